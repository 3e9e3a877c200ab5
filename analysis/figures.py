"""The pictures: how edges, gates and a training run are drawn.

In the flow pictures time runs to the right and depth upwards. A token's residual stream is a vertical line;
an edge from key position j to query position i in layer l is a line from (j, l) to (i, l + 1), because that
is where it moves information: out of stream j below layer l, into stream i above it (the paper's first
figure).

Functions take arrays and plain lists and write a PNG; nothing here runs a model, and this file imports no
other file of ours.
"""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image  # comes with matplotlib

from storage.files import replacing

HEAD_COLORS = plt.get_cmap("tab10").colors
GREY = "0.75"


def save(figure, path):
    """Write the PNG, whole or not at all, in 128 colours: a third of the size, and nobody sees the
    difference. (Pillow's default way of choosing them, median cut, can hang.)
    """
    raw = io.BytesIO()
    figure.savefig(raw, dpi=110, format="png", bbox_inches="tight")
    plt.close(figure)
    picture = Image.open(raw).convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE)
    with replacing(path) as temporary:
        picture.save(temporary, format="png", optimize=True)


def draw_streams(ax, tokens, answers, n_layer, size=11):
    """The ground of a flow picture: one vertical line per token, its name below, what the model answers
    above, in letters of that size.
    """
    T = len(tokens)
    ax.vlines(range(T), 0, n_layer, color=GREY, lw=0.6, zorder=0)
    for i, (token, answer) in enumerate(zip(tokens, answers)):
        ax.text(i, -0.18, token, ha="center", va="top", fontsize=11, family="monospace")
        ax.text(i, n_layer + 0.15, answer, ha="center", va="bottom", fontsize=size, family="monospace",
                weight="bold")
    ax.set(xlim=(-0.7, T - 0.3), ylim=(-0.75, n_layer + 0.75), xticks=[], yticks=np.arange(n_layer) + 0.5)
    ax.set_yticklabels([f"layer {layer}" for layer in range(n_layer)], fontsize=9)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def draw_edges(ax, weights):
    """One line per edge. weights (n_layer, H, T, T): its opacity, 0 where the edge is shut."""
    for layer, head, i, j in zip(*np.nonzero(weights)):
        ax.plot([j, i], [layer, layer + 1], color=HEAD_COLORS[head % 10], lw=2, solid_capstyle="round",
                alpha=float(min(1, weights[layer, head, i, j])), zorder=1)


