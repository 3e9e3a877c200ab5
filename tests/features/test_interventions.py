"""Interventions: the graph foretells what the frozen model does; cuts in the real one are what they say."""

import pytest
import torch
from test_attribution_graph import CASES, C, H, L, T, case, random_model, replay

from features.interventions import (
    FEATURES,
    HEADS,
    CutEffect,
    answer_of,
    in_short,
    interventions,
    strongest_and_others,
    totals,
    totals_of_heads,
    without,
    without_head,
)
from features.transcoder import read_and_written
from model import by_layer


@pytest.mark.parametrize("cross", [True, False])
@torch.no_grad()
def test_what_is_due_to_a_source_is_what_the_frozen_model_loses_without_it(cross):
    model, coder, tokens, graph = case(0, cross)
    token = graph.targets[-len(graph.chances)].number
    _, before = replay(model, coder, tokens, passing=True)
    due = totals(graph)
    for s in range(0, len(graph.sources) - 1, 7):
        _, logits = replay(model, coder, tokens, {graph.sources[s]: 0.0}, passing=True)
        lost = (before - logits)[token] - (before - logits).mean()
        assert due[s].item() == pytest.approx(lost.item(), abs=1e-8)


@torch.no_grad()
def test_what_is_due_to_a_head_adds_up_over_all_that_it_passes_on_to():
    *_, graph = case()
    n, due = len(graph.targets) - len(graph.chances), totals(graph)
    by_hand = graph.net[n].clone()
    for t in range(n):
        by_hand += graph.net[t] * due[t] / graph.values[t]
    torch.testing.assert_close(totals_of_heads(graph), by_hand)


def by_hand(model, coder, tokens, feature, activation, answer):
    """The forward pass, block by block, a feature's writes taken off."""
    parts, decoders = model.transformer, coder.folded().decoders()
    x, own = parts.wte(tokens) + parts.wpe(torch.arange(T)), by_layer(model.config, None, "cpu")
    for layer, block in enumerate(model.blocks):
        x = x + block.attn(block.ln_1(x)[None], **own[layer])[0][0]
        written = block.mlp(block.ln_2(x))
        if layer >= feature.layer:
            written[feature.position] -= activation * decoders[feature.layer, layer, feature.number]
        x = x + written
    logits = model.lm_head(parts.ln_f(x))[answer.position]
    return (logits[answer.number] - logits.mean()).item()


@torch.no_grad()
def test_a_feature_is_cut_where_it_writes_and_the_model_is_whole_again_after():
    model, coder, tokens, graph = case()
    answer = graph.targets[-len(graph.chances)]
    before = answer_of(model, tokens, answer)
    moved = 0
    for i in range(0, len(graph.targets) - len(graph.chances), 5):
        with without(model, coder.folded(), [graph.sources[i]]):
            found = answer_of(model, tokens, answer)
        by = by_hand(model, coder, tokens, graph.sources[i], graph.values[i], answer)
        assert found == pytest.approx(by)
        moved += abs(found - before) > 1e-3
        assert answer_of(model, tokens, answer) == before
    assert moved > 3


@torch.no_grad()
def test_several_features_are_cut_on_many_prompts_at_once():
    """Later ones fire anew once the first is cut."""
    model, coder, tokens, graph = case()
    plain = coder.folded()
    first = next(node for node in graph.sources if node.kind == "feature" and node.layer == 0)
    later = next(node for node in graph.sources if node.kind == "feature" and node.layer == 2
                 and node.position >= first.position)
    others = torch.stack([tokens, tokens.flip(0)])
    with without(model, plain, [first, later]):
        together = model(others)[0]
        alone = [model(one[None])[0][0] for one in others]
    torch.testing.assert_close(together, torch.stack(alone))
    with without(model, plain, [first]):
        read, _ = read_and_written(model, tokens[None])
    activation = plain.features(read)[0, later.position, 2, later.number]
    assert activation != graph.values[graph.sources.index(later)]
    with without(model, plain, [first]):
        removed = activation * plain.decoders()[2, 2, later.number]
        hook = model.blocks[2].mlp.register_forward_hook(
            lambda mlp, arguments, output: output - removed * (torch.arange(T) == later.position)[:, None])
        by_hand_then = model(tokens[None])[0][0]
        hook.remove()
    torch.testing.assert_close(together[0], by_hand_then)


@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_a_head_that_is_cut_writes_nothing(number):
    _, _, tokens, graph = case(number)
    model = random_model(**CASES[number])
    answer = graph.targets[-len(graph.chances)]
    found = without_head(model, tokens, 1, 1, answer)
    model.blocks[1].attn.c_proj.weight[:, C // H:] = 0
    assert found == pytest.approx(answer_of(model, tokens, answer))


def test_others_are_drawn_from_what_the_ranking_left():
    strength = torch.tensor([0.0, 5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    first, others = strongest_and_others(strength, 2, seed=0)
    assert first == [1, 3] and set(others) <= {2, 4, 5} and len(set(others)) == 2
    assert strongest_and_others(torch.tensor([0.0, 1.0]), 3, seed=0) == ([1], [])
    drawn = {tuple(strongest_and_others(strength, 2, seed)[1]) for seed in range(20)}
    assert len(drawn) > 2


@torch.no_grad()
def test_what_is_foretold_and_seen_of_a_prompt():
    model, coder, tokens, graph = case()
    found = interventions(model, coder, tokens, graph)
    assert [len(cuts) for cuts in found["features"]] == [FEATURES, FEATURES]
    assert [len(cuts) for cuts in found["heads"]] == [HEADS, L * H - HEADS]
    due = {round(-x, 6) for x in totals_of_heads(graph).flatten().tolist()}
    assert {round(cut.foretold, 6) for part in found["heads"] for cut in part} <= due


def test_in_short():
    one = [CutEffect(-1.0, -2.0), CutEffect(-1.0, 0.5)], [CutEffect(0.1, 0.2)]
    two = [CutEffect(2.0, 1.0), CutEffect(0.5, 0.5)], []
    found = in_short([one, two])
    assert found["same_sign"] == 0.75
    assert found["strongest"] == pytest.approx(1.0) and found["others"] == pytest.approx(0.2)
    assert 0 < found["correlation"] < 1
    assert set(in_short([([], [])]).values()) == {None}
    all_the_same = [CutEffect(1.0, 0.0)] * 2, [CutEffect(0.5, 0.0)]
    assert in_short([all_the_same])["correlation"] is None
