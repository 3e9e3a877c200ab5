"""One sum through an addition model: its answer, the edges that opened, what changes when one is cut.

    python analyze.py ask out/addition 36+28
    python analyze.py ask out/addition 36+28 --shut=1.s2.s4     layer 1's edge from s4 to s2 is cut
    python analyze.py ask out/addition 36+28 --shut=1.0.s2.s4   with several heads: layer.head.query.key

--shut may be given several times.

An edge's weight is what it multiplies the value with that it brings,

    weight_ij = A_ij softmax_j(a_i.)_j       (gate.py; 0 where the edge is shut)

Notable:
- To cut an edge is an intervention, not a correlation: if the answer changes, it did because of this edge.
- A cut edge changes what later layers read, and so which of their edges open: those are listed too.
- A dense model has no gates: every edge is open, and only the strongest are listed.
"""

import re
from typing import NamedTuple

import numpy as np
import torch

from analysis.explain import edge_name, read_addition_run
from storage.addition import ADDITION_TOKENS, addition_rows, token_names
from storage.files import UserError, typed

MOST_DENSE = 10  # edges that are listed of a dense model
MOST_SPARSE = 60  # and of a gated one


class Answer(NamedTuple):
    """What a model makes of one sum."""

    digits: str  # the answer positions, the highest place first: '00064'
    weights: np.ndarray  # (n_layer, H, T, T), query by key: attention weight, 0 where the edge is shut
    open: np.ndarray  # (n_layer, H, T, T) bool


def parse_sum(question, task, example="python analyze.py ask out/addition"):
    """`36+28` -> (36, 28). Raises UserError if it is no sum, or a number has too many digits."""
    most = 10**task.digits - 1
    hint = f"Type two numbers from 0 to {most}, for instance: {example} {most // 3}+{most // 2}"
    found = re.fullmatch(r"([0-9]+)\+([0-9]+)=?", "".join(question.split()))
    if not found:
        what = f"{question!r} is not a sum" if question else "there is no sum to ask for"
        raise UserError(f"{what}. {hint}")
    a, b = int(found[1]), int(found[2])
    if max(a, b) > most:
        raise UserError(f"{max(a, b)} is too large for this model. {hint}")
    return a, b


def parse_edge(words, config, task, option="--shut"):
    """`1.s2.s4` (layer.query.key) or `1.0.s2.s4` (layer.head.query.key) -> (layer, head, query, key).

    config: the model's; option: that had the words. Raises UserError if the model has no such edge.
    """
    names = token_names(task)
    first, last = names[-1], names[0]
    form, example = f"layer.query.key, such as {option}=0.{first}.{last}", f"{option}={words}"
    if config.n_head > 1:
        form = f"layer.head.query.key, such as {option}=0.0.{first}.{last}"
    parts = words.split(".")
    if config.n_head == 1 and len(parts) == 3:
        parts.insert(1, "0")
    if len(parts) != 4:
        raise UserError(f"{example} names no edge: write {form}")
    layer, head = (number_below(part, count, example, what) for part, count, what in
                   ((parts[0], config.n_layer, "layers"), (parts[1], config.n_head, "heads")))
    for name in parts[2:]:
        if name not in names:
            raise UserError(f"{example}: no position is called {name!r}, there are {' '.join(names)}")
    query, key = names.index(parts[2]), names.index(parts[3])
    if key > query:
        raise UserError(f"{example}: {parts[2]} cannot read {parts[3]}, which comes after it")
    return layer, head, query, key


def number_below(words, count, example, what):
    """The number in words, if it is one of the model's `count` layers or heads, else UserError."""
    if not words.isdecimal() or int(words) >= count:
        raise UserError(f"{example}: the model's {what} are 0 to {count - 1}, {words!r} is none of them")
    return int(words)


