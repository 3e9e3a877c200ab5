"""graph.py, patching.py, attribution.py and induction.py against an independent transformer that is written
edge by edge, and against finite differences.
"""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from circuits import induction
from circuits.attribution import (
    attribute_edges,
    best_edges,
    cut_edges,
    cut_writers,
    dead_heads,
    effects,
    explained,
    needed,
    sizes,
    without_dead_heads,
)
from circuits.graph import ComponentGraph, Watch
from circuits.patching import patched
from circuits.prompts import copy as copying
from circuits.tasks import LOGIT, PROBABILITY, Pair, metric_of, vocabulary
from model import GPT, GPTConfig

L, H, C, V = 2, 2, 16, 40
METRICS = [LOGIT, PROBABILITY]


def make(gated, **settings):
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=L, n_head=H, n_embd=C, gated=gated,
                          gate_bias=0.2, **settings)).eval().double()
    for parameter in model.parameters():
        parameter.data += 0.25 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=[False, True], ids=["dense", "gated"])
def model(request):
    return make(request.param)


@pytest.fixture
def pairs():
    """Copying, from sequences of 4 tokens: short, because what they are compared with loops over single
    positions.
    """
    made = copying(vocabulary("forty tokens", V), 6, random.Random(1), length=4)
    return [Pair(clean, corrupted, [len(clean) - 1], [right], [wrong])
            for clean, corrupted, right, wrong in made]


class ByHand:
    """The same network, one number of the graph at a time: every reader adds up what it reads from a
    dictionary of writes.
    """

    def __init__(self, model):
        self.model, self.t = model, model.transformer

    def norm(self, x, ln):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5) * ln.weight + ln.bias

    def run(self, tokens, moved=None, other=None):
        """Logits (T, V) of one prompt, and all writes.

        moved {(writer, reader): how far this edge is moved towards `other`, another run's writes}.
        """
        T, D, moved = len(tokens), C // H, moved or {}
        writes = [self.t.wte.weight[tokens] + self.t.wpe.weight[:T]]
        biases = torch.zeros(C, dtype=torch.float64)

        def read(reader):
            x = biases.clone()
            for w, y in enumerate(writes):
                x = x + y + moved.get((w, reader), 0.0) * ((other[w] - y) if other else 0.0)
            return x

        for layer in range(L):
            block = self.t.h[layer]
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            heads = []
            for h in range(H):
                qkv = []
                for part in range(3):
                    rows = slice(part * C + h * D, part * C + (h + 1) * D)
                    x = self.norm(read(layer * (3 * H + 1) + part * H + h), block.ln_1)
                    qkv.append(x @ weight[rows].T + bias[rows])
                q, k, v = qkv
                out = []
                for i in range(T):
                    a = torch.stack([q[i] @ k[j] / math.sqrt(D) for j in range(i + 1)])
                    p = a.softmax(0)
                    if self.model.config.gated:  # a threshold, with the derivative of a sigmoid
                        s = a + self.model.config.gate_bias
                        p = p * ((s > 0) + s.sigmoid() - s.sigmoid().detach())
                    out.append(sum(p[j] * v[j] for j in range(i + 1)))
                heads.append(torch.stack(out) @ block.attn.c_proj.weight[:, h * D:(h + 1) * D].T)
            writes += heads
            biases = biases + block.attn.c_proj.bias
            x = self.norm(read(layer * (3 * H + 1) + 3 * H), block.ln_2)
            hidden = torch.nn.functional.gelu(x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias,
                                              approximate="tanh")
            writes.append(hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias)
        x = self.norm(read(L * (3 * H + 1)), self.t.ln_f)
        return x @ self.model.lm_head.weight.T, writes

    def metric(self, pair, metric, moved):
        """The metric of a pair, a tensor, with edges {(writer, reader): how far} moved to the corrupted."""
        _, other = self.run(torch.tensor(pair.corrupted))
        return metric_of(self.run(torch.tensor(pair.clean), moved, other)[0][None], [pair], metric)[0]

    def cut(self, pair, edges):
        """LOGIT of a pair with edges (W, R) bool cut."""
        return self.metric(pair, LOGIT, {tuple(edge): 1.0 for edge in edges.nonzero().tolist()}).item()


