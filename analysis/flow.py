"""Edges going out: the attention edges that are open while a model learns to add, evaluation by evaluation.

    out/<run>/edges.jsonl   one line an evaluation: which edges are open, in what share of the held-out sums
    out/<run>/flow.png      the one that is kept
    out/<run>/flow.gif      all of them, up to the one that is kept

As in figures.py time runs to the right and depth upwards: an edge from key j to query i in layer l is a line
from (j, l) to (i, l + 1). Here it stands for all held-out sums at once, and its darkness is the share of sums
in which it is open.

Notable:
- Drawn by Pillow alone, in some 20 ms a frame.
- Drawn at twice the size and scaled down: that makes smooth lines out of Pillow's jagged ones.
- Frames of steps after the one that a killed run goes on from are dropped, so that a run that was killed has
  the same film.
"""

import functools
import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont  # comes with matplotlib

from storage.addition import token_names
from storage.files import write_whole
from training.folder import read_metrics

# matplotlib's tab10, as in analysis/figures.py
HEAD_COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
               (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207))
BLACK, GREY, PALE = (20, 20, 20), (120, 120, 120), (222, 222, 222)
FAINTEST = 0.12  # an edge that is open in a single sum can still be seen

SMOOTH = 2  # drawn so many times as large as shown
COLUMN, LEFT, RIGHT, TOP, BOTTOM = 48, 76, 24, 84, 90  # pixels: a token's width, and the margins
HEIGHT, LOWEST = 280, 28  # pixels: of all layers together, and of one layer at least

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


def film(folder, task, config, max_steps):
    """Draw flow.png and flow.gif of a run from its edges.jsonl; nothing if it has none.

    task: an AdditionTask; config: the model's; max_steps: of the run.
    """
    path = os.path.join(folder, "edges.jsonl")
    frames = read_metrics(path) if os.path.exists(path) else []
    if not frames:
        return
    frames = frames[:kept_frame(frames) + 1]
    canvas = Canvas(task, config.n_layer, config.n_head, max_steps)
    shown = np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int)
    pictures = [canvas.draw(frames[i]) for i in shown[:-1]] + [canvas.draw(frames[-1], is_kept=True)]
    save_picture(os.path.join(folder, "flow.png"), pictures[-1])
    write_whole(os.path.join(folder, "flow.gif"), animation(pictures, palette_of(config.n_head)))


# ------------------------------------------------------------------------------------------------------------
# Drawing


