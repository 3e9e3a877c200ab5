"""When does an edge open? Each edge of an addition model described in words, by counting over many sums.

With digits a1 a0 + b1 b0, an edge that is open on some sums and shut on others computes a predicate of the
digits. We look for it in a library of readable conditions: the one that agrees with the gate on most sums,

    agreement = share of sums on which (condition holds) = (edge is open),

next to the baseline, the agreement of the better constant guess ("always" or "never"). What an edge is for is
measured by shutting it, it alone, on every sum, and counting which answer digits go wrong (an ablation).

The conditions are built from the places of the sum, as a hardware adder is. With c_p = a_p + b_p at place p

    generate   c_p >= 10       the place carries by itself
    propagate  c_p = 9         the place passes a carry on
    carry_p  = generate_p or (propagate_p and carry_(p-1))

This goes further than the paper, which shows the carry edge on three examples (its first figure): found by
counting, not by eye. All 10,000 sums of two digits are counted; of more digits, those of the dataset.
Notable: the best of some 2,000 conditions is a selection: read 96 % as "nearly", not as "is". And a shut edge
may have a twin that opens instead: gates are computed from queries and keys, which change with what was read.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from checkpoint import model_of, read_checkpoint
from resume import checkpoint_named

FITS = 0.95  # a condition must agree on this share of the sums, and halve the error of the constant guess
PLACES = ("units", "tens", "hundreds", "thousands", "ten-thousands")
MOST_EDGES = 60  # that ever open: more are no circuit to read, and each costs a pass over all sums
CHUNK = 500  # sums that go through the model at once


class AnalysisError(Exception):
    """A run that cannot be analysed. The message says what to type instead."""


# ---------------------------------------------------------------------------------------------------------------------
# the sums


def population(data, task):
    """The sums to count on, a (N,) and b (N,): all 10,000 of two digits, else the dataset's."""
    if task.digits == 2:
        return np.divmod(np.arange(10_000), 100)
    return prepare_data.addition_pairs(np.concatenate([data.train, data.val]), task.digits)


def token_names(task):
    """The T positions of a row: a1 a0 + b1 b0 = s4 s3 s2 s1 s0. s2 is the `?` that answers the hundreds."""
    def places(letter, count):
        return [f"{letter}{place}" for place in reversed(range(count))]

    return [*places("a", task.digits), "+", *places("b", task.digits), "=", *places("s", task.answers)]


# ---------------------------------------------------------------------------------------------------------------------
# the library of conditions


class Library(NamedTuple):
    """Readable conditions on N sums, the simplest first."""

    named: list  # [(words, truth (N,) bool)]
    quantities: list  # [(words, value (N,) int)], each for `value >= v`, `value = v` and `value is odd`
    combined: list  # [(words, truth (N,) bool)]: a carry together with something else, and comparisons


def carry_words(place, digits):
    """The true carry out of a place, incoming carry included: `carry out of the units (a0+b0 >= 10)`."""
    if place == 0:
        numbers = "a0+b0"
    elif place == digits - 1:
        numbers = "a+b"
    else:
        numbers = "+".join("".join(f"{letter}{p}" for p in reversed(range(place + 1))) for letter in "ab")
    return f"carry out of the {PLACES[place]} ({numbers} >= {10 ** (place + 1)})"


