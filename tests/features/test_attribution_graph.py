"""Attribution graphs: what comes in sums to what is there, in models whose norms have gains and biases."""

import functools

import pytest
import torch

from circuits.attention_edges import attending
from features.attribution_graph import Node, centred, freeze, graph_of, shares_of, why_open
from features.influence import (
    attention_edges_of,
    heads_of,
    influence_of,
    least_that_hold,
    n80,
    pruned,
    scores,
    square,
)
from features.transcoder import Transcoder
from model import GPT, GPTConfig

L, H, C, F, T, V = 3, 2, 8, 12, 6, 11
GATED = {"gated": True, "gate_bias": 0.1}
CASES = [GATED, {"gated": False}, GATED | {"bias": False}]


def random_model(**settings):
    """All parameters random, norms too, in float64; gated: about half of the edges open."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C, **settings)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model.eval()


def random_transcoder(cross=True):
    torch.manual_seed(3)
    coder = Transcoder(L, C, F, cross).double()
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    coder.scale_in.uniform_(0.5, 2)
    coder.scale_out.uniform_(0.5, 2)
    return coder


@functools.cache
def case(number=0, cross=True):
    """(model, transcoder, tokens, graph), made once. number: of CASES."""
    model, coder = random_model(**CASES[number]), random_transcoder(cross)
    tokens = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(4))
    return model, coder, tokens, graph_of(model, coder, tokens)


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("cross", [True, False])
def test_what_comes_in_sums_to_the_pre_activation_and_to_the_logit(number, cross):
    model, coder, tokens, graph = case(number, cross)
    assert sum(node.kind == "feature" for node in graph.targets) > 20
    torch.testing.assert_close(graph.edges.sum(1), graph.values, rtol=1e-9, atol=1e-9)
    logits = model(tokens[None])[0][0, -1]
    for node, value in zip(graph.targets, graph.values):
        if node.kind == "logit":
            assert value.item() == pytest.approx((logits[node.number] - logits.mean()).item(), abs=1e-9)
    assert graph.chances.sum() >= 0.95 or len(graph.chances) == 10


def replay(model, coder, tokens, scale=None, passing=False):
    """The local replacement model, run: z (T, L, F) and last logits. scale: {source Node: factor of what it
    writes}; passing: features that fire say what this run makes of them, else what they were. Written apart
    from graph_of: one stream, no sources.
    """
    plain, scale = coder.folded(), scale or {}
    frozen, parts = freeze(model, plain, tokens), model.transformer

    def factor(*node):
        return scale.get(Node(*node), 1.0)

    x = parts.wte(tokens) + parts.wpe(torch.arange(T))
    x = torch.stack([factor("embedding", -1, j, int(tokens[j])) * x[j] for j in range(T)])
    found = []
    for layer, block in enumerate(model.blocks):
        u = centred(block.ln_1, frozen.spread[block.ln_1], x)
        if block.ln_1.bias is not None:
            u = u + block.ln_1.bias
        v = block.attn.c_attn(u)[:, 2 * C:].view(T, H, C // H)
        mixed = torch.einsum("hij,jhd->ihd", frozen.attention[layer], v).flatten(1)
        x = x + block.attn.c_proj(mixed)
        m = centred(block.ln_2, frozen.spread[block.ln_2], x)
        if block.ln_2.bias is not None:
            m = m + block.ln_2.bias
        found.append(m @ plain.encoder[layer].T + plain.b_enc[layer])
        write = plain.b_dec[layer].expand(T, C).clone()
        for below in range(layer + 1):
            for t in range(T):
                for i in range(F):
                    a = frozen.features[t, below, i]
                    if passing and a > 0:
                        a = found[below][t, i]
                    a = a * factor("feature", below, t, i)
                    write[t] += a * plain.decoders()[below, layer, i]
        for t in range(T):
            write[t] += factor("error", layer, t, -1) * frozen.errors[t, layer]
        x = x + write
    out = centred(parts.ln_f, frozen.spread[parts.ln_f], x)
    if parts.ln_f.bias is not None:
        out = out + parts.ln_f.bias
    return torch.stack(found, 1), model.lm_head(out)[-1]


@torch.no_grad()
def test_the_model_comes_back_and_doubling_a_source_moves_every_target_by_its_column():
    model, coder, tokens, graph = case()
    before_z, before = replay(model, coder, tokens)
    torch.testing.assert_close(before, model(tokens[None])[0][0, -1])

    def at_targets(z, logits):
        return torch.stack([z[node.position, node.layer, node.number] if node.kind == "feature"
                            else logits[node.number] - logits.mean() for node in graph.targets])

    torch.testing.assert_close(at_targets(before_z, before), graph.values)
    for s in range(0, len(graph.sources) - 1, 9):
        z, logits = replay(model, coder, tokens, {graph.sources[s]: 2.0})
        moved = at_targets(z, logits) - at_targets(before_z, before)
        torch.testing.assert_close(moved, graph.edges[:, s], rtol=0, atol=1e-9)


def shares_by_hand(model, coder, tokens, graph, t):
    """(S, L, H, T) of one target, head by head and key by key."""
    plain, node, D = coder.folded(), graph.targets[t], C // H
    frozen = freeze(model, plain, tokens)
    found = torch.zeros(len(graph.sources), L, H, T).double()
    if node.kind == "feature":
        norm, top = model.blocks[node.layer].ln_2, node.layer + 1
        reader = plain.encoder[node.layer, node.number]
    else:
        norm, top = model.transformer.ln_f, L
        reader = model.lm_head.weight[node.number] - model.lm_head.weight.mean(0)
    for layer in range(top):
        block, i = model.blocks[layer], node.position
        for s in range(len(graph.sources)):
            is_bias = s == len(graph.sources) - 1
            u = centred(block.ln_1, frozen.spread[block.ln_1], graph.streams[layer, s])
            u = u + is_bias * block.ln_1.bias
            for h in range(H):
                rows = slice(2 * C + h * D, 2 * C + (h + 1) * D)
                v = u @ block.attn.c_attn.weight[rows].T + is_bias * block.attn.c_attn.bias[rows]
                w_o = block.attn.c_proj.weight[:, h * D:(h + 1) * D]
                write = frozen.attention[layer][h, i][:, None] * v @ w_o.T
                found[s, layer, h] = centred(norm, frozen.spread[norm][i], write) @ reader
    return found


@torch.no_grad()
def test_what_heads_carry_is_the_formula_head_by_head():
    """The edge is that and what is direct: what the source wrote at the target's own position."""
    model, coder, tokens, graph = case()
    for t in (0, 15, len(graph.targets) - 1):
        shares = shares_by_hand(model, coder, tokens, graph, t)
        torch.testing.assert_close(graph.reads[t], shares.abs().sum(0))
        shares = shares.sum(-1)
        torch.testing.assert_close(graph.through[t], shares.abs().sum(0))
        torch.testing.assert_close(graph.net[t], shares.sum(0))
        for s in (0, 9, len(graph.sources) - 1):
            torch.testing.assert_close(shares_of(model, graph, t, s), shares[s])
        elsewhere = [s for s, source in enumerate(graph.sources[:-1])
                     if source.position != graph.targets[t].position]
        torch.testing.assert_close(graph.edges[t, elsewhere], shares[elsewhere].sum((1, 2)))