def test_the_graph_of_gpt2_has_as_many_edges_as_the_literature_counts():
    graph = ComponentGraph(12, 12)
    assert (graph.W, graph.R, int(graph.edges.sum())) == (157, 445, 32491)
    names, readers = graph.writer_names, graph.reader_names
    assert names[graph.writer["heads", 3]][5] == "3.5"
    assert names[graph.writer["mlp", 3]] == readers[graph.reader["mlp", 3]] == ["mlp 3"]
    assert readers[graph.reader["k", 3]][5] == "3.5 k"
    assert readers[graph.reader["final", None]] == ["output"] and graph.owner[444] == 157
    assert all(readers[i].rstrip(" qkv") == names[graph.owner[i]] for i in range(444))


@torch.no_grad()
def test_circuits_are_run_as_by_hand(model, pairs):
    graph, hand = ComponentGraph(L, H), ByHand(model)
    chance = torch.rand(graph.W, graph.R, generator=torch.Generator().manual_seed(0))
    keeps = [graph.edges & (chance < share) for share in (0.2, 0.5, 0.8)]
    nothing = torch.zeros_like(graph.edges)
    clean, corrupted, values = effects(model, pairs[:2], LOGIT, [*keeps, graph.edges, nothing])
    assert torch.allclose(values[-2], clean) and torch.allclose(values[-1], corrupted)
    assert (clean - corrupted).abs().min() > 1e-3
    for number, pair in enumerate(pairs[:2]):
        assert clean[number].item() == pytest.approx(hand.cut(pair, nothing), abs=1e-9)
        for keep, value in zip(keeps, values[:, number]):
            assert value.item() == pytest.approx(hand.cut(pair, graph.edges & ~keep), abs=1e-9)


@torch.no_grad()
def test_exact_scores_are_those_of_every_edge_and_of_every_component_cut_alone(model, pairs):
    graph, hand, pair = ComponentGraph(L, H), ByHand(model), pairs[0]
    whole = hand.cut(pair, torch.zeros_like(graph.edges))
    scores = cut_edges(model, [pair], LOGIT, graph.edges)
    for edge in graph.edges.nonzero().tolist():
        alone = hand.metric(pair, LOGIT, {tuple(edge): 1.0}).item()
        assert scores[tuple(edge)].item() == pytest.approx(alone - whole, abs=1e-6)
    assert scores.abs().max() > 1e-3 and not scores[~graph.edges].any()
    of_writers = cut_writers(model, [pair], LOGIT, graph.edges)
    for writer in range(graph.W):
        edges = torch.zeros_like(graph.edges)
        edges[writer] = graph.edges[writer]
        assert of_writers[writer].item() == pytest.approx(hand.cut(pair, edges) - whole, abs=1e-6)
    # a mean over pairs, and what is gone stays gone
    some = graph.edges & (torch.arange(graph.R) % 2 == 0)
    edge = tuple(some.nonzero()[7].tolist())
    without = some.clone()
    without[edge] = False
    lost = [hand.cut(pair, graph.edges & ~without) - hand.cut(pair, graph.edges & ~some)
            for pair in pairs[:2]]
    assert cut_edges(model, pairs[:2], LOGIT, some)[edge].item() == pytest.approx(np.mean(lost), abs=1e-6)


def slope(model, value):
    """The derivative of value(step) at 0: by central differences; of a gated model, whose thresholds have
    none, by autograd through the by-hand network.
    """
    if model.config.gated:
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(value(step), step)[0].item()
    with torch.no_grad():
        return (value(1e-5) - value(-1e-5)).item() / 2e-5


@pytest.mark.parametrize("metric", METRICS)
def test_attribution_is_the_derivative_of_the_metric_by_how_far_an_edge_is_moved(model, pairs, metric):
    """ALL edges."""
    graph, pair, hand = ComponentGraph(L, H), pairs[0], ByHand(model)
    scores = attribute_edges(model, [pair], metric)
    assert not scores[~graph.edges].any() and scores.abs().max() > 1e-3
    for edge in map(tuple, graph.edges.nonzero().tolist()):
        found = slope(model, lambda step: hand.metric(pair, metric, {edge: step}))
        assert scores[edge].item() == pytest.approx(found, abs=2e-6, rel=1e-4)


def test_integrated_gradients_average_over_the_way_from_the_corrupted_input(model, pairs):
    """EAP-IG's definition, with the package's steps k / steps, k from 0: the embedding of step k, everything
    behind it computed anew.
    """
    pair, steps, hand = pairs[0], 4, ByHand(model)
    scores = attribute_edges(model, [pair], LOGIT, steps=steps)
    with torch.no_grad():
        (_, clean), (_, corrupted) = (hand.run(torch.tensor(prompt))
                                      for prompt in (pair.clean, pair.corrupted))

    def value(edge, way, step):
        logits = interpolated(hand, len(pair.clean), way, clean, corrupted, edge, step)
        return metric_of(logits[None], [pair], LOGIT)[0]

    for edge in map(tuple, ComponentGraph(L, H).edges.nonzero().tolist()[::5]):
        slopes = [slope(model, lambda step: value(edge, k / steps, step)) for k in range(steps)]
        assert scores[edge].item() == pytest.approx(np.mean(slopes), abs=2e-6, rel=1e-4)


