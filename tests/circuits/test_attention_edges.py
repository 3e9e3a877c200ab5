"""Attention-edge circuits: every score against finite differences and loops; a planted circuit is found."""

import math

import pytest
import torch
from planted import PLANTED, T, planted

from circuits.attention_edges import (
    ABLATIONS,
    KINDS,
    curve_of,
    curves,
    exact_scores,
    integrated_scores,
    metrics_of,
    prepared,
    ranks,
    run_cut,
    scores_by,
    terms_of,
)
from circuits.tasks import LOGIT, Pair, metric_of
from model import GPT, GPTConfig
from models.olmo import OLMo, OLMoConfig

SHAPE = {"block_size": T, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8}
PAIRS = [
    Pair([1, 2, 3, 4, 5], [6, 2, 3, 4, 5], [T - 1], [[7]], [[8, 9]]),
    Pair([4, 4, 0, 1, 2], [4, 9, 0, 1, 2], [2, T - 1], [[1], [2]], [[3], [4]]),
]


def random_model(gated, kind=GPT, seed=0):
    """A model with random norms and biases, too, in float64; gated: a good half of its edges are open."""
    torch.manual_seed(seed)
    if kind is GPT:
        model = GPT(GPTConfig(**SHAPE, gated=gated, gate_bias=0.1))
    else:
        model = OLMo(OLMoConfig(**SHAPE, n_kv_head=1, gated=gated, gate_bias=0.1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model.double().eval()


def one_batch(model, ablation):
    [batch] = prepared(model, PAIRS, ablation)
    return batch


# ------------------------------------------------------------------------------------------------------------
# Runs


def by_loops(model, tokens, keep, instead):
    """`run_cut` for a GPT, edge by edge. instead: as [layer](weights, values), or None."""
    parts, (B, length), H = model.transformer, tokens.shape, model.config.n_head
    x = parts.wte(tokens) + parts.wpe(torch.arange(length))
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(B, length, 3, H, -1).unbind(2)
        y = torch.zeros_like(q)
        for b, h, i in [(b, h, i) for b in range(B) for h in range(H) for i in range(length)]:
            a = torch.stack([q[b, i, h] @ k[b, j, h] / math.sqrt(q.shape[-1]) for j in range(i + 1)])
            pattern = a.softmax(0)
            for j in range(i + 1):
                is_open = not model.config.gated or a[j] + model.config.gate_bias > 0
                m = keep[layer, b, h, i, j]
                y[b, i, h] += m * is_open * pattern[j] * v[b, j, h]
                if instead is not None:
                    y[b, i, h] += (1 - m) * instead[layer].weights[b, h, i, j] * instead[layer].v[b, h, j]
        x = x + block.attn.c_proj(y.flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(parts.ln_f(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ablation", ABLATIONS)
@torch.no_grad()
def test_a_run_that_is_cut_is_the_formula_edge_by_edge(gated, ablation):
    model = random_model(gated)
    batch = one_batch(model, ablation)
    keep = torch.rand(batch.present.shape, dtype=torch.float64)
    expected = by_loops(model, batch.tokens, keep, batch.instead)
    assert torch.allclose(run_cut(model, batch.tokens, keep, batch.instead), expected, atol=1e-12)


@pytest.mark.parametrize("kind", [GPT, OLMo])
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_kept_edges_change_nothing_and_cut_ones_are_those_of_keep(kind, gated):
    model = random_model(gated, kind)
    batch = one_batch(model, "zero")
    plain = model(batch.tokens)[0]
    assert torch.allclose(run_cut(model, batch.tokens, batch.present), plain)
    keep = batch.present & (torch.rand(batch.present.shape) < 0.5)
    assert torch.allclose(run_cut(model, batch.tokens, keep), model(batch.tokens, keep=keep)[0])
    assert torch.equal(model(batch.tokens)[0], plain), "the model is itself again"


@pytest.mark.parametrize("kind", [GPT, OLMo])
@torch.no_grad()
def test_with_all_edges_interchanged_attention_writes_what_it_wrote_on_the_corrupted_prompt(kind):
    model = random_model(True, kind)
    other = torch.tensor([pair.corrupted for pair in PAIRS])
    instead = terms_of(model, other)
    nothing = torch.zeros(2, 2, 2, T, T, dtype=torch.bool)
    assert torch.allclose(run_cut(model, other, nothing, instead), model(other)[0])


@torch.no_grad()
def test_present_edges_are_those_that_open():
    model, opened = random_model(True), {}
    for which in ("clean", "corrupted"):
        gates = []
        model(torch.tensor([getattr(pair, which) for pair in PAIRS]),
              record=lambda layer, found: gates.append(found.open > 0))
        opened[which] = torch.stack(gates)
    present = one_batch(model, "zero").present
    assert torch.equal(present, opened["clean"]) and present.any() and not present.all()
    assert torch.equal(one_batch(model, "interchange").present, opened["clean"] | opened["corrupted"])
    assert one_batch(random_model(False), "zero").present.sum() == 2 * 2 * 2 * T * (T + 1) // 2


# ------------------------------------------------------------------------------------------------------------
# Scores


def metric_at(model, batch, keep):
    return metric_of(run_cut(model, batch.tokens, keep, batch.instead), batch.pairs, LOGIT)


@pytest.mark.parametrize("kind", [GPT, OLMo])
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_scores_are_finite_differences(kind, ablation, steps):
    model = random_model(False, kind)
    batch = one_batch(model, ablation)
    scores = integrated_scores(model, batch, LOGIT, steps)
    ways = [1.0] if steps == 1 else [1 / 6, 3 / 6, 5 / 6]
    step = 1e-5
    for edge in batch.present.nonzero().tolist()[::7]:
        by_hand = 0.0
        for way in ways:
            values = []
            for move in (step, -step):
                keep = way * batch.present.double()
                keep[tuple(edge)] += move
                values.append(metric_at(model, batch, keep)[edge[1]].item())
            by_hand += (values[0] - values[1]) / (2 * step) / len(ways)
        assert scores[tuple(edge)].item() == pytest.approx(by_hand, abs=1e-5)
    assert not scores[~batch.present].any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ablation", ABLATIONS)
@torch.no_grad()
def test_exact_scores_are_those_of_a_loop(gated, ablation):
    model = random_model(gated)
    batch = one_batch(model, ablation)
    scores = exact_scores(model, batch, LOGIT)
    intact = metric_at(model, batch, batch.present)
    for edge in batch.present.nonzero().tolist():
        keep = batch.present.clone()
        keep[tuple(edge)] = False
        lost = intact[edge[1]] - metric_at(model, batch, keep)[edge[1]]
        assert scores[tuple(edge)].item() == pytest.approx(lost.item(), abs=1e-5)


def test_many_runs_in_parts_are_the_same_runs(monkeypatch):
    model = random_model(True)
    batch = one_batch(model, "interchange")
    scores = scores_by("|integrated|", model, batch, LOGIT)
    whole = curves(model, batch, LOGIT, scores)
    monkeypatch.setattr("circuits.attention_edges.ROOM", 1)
    in_parts = curves(model, batch, LOGIT, scores)
    for one, other in zip(whole, in_parts):
        assert one.kept == other.kept
        assert one.share == pytest.approx(other.share)


# ------------------------------------------------------------------------------------------------------------
# Curves


def test_ranks_leave_absent_edges_behind():
    scores = torch.tensor([[5.0, 1.0], [9.0, 3.0]])
    present = torch.tensor([[True, True], [False, True]])
    assert ranks(scores, present).tolist() == [[0, 2], [4, 1]]


def test_the_size_is_where_a_curve_gets_to_its_level_and_stays_there():
    curve = curve_of([0, 1, 2, 3, 4], [1.0, 2.9, 2.0, 2.82, 3.0])
    assert curve.share == pytest.approx([0, 0.95, 0.5, 0.91, 1])
    assert curve.reaches == {"0.8": 3, "0.9": 3, "0.95": 4}
    overshoots = curve_of([0, 1, 2, 3], [0.0, 3.0, 2.0, 1.0])
    assert (overshoots.reaches["0.9"], overshoots.within["0.9"]) == (1, 3)


# ------------------------------------------------------------------------------------------------------------
# A circuit that is known, because it was planted


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("ranking", [*KINDS, *map("|{}|".format, KINDS)])
def test_exactly_the_planted_circuit_is_found(ablation, ranking):
    model = planted()
    [batch] = prepared(model, PLANTED, ablation)
    scores = scores_by(ranking, model, batch, LOGIT)
    for pair, curve in enumerate(curves(model, batch, LOGIT, scores)):
        order = ranks(scores[:, pair], batch.present[:, pair])
        assert (order < 2).nonzero().tolist() == [[0, 0, 2, 0], [1, 1, T - 1, 2]]
        assert curve.share[curve.kept.index(2)] == pytest.approx(1, abs=1e-6)
        assert curve.share[curve.kept.index(1)] == pytest.approx(0, abs=1e-6)
        assert curve.within["0.9"] <= 2
        rest = batch.present[:, pair] & (order >= 2)
        [left] = metrics_of(model, batch, LOGIT, [(pair, rest)])
        assert left == pytest.approx(curve.none, abs=1e-6), "complete: without it nothing is left"
