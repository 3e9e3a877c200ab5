"""The pictures of circuits: when every edge opens, how much of a model a task needs, the circuit as a
graph, and on which sums a feature fires.

Functions take plain lists and write a PNG, as those of figures.py, whose ground they draw on.
"""

import math

import matplotlib
import numpy as np

from analysis.figures import GREY, HEAD_COLORS, draw_edges, draw_streams, plt, save

PLOTS_IN_A_ROW = 3  # of operand plots


def explanation(path, tokens, n_layer, edges, title):
    """Every edge that ever opens, numbered, beside what is known about it.

    edges: a list of dicts with layer, head, query, key, share (of prompts on which it is open, 0 to 1) and
    text (its line). At its end unions of edges, which have no layer: of these the text alone.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, max(4.2, 0.5 * len(edges) + 1.4)),
                                         width_ratios=[6, 7], layout="constrained")
    draw_streams(left, tokens, [""] * len(tokens), n_layer)
    right.axis("off")
    right.set(xlim=(0, 1), ylim=(len(edges) + 0.5, -0.5))
    for number, edge in enumerate(edges, 1):
        start = f"{number:2d}" if "layer" in edge else "  "
        right.text(0, number - 0.5, f"{start}  {edge['text']}", fontsize=8.5, family="monospace", va="center")
        if "layer" not in edge:
            continue
        always = edge["share"] == 1
        x, y = [edge["key"], edge["query"]], [edge["layer"], edge["layer"] + 1]
        left.plot(x, y, color=HEAD_COLORS[edge["head"] % 10], lw=0.8 + 1.4 * edge["share"],
                  ls="-" if always else (0, (4, 1.5)), zorder=1)
        at = (0.3, 0.5, 0.7)[number % 3]  # numbers of neighbouring edges at different heights
        left.text(x[0] + at * (x[1] - x[0]), y[0] + at, number, fontsize=9, ha="center", va="center",
                  zorder=2, bbox=dict(boxstyle="circle,pad=0.15", fc="white", ec=GREY))
    left.set_title("solid: open on every sum; dashed: on some", fontsize=10)
    figure.suptitle(title, fontsize=12)
    save(figure, path)


MODEL_COLORS = {"dense": "tab:gray", "sparse": "tab:red"}


def circuit_curves(path, task, result):
    """How much of the effect a circuit carries, against its size, dense and sparse in one axis.

    Above attention edges, cut in two ways; below component edges and heads. result: compare.py's dict.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for ax, (ablation, found) in zip(axes[0], result["attention_edges"].items()):
        instead = "cut" if ablation == "zero" else "as in the corrupted run"
        ax.set(xlabel=f"attention edges kept, the others {instead}", ylabel="share of the effect")
        if "dense" not in found:
            continue  # no prompt that both know
        for model, color in MODEL_COLORS.items():
            curve = found[model]["curve"]
            band(ax, curve["kept"], curve["share"], curve["low"], curve["high"], color, model)
        ax.axhspan(0.9, 1.1, color=GREY, alpha=0.12, lw=0)
        sizes = [found[model]["within"]["0.9"]["median"] for model in MODEL_COLORS]
        arrow(ax, *sizes, (sizes[0] * sizes[1]) ** 0.5)
        in_logarithms(ax)
    for ax, by, what in ((axes[1][0], "by_edges", "component edges"), (axes[1][1], "by_heads", "heads")):
        for model, color in MODEL_COLORS.items():
            curve = result[model][by]
            band(ax, curve["n"], curve["explained"], curve["low"], curve["high"], color, model)
        ax.axhline(0.9, color=GREY, lw=0.8, ls=":", zorder=0)
        sizes = [result[model][by]["needed"]["0.9"] for model in MODEL_COLORS]
        if all(sizes):
            middle = (sizes[0] * sizes[1]) ** 0.5 if by == "by_edges" else sum(sizes) / 2
            arrow(ax, *sizes, middle)
        ax.set(xlabel=f"{what} kept, the others as in the corrupted run", ylabel="explained effect")
    in_logarithms(axes[1][0])
    axes[1][1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for ax in axes.flat:
        ax.set_ylim(-0.25, 1.6 if ax in axes[0] else 1.25)
        ax.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, loc="upper left")
    figure.suptitle(f"{task}: how much of the model does it need? Above: the median prompt, bands are "
                    "quartiles. Below: all prompts together, 95 %", fontsize=11)
    save(figure, path)


def prompt_circuits(path, pieces, rows, title):
    """The circuit of one prompt, token by token: layers go upwards, an edge from what is read to what reads.

    pieces: the tokens; rows: [(model, weights (n_layer, H, T, T), 0 where an edge is not of the circuit)]
    """
    n_layer = rows[0][1].shape[0]
    width = max(4.0, 0.32 * len(pieces) + 1)
    figure, axes = plt.subplots(len(rows), 1, figsize=(width, 3.2 * len(rows)), layout="constrained")
    for ax, (model, weights) in zip(axes, rows):
        draw_streams(ax, pieces, [""] * len(pieces), n_layer)
        draw_edges(ax, weights)
        ax.set_title(f"{model}: {np.count_nonzero(weights)} attention edges", fontsize=10)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def band(ax, x, y, low, high, color, label):
    """A curve with its band, left away where it is None."""
    ax.plot(x, y, "o-", color=color, ms=3, lw=1.5, label=label)
    ax.fill_between(x, *np.array([low, high], dtype=float), color=color, alpha=0.15, lw=0)


