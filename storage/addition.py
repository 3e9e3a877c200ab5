"""Addition as rows of tokens: what a sum looks like, and what its positions are called.

    5 3 + 2 1 = ? ? ? ? ?   ->   0 0 0 7 4          two digits; the answer's digits all at once, the highest
                            place first

A model learns this task from one dataset and is asked sums of it by many tools, so what follows from `digits`
and `answers` alone is here: the tokens, the rows, the way back to the numbers, and the names of the
positions. prepare_data.py splits and writes the dataset.

This file imports no other file of ours.
"""

from typing import NamedTuple

import numpy as np

IGNORE = 65535  # a target that is not asked for, as stored; -1 once it is read
ADDITION_TOKENS = "0123456789+=?"


class AdditionTask(NamedTuple):
    """The shape of an addition dataset: a row is `digits` digits, +, as many, =, and `answers` times ?."""

    digits: int = 2  # of each of the two numbers
    answers: int = 5  # positions of the answer, the highest place first, filled up with zeros

    @property
    def first(self):
        """The position of the first `?`."""
        return 2 * self.digits + 2

    @property
    def length(self):
        """T, the tokens of a row."""
        return self.first + self.answers


def answers_for(digits):
    """The answer positions of a dataset of so many digits: five, or more where the sum needs them."""
    return max(5, digits + 1)


def addition_task(meta):
    """The AdditionTask of the dataset that meta.json describes, or None if it does not add."""
    task = meta.get("task", {})
    return AdditionTask(task["digits"], task["answers"]) if task.get("name") == "addition" else None


def addition_rows(a, b, digits=2, answers=5):
    """Rows for the sums a + b: (N, 2, T) uint16, the question and, at its `?`, the digits of the answer.

    a, b: (N,) integers from 0 to 10^digits - 1. The model answers all digits at once, in one forward pass.
    T = 2 digits + 2 + answers: 11 for two digits.
    """
    a, b = np.asarray(a), np.asarray(b)
    task = AdditionTask(digits, answers)
    plus, equals, ask = (ADDITION_TOKENS.index(c) for c in "+=?")
    rows = np.full((len(a), 2, task.length), IGNORE, dtype=np.uint16)
    rows[:, 0, :digits] = digits_of(a, digits)
    rows[:, 0, digits] = plus
    rows[:, 0, digits + 1:task.first - 1] = digits_of(b, digits)
    rows[:, 0, task.first - 1] = equals
    rows[:, 0, task.first:] = ask
    rows[:, 1, task.first:] = digits_of(a + b, answers)
    return rows


def digits_of(numbers, count):
    """The last `count` digits of numbers (N,), the highest place first: (N, count)."""
    return numbers[:, None] // 10 ** np.arange(count)[::-1] % 10


def addition_pairs(rows, digits):
    """The numbers that rows (N, 2, T) add: a (N,) and b (N,). The way back from `addition_rows`."""
    place_values = 10 ** np.arange(digits)[::-1]
    questions = np.asarray(rows[:, 0]).astype(np.int64)
    return questions[:, :digits] @ place_values, questions[:, digits + 1:2 * digits + 1] @ place_values


def token_names(task):
    """The T positions of a row: a1 a0 + b1 b0 = s4 s3 s2 s1 s0. s2 is the `?` that answers the hundreds."""
    def places(letter, count):
        return [f"{letter}{place}" for place in reversed(range(count))]

    return [*places("a", task.digits), "+", *places("b", task.digits), "=", *places("s", task.answers)]
