"""When does an edge open? Each edge of an addition model described in words, by counting over many sums.

    python analyze.py explain out/addition                       all sums
    python analyze.py explain out/addition 36+28                 one: its answer, and the edges that opened
    python analyze.py explain out/addition 36+28 --shut=2.s1.=   layer 2's edge from `=` to s1 is cut
    python analyze.py explain out/addition 36+28 --shut=2.0.s1.= with several heads: layer.head.query.key

With digits a1 a0 + b1 b0, an edge that is open on some sums and shut on others computes a predicate of the
digits. We look for it in a library of readable conditions: the one that agrees with the gate on most sums,

    agreement = share of sums on which (condition holds) = (edge is open),

next to the baseline, the agreement of the better constant guess ("always" or "never"). What an edge is for is
measured by shutting it, it alone, on every sum, and counting which answer digits go wrong (an ablation).

Several layers or heads may share one task: s1 reads the `=` in layer 2 on some sums that carry, in layer 3 on
the others, and neither fits a condition. So edges with one query and one key are also taken as one, their
union: open where any of them is, shut all at once.

The library is in conditions.py. This goes further than the paper, which shows the carry edge on three
examples (its first figure): found by counting, not by eye. All 10,000 sums of two digits are counted; of one
or three digits, those of the dataset. Notable: a shut edge may have a twin that opens instead: gates are
computed from queries and keys, which change with what was read.
"""

import os
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from analysis import circuit_figures
from analysis.conditions import PLACES, carry_words, conditions, describe
from analysis.questions import parse_edge, parse_sum
from models.checkpoint import model_of, read_checkpoint
from models.sources import checkpoint_named, folder_of_answers
from storage.addition import ADDITION_TOKENS, addition_pairs, addition_rows, addition_task, token_names
from storage.files import UserError, draw_or_say, typed, write_json

MOST_EDGES = 60  # that ever open: more are no circuit to read, and each costs a pass over all sums
MOST_DENSE = 10  # edges that are listed of a dense model and one sum, the strongest
CHUNK = 500  # sums that go through the model at once


def population(data, task):
    """The sums to count on, a (N,) and b (N,): all 10,000 of two digits, else the dataset's."""
    if task.digits == 2:
        return np.divmod(np.arange(10_000), 100)
    return addition_pairs(np.concatenate([data.train, data.val]), task.digits)


@torch.inference_mode()
def run_sums(model, task, a, b, keep=None):
    """The sums a + b, both (N,), through the model.

    keep: as in GPT.forward. Returns right (N, answers) bool, which answer digits are right; and is_open
    (n_layer, H, T, T, N) bool.
    """
    rows = torch.from_numpy(addition_rows(a, b, *task).astype(np.int64))
    device = next(model.parameters()).device
    layers, right = [[] for _ in model.blocks], []

    def remember(layer, gates):
        layers[layer].append(gates.open.bool().cpu())

    for chunk in rows.split(CHUNK):
        questions, targets = chunk.unbind(dim=1)
        logits, _, _ = model(questions.to(device), keep=keep, record=remember)
        right.append(logits[:, task.first:].argmax(-1).cpu() == targets[:, task.first:])
    right = torch.cat(right).numpy()
    is_open = torch.stack([torch.cat(chunks) for chunks in layers])  # (n_layer, N, H, T, T)
    return right, is_open.permute(0, 2, 3, 4, 1).numpy()


def accuracy(right):
    """right (N, A) bool -> {"digits": A shares, the highest place first; "sum": share of rows all right}."""
    return {"digits": right.mean(axis=0).tolist(), "sum": float(right.all(axis=1).mean())}


