"""Operand plots: on which sums a feature fires. One dot for each a + b, 0 to 99, as in Anthropic's figures.

A diagonal is a condition on a + b, a stripe one on a or on b alone, what repeats ten by ten one on the units.
"""

import math

import matplotlib.pyplot as plt

from analysis.figures import save

COLUMNS = 3


def operand_plots(path, titles, grids):
    """Write one picture of all grids, each (100, 100): a downwards, b to the right."""
    rows = math.ceil(len(grids) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(3.4 * COLUMNS, 3.6 * rows), squeeze=False)
    for ax in axes.flat[len(grids):]:
        ax.set_visible(False)
    for ax, title, grid in zip(axes.flat, titles, grids):
        ax.imshow(grid, cmap="magma", interpolation="nearest", vmin=0, origin="upper")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=range(0, 100, 20), yticks=range(0, 100, 20), xlabel="b", ylabel="a")
        ax.tick_params(labelsize=7)
    figure.tight_layout()
    save(figure, path)
