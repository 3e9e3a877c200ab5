"""Conditions are found by counting: planted ones are named, noise is not, and every condition means what its words say."""

import numpy as np
import pytest
import torch

from explain import PLACES, accuracy, conditions, damage, describe, explain, run_sums, when
from model import GPT, GPTConfig

N = np.arange(10_000)
A, B = N // 100, N % 100
LIBRARY, QUANTITIES = conditions(A, B)


@pytest.mark.parametrize("truth, words", [
    ((A % 10 + B % 10) >= 10, "carry out of the units (a0+b0 >= 10)"),
    (A + B >= 100, "carry out of the tens (a+b >= 100)"),
    ((A // 10 + B // 10) == 9, "tens digits sum to exactly 9 (a1+b1 = 9)"),
    ((A % 10 + B % 10 >= 10) & (A // 10 + B // 10 == 9), "a carry runs through (a0+b0 >= 10 and a1+b1 = 9)"),
    (B // 10 >= 4, "b1 >= 4"),
    (A % 10 != 0, "a0 >= 1"),
    (A % 10 != 5, "unless a0 = 5"),
    ((A % 10 + B % 10) < 10, "unless carry out of the units (a0+b0 >= 10)"),
    ((A + B) // 10 % 10 == 3, "tens digit of the answer = 3"),
    (A // 10 + A % 10 + B // 10 >= 14, "digit sum without b0 >= 14"),
    ((A % 10 + B % 10 >= 10) ^ (A // 10 + B // 10 >= 9), "exactly one of: carry out of the units, a1+b1 >= 9"),
    (np.isin(B % 10, [0, 2, 3, 7]), "b0 is one of {0, 2, 3, 7}"),
])
def test_planted_conditions_are_named(truth, words):
    found, agreement, baseline = describe(truth, LIBRARY, QUANTITIES)
    assert (found, agreement) == (words, 1.0)
    assert baseline == max(truth.mean(), 1 - truth.mean())


def test_a_condition_survives_a_little_noise_and_noise_alone_fits_nothing():
    rng = np.random.default_rng(0)
    carry = (A % 10 + B % 10) >= 10
    found, agreement, _ = describe(carry ^ (rng.random(10_000) < 0.03), LIBRARY, QUANTITIES)
    assert found.startswith("carry out of the units") and 0.96 < agreement < 0.98
    found, agreement, baseline = describe(rng.random(10_000) < 0.3, LIBRARY, QUANTITIES)
    assert found is None and agreement < 0.75
    # open on 97 % of the sums at random: 97 % agreement with "always" is no explanation
    assert describe(rng.random(10_000) < 0.97, LIBRARY, QUANTITIES)[0] is None


def test_edges_that_never_change_have_no_condition():
    assert describe(np.ones(10_000, dtype=bool), LIBRARY, QUANTITIES) == (None, 1.0, 1.0)


def random_model():
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=11, vocab_size=13, n_layer=2, n_head=1, n_embd=8, gated=True, gate_bias=-0.5)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def test_edges_are_counted_over_all_sums_and_shut_one_by_one():
    model = random_model()
    right, is_open = run_sums(model)
    assert right.shape == (10_000, 5) and is_open.shape == (2, 1, 11, 11, 10_000)
    edges, intact = explain_few(model)
    assert intact == accuracy(right)
    assert len(edges) == is_open.any(-1).sum()
    for edge in edges:
        assert set(edge) == {"layer", "head", "query", "key", "open_on", "condition", "agreement", "baseline", "accuracy_when_shut"}
        assert edge["open_on"] == is_open[edge["layer"], edge["head"], edge["query"], edge["key"]].sum() > 0
        assert edge["key"] <= edge["query"]
    # one ablation by hand
    edge = max(edges, key=lambda e: abs(np.subtract(e["accuracy_when_shut"]["digits"], intact["digits"])).max())
    keep = torch.ones(2, 1, 11, 11, dtype=torch.bool)
    keep[edge["layer"], 0, edge["query"], edge["key"]] = False
    assert edge["accuracy_when_shut"]["digits"] == run_sums(model, keep)[0].mean(0).tolist() != intact["digits"]


def explain_few(model, cache={}):
    if "it" not in cache:
        cache["it"] = explain(model)
    return cache["it"]


def test_words():
    intact = {"digits": [1.0] * 5, "sum": 1.0}
    edge = {"open_on": 4500, "condition": "carry", "agreement": 0.987, "baseline": 0.55,
            "accuracy_when_shut": {"digits": [1.0, 1.0, 0.95, 0.55, 1.0], "sum": 0.5}}
    assert when(edge) == "carry: 98.7 % of sums (constant guess 55.0 %)"
    assert damage(edge, intact) == "accuracy when shut: hundreds 95.0 %, tens 55.0 %"
    edge |= {"condition": None, "agreement": 0.8, "accuracy_when_shut": intact}
    assert when(edge).startswith("no condition of the library fits (best 80.0 %") and damage(edge, intact) == "nothing breaks"
    assert when(edge | {"open_on": 10_000}) == "always"
    assert len(PLACES) == 5
