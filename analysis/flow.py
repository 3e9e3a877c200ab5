"""Edges going out: the attention edges that are open while a model learns to add, evaluation by evaluation.

    out/<run>/edges.jsonl   one line an evaluation: which edges are open, in what share of the held-out sums
    out/<run>/flow.gif      all of them, up to the one that is kept

Drawn as in figures.py, but an edge stands here for all held-out sums at once, and its opacity is the share of
sums in which it is open.

Notable: frames of steps after the one that a killed run goes on from are dropped, so that a run that was
killed has the same film.
"""

import io
import os

import numpy as np
from matplotlib.collections import LineCollection
from PIL import Image  # comes with matplotlib

from analysis.figures import HEAD_COLORS, draw_streams, plt
from storage.addition import token_names
from storage.files import write_whole
from training.folder import read_metrics

FAINTEST = 0.12  # an edge that is open in a single sum can still be seen
MOST_FRAMES = 36
MOST_BYTES = 300_000  # of flow.gif, so that it fits into a README
FRAME, FIRST, LAST = 200, 1000, 4000  # milliseconds that a frame stands


def kept_frame(frames):
    """The place in `frames` of the evaluation whose model the run is known by: the last that became best.pt,
    else closest.pt, else the last of all.
    """
    for name in ("best", "closest"):
        places = [i for i, frame in enumerate(frames) if frame["kept"] == name]
        if places:
            return places[-1]
    return len(frames) - 1


def film(folder, task, n_layer, max_steps):
    """Draw flow.gif of a run from its edges.jsonl; nothing if it has none. task: an AdditionTask."""
    path = os.path.join(folder, "edges.jsonl")
    frames = read_metrics(path) if os.path.exists(path) else []
    if not frames:
        return
    frames = frames[:kept_frame(frames) + 1]
    shown = np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int)
    figure, ax = plt.subplots(figsize=(0.48 * task.length + 1.2, 4.4), dpi=76, layout="constrained")
    places = [""] * task.first + [f"{10**place}s" for place in reversed(range(task.answers))]
    draw_streams(ax, token_names(task), places, n_layer, size=9)
    ax.set_xlabel("A line runs from the token that is read to the token that reads it.\n"
                  "The darker, the more sums in which it is open.", fontsize=8, color="0.4")
    ax.set_title("\n", fontsize=9.5)  # room for the caption
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the same in all frames
    pictures = [picture_of(figure, ax, frames[i], max_steps, is_kept=i == len(frames) - 1) for i in shown]
    plt.close(figure)
    write_whole(os.path.join(folder, "flow.gif"), animation(pictures))


def picture_of(figure, ax, frame, max_steps, is_kept=False):
    """A frame, a line of edges.jsonl, as an image. is_kept: the film's last, whose model is kept."""
    edges = sorted(frame["edges"], key=lambda edge: edge[-1])  # the darkest on top
    lines = LineCollection([[(key, layer), (query, layer + 1)] for layer, _, query, key, _ in edges],
                           colors=[(*HEAD_COLORS[head % 10], FAINTEST + (1 - FAINTEST) * share)
                                   for _, head, *_, share in edges],
                           linewidths=[1.2 + 1.3 * share for *_, share in edges], capstyle="round")
    ax.add_collection(lines, autolim=False)
    ax.set_title("\n".join(caption(frame, max_steps, is_kept)), fontsize=9.5, loc="left")
    figure.canvas.draw()
    lines.remove()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def caption(frame, max_steps, is_kept):
    """Two lines on top of a frame: where the run stands, and how good the model is."""
    edges = f"{frame['open']:.1f} of {frame['total']} attention edges open"
    where = f"step {frame['step']:,} of {max_steps:,}"
    if is_kept:
        what = {"best": "kept", "closest": "target missed, closest"}.get(frame["kept"], "last")
        where = f"{what}: step {frame['step']:,}"
    sums = "held-out sums" if frame["held_out_only"] else "sums"
    right = f"{frame['correct']:,} of {frame['examples']:,} {sums} right"
    target = "meets its target" if frame["passes"] else "misses its target"
    return f"{where},  {edges}", f"{right}, {target};  lambda {frame['lambda']:.2f}"


def animation(pictures):
    """Images of one size as the bytes of a GIF that repeats for ever, with as many frames as MOST_BYTES
    allow.
    """
    palette = pictures[0].quantize(24, dither=Image.Dither.NONE)  # most edges are open: all colours
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [FIRST, *[FRAME] * (len(frames) - 2), LAST][-len(frames):]
    content = io.BytesIO()
    frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    if content.tell() <= MOST_BYTES or len(frames) == 1:
        return content.getvalue()
    fit = max(1, len(pictures) * MOST_BYTES // content.tell())
    return animation([pictures[i] for i in np.linspace(len(pictures) - 1, 0, fit).astype(int)[::-1]])
