"""Other ways to cut edges: every rule against its definition, row by row; the command from end to end."""

import math
from dataclasses import replace

import pytest
import torch
from planted import PLANTED, planted
from tqdm import tqdm

import analyze
import prepare_data
from analysis import baselines
from analysis.baselines import fit, judged, size_of_circuits, train_on
from analysis.rules import RULES, RuleAttention
from circuits.attention_edges import attending
from circuits.tasks import LOGIT
from helpers import SMALL, call, random_gpt, run
from models.checkpoint import read_checkpoint, save_checkpoint
from storage.files import UserError, read_json
from training.config import Config
from training.judge import evaluate
from training.steps import get_lr

B, H, T = 3, 2, 12


def some_scores():
    torch.manual_seed(3)
    return (2 * torch.randn(B, H, T, T)).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)


def rows(scores):
    """Every query's scores, causal ones only: (b, h, i, scores (i + 1,))."""
    for b in range(B):
        for h in range(H):
            for i in range(T):
                yield b, h, i, scores[b, h, i, :i + 1]


def expected(rule, level, h, i, row):
    """One query's weights, by the definition."""
    if rule == "entmax":
        return entmax_by_bisection(row * level[h].item())
    if rule == "top-k":
        kept = torch.zeros(i + 1, dtype=torch.bool)
        kept[row.argsort(descending=True)[:level]] = True
    if rule == "threshold":
        kept = row.softmax(0) >= level[h].item()
    if rule == "shared":
        kept = row.softmax(0) >= level.item()
    if rule == "window":
        kept = torch.tensor([j == 0 or i - j < level - 1 for j in range(i + 1)])
    if rule == "random":
        kept = level[h, i, :i + 1]
    parts = [math.exp(score) if keep else 0.0 for score, keep in zip(row.tolist(), kept.tolist())]
    return torch.tensor([part / (sum(parts) or 1.0) for part in parts])


def entmax_by_bisection(z):
    """p_j = max(0, z_j / 2 - tau)^2, tau such that they sum to 1 (Peters et al. 2019, alpha = 1.5)."""
    low, high = z.max().item() / 2 - 1, z.max().item() / 2
    for _ in range(60):
        tau = (low + high) / 2
        low, high = (tau, high) if ((z / 2 - tau).clamp(min=0) ** 2).sum() > 1 else (low, tau)
    return (z / 2 - tau).clamp(min=0) ** 2


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_what_its_definition_says(rule):
    scores, k = some_scores(), 3
    level_of, weights_of = RULES[rule]
    level = level_of(scores, k, 0)
    weights = weights_of(scores, level)
    for b, h, i, row in rows(scores):
        torch.testing.assert_close(weights[b, h, i, :i + 1], expected(rule, level, h, i, row), atol=1e-5,
                                   rtol=1e-4)
        assert not weights[b, h, i, i + 1:].any()


@pytest.mark.parametrize("rule", ["threshold", "shared", "entmax", "random"])
def test_a_budget_below_one_edge_or_above_is_met_on_average(rule):
    torch.manual_seed(0)
    scores = torch.randn(16, 8, 64, 64).masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -math.inf)
    level, weights_of = RULES[rule]
    for k in (0.5, 2.0) if rule != "entmax" else (2.0, 6.0):  # 1.5-entmax keeps one edge at least
        weights = weights_of(scores, level(scores, k, 0))
        assert (weights > 0).float().sum(-1).mean().item() == pytest.approx(k, rel=0.05)


