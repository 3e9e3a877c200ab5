"""Attribution graphs: what comes in sums to what is there, in models whose norms have gains and biases."""

import pytest
import torch

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


def case(settings, cross=True):
    torch.manual_seed(4)
    model, coder, tokens = random_model(**settings), random_transcoder(cross), torch.randint(0, V, (T,))
    return model, coder, tokens, graph_of(model, coder, tokens)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("cross", [True, False])
def test_what_comes_in_sums_to_the_pre_activation_and_to_the_logit(settings, cross):
    model, coder, tokens, graph = case(settings, cross)
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
def test_with_error_nodes_the_model_comes_back():
    model, coder, tokens, graph = case(CASES[0])
    z, logits = replay(model, coder, tokens)
    torch.testing.assert_close(logits, model(tokens[None])[0][0, -1])
    for node, value in zip(graph.targets, graph.values):
        if node.kind == "feature":
            assert z[node.position, node.layer, node.number].item() == pytest.approx(value.item(), abs=1e-9)


@torch.no_grad()
def test_doubling_a_source_moves_every_target_by_its_column():
    model, coder, tokens, graph = case(CASES[0])
    before_z, before = replay(model, coder, tokens)
    for s in range(0, len(graph.sources) - 1, 9):
        z, logits = replay(model, coder, tokens, {graph.sources[s]: 2.0})
        for t, node in enumerate(graph.targets):
            if node.kind == "feature":
                moved = (z - before_z)[node.position, node.layer, node.number]
            else:
                moved = (logits - before)[node.number] - (logits - before).mean()
            assert moved.item() == pytest.approx(graph.edges[t, s].item(), abs=1e-9)


def shares_by_hand(model, coder, tokens, graph, t):
    """(S, L, H, T) of one target, head by head and key by key."""
    plain, node = coder.folded(), graph.targets[t]
    frozen = freeze(model, plain, tokens)
    found = torch.zeros(len(graph.sources), L, H, T).double()
    norm = model.transformer.ln_f if node.kind == "logit" else model.blocks[node.layer].ln_2
    if node.kind == "logit":
        reader = model.lm_head.weight[node.number] - model.lm_head.weight.mean(0)
    else:
        reader = plain.encoder[node.layer, node.number]
    for layer in range(L if node.kind == "logit" else node.layer + 1):
        block, i = model.blocks[layer], node.position
        for s in range(len(graph.sources)):
            u = centred(block.ln_1, frozen.spread[block.ln_1], graph.streams[layer, s])
            if s == len(graph.sources) - 1:
                u = u + block.ln_1.bias
            for h in range(H):
                D = C // H
                w_v = block.attn.c_attn.weight[2 * C + h * D:2 * C + (h + 1) * D]
                v = u @ w_v.T
                if s == len(graph.sources) - 1:
                    v = v + block.attn.c_attn.bias[2 * C + h * D:2 * C + (h + 1) * D]
                w_o = block.attn.c_proj.weight[:, h * D:(h + 1) * D]
                write = frozen.attention[layer][h, i][:, None] * v @ w_o.T
                found[s, layer, h] = centred(norm, frozen.spread[norm][i], write) @ reader
    return found


@torch.no_grad()
def test_direct_and_heads_make_the_edge():
    """Direct: what the source wrote at the target's own position. The heads' shares make up the rest."""
    model, coder, tokens, graph = case(CASES[0])
    plain = coder.folded()
    for t in (0, 15, len(graph.targets) - 1):
        node, shares = graph.targets[t], shares_by_hand(model, coder, tokens, graph, t)
        torch.testing.assert_close(graph.reads[t], shares.abs().sum(0))
        shares = shares.sum(-1)
        torch.testing.assert_close(graph.through[t], shares.abs().sum(0))
        torch.testing.assert_close(graph.net[t], shares.sum(0))
        for s in (0, 9, len(graph.sources) - 1):
            torch.testing.assert_close(shares_of(model, graph, t, s), shares[s])
        norm = model.transformer.ln_f if node.kind == "logit" else model.blocks[node.layer].ln_2
        top = L if node.kind == "logit" else node.layer
        reader = plain.encoder[node.layer, node.number]
        if node.kind == "logit":
            reader = model.lm_head.weight[node.number] - model.lm_head.weight.mean(0)
        frozen = freeze(model, plain, tokens)
        for s, source in enumerate(graph.sources[:-1]):
            direct = torch.zeros(C).double()
            if source.position == node.position:
                if source.kind == "embedding":
                    direct = model.transformer.wte(tokens[source.position]) \
                        + model.transformer.wpe.weight[source.position]
                elif source.kind == "error" and source.layer < top:
                    direct = frozen.errors[source.position, source.layer]
                elif source.kind == "feature" and source.layer < top:
                    a = frozen.features[source.position, source.layer, source.number]
                    direct = a * plain.decoders()[source.layer, :top, source.number].sum(0)
            own = centred(norm, frozen.spread[norm][node.position], direct) @ reader
            assert (own + shares[s].sum()).item() == pytest.approx(graph.edges[t, s].item(), abs=1e-9)


