"""graph.py, circuits/attribution.py and induction.py against an independent transformer that is written edge
by edge, against finite differences, and against TransformerLens.
"""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
from circuits import attribution as circuit
from circuits import induction
from circuits.attribution import (
    attribute_edges,
    best_edges,
    cut_edges,
    dead_heads,
    effects,
    explained,
    metric_of,
    needed,
    patch_components,
    sizes,
)
from circuits.graph import CircuitRun, ComponentGraph, Watch
from circuits.patching import patched
from circuits.prompts import copy as copying
from circuits.tasks import LOGIT, PROBABILITY, Pair, vocabulary
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, save_checkpoint

L, H, C, V = 2, 2, 16, 40
METRICS = [LOGIT, PROBABILITY]


def make(gated, **settings):
    torch.manual_seed(1)
    model = (
        GPT(
            GPTConfig(
                **{
                    "block_size": 32,
                    "vocab_size": V,
                    "n_layer": L,
                    "n_head": H,
                    "n_embd": C,
                    "gated": gated,
                    "gate_bias": 0.2,
                }
                | settings
            )
        )
        .eval()
        .double()
    )
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
    return [
        Pair(clean, corrupted, [len(clean) - 1], [right], [wrong]) for clean, corrupted, right, wrong in made
    ]


class ByHand:
    """The same network, one number of the graph at a time: every reader adds up what it reads from a
    dictionary of writes.
    """

    def __init__(self, model):
        self.model, self.t = model, model.transformer
        self.W = 1 + L * (H + 1)

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
                q, k, v = (
                    self.norm(read(layer * (3 * H + 1) + part * H + h), block.ln_1)
                    @ weight[part * C + h * D : part * C + (h + 1) * D].T
                    + bias[part * C + h * D : part * C + (h + 1) * D]
                    for part in range(3)
                )
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


def by_hand(model, pair, metric, moved):
    """The metric of one pair with edges moved, and without."""
    hand = ByHand(model)
    _, other = hand.run(torch.tensor(pair.corrupted))
    return [
        metric_of(hand.run(torch.tensor(pair.clean), edges, other)[0][None], [pair], metric).item()
        for edges in (moved, {})
    ]


def test_the_graph_of_gpt2_has_as_many_edges_as_the_literature_counts():
    graph = ComponentGraph(12, 12)
    assert (graph.W, graph.R, int(graph.edges.sum())) == (157, 445, 32491)
    names, readers = graph.writer_names(), graph.reader_names()
    assert (len(names), len(readers)) == (157, 445)
    assert names[graph.writer("heads", 3)][5] == "3.5"
    assert names[graph.writer("mlp", 3)] == ["mlp 3"]
    assert readers[graph.reader("k", 3)][5] == "3.5 k"
    assert readers[graph.reader("mlp", 3)] == ["mlp 3"]
    assert readers[graph.reader("final", None)] == ["output"]
    assert (
        all(
            names[graph.owner(i)] == readers[i].split(" k")[0].split(" q")[0].split(" v")[0]
            for i in range(444)
        )
        and graph.owner(444) == 157
    )


@torch.no_grad()
def test_every_edge_is_cut_as_by_hand(model, pairs):
    graph, pair = ComponentGraph(L, H), pairs[0]
    circuits = []
    for writer, reader in graph.edges.nonzero().tolist():
        keep = graph.edges.clone()
        keep[writer, reader] = False
        circuits.append(keep)
    clean, corrupted, values = effects(model, [pair], LOGIT, circuits)
    assert len(circuits) == 1 * 6 + 3 * 1 + 4 * 6 + 6 * 1 + 7  # q, k, v and MLP of two layers, and the output
    for (writer, reader), value in zip(graph.edges.nonzero().tolist(), values[:, 0]):
        cut, base = by_hand(model, pair, LOGIT, {(writer, reader): 1.0})
        assert value.item() == pytest.approx(cut, abs=1e-9) and clean.item() == pytest.approx(base, abs=1e-9)
    assert (values[:, 0] - clean).abs().max() > 1e-3 and abs(clean - corrupted) > 1e-3