def arrow(ax, dense, sparse, middle):
    """An arrow from the dense to the sparse model's size at 90 %, and how many times fewer that is."""
    ax.annotate("", (sparse, 0.9), (dense, 0.9), arrowprops={"arrowstyle": "->", "color": "black"})
    times = dense / sparse
    words = f"{times:.1f}x fewer" if times >= 1 else f"{1 / times:.1f}x more"
    ax.text(middle, 1.14, words, ha="center", va="bottom", fontsize=9)
    ax.plot([middle, middle], [0.9, 1.13], color="black", lw=0.5)


def in_logarithms(ax):
    """A logarithmic axis of counts, with plain numbers."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda n, _: f"{n:.0f}" if n < 1000 else f"{n / 1000:.0f}k")
    ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def circuit_graph(path, names, n_head, edges, title, most=60):
    """A circuit as a layered graph, the embedding below, the output above.

    names of components in the order of writers, the output last; edges [(from, to, part, score)], part being
    q, k, v or ''. Only the strongest `most` are drawn, and the title says so.
    """
    shown = sorted(edges, key=lambda edge: -abs(edge[3]))[:most]
    output, rows = len(names) - 1, {}
    for node in sorted({end for edge in shown for end in edge[:2]}):
        layer, place = divmod(node - 1, n_head + 1)  # embedding; per layer heads, then the MLP; output
        height = -1.0 if node == 0 else 1e9 if node == output else layer + 0.5 * (place == n_head)
        rows.setdefault(height, []).append(node)
    position, widest = {}, max(2.0, max(map(len, rows.values())) / 2)
    for height, key in enumerate(sorted(rows)):
        for i, node in enumerate(rows[key]):
            # MLPs stand on the right, so that edges past them stay visible
            aside = 0 < node < output and (node - 1) % (n_head + 1) == n_head
            position[node] = (widest if aside else ((i + 0.5) / len(rows[key]) - 0.5) * 2 * widest), height
    figure, ax = plt.subplots(figsize=(3 + 2.1 * widest, max(3.5, 0.9 * len(rows))), layout="constrained")
    colors = {"q": "tab:blue", "k": "tab:green", "v": "tab:red", "": "0.4"}
    largest = max(abs(edge[3]) for edge in shown)
    for start, end, part, score in shown:
        (x0, y0), (x1, y1) = position[start], position[end]
        bend = 0.0 if abs(x1 - x0) > 0.1 or y1 - y0 < 1.5 else 0.2
        ax.annotate("", (x1, y1 - 0.14), (x0, y0 + 0.14), arrowprops={
            "arrowstyle": "-|>", "color": colors[part], "lw": 0.8 + 3 * abs(score) / largest, "alpha": 0.75,
            "shrinkA": 0, "shrinkB": 0, "connectionstyle": f"arc3,rad={bend}"})
    for node, (x, y) in position.items():
        ax.text(x, y, names[node], ha="center", va="center", fontsize=9,
                bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "0.5"}, zorder=3)
    for part, color in colors.items():
        words = f"read as {part}" if part else "read by an MLP or the output"
        ax.plot([], [], color=color, lw=2, label=words)
    ax.plot([], [], " ", label="thicker: larger |score|")
    ax.set(xlim=(-widest - 0.1, widest + 0.6), ylim=(-0.5, len(rows) - 0.5))
    ax.axis("off")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    some = f"; the strongest {most} of {len(edges)} are drawn" if len(edges) > most else ""
    ax.set_title(title + some, fontsize=10)
    save(figure, path)


def operand_plots(path, titles, grids):
    """Write one picture of all grids, each (100, 100): a downwards, b to the right.

    A diagonal is a condition on a + b, a stripe one on a or on b alone, what repeats ten by ten one on the
    units.
    """
    rows = math.ceil(len(grids) / PLOTS_IN_A_ROW)
    size = (3.4 * PLOTS_IN_A_ROW, 3.6 * rows)
    figure, axes = plt.subplots(rows, PLOTS_IN_A_ROW, figsize=size, squeeze=False)
    for ax in axes.flat[len(grids):]:
        ax.set_visible(False)
    for ax, title, grid in zip(axes.flat, titles, grids):
        ax.imshow(grid, cmap="magma", interpolation="nearest", vmin=0, origin="upper")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=range(0, 100, 20), yticks=range(0, 100, 20), xlabel="b", ylabel="a")
        ax.tick_params(labelsize=7)
    figure.tight_layout()
    save(figure, path)