def attention_flow(path, columns, rows):
    """The paper's first figure: the same sums through two models.

    columns  [(title, tokens)], one per prompt; rows [(label, [(weights (n_layer, H, T, T), answers)])], one
             per model
    """
    n_layer = rows[0][1][0][0].shape[0]
    size = (4.3 * len(columns), 3.5 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    for r, (label, panels) in enumerate(rows):
        for c, (weights, answers) in enumerate(panels):
            ax, (title, tokens) = axes[r, c], columns[c]
            draw_streams(ax, tokens, answers, n_layer)
            draw_edges(ax, weights)
            ax.set_title(title if r == 0 else "", fontsize=12)
            ax.set_xlabel(f"{np.count_nonzero(weights)} open edges", fontsize=9)
        axes[r, 0].set_ylabel(label, fontsize=12)
    figure.suptitle("A line runs from the token that is read to the token that reads it; its opacity is the "
                    "attention weight", fontsize=10)
    save(figure, path)


def training(path, metrics, kept_step=None, bounds=()):
    """metrics: the lines of metrics.jsonl. Loss; for a gated run also open edges and lambda.

    kept_step: of best.pt, or closest.pt; bounds: lambda's floor and cap.
    """
    gated = "lambda" in metrics[0]
    kept = next((m for m in metrics if m["step"] == kept_step and kept_step), None)
    figure, axes = plt.subplots(3 if gated else 1, 1, figsize=(7, 8 if gated else 3.4), sharex=True,
                                squeeze=False, layout="constrained")
    axes = axes[:, 0]
    draw_loss(axes[0], metrics, gated)
    if gated:
        draw_open_edges(axes[1], metrics, kept)
        draw_lambda(axes[2], metrics, bounds)
        for ax in axes[1:]:
            ax.legend(fontsize=8)
    # above the axes: every corner inside may hold a curve
    axes[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.suptitle(became(kept) if gated else "", fontsize=11)
    for ax in axes:
        logarithmic_if_wide(ax)
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    save(figure, path)


def became(kept):
    """What became of a gated run, in a headline. kept: its line of metrics.jsonl, or None."""
    if not kept:
        return "no evaluation kept yet"
    what = "target met" if kept["passes"] else "target MISSED; closest"
    return f"{what}: {kept['open']:.2f} open edges at step {kept['step']}"


def curve(ax, metrics, key, label, scale=1.0, **style):
    """A line of metrics.jsonl's `key` over the step, where it was measured."""
    points = [(m["step"], m[key] * scale) for m in metrics if m.get(key) is not None]
    if points:
        ax.plot(*zip(*points), label=label, **style)


def draw_loss(ax, metrics, gated):
    """Losses in training and on the held-out set; with their targets, if the run is gated."""
    batches = "training, gates as trained" if gated else "training"
    curve(ax, metrics, "batch_loss", f"{batches} (running mean)", color="tab:orange")
    curve(ax, metrics, "val_loss", "held out" + (", thresholds" if gated else ""), color="tab:blue")
    if gated:
        ax.axhline(metrics[0]["target_loss"], color="tab:green", ls="--", label="its target")
        curve(ax, metrics, "constraint_loss", "constraint, a batch: moves lambda", color="tab:purple", lw=0.6,
              marker=".", ms=4)
        # which comes down with the learning rate where there is a peak_slack; at step 0 nothing was measured
        curve(ax, metrics[1:] or metrics, "constraint_target", "its target", color="tab:purple", ls=":")
    ax.set(ylabel="loss (nats)")


def draw_open_edges(ax, metrics, kept):
    """Open edges, in percent: where the target was met, and which checkpoint was kept."""
    curve(ax, metrics, "fraction", "all evaluations", 100, color="tab:blue")
    passed = [(m["step"], 100 * m["fraction"]) for m in metrics if m["passes"]]
    ax.plot(*zip(*passed) if passed else ([], []), "o", ms=4, color="tab:green", label="meets the target")
    if kept:
        what, color = ("kept", "tab:red") if kept["passes"] else ("target missed; closest", "tab:orange")
        ax.plot(kept["step"], 100 * kept["fraction"], "*", ms=14, color=color,
                label=f"{what}: step {kept['step']}, {kept['open']:.2f} edges")
    ax.set(ylabel="open edges (%)")


def draw_lambda(ax, metrics, bounds):
    """Lambda between its floor and its cap."""
    curve(ax, metrics, "lambda", "lambda", color="tab:purple")
    for bound, label in zip(bounds, ("floor", "cap")):
        ax.axhline(bound, color=GREY, lw=1, ls="--", label=label)
    ax.set(ylabel="lambda")


def logarithmic_if_wide(ax):
    """A logarithmic axis where there are decades to show."""
    low, high = ax.dataLim.intervaly
    if low > 0 and high > 10 * low:
        ax.set_yscale("log")
        labelled = (1, 2, 5) if high < 100 * low else (1,)
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=labelled))
        ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))