@torch.no_grad()
def test_many_edges_cut_at_once_as_by_hand(model, pairs):
    graph = ComponentGraph(L, H)
    generator = torch.Generator().manual_seed(0)
    for share in (0.2, 0.5, 0.8):
        keep = graph.edges & (torch.rand(graph.W, graph.R, generator=generator) < share)
        _, _, values = effects(model, pairs[:2], LOGIT, [keep])
        for pair, value in zip(pairs, values[0]):
            assert value.item() == pytest.approx(
                by_hand(
                    model,
                    pair,
                    LOGIT,
                    {tuple(edge): 1.0 for edge in (graph.edges & ~keep).nonzero().tolist()},
                )[0],
                abs=1e-9,
            )


@pytest.mark.parametrize("metric", METRICS)
def test_all_edges_explain_everything_and_none_nothing(model, pairs, metric):
    graph = ComponentGraph(L, H)
    shares, low, high = explained(
        *effects(model, pairs, metric, [graph.edges, torch.zeros_like(graph.edges)], batch_size=2)
    )
    assert shares == pytest.approx([1, 0], abs=1e-5)
    assert low == pytest.approx([1, 0], abs=1e-5)
    assert high == pytest.approx([1, 0], abs=1e-5)


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
    scores, (_, other) = attribute_edges(model, [pair], metric), hand.run(torch.tensor(pair.corrupted))
    assert (scores[~graph.edges] == 0).all()
    assert scores.abs().max() > 1e-3
    assert not any(attention.training for attention in model.attentions)
    for writer, reader in graph.edges.nonzero().tolist():
        found = slope(
            model,
            lambda step: metric_of(
                hand.run(torch.tensor(pair.clean), {(writer, reader): step}, other)[0][None], [pair], metric
            )[0],
        )
        assert scores[writer, reader].item() == pytest.approx(found, abs=2e-6, rel=1e-4)


def test_integrated_gradients_average_over_the_way_from_the_corrupted_input(model, pairs):
    """EAP-IG's definition, with the package's steps k / steps, k from 0: the embedding of step k, everything
    behind it computed anew.
    """
    pair, steps, graph = pairs[0], 4, ComponentGraph(L, H)
    scores = attribute_edges(model, [pair], LOGIT, steps=steps)
    hand = ByHand(model)
    with torch.no_grad():
        (_, clean), (_, corrupted) = (
            hand.run(torch.tensor(prompt)) for prompt in (pair.clean, pair.corrupted)
        )
    for edge in graph.edges.nonzero().tolist()[::5]:
        slopes = [
            slope(
                model,
                lambda step: metric_of(
                    interpolated(hand, pair, k / steps, clean, corrupted, tuple(edge), step)[None],
                    [pair],
                    LOGIT,
                )[0],
            )
            for k in range(steps)
        ]
        assert scores[tuple(edge)].item() == pytest.approx(np.mean(slopes), abs=2e-6, rel=1e-4)


def test_an_edge_that_only_opens_a_gate_has_a_score():
    """With one token there is one key, whose weight is always 1: what q and k read matters for the gate, and
    for nothing else.
    """
    pair, graph = Pair([3], [7], [0], [[1]], [[2]]), ComponentGraph(L, H)
    scores = {
        gated: torch.cat(
            [
                attribute_edges(make(gated), [pair], LOGIT)[:, graph.reader(part, layer)].flatten()
                for part in "qk"
                for layer in range(L)
            ]
        )
        for gated in (False, True)
    }
    assert scores[False].abs().max() < 1e-12 and scores[True].abs().max() > 1e-3


@torch.no_grad()
def test_exact_scores_are_those_of_every_edge_cut_alone(model, pairs):
    graph = ComponentGraph(L, H)
    some = graph.edges & (torch.rand(graph.W, graph.R, generator=torch.Generator().manual_seed(2)) < 0.5)
    scores = cut_edges(model, pairs[:2], LOGIT, some)
    gone = {tuple(edge): 1.0 for edge in (graph.edges & ~some).nonzero().tolist()}
    assert (scores[~some] == 0).all()
    for edge in some.nonzero().tolist()[::4]:
        found = [
            by_hand(model, pair, LOGIT, gone | {tuple(edge): 1.0})[0] - by_hand(model, pair, LOGIT, gone)[0]
            for pair in pairs[:2]
        ]
        assert scores[tuple(edge)].item() == pytest.approx(np.mean(found), abs=1e-6)


