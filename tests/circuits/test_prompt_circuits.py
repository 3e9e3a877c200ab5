"""Circuits of attention edges over many prompts, and their controls, on the planted circuit."""

import pytest
import torch
from planted import PLANTED, T, planted

from analysis.circuit_table import table
from circuits import prompt_circuits
from circuits.attention_edges import prepared
from circuits.attribution import best_edges, cut_edges
from circuits.controls import aligned, component_controls, nonsense, nonsense_reached, of_size, untrained
from circuits.graph import ComponentGraph
from circuits.prompt_circuits import circuit_of, kinds_for, known_to, measure, spread
from circuits.tasks import LOGIT, Pair

CIRCUIT = [[0, 0, 2, 0], [1, 1, T - 1, 2]]
OTHER = ("another", [Pair([0, 2, 3, 1, 4], [0, 3, 3, 1, 4], [1], [[2]], [[3]])], LOGIT)


@pytest.mark.parametrize("ablation", ["zero", "interchange"])
def test_the_planted_circuit_passes_its_controls(ablation):
    found = measure(planted(), PLANTED, PLANTED, LOGIT, ablation, OTHER)
    assert found["pairs"] == 2
    assert found["within"]["0.9"]["mean"] == pytest.approx(2, abs=0.2)
    assert found["controls"]["circuit alone is cut"] == pytest.approx(0, abs=1e-6)
    assert abs(found["controls"]["random edges"]) < 0.5
    assert found["controls"]["another task's circuit"] == pytest.approx(0, abs=1e-6)
    assert found["nonsense"] == 0
    curve = found["curve"]
    assert curve["share"][-1] == pytest.approx(1, abs=1e-6)
    assert len(curve["kept"]) == len(curve["low"]) == len(curve["high"])


def test_the_circuit_of_one_prompt():
    model = planted()
    assert circuit_of(model, PLANTED[0], LOGIT, "zero", "|exact|").nonzero().tolist() == CIRCUIT


def test_a_pair_that_a_model_does_not_know_is_left_out():
    backwards = PLANTED[1]._replace(right=PLANTED[1].wrong, wrong=PLANTED[1].right)
    assert known_to([planted()], [PLANTED[0], backwards], LOGIT, "zero") == [PLANTED[0]]
    cut_off = planted()
    cut_off.lm_head.weight.data.zero_()
    assert known_to([planted(), cut_off], PLANTED, LOGIT, "zero") == []


def test_exact_scores_are_left_out_where_edges_are_many(monkeypatch):
    models = [planted(), planted()]
    assert kinds_for(models, PLANTED, "zero") == ("gradient", "integrated", "exact")
    models[1].config.gated = False  # one of the two is dense: 60 edges
    monkeypatch.setattr(prompt_circuits, "EXACT", 50)
    kinds = kinds_for(models, PLANTED, "zero")
    assert kinds == ("gradient", "integrated")
    _, tried = prompt_circuits.best_ranking(planted(), PLANTED, LOGIT, "zero", kinds)
    assert set(tried) == {"gradient", "|gradient|", "integrated", "|integrated|"}


def test_nonsense_labels_are_never_the_right_ones():
    for seed in range(5):
        for pair, asked in zip(PLANTED, nonsense(PLANTED, seed)):
            assert asked.wrong == pair.right
            assert not set(asked.right[0]) & {*pair.right[0], *pair.wrong[0]}
            assert asked.clean == pair.clean


def test_an_untrained_model_has_the_shape_and_leaves_the_noise_alone():
    model, before = planted(), torch.get_rng_state()
    fresh = untrained(model)
    assert fresh.config == model.config
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)


def test_another_prompts_scores_meet_at_the_last_token():
    scores = torch.arange(9.0).view(1, 1, 3, 3)
    assert torch.equal(aligned(scores, 2)[0, 0], scores[0, 0, 1:, 1:])
    longer = aligned(scores, 4)[0, 0]
    assert torch.equal(longer[1:, 1:], scores[0, 0])
    assert not longer[0].any() and not longer[:, 0].any()


def test_the_band_is_that_of_the_mean():
    found = spread([1.0, 2.0, 3.0, 10.0])
    assert found["mean"] == 4
    assert found["median"] == 2.5
    assert 1 < found["low"] < 4 < found["high"] < 10


def test_a_task_that_no_prompt_shows_is_said_and_not_an_error():
    backwards = [pair._replace(right=pair.wrong, wrong=pair.right) for pair in PLANTED]
    models = {"dense": planted(), "sparse": planted()}
    found, known = prompt_circuits.compare(models, backwards, backwards, LOGIT, "zero", None)
    assert known == []
    assert found == {"pairs": [0, 2]}
    side = {"metric": {"clean": 1.0, "corrupted": 0.0}, "edges": 10, "heads": 4, "untrained": None,
            "controls": {"random edges": 0.1}, "by_edges": {"needed": {"0.8": 1, "0.9": 2, "0.95": None}},
            "by_heads": {"needed": {"0.8": 1, "0.9": 2, "0.95": 3}}}
    result = {"task": "x", "metric": LOGIT, "pairs": 2, "pairs_to_test": 2, "another": None, "dense": side,
              "sparse": side, "attention_edges": {"zero": found}}
    assert "0 of 2 that both know" in table(result)
    assert "hardly knows" not in table(result)
    side["metric"]["corrupted"] = 0.6
    assert "the sparse model hardly knows the task" in table(result)


def test_batches_are_of_one_length():
    longer = Pair([1, 0, 0, 0], [2, 0, 0, 0], [3], [[1]], [[2]])
    sizes = [batch.tokens.shape for batch in prepared(planted(), [*PLANTED, longer], "zero")]
    assert sorted(sizes) == [(1, 4), (2, 5)]


def test_nonsense_that_few_edges_say_is_seen():
    """The same two edges bring a third token, louder."""
    model = planted()
    model.lm_head.weight.data[4] = 3 * model.lm_head.weight.data[1]  # token 1 in the stream says 4, louder
    pair = PLANTED[0]._replace(clean=[1, 0, 4, 0, 0], corrupted=[2, 0, 4, 0, 0])
    assert nonsense_reached(model, [pair], LOGIT, "zero", {pair.key: (1.0, 2)}) == 1
    assert nonsense_reached(model, [pair], LOGIT, "zero", {pair.key: (1.0, 1)}) == 0, "one is not enough"


def test_component_controls_of_the_planted_circuit():
    model, graph = planted(), ComponentGraph(2, 2)
    scores = cut_edges(model, PLANTED, LOGIT, graph.edges)
    circuit = graph.on_paths(best_edges(scores, graph.edges, 3))
    found = component_controls(model, PLANTED, PLANTED, LOGIT, graph.edges, circuit, 1, None)
    assert found["circuit alone is cut"] == pytest.approx(0, abs=1e-5)
    assert found["nonsense labels"] < 0.1
    assert abs(found["random edges"]) < 0.9


def test_as_many_edges_on_paths_as_asked_for():
    graph = ComponentGraph(2, 2)
    for n in (1, 5, 20):
        kept = of_size(graph, torch.rand(graph.edges.shape), graph.edges, n)
        assert n <= kept.sum() <= n + graph.W
        assert torch.equal(kept, graph.on_paths(kept))