def conditions(a, b, task):
    """The Library for the sums a + b, both (N,). The negation of a condition counts too ("unless ...")."""
    d = task.digits
    total = a + b
    digits = {f"a{p}": a // 10**p % 10 for p in reversed(range(d))}
    digits |= {f"b{p}": b // 10**p % 10 for p in reversed(range(d))}
    column = [digits[f"a{p}"] + digits[f"b{p}"] for p in range(d)]
    column_words = [f"a{p}+b{p}" for p in range(d)]
    tail = [a % 10 ** (p + 1) + b % 10 ** (p + 1) for p in range(d)]  # the sum of the last p + 1 digits
    carry = [tail[p] >= 10 ** (p + 1) for p in range(d)]

    named = [(carry_words(p, d), carry[p]) for p in range(d)]
    for p in range(1, d):
        of_place = f" the {PLACES[p]}" if d > 2 else ""
        arrives = carry_words(p - 1, d).partition("(")[2].rstrip(")")  # `a0+b0 >= 10`
        nine = column[p] == 9
        named.append((f"{PLACES[p]} digits sum to exactly 9 ({column_words[p]} = 9)", nine))
        named.append((f"a carry runs through{of_place} ({arrives} and {column_words[p]} = 9)",
                      carry[p - 1] & nine))
        named.append((f"a carry arrives or could run through{of_place} ({arrives} or {column_words[p]} = 9)",
                      carry[p - 1] | nine))

    quantities = [*digits.items(), *zip(column_words, column)]
    for x, y in combinations(digits, 2):
        if f"{x}+{y}" not in column_words:
            quantities.append((f"{x}+{y}", digits[x] + digits[y]))
    digit_sum = sum(digits.values())
    if d > 1:
        quantities += [(f"digit sum without {x}", digit_sum - digits[x]) for x in digits]
        quantities += [("+".join(digits), digit_sum)]
        for p in range(1, d - 1):
            quantities.append((carry_words(p, d).partition("(")[2].partition(" ")[0], tail[p]))  # `a1a0+b1b0`
        quantities += [("a+b", total)]
    quantities += [(f"{PLACES[p]} digit of the answer", total // 10**p % 10) for p in range(d)]

    combined = []
    for low, high in combinations(range(d), 2):  # a carry together with what it meets in a higher place
        out = f"carry out of the {PLACES[low]}"
        for v in range(1, 19):
            meets, large = f"{column_words[high]} >= {v}", column[high] >= v
            combined.append((f"{out} and {meets}", carry[low] & large))
            combined.append((f"{out} or {meets}", carry[low] | large))
            combined.append((f"exactly one of: {out}, {meets}", carry[low] ^ large))
        other = f"carry out of the {PLACES[high]}"
        combined.append((f"{out} and {other}", carry[low] & carry[high]))
        combined.append((f"{out} or {other}", carry[low] | carry[high]))
        combined.append((f"exactly one of: {out}, {other}", carry[low] ^ carry[high]))
    combined += [(f"{x} > {y}", digits[x] > digits[y]) for x in digits for y in digits if x < y]
    return Library(named, quantities, combined)


def by_threshold(is_open, name, value):
    """[(words, agreement)] of `value >= v` and `value = v` for every v, and of `value is odd`."""
    sums = np.bincount(value)  # (V,) how many sums have each value
    opened = np.bincount(value[is_open], minlength=len(sums))  # (V,) on how many of those the edge is open
    shut = sums - opened
    # value >= v agrees where the edge is open from v on, and where it is shut below v
    at_least = opened[::-1].cumsum()[::-1] + shut.cumsum() - shut
    equal = opened + shut.sum() - shut
    odd = opened[1::2].sum() + shut[::2].sum()
    found = [(f"{name} >= {v}", at_least[v]) for v in range(1, len(sums))]
    found += [(f"{name} = {v}", equal[v]) for v in range(len(sums))]
    found += [(f"{name} is odd", odd)]
    return [(words, count / len(value)) for words, count in found]


def describe(is_open, library):
    """The condition that predicts `is_open` (N,) bool best -> (words or None, agreement, baseline).

    words is None if the edge never or always opens, or if nothing fits: then agreement is that of the best.
    """
    baseline = max(is_open.mean(), 1 - is_open.mean())
    if baseline == 1:
        return None, 1.0, 1.0
    candidates = [(words, (truth == is_open).mean()) for words, truth in library.named]
    for name, value in library.quantities:
        candidates += by_threshold(is_open, name, value)
    candidates += [(words, (truth == is_open).mean()) for words, truth in library.combined]

    best, agreement = None, 0.0
    for words, share in candidates:
        if share > agreement:
            best, agreement = words, share
        if 1 - share > agreement:
            best, agreement = f"unless {words}", 1 - share

    # last resort: for which values of one quantity is the edge mostly open?
    for name, value in library.quantities:
        if value.max() > 18:
            continue
        sums = np.bincount(value)
        opened = np.bincount(value[is_open], minlength=len(sums))
        mostly = 2 * opened > sums
        share = np.where(mostly, opened, sums - opened).sum() / len(value)
        if share > agreement + 0.01:
            values = ", ".join(str(v) for v in np.flatnonzero(mostly))
            best, agreement = f"{name} is one of {{{values}}}", share
    fits = agreement >= FITS and 1 - agreement <= (1 - baseline) / 2
    return best if fits else None, float(agreement), float(baseline)


# ---------------------------------------------------------------------------------------------------------------------
# counting


@torch.inference_mode()
def run_sums(model, task, a, b, keep=None):
    """The sums a + b, both (N,), through the model.

    keep: as in GPT.forward. Returns right (N, answers) bool, which answer digits are right; and is_open
    (n_layer, H, T, T, N) bool.
    """
    rows = torch.from_numpy(prepare_data.addition_rows(a, b, *task).astype(np.int64))
    device = next(model.parameters()).device
    layers = [[] for _ in model.blocks]
    right = []

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

    Returns a list of edges, and the accuracy with none shut, as `accuracy` gives it. An edge: {layer,
    head, query, key, open_on (sums), share (the same, 0 to 1), condition, agreement, baseline,
    accuracy_when_shut, twin (see `twin`)}. Raises AnalysisError if more than MOST_EDGES ever open.
    """
    right, is_open = run_sums(model, task, a, b)
    places = np.argwhere(is_open.any(axis=-1)).tolist()
    if len(places) > MOST_EDGES:
        raise AnalysisError(f"{len(places)} edges open on one sum or another: that is not sparse, explain "
                            f"takes {MOST_EDGES} at most. Train the run to its end, or with more --max_steps")
    library = conditions(a, b, task)
    edges = []
    progress = tqdm(places, desc="shutting edge by edge", unit="edge", leave=False, disable=None)
    for layer, head, query, key in progress:
        opens = is_open[layer, head, query, key]  # (N,)
        condition, agreement, baseline = describe(opens, library)
        keep = torch.ones(is_open.shape[:-1], dtype=torch.bool, device=next(model.parameters()).device)
        keep[layer, head, query, key] = False
        right_when_shut = right.copy()  # and so it stays where the edge is shut anyway
        right_when_shut[opens], now_open = run_sums(model, task, a[opens], b[opens], keep)
        edges.append({"layer": layer, "head": head, "query": query, "key": key,
                      "open_on": int(opens.sum()), "share": float(opens.mean()),
                      "condition": condition, "agreement": agreement, "baseline": baseline,
                      "accuracy_when_shut": accuracy(right_when_shut),
                      "twin": twin(is_open[..., opens], now_open)})
    return edges, accuracy(right)


def twin(before, now):
    """The edge that opens instead of a shut one, {layer, head, query, key}, or None if there is none.

    before, now: (n_layer, H, T, T, N) bool, what is open on the sums on which the shut edge was. A twin opens on
    most of those sums, and was shut on them before.
    """
    share = (now & ~before).mean(axis=-1)  # (n_layer, H, T, T)
    if share.max() <= 0.5:
        return None
    place = np.unravel_index(share.argmax(), share.shape)
    return dict(zip(("layer", "head", "query", "key"), map(int, place)))


def algorithm(edges, intact, task):
    """How a circuit carries, in a few words for a table.

    `carry edge`: an edge opens on a true carry out of some place, or unless there is one (on FITS of the sums
    or more), and sums go wrong when it is shut. Else what comes nearest. edges, intact: from `explain`.
    """
    carries = [carry_words(place, task.digits) for place in range(task.digits)]
    needed = [edge for edge in edges if edge["accuracy_when_shut"]["sum"] < intact["sum"]]
    needed_words = [edge["condition"].removeprefix("unless ") for edge in needed if edge["condition"]]
    if any(words in carries for words in needed_words):
        return "carry edge"
    if any("carry" in words for words in needed_words):
        return "carry merged with another condition"
    conditional = [edge for edge in edges if edge["share"] < 1]
    if not edges:
        return "no edges"
    if not conditional:
        return "always-open edges only"
    if not any(edge["share"] < 1 for edge in needed):
        return "always-open edges, and others that nothing needs"
    if any(needed_words):
        return "other conditional edge"
    return "conditional edges without a readable condition"


def summary(edges, intact, task, sums):
    """What explain.json holds. edges, intact: what `explain` returns; sums: on how many it counted."""
    return {"task": {"name": "addition", **task._asdict()}, "sums": sums,
            "algorithm": algorithm(edges, intact, task),
            "open": sum(edge["open_on"] for edge in edges) / sums, "sum_right": intact["sum"],
            "digits_right": intact["digits"], "edges": edges}


# ---------------------------------------------------------------------------------------------------------------------
# in words


def edge_name(edge, task, n_head=1):
    """`layer 1  s2 reads s4`, with the head where there are several."""
    names = token_names(task)
    head = f" head {edge['head']}" if n_head > 1 else ""
    return f"layer {edge['layer']}{head}  {names[edge['query']]} reads {names[edge['key']]}"


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
    lost = []
    for place, now, before in zip(reversed(PLACES[:len(shut)]), shut, intact["digits"]):
        if now < before:
            lost.append(f"{place} {100 * now:.1f} %")
    words = "accuracy when shut: " + ", ".join(lost) if lost else "nothing breaks"
    if edge["twin"]:
        words += f"; instead opens {edge_name(edge['twin'], task, n_head)}"
    return words


def circuit_in_words(edges, intact, task, n_head=None):
    """One numbered line for every edge: where it is, when it opens, what it is for.

    edges, intact: what `explain` returns. n_head: of the model; left out, as many as the edges need.
    """
    if n_head is None:
        n_head = 1 + max((edge["head"] for edge in edges), default=0)
    lines = []
    for number, edge in enumerate(edges, 1):
        where = f"{number:3d}  {edge_name(edge, task, n_head)}, open on {edge['open_on']} sums"
        lines.append(f"{where}: {when(edge)}; {damage(edge, intact, task, n_head)}")
    return lines


def legend(task):
    """What the names in `circuit_in_words` mean, one line."""
    places = [f"s1 the {PLACES[1]}", f"s2 the {PLACES[2]}"]
    return f"{' '.join(token_names(task))}: s0 is the `?` that answers the {PLACES[0]}, {', '.join(places)}"


# ---------------------------------------------------------------------------------------------------------------------
# a run


def read_addition_run(run):
    """What a run's folder, or a checkpoint, on addition means: (model, dataset, AdditionTask).

    The dataset says whether a run adds, not its name. Raises AnalysisError if this one does not.
    """
    path = checkpoint_named(run)
    checkpoint = read_checkpoint(path)
    gated = checkpoint["model_args"].get("gated", False)
    name = checkpoint.get("data", {}).get("dataset")
    data = prepare_data.load(name) if name else None
    task = prepare_data.addition_task(data.meta) if data else None
    if task is None:
        kind = "a gated" if gated else "a dense"
        raise AnalysisError(f"{run} is {kind} run on {name or 'other data'}: explain counts over sums, ask "
                            "asks for one, so they need a run on addition, such as out/addition")
    return model_of(checkpoint, path), data, task