def explain(model, task, a, b):
    """Describe every edge that opens on at least one of the sums a + b, both (N,).

    Returns a list of edges, a list of unions, and the accuracy with none shut, as `accuracy` gives it. An
    edge: {layer, head, query, key, open_on (sums), share (the same, 0 to 1), condition, agreement, baseline,
    accuracy_when_shut, twin (see `twin`)}. A union of edges, if it fits a condition: the same, but for
    {edges (their numbers, from 1)} in place of layer and head. Raises UserError if more than MOST_EDGES ever
    open.
    """
    right, is_open = run_sums(model, task, a, b)
    places = np.argwhere(is_open.any(axis=-1))  # (E, 4): layer, head, query, key
    if len(places) > MOST_EDGES:
        raise UserError(f"{len(places)} edges open on one sum or another: that is not sparse, explain "
                            f"takes {MOST_EDGES} at most. Train the run to its end, or with more --max_steps")
    library = conditions(a, b, task)
    alike = {}  # (query, key): numbers of the edges
    for number, (_, _, query, key) in enumerate(places.tolist()):
        alike.setdefault((query, key), []).append(number)
    groups = [[number] for number in range(len(places))] + [some for some in alike.values() if len(some) > 1]
    edges, unions = [], []
    for some in tqdm(groups, desc="shutting edge by edge", unit="edge", leave=False, disable=None):
        at = tuple(places[some].T)  # layers, heads, queries, keys
        opens = is_open[at].any(axis=0)  # (N,)
        condition, agreement, baseline = describe(opens, library)
        if len(some) > 1 and not condition:
            continue
        keep = torch.ones(is_open.shape[:-1], dtype=torch.bool, device=next(model.parameters()).device)
        keep[at] = False
        right_when_shut = right.copy()  # and so it stays where the edge is shut anyway
        right_when_shut[opens], now_open = run_sums(model, task, a[opens], b[opens], keep)
        layer, head, query, key = places[some[0]].tolist()
        found = {"query": query, "key": key, "open_on": int(opens.sum()), "share": float(opens.mean()),
                 "condition": condition, "agreement": agreement, "baseline": baseline,
                 "accuracy_when_shut": accuracy(right_when_shut),
                 "twin": twin(is_open[..., opens], now_open)}
        if len(some) == 1:
            edges.append({"layer": layer, "head": head} | found)
        else:
            unions.append({"edges": [number + 1 for number in some]} | found)
    return edges, unions, accuracy(right)


def twin(before, now):
    """The edge that opens instead of a shut one, {layer, head, query, key}, or None if there is none.

    before, now: (n_layer, H, T, T, N) bool, what is open on the sums on which the shut edge was. A twin opens
    on most of those sums, and was shut on them before.
    """
    share = (now & ~before).mean(axis=-1)  # (n_layer, H, T, T)
    if share.max() <= 0.5:
        return None
    place = np.unravel_index(share.argmax(), share.shape)
    return dict(zip(("layer", "head", "query", "key"), map(int, place)))


def algorithm(edges, intact, task):
    """How a circuit carries, in a few words for a table.

    `carry edge`: an edge opens on a true carry out of some place, or unless there is one (on FITS of the sums
    or more), and sums go wrong when it is shut. Else what comes nearest. edges: edges and unions; they and
    intact from `explain`.
    """
    carries = [carry_words(place, task.digits) for place in range(task.digits)]
    needed = [edge for edge in edges if edge["accuracy_when_shut"]["sum"] < intact["sum"]]
    words = [edge["condition"].removeprefix("unless ") for edge in needed if edge["condition"]]
    if set(words) & set(carries):
        return "carry edge"
    if "carry" in " ".join(words):
        return "carry merged with another condition"
    if not edges:
        return "no edges"
    if all(edge["share"] == 1 for edge in edges):
        return "always-open edges only"
    if all(edge["share"] == 1 for edge in needed):
        return "always-open edges, and others that nothing needs"
    return "other conditional edge" if words else "conditional edges without a readable condition"


def summary(edges, unions, intact, task, sums):
    """What explain.json holds; open: the mean over all sums, while report.json's is over held-out ones.

    edges, unions, intact: what `explain` returns; sums: on how many it counted.
    """
    return {"task": {"name": "addition", **task._asdict()}, "sums": sums,
            "algorithm": algorithm(edges + unions, intact, task),
            "open": sum(edge["open_on"] for edge in edges) / sums, "sum_right": intact["sum"],
            "digits_right": intact["digits"], "edges": edges, "unions": unions}


# ------------------------------------------------------------------------------------------------------------
# in words


def edge_name(edge, task, n_head=1):
    """`layer 1  s2 reads s4`, with the head where there are several; `edges 5 and 7 as one  s2 reads s4`."""
    names = token_names(task)
    if "edges" in edge:  # a union
        where = f"edges {' and '.join(map(str, edge['edges']))} as one"
    else:
        where = f"layer {edge['layer']}" + (f" head {edge['head']}" if n_head > 1 else "")
    return f"{where}  {names[edge['query']]} reads {names[edge['key']]}"