def open_by_head(path, per_head):
    """Open fraction by layer and head.

    per_head [n_layer][H], from 0 to 1; the colour is logarithmic, a head that is off is white.
    """
    fractions = np.array(per_head)
    n_layer, H = fractions.shape
    figure, ax = plt.subplots(figsize=(2.8 + 0.75 * H, 1.4 + 0.5 * n_layer), layout="constrained")
    image = ax.imshow(np.ma.masked_equal(fractions, 0), cmap="viridis_r", aspect="auto", origin="lower",
                      norm=matplotlib.colors.LogNorm(vmin=1e-4, vmax=1))
    for layer in range(n_layer):
        for head in range(H):
            value = fractions[layer, head]
            words = "off" if value == 0 else f"{100 * value:.3g} %"
            color = "white" if value > 0.05 else "black"
            ax.text(head, layer, words, ha="center", va="center", fontsize=8, color=color)
    ax.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(n_layer), title="open edges")
    figure.colorbar(image, ax=ax, format=lambda value, _: f"{100 * value:g} %").ax.tick_params(labelsize=8)
    save(figure, path)


def open_by_distance(path, by_distance, open_edges):
    """How far back the open edges reach.

    by_distance [T]: open fraction of the edges that reach so many positions back; open_edges: mean number a
    sequence.
    """
    fractions = np.array(by_distance)
    T = len(fractions)
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    ax.plot(np.arange(T) + 1, 100 * np.ma.masked_equal(fractions, 0), ".-", ms=5 if T < 64 else 2,
            color="tab:blue", label="sparse model")
    ax.axhline(100, color="tab:orange", ls="--", label="dense model: every edge")
    share = fractions * (T - np.arange(T))
    half = int(np.searchsorted(np.cumsum(share), share.sum() / 2)) if share.sum() else 0
    ax.axvline(half + 1, color=GREY, lw=1)
    words = f" half of a sequence's {open_edges:.0f} open edges \n reach {half} or fewer back "
    is_far = half + 1 > math.sqrt(T)  # right of the middle: the axis is logarithmic
    ax.text(half + 1, 0.97, words, fontsize=8, va="top", ha="right" if is_far else "left",
            transform=ax.get_xaxis_transform())
    ticks = [t for t in (0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023) if t < T]
    lowest = 100 * fractions[fractions > 0].min(initial=1)
    ax.set(xscale="log", yscale="log", ylim=(min(0.9 * lowest, 50), 1000),
           xlabel="positions back (0: a token reads itself)", ylabel="open edges (%)",
           title="How far back do the edges reach?")
    ax.set_xticks([t + 1 for t in ticks], [str(t) for t in ticks])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    ax.legend(fontsize=8, loc="lower left")
    ax.grid(alpha=0.3)
    save(figure, path)


def gallery(path, titles, tokens, rows, what="The busiest heads of the sparse model on one held-out snippet"):
    """Attention maps of a few heads on one snippet; what: says which.

    titles: one per head; tokens: T strings; rows [(label, [weights (T, T), one per head])].
    """
    T, columns = len(tokens), max(1, len(titles))
    tokens = [token.replace(" ", "·").replace("$", r"\$") for token in tokens]  # $ would begin a formula
    rotation = 90 if max(map(len, tokens)) > 1 else 0
    figure, axes = plt.subplots(len(rows), columns, figsize=(4.2 * columns, 4.4 * len(rows)), squeeze=False,
                                layout="constrained")
    for r, (label, maps) in enumerate(rows):
        for c, weights in enumerate(maps):
            ax = axes[r, c]
            ax.imshow(np.ma.masked_equal(weights, 0), cmap="Blues",
                      norm=matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1))
            ax.set_xticks(range(T), tokens, fontsize=7, family="monospace", rotation=rotation)
            ax.set_yticks(range(T), tokens, fontsize=7, family="monospace")
            ax.tick_params(length=0, pad=1)
            ax.set_title(titles[c] if r == 0 else "", fontsize=9)
        axes[r, 0].set_ylabel(f"{label}\nthe token that reads", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("the token that is read", fontsize=9)
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.96))
    figure.suptitle(f"{what}; white: nothing is read (sparse: the edge is shut). Darker: more attention, "
                    "square-root scale", fontsize=11, y=0.99)
    save(figure, path)