@torch.no_grad()
def test_a_head_that_writes_nothing_and_a_head_that_is_shut_carry_exactly_nothing():
    _, coder, tokens, _ = case()
    model = random_model(**CASES[0])
    D = C // H
    model.blocks[1].attn.c_proj.weight[:, :D] = 0
    assert (graph_of(model, coder, tokens).through[:, 1, 0] == 0).all()
    model.config.gate_bias = [[0.1, 0.1], [0.1, 0.1], [0.1, -1e6]]
    graph = graph_of(model, coder, tokens)
    assert (graph.through[:, 2, 1] == 0).all() and (graph.through[:, 2, 0] > 0).any()


@pytest.mark.parametrize("number", range(len(CASES)))
@torch.no_grad()
def test_pairs_of_sources_sum_to_the_score_that_opens_the_edge(number):
    model, coder, tokens, graph = case(number)
    scores_of, opened = [], []

    def watch(layer, original, q, k, v, **options):
        scores_of.append((q @ k.transpose(-2, -1) / (C // H) ** 0.5)[0])
        return original(q, k, v, **options)

    with attending(model, watch):
        model(tokens[None], record=lambda layer, gates: opened.append(gates.open[0]))
    for layer, head, i, j in ((0, 0, 3, 1), (1, 1, 5, 0), (2, 0, 4, 4)):
        found = why_open(model, graph, layer, head, i, j)
        assert found.shape == (len(graph.sources), len(graph.sources))
        assert found.sum().item() == pytest.approx(scores_of[layer][head, i, j].item(), abs=1e-9)
        if model.config.gated:
            assert bool(opened[layer][head, i, j]) == bool(found.sum() + model.config.gate_bias > 0)


def test_any_answer_can_be_asked_for():
    model, coder, tokens, graph = case()
    logits = model(tokens[None])[0][0, 2]
    found = graph_of(model, coder, tokens, at=2, answer=7)
    assert found.targets[-1] == Node("logit", -1, 2, 7) and found.chances.tolist() == [1.0]
    assert found.values[-1].item() == pytest.approx((logits[7] - logits.mean()).item())
    torch.testing.assert_close(found.edges[:-1], graph.edges[:len(found.edges) - 1])


def test_influence_is_the_sum_over_all_paths():
    *_, graph = case()
    matrix, ends = square(graph)
    eye = torch.eye(len(ends)).double()
    torch.testing.assert_close(influence_of(matrix, ends), ends @ (torch.linalg.inv(eye - matrix) - eye))
    torch.testing.assert_close(matrix.sum(1)[-len(graph.chances):], torch.ones(len(graph.chances)).double())


def test_scores_are_one_without_errors_and_less_with_them():
    *_, graph = case()
    found = scores(graph)
    assert 0 < found["replacement"] < 1 and 0 < found["completeness"] < 1
    kinds = torch.tensor([node.kind == "error" for node in graph.sources])
    perfect = scores(graph._replace(edges=graph.edges.masked_fill(kinds, 0)))
    assert perfect == {"replacement": 1.0, "completeness": 1.0}


def test_pruning_keeps_tokens_and_logits_and_leaves_nothing_dangling():
    *_, graph = case()
    nodes, edges = pruned(graph)
    S = len(graph.sources)
    assert nodes[S:].all() and 0 < nodes[:S].sum() < S
    assert not edges[~nodes].any() and not edges[:, ~nodes].any()
    for s, node in enumerate(graph.sources):
        if node.kind == "embedding":
            assert nodes[s]
        elif nodes[s]:
            assert edges[:, s].any()
            if node.kind == "feature":
                assert edges[s].any()


def test_the_fewest_that_hold_a_share():
    weights = torch.tensor([[5.0, 1.0], [3.0, 1.0]])
    assert least_that_hold(weights, 0.5).tolist() == [[True, False], [False, False]]
    assert least_that_hold(weights, 0.8).tolist() == [[True, False], [True, False]]
    assert n80(weights) == 2 and n80(torch.ones(4, 4)) == 13 and n80(torch.zeros(3, 2)) == 0


def test_a_head_counts_by_the_influence_of_what_it_feeds():
    *_, graph = case()
    matrix, ends = square(graph)
    influence, features = influence_of(matrix, ends) + ends, len(graph.targets) - len(graph.chances)
    by_hand = torch.zeros(L, H).double()
    for t in range(len(graph.targets)):
        weight = influence[t] if t < features else influence[len(graph.sources) + t - features]
        by_hand += weight * graph.through[t] / graph.edges[t].abs().sum()
    torch.testing.assert_close(heads_of(graph), by_hand)


def test_an_attention_edge_counts_by_what_is_read_there():
    model, coder, tokens, graph = case()
    found = attention_edges_of(graph)
    assert found.shape == (L, H, T, T) and not found.triu(1).any()
    opened = []
    model(tokens[None], record=lambda layer, gates: opened.append(gates.open[0]))
    opened = torch.stack(opened) > 0
    assert not found[~opened].any() and (found[opened] > 0).any()
    assert (found.sum((2, 3)) >= heads_of(graph) - 1e-12).all()  # sums of |parts| against |sums|
    last = [t for t, node in enumerate(graph.targets) if node.position == T - 1]
    others = graph._replace(reads=graph.reads.clone())
    others.reads[last] = 0
    assert not attention_edges_of(others)[:, :, -1].any()