def test_random_edges_are_others_in_every_layer_and_the_same_every_time():
    level, _ = RULES["random"]
    first, again, other = (level(some_scores(), 2, layer) for layer in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not first.triu(1).any()


def test_the_window_at_one_edge_is_the_position_itself_and_from_two_on_has_the_sink():
    scores = some_scores()
    for k, reads in ((1, {11}), (2, {0, 11}), (4, {0, 9, 10, 11})):
        weights = RULES["window"][1](scores, k)
        assert set(weights[0, 0, 11].nonzero().flatten().tolist()) == reads


def random_model(**settings):
    return random_gpt(std=0.4, block_size=T, vocab_size=10, n_head=2, n_embd=16, **settings)


def test_with_room_for_all_edges_nothing_changes():
    model, x = random_model(), torch.randint(0, 10, (4, T))
    for rule in ("top-k", "threshold", "window"):
        cut = RuleAttention(rule, T)
        with attending(model, cut), torch.no_grad():
            logits = model(x)[0]
        torch.testing.assert_close(logits, model(x)[0], atol=1e-5, rtol=1e-5)


def test_gates_and_rules_are_counted_as_the_judge_counts_them(counting):
    """The window of 2 has 1 edge at the first position and 2 at all others; who is dense stays so."""
    gated, dense, data = random_model(gated=True, gate_bias=0.3), random_model(), prepare_data.load("count")
    c = Config(eval_batch_size=50, eval_batches=1)
    per_query = evaluate(gated, data, "val", 50, 1)["open"] / (2 * 2 * T)
    assert judged(gated, None, data, c)["edges"] == pytest.approx(per_query)
    assert 0 < per_query < T / 2
    found = judged(dense, RuleAttention("window", 2), data, c)
    assert found["edges"] == pytest.approx((2 * T - 1) / T) and not dense.config.gated


def test_one_stand_in_may_lie_in_another():
    """The circuit of a model that is cut: the inner one calls the outer one, and leaves it in place."""
    model, x, calls = random_model(), torch.zeros(1, T, dtype=torch.long), []

    def inner(layer, original, q, k, v, **options):
        calls.append(layer)
        return original(q, k, v, **options)

    with attending(model, RuleAttention("window", 2)), torch.no_grad():
        cut = model(x)[0]
        with attending(model, inner):
            assert torch.equal(model(x)[0], cut)
        assert torch.equal(model(x)[0], cut)
    assert calls == [0, 1]
    assert not any("attend" in vars(attention) for attention in model.attentions)


TRAINING = Config(**SMALL | {"dataset": "count", "distill_weight": 0.0, "learning_rate": 1e-2,
                             "max_steps": 60, "eval_batch_size": 50, "eval_batches": 1})


def trained_on(cut, **more):
    """The random model, trained on with its edges cut; of the dataset `count`."""
    c, data = replace(TRAINING, **more), prepare_data.load("count")
    return train_on(random_model(), random_model(), cut, data, c, tqdm(disable=True))


def test_training_on_brings_the_loss_down_at_the_same_budget(counting):
    data, cut, found = prepare_data.load("count"), RuleAttention("threshold", 1.5), []
    for model in random_model(), trained_on(cut):
        fit(model, cut, data)
        found.append(judged(model, cut, data, TRAINING))
    before, after = found
    assert after["loss"] < before["loss"] - 0.5
    assert after["edges"] == pytest.approx(1.5, rel=0.15)


def test_training_on_that_leaves_the_numbers_is_named(counting):
    with pytest.raises(UserError, match="the loss is nan after training on. Leave this rule"):
        trained_on(RuleAttention("window", 2), learning_rate=1e30, max_steps=5)


def test_the_learning_rate_is_that_of_the_loop(counting, monkeypatch):
    given, rates, real = {"warmup_steps": 3, "max_steps": 8, "min_lr": 1e-4}, [], torch.optim.AdamW.step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    trained_on(RuleAttention("top-k", 2), **given)
    assert rates == pytest.approx([get_lr(step, replace(TRAINING, **given)) for step in range(8)])


def test_the_average_is_what_is_judged(counting):
    """Far behind its model after one step, as a decay of 0.9 says."""
    start = random_model()
    one, averaged = (trained_on(RuleAttention("top-k", 2), max_steps=1, warmup_steps=0, average_decay=decay)
                     for decay in (0.0, 0.9))
    for was, now, later in zip(*(model.parameters() for model in (start, one, averaged)), strict=True):
        torch.testing.assert_close(later - was, 0.1 * (now - was), atol=1e-6, rtol=1e-3)


def test_the_circuit_of_a_model_that_is_cut_is_found():
    """Each query keeps its largest weight: the planted circuit is two of those."""
    model = planted()
    model.config.gated = False
    cut = RuleAttention("top-k", 1)
    cut.fitting = False
    cut.levels = {0: 1, 1: 1}
    assert size_of_circuits(model, cut, PLANTED, LOGIT) == 2


def test_the_command_from_end_to_end(counting_parent, monkeypatch):
    run("sparse.py", distill_weight=1.0, max_steps=20)
    assert call(analyze.main, "report", "out/sparse").returncode == 0
    command = ["baselines", "out/sparse", "--budgets=2", "--steps=3"]
    done = call(analyze.main, *command)
    assert done.returncode == 0, done.stderr
    for rule in ("the gate", *RULES):
        assert rule in done.stdout + done.stderr
    found, report = read_json("out/sparse/baselines-3.json"), read_json("out/sparse/report.json")
    assert [row["rule"] for row in found["rows"]] == ["the parent", "the gate", *RULES]
    assert found["rows"][1]["loss"] == pytest.approx(report["sparse"]["val_loss"], rel=1e-5)
    assert found["rows"][0]["above_parent"] == 0
    assert found["rows"][0]["edges"] == 4.5  # of 8 positions: (1 + ... + 8) / 8
    assert found["parent_loss"] == pytest.approx(report["dense"]["val_loss"], rel=1e-5)

    # what stands in the table is not trained again; other budgets are added
    trained = []
    monkeypatch.setattr(baselines, "train_on", lambda model, *others: trained.append(others[1].k) or model)
    done = call(analyze.main, *command[:2], "--budgets=2,1", "--steps=3", "--rules=top-k")
    assert done.returncode == 0 and trained == [1] and done.stdout.count("top-k") == 2, done.stderr
    assert read_json("out/sparse/baselines-3.json")["rows"][:-1] == found["rows"]


def test_another_command_adds_tasks_and_judges_a_run_again_that_was_trained_on(counting_parent, monkeypatch):
    run("sparse.py", max_steps=5)
    monkeypatch.setattr(baselines, "questions", lambda task, *others: task)
    monkeypatch.setattr(baselines, "size_of_circuits", lambda model, cut, *task: float(len(task)))
    command, place = ["baselines", "out/sparse", "--budgets=2", "--rules=window"], "out/sparse/baselines.json"
    call(analyze.main, *command, "--tasks=quote")
    before = read_json(place)["rows"]
    call(analyze.main, *command, "--tasks=bracket")
    assert read_json(place)["rows"] == [row | {"bracket": 7.0} for row in before]
    checkpoint = read_checkpoint("out/sparse/best.pt")
    save_checkpoint("out/sparse/best.pt", checkpoint | {"step": 99})
    call(analyze.main, *command)
    parent, window, gate = sorted(read_json(place)["rows"], key=lambda row: "step" in row)
    assert gate["step"] == 99 and "quote" not in gate and parent["quote"] == window["quote"] == 5.0