def when(edge):
    """When an edge opens, in words."""
    guess = f"constant guess {100 * edge['baseline']:.1f} %"
    if edge["condition"]:
        return f"{edge['condition']}: {100 * edge['agreement']:.1f} % of sums ({guess})"
    if edge["share"] == 1:
        return "always"
    return f"no condition of the library fits (best {100 * edge['agreement']:.1f} %, {guess})"


def damage(edge, intact, task, n_head=1):
    """What goes wrong when an edge is shut, in words: the places of the answer that lose at least one sum."""
    shut = edge["accuracy_when_shut"]["digits"]
    lost = [f"{place} {100 * now:.1f} %" for place, now, before
            in zip(reversed(PLACES[:len(shut)]), shut, intact["digits"]) if now < before]
    words = "accuracy when shut: " + ", ".join(lost) if lost else "nothing breaks"
    if edge["twin"]:
        words += f"; instead opens {edge_name(edge['twin'], task, n_head)}"
    return words


def circuit_in_words(edges, intact, task, n_head):
    """One numbered line for every edge, then one for every union: where it is, when it opens, what it is for.

    edges: edges and unions; they and intact are what `explain` returns. n_head: of the model.
    """
    lines = []
    for number, edge in enumerate(edges, 1):
        start = f"{number:3d}" if "layer" in edge else "   "
        where = f"{start}  {edge_name(edge, task, n_head)}, open on {edge['open_on']} sums"
        lines.append(f"{where}: {when(edge)}; {damage(edge, intact, task, n_head)}")
    return lines


def legend(task):
    """What the names in `circuit_in_words` mean, one line."""
    places = [f"s1 the {PLACES[1]}", f"s2 the {PLACES[2]}"]
    return f"{' '.join(token_names(task))}: s0 is the `?` that answers the {PLACES[0]}, {', '.join(places)}"


# ------------------------------------------------------------------------------------------------------------
# one sum


class Answer(NamedTuple):
    """What a model makes of one sum."""

    digits: str  # the answer positions, the highest place first: '00064'
    weights: np.ndarray  # (n_layer, H, T, T), query by key: A_ij softmax_j(a_i.)_j, 0 where the edge is shut
    open: np.ndarray  # (n_layer, H, T, T) bool


@torch.inference_mode()
def run_sum(model, task, a, b, shut=()):
    """The sum a + b through the model -> Answer. shut: edges (layer, head, query, key) to cut."""
    config, device = model.config, next(model.parameters()).device
    shape = (config.n_layer, config.n_head, task.length, task.length)
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    for edge in shut:
        keep[edge] = False
    layers = []
    question = torch.from_numpy(addition_rows([a], [b], *task)[:, 0].astype(np.int64)).to(device)
    logits, _, _ = model(question, keep=keep, record=lambda layer, gates: layers.append(gates))
    return Answer("".join(ADDITION_TOKENS[token] for token in logits[0, task.first:].argmax(-1).tolist()),
                  np.stack([gates.weights[0].float().cpu().numpy() for gates in layers]),
                  np.stack([gates.open[0].bool().cpu().numpy() for gates in layers]))