def interpolated(hand, T, way, clean, corrupted, edge, step):
    """Logits with the embedding `way` from corrupted to clean, and one edge moved by step times (corrupted -
    clean) of its writer.
    """
    changed = copy.copy(hand)  # the same network, whose embedding of position i is row i of a table
    changed.t = SimpleNamespace(h=hand.t.h, ln_f=hand.t.ln_f,
                                wte=SimpleNamespace(weight=corrupted[0] + way * (clean[0] - corrupted[0])),
                                wpe=SimpleNamespace(weight=torch.zeros_like(hand.t.wpe.weight)))
    _, plain = changed.run(torch.arange(T))
    # moving towards it by `step` adds step (corrupted - clean)
    target = [y + (b - a) for y, a, b in zip(plain, clean, corrupted)]
    return changed.run(torch.arange(T), {edge: step}, target)[0]


def test_an_edge_that_only_opens_a_gate_has_a_score():
    """With one token there is one key, whose weight is always 1: what q and k read matters for the gate, and
    for nothing else.
    """
    pair, graph = Pair([3], [7], [0], [[1]], [[2]]), ComponentGraph(L, H)
    readers = [graph.reader[part, layer] for part in "qk" for layer in range(L)]
    largest = {}
    for gated in (False, True):
        scores = attribute_edges(make(gated), [pair], LOGIT)
        largest[gated] = max(scores[:, reader].abs().max() for reader in readers)
    assert largest[False] < 1e-12 and largest[True] > 1e-3


def test_hooks_change_nothing_by_being_there(model):
    idx = torch.randint(0, V, (3, 20))
    for settings in ({}, {"bias": False}, {"tied": False}):
        other = make(model.config.gated, **settings)
        assert torch.allclose(other(idx)[0], patched(other, idx, Watch(ComponentGraph(L, H))), atol=1e-12)


@torch.no_grad()
def test_edges_on_no_path_are_dropped_and_that_changes_no_result(model, pairs):
    graph = ComponentGraph(L, H)
    keep = torch.zeros_like(graph.edges)
    final, mlp = graph.R - 1, graph.writer["mlp", 0].start
    keep[mlp, final] = True  # the MLP's output is heard, but it hears nothing
    keep[0, graph.reader["q", 1].start] = True  # head 1.0 hears, but nobody hears it
    assert not graph.on_paths(keep).any()
    keep[0, graph.reader["mlp", 0]] = True
    assert graph.on_paths(keep).nonzero().tolist() == [[0, graph.reader["mlp", 0].start], [mlp, final]]
    assert torch.equal(graph.on_paths(graph.edges), graph.edges)

    keep = graph.edges & (torch.rand(graph.W, graph.R, generator=torch.Generator().manual_seed(3)) < 0.25)
    assert int(graph.on_paths(keep).sum()) < int(keep.sum())
    _, _, values = effects(model, pairs, LOGIT, [keep, graph.on_paths(keep)])
    assert torch.allclose(values[0], values[1], atol=1e-9)


@torch.no_grad()
def test_heads_that_never_open_are_out_of_the_graph(pairs):
    model, graph, D = make(True), ComponentGraph(L, H), C // H
    c_attn = model.transformer.h[1].attn.c_attn  # head 1.0: every query is far from every key
    c_attn.weight[:D] = c_attn.weight[C:C + D] = 0.0
    c_attn.bias[:D], c_attn.bias[C:C + D] = 5.0, -5.0
    dead = dead_heads(model, pairs)
    assert dead.tolist() == [[False, False], [True, False]] and not dead_heads(make(False), pairs).any()
    edges, head = without_dead_heads(graph, dead), graph.writer["heads", 1].start
    assert not edges[head].any()
    gone = int((graph.edges & ~edges).sum())
    assert gone == int(graph.edges[head].sum()) + 3 * graph.before["q", 1]
    _, _, values = effects(model, pairs, LOGIT, [graph.edges, edges])
    assert torch.allclose(values[0], values[1], atol=1e-9)


