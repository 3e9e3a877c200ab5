"""Conditions on a sum in readable words, and the one among them that predicts best when an edge is open.

The conditions are built from the places of the sum, as a hardware adder is. With c_p = a_p + b_p at place p

    generate   c_p >= 10       the place carries by itself
    propagate  c_p = 9         the place passes a carry on
    carry_p  = generate_p or (propagate_p and carry_(p-1))

Notable: the best of some 2,000 conditions is a selection: read 96 % as "nearly", not as "is".
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np

FITS = 0.95  # a condition must agree on this share of the sums, and halve the error of the constant guess
PLACES = ("units", "tens", "hundreds", "thousands", "ten-thousands")


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