def sum_in_words(model, task, a, b, shut=()):
    """What there is to say of a + b, a list of lines. shut: edges (layer, head, query, key) to cut.

    A cut edge changes what later layers read, and so which of their edges open: those are listed too.
    """
    config, expected = model.config, f"{a + b:0{task.answers}d}"

    def judged(digits):
        return f"{digits}, " + ("right" if digits == expected else f"wrong, {expected} is right")

    def line(edge, weight):
        name = edge_name(dict(zip(("layer", "head", "query", "key"), edge)), task, config.n_head)
        return f"  {name:26} {weight:5.2f}"

    before = run_sum(model, task, a, b)
    edges = [tuple(edge) for edge in np.argwhere(before.open).tolist()]  # in the order of layers
    total = config.n_layer * config.n_head * task.length * (task.length + 1) // 2
    opened = f"{len(edges)} of {total} edges opened" if config.gated else f"dense: all {total} edges are open"
    lines = [f"{a}+{b} = {judged(before.digits)}", f"{opened}; beside each its attention weight"]
    most = MOST_EDGES if config.gated else MOST_DENSE
    if len(edges) > most:
        edges = sorted(edges, key=lambda edge: -before.weights[edge])[:most]
        lines[-1] += f", the strongest {most}"
    lines += [line(edge, before.weights[edge]) for edge in edges]
    if not shut:
        return lines

    after = run_sum(model, task, a, b, shut)
    lines.append("")
    for edge in shut:
        was_open = "" if before.open[edge] else "  (it was shut anyway)"
        lines.append(f"cut:{line(edge, before.weights[edge])}{was_open}")
    names = token_names(task)[task.first:]
    changed = [f"{name} {old} -> {new}"
               for name, old, new in zip(names, before.digits, after.digits) if old != new]
    lines.append(f"before: {judged(before.digits)}")
    lines.append(f"after:  {judged(after.digits)}; "
                 + ("changed: " + ", ".join(changed) if changed else "no digit changed"))
    flipped = [tuple(edge) for edge in np.argwhere(before.open != after.open).tolist()]
    flipped = [edge for edge in flipped if edge not in shut]
    for edge in flipped:
        weight = max(before.weights[edge], after.weights[edge])
        lines.append(f"{line(edge, weight)}  {'opened' if after.open[edge] else 'shut'} because of it")
    if config.gated and not flipped:
        lines.append("no other edge opened or shut because of it")
    return lines


# ------------------------------------------------------------------------------------------------------------
# a run


def read_addition_run(run):
    """What a run's folder, or a checkpoint, on addition means: (model, dataset, AdditionTask).

    The dataset says whether a run adds, not its name. Raises UserError if this one does not.
    """
    path = checkpoint_named(run)
    checkpoint = read_checkpoint(path)
    gated = checkpoint["model_args"].get("gated", False)
    name = checkpoint.get("data", {}).get("dataset")
    data = prepare_data.load(name) if name else None
    task = addition_task(data.meta) if data else None
    if task is None:
        kind = "a gated" if gated else "a dense"
        raise UserError(f"{run} is {kind} run on {name or 'other data'}: explain counts over sums, so it "
                        "needs a run on addition, such as out/addition")
    data.require_same(checkpoint["data"].get("sha256", data.meta["sha256"]), run)
    return model_of(checkpoint, path), data, task


def explain_run(run):
    """Write a run's explain.json and explain.png, and print the table."""
    model, data, task = read_addition_run(run)
    if not model.config.gated:
        raise UserError(f"{run} is a dense run on {data.name}: explain counts over sums and describes "
                        "gates, so it needs a gated run on addition, such as out/addition")
    a, b = population(data, task)
    edges, unions, intact = explain(model, task, a, b)
    found = summary(edges, unions, intact, task, len(a))
    path = os.path.join(folder_of_answers(run), "explain")
    write_json(path + ".json", found)

    right = f"{100 * intact['sum']:.2f} % of them right"
    title = f"{run}: {found['open']:.2f} open edges, the mean of all {len(a):,} sums; {right}"
    print(title, legend(task), *circuit_in_words(edges + unions, intact, task, model.config.n_head),
          f"algorithm: {found['algorithm']}", sep="\n")

    drawn = [edge | {"text": "\n    ".join([edge_name(edge, task, model.config.n_head), when(edge),
                                             damage(edge, intact, task, model.config.n_head)])}
             for edge in edges + unions]
    draw_or_say(path + ".png", circuit_figures.explanation, token_names(task), model.config.n_layer, drawn,
                title)


def add_arguments(parser):
    parser.add_argument("run", metavar="RUN", help="a run on addition, such as out/addition")
    parser.add_argument("sum", nargs="*", metavar="SUM", help="one sum, such as 36+28, in place of all")
    parser.add_argument("--shut", action="append", default=[], metavar="LAYER.QUERY.KEY",
                        help="cut this edge; may be given several times")


def run(options, settings):
    """`analyze.py explain`."""
    folder = options.run.rstrip("/")
    if not options.sum and not options.shut:
        return explain_run(folder)
    model, _, task = read_addition_run(folder)
    a, b = parse_sum("".join(options.sum), task, typed("python", "analyze.py", "explain", folder))
    shut = [parse_edge(words, model.config, task) for words in options.shut]
    print("\n".join(sum_in_words(model, task, a, b, shut)))