@torch.inference_mode()
def run_sum(model, task, a, b, shut=()):
    """The sum a + b through the model -> Answer. shut: edges (layer, head, query, key) to cut."""
    config, device = model.config, next(model.parameters()).device
    shape = (config.n_layer, config.n_head, task.length, task.length)
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    for edge in shut:
        keep[edge] = False
    opens, weights = [], []

    def remember(layer, gates):
        opens.append(gates.open[0].bool().cpu().numpy())
        weights.append(gates.weights[0].float().cpu().numpy())

    question = torch.from_numpy(addition_rows([a], [b], *task)[:, 0].astype(np.int64)).to(device)
    logits, _, _ = model(question, keep=keep, record=remember)
    digits = [ADDITION_TOKENS[token] for token in logits[0, task.first:].argmax(-1).tolist()]
    return Answer("".join(digits), np.stack(weights), np.stack(opens))


def edge_line(edge, weight, task, n_head):
    """`layer 1  s2 reads s4  0.97`."""
    named = dict(zip(("layer", "head", "query", "key"), edge))
    return f"  {edge_name(named, task, n_head):26} {weight:5.2f}"


def verdict(digits, expected):
    """Is the answer right?"""
    return "right" if digits == expected else f"wrong, {expected} is right"


def changes(before, after, task):
    """Which digits of the answer changed, in words."""
    names = token_names(task)[task.first:]
    changed = [f"{name} {old} -> {new}" for name, old, new in zip(names, before, after) if old != new]
    return "changed: " + ", ".join(changed) if changed else "no digit changed"


def ask(model, task, a, b, shut=()):
    """What there is to say of a + b, a list of lines. shut: edges (layer, head, query, key) to cut."""
    config = model.config
    expected = f"{a + b:0{task.answers}d}"
    before = run_sum(model, task, a, b)
    lines = [f"{a}+{b} = {before.digits}, {verdict(before.digits, expected)}"]

    edges = [tuple(edge) for edge in np.argwhere(before.open).tolist()]  # in the order of layers
    total = config.n_layer * config.n_head * task.length * (task.length + 1) // 2
    if config.gated:
        lines.append(f"{len(edges)} of {total} edges opened; beside each its attention weight")
    else:
        lines.append(f"dense: all {total} edges are open; beside each its attention weight")
    most = MOST_SPARSE if config.gated else MOST_DENSE
    if len(edges) > most:
        edges = sorted(edges, key=lambda edge: -before.weights[edge])[:most]
        lines[-1] += f", the strongest {most}"
    lines += [edge_line(edge, before.weights[edge], task, config.n_head) for edge in edges]
    if not shut:
        return lines

    after = run_sum(model, task, a, b, shut)
    lines.append("")
    for edge in shut:
        was_open = "" if before.open[edge] else "  (it was shut anyway)"
        lines.append(f"cut:{edge_line(edge, before.weights[edge], task, config.n_head)}{was_open}")
    lines.append(f"before: {before.digits}, {verdict(before.digits, expected)}")
    changed = changes(before.digits, after.digits, task)
    lines.append(f"after:  {after.digits}, {verdict(after.digits, expected)}; {changed}")
    flipped = [tuple(edge) for edge in np.argwhere(before.open != after.open).tolist()]
    flipped = [edge for edge in flipped if edge not in shut]
    for edge in flipped:
        what = "opened" if after.open[edge] else "shut"
        weight = max(before.weights[edge], after.weights[edge])
        lines.append(f"{edge_line(edge, weight, task, config.n_head)}  {what} because of it")
    if config.gated and not flipped:
        lines.append("no other edge opened or shut because of it")
    return lines


def add_arguments(parser):
    parser.add_argument("run", metavar="RUN", help="a run on addition, such as out/addition")
    parser.add_argument("sum", nargs="*", help="such as 36+28")
    parser.add_argument("--shut", action="append", default=[], metavar="LAYER.QUERY.KEY",
                        help="cut this edge; may be given several times")


def run(options, settings):
    """`analyze.py ask`."""
    folder = options.run.rstrip("/")
    model, _, task = read_addition_run(folder)
    a, b = parse_sum("".join(options.sum), task, typed("python", "analyze.py", "ask", folder))
    shut = [parse_edge(words, model.config, task) for words in options.shut]
    print("\n".join(ask(model, task, a, b, shut)))
