"""When does an edge open? Each edge of the addition model described in words, by counting over all 10,000 sums.

With digits a1 a0 + b1 b0, an edge that is open on some sums and shut on others computes a predicate of the four digits.
We look for it in a library of readable conditions: the one that agrees with the gate on the largest share of the sums,

    agreement = share of sums on which (condition holds) = (edge is open),

next to the baseline, the agreement of the better constant guess ("always" or "never"). What an edge is for is measured by
shutting it, it alone, on every sum, and counting which answer digits go wrong (an ablation).

This goes further than the paper, which shows the carry edge on three examples (its first figure): found by counting, not by
eye. The 10,000 sums are the whole population, so nothing has to generalise; but the best of some 2,000 conditions is a
selection: read 96 % as "nearly", not as "is". And an edge without which "nothing breaks" may have a twin that takes over.
"""

import numpy as np
import torch

import prepare_data

FITS = 0.95  # a condition is reported if it agrees on this share of the sums and halves the error of the better constant guess
PLACES = ("ten-thousands", "thousands", "hundreds", "tens", "units")


def conditions(a, b):
    """The library: [(words, truth (N,) bool)] for the sums a + b, simplest first. Its negations count too ("unless ...")."""
    digits = {"a1": a // 10, "a0": a % 10, "b1": b // 10, "b0": b % 10}
    a1, a0, b1, b0 = digits.values()
    units, tens, total = a0 + b0, a1 + b1, a + b
    library = [
        ("carry out of the units (a0+b0 >= 10)", units >= 10),
        ("carry out of the tens (a+b >= 100)", total >= 100),
        ("tens digits sum to exactly 9 (a1+b1 = 9)", tens == 9),
        ("a carry runs through (a0+b0 >= 10 and a1+b1 = 9)", (units >= 10) & (tens == 9)),
        ("a carry arrives or could run through (a0+b0 >= 10 or a1+b1 = 9)", (units >= 10) | (tens == 9)),
    ]
    quantities = [*digits.items()]
    quantities += [(f"{x}+{y}", digits[x] + digits[y]) for x, y in
                   (("a0", "b0"), ("a1", "b1"), ("a1", "a0"), ("b1", "b0"), ("a1", "b0"), ("a0", "b1"))]
    quantities += [(f"digit sum without {x}", sum(digits.values()) - digits[x]) for x in digits]
    quantities += [("a1+a0+b1+b0", sum(digits.values())), ("a+b", total)]
    quantities += [(f"{place} digit of the answer", total // 10**power % 10) for power, place in ((0, "units"), (1, "tens"))]
    for name, value in quantities:
        library += [(f"{name} >= {v}", value >= v) for v in range(1, value.max() + 1)]
        library += [(f"{name} = {v}", value == v) for v in range(value.max() + 1)]
        library += [(f"{name} is odd", value % 2 == 1)]
    carry = units >= 10
    for v in range(1, 19):  # a carry together with what it meets in the tens
        library += [(f"carry out of the units and a1+b1 >= {v}", carry & (tens >= v)),
                    (f"carry out of the units or a1+b1 >= {v}", carry | (tens >= v)),
                    (f"exactly one of: carry out of the units, a1+b1 >= {v}", carry ^ (tens >= v))]
    library += [(f"{x} > {y}", digits[x] > digits[y]) for x in digits for y in digits if x < y]
    return library, quantities


def describe(is_open, library, quantities):
    """The condition that predicts `is_open` (N,) bool best -> (words or None, agreement, baseline).

    words is None if the edge never or always opens, or if no condition fits: then agreement is that of the best one.
    """
    baseline = max(is_open.mean(), 1 - is_open.mean())
    if baseline == 1:
        return None, 1.0, 1.0
    words, agreement = None, 0.0
    for name, truth in library:
        same = (truth == is_open).mean()
        for candidate, share in ((name, same), (f"unless {name}", 1 - same)):
            if share > agreement:
                words, agreement = candidate, share
    for name, value in quantities:  # last resort: for which values of one quantity is the edge mostly open?
        if value.max() > 18:
            continue
        mostly = np.array([is_open[value == v].mean() > 0.5 if (value == v).any() else False for v in range(value.max() + 1)])
        share = (mostly[value] == is_open).mean()
        if share > agreement + 0.01:
            words, agreement = f"{name} is one of {{{', '.join(map(str, np.flatnonzero(mostly)))}}}", share
    fits = agreement >= FITS and 1 - agreement <= (1 - baseline) / 2
    return words if fits else None, float(agreement), float(baseline)


@torch.no_grad()
def run_sums(model, keep=None):
    """All 10,000 sums through the model -> right (10000, 5) bool, which answer digits are right; is_open (n_layer, H, T, T, 10000) bool.

    keep: as in GPT.forward. Row i is the sum i // 100 + i % 100.
    """
    numbers = np.arange(10_000)
    rows = prepare_data.addition_rows(numbers // 100, numbers % 100).astype(np.int64)
    device = next(model.parameters()).device
    layers, right = [[] for _ in model.blocks], []
    for chunk in np.split(rows, 10):
        x = torch.from_numpy(chunk[:, 0]).to(device)
        logits, _, _ = model(x, keep=keep, record=lambda layer, gates: layers[layer].append(gates.open.bool().cpu()))
        right.append(logits[:, 6:].argmax(-1).cpu().numpy() == chunk[:, 1, 6:])
    is_open = torch.stack([torch.cat(parts) for parts in layers]).permute(0, 2, 3, 4, 1)  # (L, B, H, T, T) -> (L, H, T, T, B)
    return np.concatenate(right), is_open.numpy()


def explain(model):
    """Describe every edge that opens on at least one of the 10,000 sums.

    Returns a list of {layer, head, query, key, open_on, condition, agreement, baseline, accuracy_when_shut}, and the accuracy
    with no edge shut. Accuracies are {"digits": [5 shares, ten-thousands first], "sum": share of sums all right}.
    """
    numbers = np.arange(10_000)
    library, quantities = conditions(numbers // 100, numbers % 100)
    right, is_open = run_sums(model)
    edges = []
    for layer, head, query, key in np.argwhere(is_open.any(axis=-1)).tolist():
        condition, agreement, baseline = describe(is_open[layer, head, query, key], library, quantities)
        keep = torch.ones(is_open.shape[:-1], dtype=torch.bool, device=next(model.parameters()).device)
        keep[layer, head, query, key] = False
        edges.append({"layer": layer, "head": head, "query": query, "key": key, "open_on": int(is_open[layer, head, query, key].sum()),
                      "condition": condition, "agreement": agreement, "baseline": baseline,
                      "accuracy_when_shut": accuracy(run_sums(model, keep)[0])})
    return edges, accuracy(right)


def accuracy(right):
    """right (N, 5) bool -> {"digits": 5 shares, ten-thousands first; "sum": share of rows all right}."""
    return {"digits": right.mean(axis=0).tolist(), "sum": float(right.all(axis=1).mean())}


def when(edge):
    """When an edge opens, in words."""
    if edge["condition"]:
        return f"{edge['condition']}: {100 * edge['agreement']:.1f} % of sums (constant guess {100 * edge['baseline']:.1f} %)"
    if edge["open_on"] == 10_000:
        return "always"
    return f"no condition of the library fits (best {100 * edge['agreement']:.1f} %, constant guess {100 * edge['baseline']:.1f} %)"


def damage(edge, intact):
    """What goes wrong when an edge is shut, in words: the places of the answer that lose at least one sum."""
    lost = [f"{place} {100 * shut:.1f} %" for place, shut, whole in zip(PLACES, edge["accuracy_when_shut"]["digits"], intact["digits"])
            if shut < whole]
    return "nothing breaks" if not lost else "accuracy when shut: " + ", ".join(lost)