class Canvas:
    """Draws the frames of one run: everything but the edges and the caption is the same in all of them."""

    def __init__(self, task, n_layer, n_head, max_steps):
        self.task, self.n_layer, self.n_head, self.max_steps = task, n_layer, n_head, max_steps
        self.row = max(LOWEST, HEIGHT // n_layer)
        self.width = LEFT + COLUMN * (task.length - 1) + RIGHT + COLUMN // 2
        self.height = TOP + self.row * n_layer + BOTTOM

    def x(self, position):
        return LEFT + COLUMN * position

    def y(self, depth):
        """depth: 0 below the first layer, n_layer above the last."""
        return TOP + self.row * (self.n_layer - depth)

    def text(self, pen, x, y, words, size=13, color=BLACK, anchor="mm"):
        """Write words; anchor: Pillow's, mm is centred."""
        pen.text((x * SMOOTH, y * SMOOTH), words, color, font(size * SMOOTH), anchor)

    def line(self, pen, x0, y0, x1, y1, color, width):
        pen.line([v * SMOOTH for v in (x0, y0, x1, y1)], color, round(width * SMOOTH))

    def edge(self, pen, layer, query, key, color, width):
        """A line from what is read, below the layer, to a dot at what reads it, above the layer."""
        x, y, radius = self.x(query), self.y(layer + 1), 1 + width
        self.line(pen, self.x(key), self.y(layer), x, y, color, width)
        pen.ellipse([v * SMOOTH for v in (x - radius, y - radius, x + radius, y + radius)], color)

    @functools.cached_property
    def ground(self):
        """The picture without edges: a vertical line per token, names below, places of the answer above."""
        image = Image.new("RGB", (self.width * SMOOTH, self.height * SMOOTH), "white")
        pen, task = ImageDraw.Draw(image), self.task
        for position, name in enumerate(token_names(task)):
            self.line(pen, self.x(position), self.y(0), self.x(position), self.y(self.n_layer), PALE, 1)
            self.text(pen, self.x(position), self.y(0) + 15, name, 15)
        for layer in range(self.n_layer):
            self.text(pen, 12, self.y(layer + 0.5), f"layer {layer}", 12, GREY, "lm")
        middles = (
            ((task.digits - 1) / 2, "first number"),
            (task.digits + (task.digits + 1) / 2, "second number"),
            (task.first + (task.answers - 1) / 2, "answer"),
        )
        for position, words in middles:
            self.text(pen, self.x(position), self.y(0) + 37, words, 12, GREY)
        for place in range(task.answers):
            self.text(
                pen, self.x(task.length - 1 - place), self.y(self.n_layer) - 12, f"{10**place}s", 12, GREY
            )
        legend = (
            "A line: the token at its dot reads the token at its other end. "
            "The darker, the more sums in which it is open."
        )
        self.text(pen, self.width / 2, self.height - 14, legend, 11 if task.length >= 11 else 9, GREY)
        self.draw_heads(pen)
        return image

    def draw_heads(self, pen):
        """Which colour is which head, where there are several."""
        if self.n_head == 1:
            return
        for head in range(min(self.n_head, len(HEAD_COLORS))):
            self.text(pen, LEFT + 62 * head, self.height - 34, f"head {head}", 12, HEAD_COLORS[head], "lm")

    def draw(self, frame, is_kept=False):
        """A frame as an RGB image, (height, width).

        frame: a line of edges.jsonl; is_kept: the film's last, whose model is kept.
        """
        image = self.ground.copy()
        pen = ImageDraw.Draw(image)
        # the darkest on top
        for layer, head, query, key, share in sorted(frame["edges"], key=lambda edge: edge[-1]):
            color = HEAD_COLORS[head % len(HEAD_COLORS)]
            self.edge(pen, layer, query, key, faded(color, share), 1.2 + 1.3 * share)
        for line, (words, size) in enumerate(zip(caption(frame, self.max_steps, is_kept), (17, 13))):
            self.text(pen, 12, 20 + 24 * line, words, size, anchor="lm")
        return image.resize((self.width, self.height), Image.Resampling.LANCZOS)


@functools.cache
def font(size):
    """Pillow's own font, at so many pixels."""
    return ImageFont.load_default(size)


def faded(color, share):
    """color over white, as opaque as an edge's share of sums, from 0 to 1."""
    opacity = FAINTEST + (1 - FAINTEST) * share
    return tuple(round(255 + (part - 255) * opacity) for part in color)


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


# ------------------------------------------------------------------------------------------------------------
# Files


def save_picture(path, image):
    """Write an image as a PNG in 64 colours, whole or not at all."""
    content = io.BytesIO()
    image.quantize(64, method=Image.Quantize.FASTOCTREE).save(content, "png", optimize=True)
    write_whole(path, content.getvalue())


def palette_of(n_head):
    """The colours of all frames of a film, as an image for `quantize`: greys, and every head's colour in four
    shades.
    """
    greys = [(level,) * 3 for level in (255, 222, 180, 120, 70, 20)]
    shades = [faded(color, share) for color in HEAD_COLORS[:n_head] for share in (1, 0.66, 0.33, 0)]
    image = Image.new("P", (1, 1))
    image.putpalette([part for color in greys + shades for part in color])
    return image


def animation(pictures, palette):
    """Images of one size as the bytes of a GIF that repeats for ever.

    As sharp as MOST_BYTES allow: smaller, and at last with fewer frames.
    """
    for scale in (1, 0.85, 0.7, 0.55):
        size = [round(side * scale) for side in pictures[0].size]
        scaled = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
        frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in scaled]
        durations = [FIRST, *[FRAME] * (len(frames) - 2), LAST][-len(frames):]
        content = io.BytesIO()
        frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
        if content.tell() <= MOST_BYTES or len(frames) == 1:
            return content.getvalue()
    return animation([*pictures[:-1:2], pictures[-1]], palette)