def test_best_edges_are_the_largest_in_size():
    graph = ComponentGraph(L, H)
    scores = torch.randn(graph.W, graph.R, generator=torch.Generator().manual_seed(0))
    kept = best_edges(scores, graph.edges, 7)
    assert int(kept.sum()) == 7 and scores[kept].abs().min() >= scores[graph.edges & ~kept].abs().max()
    assert torch.equal(best_edges(scores, graph.edges, 10_000), graph.edges)


def test_curves_are_read_off_on_a_logarithmic_axis():
    assert sizes(32491)[:4] == [1, 2, 3, 4]
    assert sizes(32491)[-1] == 32491
    assert len(sizes(32491)) > 25
    assert sizes(3) == [1, 2, 3]
    assert needed([1, 10, 100], [0.0, 0.5, 1.0], 0.75) == pytest.approx(10**1.5)
    assert needed([1, 10], [0.95, 1], 0.9) == 1
    assert needed([1, 10], [0.1, 0.2], 0.9) is None
    assert needed([1, 10], [math.nan, math.nan], 0.9) is None
    # what was enough by luck does not count
    assert needed([1, 10, 100, 1000], [0.0, 0.95, 0.5, 1.0], 0.75) == pytest.approx(10**2.5)


def test_explained_effects_and_the_band_that_covers_what_other_prompts_would_give():
    shares, low, high = explained([3.0, 5.0], [1.0, 1.0], [[3.0, 5.0], [1.0, 1.0], [2.0, 4.0]])
    assert shares.tolist() == pytest.approx([1, 0, 4 / 6])
    assert low[:2].tolist() == high[:2].tolist() == [1, 0]
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        clean, corrupted = generator.normal(3, 1, 80), generator.normal(0, 1, 80)
        part = 0.7 * clean + 0.3 * corrupted + generator.normal(0, 0.5, 80)
        share, low, high = explained(clean, corrupted, [part], resamples=200, seed=trial)
        covered += low[0] <= 0.7 <= high[0]
    assert 175 <= covered <= 200


def test_metrics_are_what_the_tasks_say():
    logits = torch.tensor([[[0.0, 1.0, 2.0, 4.0], [1.0, 0.0, 0.0, 0.0]]])
    pair = Pair([0, 0], [1, 1], [0, 1], [[3], [0]], [[0, 1], [1]])
    assert metric_of(logits, [pair], LOGIT).item() == pytest.approx(((4 - 0.5) + (1 - 0)) / 2)
    p = logits.softmax(-1)[0]
    assert metric_of(logits, [pair], PROBABILITY).item() == pytest.approx(
        ((p[0, 3] - p[0, 0] - p[0, 1]) + (p[1, 0] - p[1, 1])).item() / 2)


@torch.no_grad()
def test_prefix_matching_and_copying_by_their_definitions(model):
    scores, length = induction.prefix_matching(model.float(), sequences=2, length=9), 9
    first = torch.rand(2, V, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :length]
    seen = []
    model(torch.cat([first, first], 1), record=lambda layer, gates: seen.append(gates.open * gates.pattern))
    copied = induction.copying_scores(model)
    unembed = model.lm_head.weight * model.transformer.ln_f.weight
    for layer, block in enumerate(model.transformer.h):
        embed = (model.transformer.wte.weight * block.ln_1.weight).T
        for head in range(H):
            weights = [seen[layer][b, head, i, i - length + 1].item()
                       for b in range(2) for i in range(length, 2 * length)]
            assert scores[layer, head].item() == pytest.approx(np.mean(weights), abs=1e-6)
            part = slice(head * C // H, (head + 1) * C // H)
            w_o, w_v = block.attn.c_proj.weight[:, part], block.attn.c_attn.weight[2 * C:][part]
            eigenvalues = torch.linalg.eigvals((unembed @ w_o @ w_v @ embed).double())  # (V, V), of rank D
            by_hand = (eigenvalues.sum().real / eigenvalues.abs().sum()).item()
            assert copied[layer, head].item() == pytest.approx(by_hand, abs=1e-3)


@torch.no_grad()
def test_a_head_that_copies_scores_one():
    model = make(False).float()
    block = model.transformer.h[0]
    model.transformer.ln_f.weight[:] = block.ln_1.weight[:] = 1.0
    # reads what the embedding wrote, and writes it again
    block.attn.c_attn.weight[2 * C:2 * C + C // H] = model.transformer.wte.weight[:C // H]
    block.attn.c_proj.weight[:, :C // H] = model.transformer.wte.weight[:C // H].T
    assert induction.copying_scores(model)[0, 0] > 0.99