def interpolated(hand, pair, way, clean, corrupted, edge, step):
    """Logits with the embedding `way` from corrupted to clean, and one edge moved by step times (corrupted -
    clean) of its writer.
    """
    changed = copy.copy(hand)  # the same network, whose embedding of position i is row i of a table
    changed.t = SimpleNamespace(h=hand.t.h, ln_f=hand.t.ln_f,
                                wte=SimpleNamespace(weight=corrupted[0] + way * (clean[0] - corrupted[0])),
                                wpe=SimpleNamespace(weight=torch.zeros_like(hand.t.wpe.weight)))
    positions = torch.arange(len(pair.clean))
    _, plain = changed.run(positions)
    # moving towards it by `step` adds step (corrupted - clean)
    target = [y + (b - a) for y, a, b in zip(plain, clean, corrupted)]
    return changed.run(positions, {edge: step}, target)[0]


def test_patching_components_is_transformer_lens_activation_patching(workplace, pairs):
    lens = pytest.importorskip("transformer_lens")
    patching = pytest.importorskip("transformer_lens.patching")
    from transformer_lens.pretrained.weight_conversions import convert_nanogpt_weights

    model = make(False).float()
    save_checkpoint("ours.pt", checkpoint_of(model))
    analyze.main(["export", "ours.pt", "--to", "transformer_lens", "lens.pt"])
    saved = torch.load("lens.pt", weights_only=True)
    other = lens.HookedTransformer(lens.HookedTransformerConfig(**saved["cfg"], device="cpu")).eval()
    other.load_and_process_state_dict(convert_nanogpt_weights(saved["state_dict"], other.cfg), fold_ln=False,
                                      center_writing_weights=False, center_unembed=False,
                                      fold_value_biases=False)
    same = [pair for pair in pairs if len(pair.clean) == len(pairs[0].clean)]
    clean, corrupted = (
        torch.tensor([getattr(pair, which) for pair in same]) for which in ("clean", "corrupted")
    )
    with torch.no_grad():
        # their patching brings activations of the cache into runs of the tokens
        _, cache = other.run_with_cache(corrupted)

        def measure(logits):
            return metric_of(logits, same, LOGIT).mean()

        base = measure(other(clean))
        heads = patching.get_act_patch_attn_head_out_all_pos(other, clean, cache, measure) - base
        mlps = patching.generic_activation_patch(other, clean, cache, measure,
                                                 patching.layer_pos_patch_setter, "mlp_out", index_df=None,
                                                 index_axis_names=("layer", "pos"))
    ours, graph = patch_components(model, same, LOGIT), ComponentGraph(L, H)
    for layer in range(L):
        assert torch.allclose(ours[graph.writer("heads", layer)], heads[layer].float(), atol=1e-4)
    whole = []
    for layer in range(L):  # their MLP patching goes by position; all positions at once by a hook
        with torch.no_grad():
            whole.append(
                (
                    measure(
                        other.run_with_hooks(
                            clean,
                            fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", lambda y, hook: cache[hook.name])],
                        )
                    )
                    - base
                ).item()
            )
    assert [ours[graph.writer("mlp", layer)].item() for layer in range(L)] == pytest.approx(whole, abs=1e-4)
    assert mlps.shape == (L, len(same[0].clean))
    assert heads.abs().max() > 1e-3


@torch.no_grad()
def test_gates_are_computed_anew_in_a_patched_run(pairs):
    """Cut what a gate's query reads, and the gate itself changes: with the clean run's gates kept the answer
    would be another one.
    """
    model, graph, pair = make(True), ComponentGraph(L, H), pairs[0]
    keep = graph.edges.clone()
    # layer 1's queries see the heads of layer 0 as they were in the corrupted run
    keep[1:1 + H, graph.reader("q", 1)] = False
    seen = []

    def look(layer, gates):
        seen.append(gates.open.clone())

    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    watch = Watch(graph)
    patched(model, corrupted, watch)
    model(clean, record=look)
    now = patched(model, clean, CircuitRun(graph, keep, watch.writes), record=look)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])
    frozen = patched(model, clean, CircuitRun(graph, keep, watch.writes),
                     keep=torch.stack([seen[0], seen[1]]).bool())
    assert (now - frozen).abs().max() > 1e-3
    hand = ByHand(model)
    _, other = hand.run(torch.tensor(pair.corrupted))
    moved = {tuple(edge): 1.0 for edge in (graph.edges & ~keep).nonzero().tolist()}
    assert (now[0] - hand.run(torch.tensor(pair.clean), moved, other)[0]).abs().max() < 1e-9


def test_hooks_change_nothing_by_being_there(model):
    idx = torch.randint(0, V, (3, 20))
    for settings in ({}, {"bias": False}, {"tied": False}):
        other = make(model.config.gated, **settings)
        assert torch.allclose(other(idx)[0], patched(other, idx, Watch(ComponentGraph(L, H))), atol=1e-12)