@torch.no_grad()
def test_a_head_that_writes_nothing_and_a_head_that_is_shut_carry_exactly_nothing():
    torch.manual_seed(4)
    model, coder, tokens = random_model(**CASES[0]), random_transcoder(), torch.randint(0, V, (T,))
    D = C // H
    model.blocks[1].attn.c_proj.weight[:, :D] = 0
    assert (graph_of(model, coder, tokens).through[:, 1, 0] == 0).all()
    model.config.gate_bias = [[0.1, 0.1], [0.1, 0.1], [0.1, -1e6]]
    graph = graph_of(model, coder, tokens)
    assert (graph.through[:, 2, 1] == 0).all() and (graph.through[:, 2, 0] > 0).any()


@pytest.mark.parametrize("settings", CASES)
@torch.no_grad()
def test_pairs_of_sources_sum_to_the_score_that_opens_the_edge(settings):
    model, coder, tokens, graph = case(settings)
    scores_of, opened = [], []

    def watch(attend):
        def watched(q, k, v, **options):
            scores_of.append((q @ k.transpose(-2, -1) / (C // H) ** 0.5)[0])
            return attend(q, k, v, **options)
        return watched

    for attention in model.attentions:
        attention.attend = watch(attention.attend)
    model(tokens[None], record=lambda layer, gates: opened.append(gates.open[0]))
    for attention in model.attentions:
        del attention.attend
    for layer, head, i, j in ((0, 0, 3, 1), (1, 1, 5, 0), (2, 0, 4, 4)):
        found = why_open(model, graph, layer, head, i, j)
        assert found.shape == (len(graph.sources), len(graph.sources))
        assert found.sum().item() == pytest.approx(scores_of[layer][head, i, j].item(), abs=1e-9)
        if settings["gated"]:
            assert bool(opened[layer][head, i, j]) == bool(found.sum() + settings["gate_bias"] > 0)


def test_any_answer_can_be_asked_for():
    model, coder, tokens, graph = case(CASES[0])
    logits = model(tokens[None])[0][0, 2]
    found = graph_of(model, coder, tokens, at=2, answer=7)
    assert found.targets[-1] == Node("logit", -1, 2, 7) and found.chances.tolist() == [1.0]
    assert found.values[-1].item() == pytest.approx((logits[7] - logits.mean()).item())
    torch.testing.assert_close(found.edges[:-1], graph.edges[:len(found.edges) - 1])


def test_influence_is_the_sum_over_all_paths():
    _, _, _, graph = case(CASES[0])
    matrix, ends = square(graph)
    n = len(ends)
    by_inverse = ends @ (torch.linalg.inv(torch.eye(n).double() - matrix) - torch.eye(n).double())
    torch.testing.assert_close(influence_of(matrix, ends), by_inverse)
    torch.testing.assert_close(matrix.sum(1)[-len(graph.chances):], torch.ones(len(graph.chances)).double())


def test_scores_are_one_without_errors_and_less_with_them():
    model, coder, tokens, graph = case(CASES[0])
    found = scores(graph)
    assert 0 < found["replacement"] < 1 and 0 < found["completeness"] < 1
    kinds = torch.tensor([node.kind == "error" for node in graph.sources])
    perfect = scores(graph._replace(edges=graph.edges.masked_fill(kinds, 0)))
    assert perfect == {"replacement": 1.0, "completeness": 1.0}


def test_pruning_keeps_tokens_and_logits_and_leaves_nothing_dangling():
    _, _, _, graph = case(CASES[0])
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
    _, _, _, graph = case(CASES[0])
    matrix, ends = square(graph)
    influence, features = influence_of(matrix, ends) + ends, len(graph.targets) - len(graph.chances)
    by_hand = torch.zeros(L, H).double()
    for t in range(len(graph.targets)):
        weight = influence[t] if t < features else influence[len(graph.sources) + t - features]
        by_hand += weight * graph.through[t] / graph.edges[t].abs().sum()
    torch.testing.assert_close(heads_of(graph), by_hand)


def test_an_attention_edge_counts_by_what_is_read_there():
    model, coder, tokens, graph = case(GATED)
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