def test_edges_on_no_path_are_dropped():
    graph = ComponentGraph(L, H)
    keep = torch.zeros_like(graph.edges)
    final, mlp = graph.R - 1, graph.writer("mlp", 0).start
    keep[mlp, final] = True  # the MLP's output is heard, but it hears nothing
    keep[0, graph.reader("q", 1).start] = True  # head 1.0 hears, but nobody hears it
    assert not graph.on_paths(keep).any()
    keep[0, graph.reader("mlp", 0)] = True
    assert graph.on_paths(keep).nonzero().tolist() == [[0, graph.reader("mlp", 0).start], [mlp, final]]
    assert torch.equal(graph.on_paths(graph.edges), graph.edges)


@torch.no_grad()
def test_dropping_them_changes_no_result(model, pairs):
    graph = ComponentGraph(L, H)
    keep = graph.edges & (torch.rand(graph.W, graph.R, generator=torch.Generator().manual_seed(3)) < 0.25)
    assert int(graph.on_paths(keep).sum()) < int(keep.sum())
    _, _, values = effects(model, pairs, LOGIT, [keep, graph.on_paths(keep)])
    assert torch.allclose(values[0], values[1], atol=1e-9)


def test_heads_that_never_open_are_out_of_the_graph(pairs):
    model = make(True)
    D = C // H
    bias = model.transformer.h[1].attn.c_attn.bias
    with torch.no_grad():  # head 1.0: every query is far from every key
        model.transformer.h[1].attn.c_attn.weight[:D] = model.transformer.h[1].attn.c_attn.weight[
            C : C + D
        ] = 0.0
        bias[:D], bias[C:C + D] = 5.0, -5.0
    dead = dead_heads(model, pairs)
    assert dead.tolist() == [[False, False], [True, False]] and not dead_heads(make(False), pairs).any()
    graph = ComponentGraph(L, H)
    edges = circuit.without_dead_heads(graph, dead)
    gone = graph.edges & ~edges
    head = graph.writer("heads", 1).start
    assert set(gone.nonzero()[:, 0].tolist()) >= {head}
    assert int(gone.sum()) == int(graph.edges[head].sum()) + 3 * graph.before("q", 1)
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


def test_the_band_covers_what_other_prompts_would_give():
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
        ((p[0, 3] - p[0, 0] - p[0, 1]) + (p[1, 0] - p[1, 1])).item() / 2
    )


def test_prefix_matching_and_copying_by_their_definitions(model):
    scores, length = induction.prefix_matching(model.float(), sequences=2, length=9), 9
    seen = []
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, V, generator=generator).argsort(dim=1)[:, :length]
    with torch.no_grad():
        model(torch.cat([first, first], 1), record=lambda layer,
              gates: seen.append(gates.open * gates.pattern))
    for layer in range(L):
        for head in range(H):
            weights = [
                seen[layer][b, head, i, i - length + 1].item()
                for b in range(2)
                for i in range(length, 2 * length)
            ]
            assert scores[layer, head].item() == pytest.approx(np.mean(weights), abs=1e-6)
    copying = induction.copying_scores(model)
    for layer, block in enumerate(model.transformer.h):
        for head in range(H):
            part = slice(head * C // H, (head + 1) * C // H)
            whole = (
                (model.lm_head.weight * model.transformer.ln_f.weight)
                @ block.attn.c_proj.weight[:, part]
                @ block.attn.c_attn.weight[2 * C :][part]
                @ (model.transformer.wte.weight * block.ln_1.weight).T
            )
            eigenvalues = torch.linalg.eigvals(whole.double())  # (V, V), of rank D
            assert copying[layer, head].item() == pytest.approx(
                (eigenvalues.sum().real / eigenvalues.abs().sum()).item(), abs=1e-3
            )


def test_a_head_that_copies_scores_one():
    model = make(False).float()
    with torch.no_grad():
        block = model.transformer.h[0]
        model.transformer.ln_f.weight[:] = block.ln_1.weight[:] = 1.0
        # reads what the embedding wrote, and writes it again
        block.attn.c_attn.weight[2 * C:2 * C + C // H] = model.transformer.wte.weight[:C // H]
        block.attn.c_proj.weight[:, :C // H] = model.transformer.wte.weight[:C // H].T
    assert induction.copying_scores(model)[0, 0] > 0.99
