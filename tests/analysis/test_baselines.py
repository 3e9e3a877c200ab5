"""Other ways to cut edges: every rule against its definition, row by row; the command from end to end."""

import json
import math
import os

import pytest
import torch
from planted import PLANTED, planted
from tqdm import tqdm

import analyze
import prepare_data
from analysis import baselines
from analysis.baselines import fit, judged, size_of_circuits, train_on
from analysis.baselines_table import Table
from analysis.rules import RULES, RuleAttention
from circuits.attention_edges import attending
from circuits.tasks import LOGIT
from helpers import SMALL, call, run
from model import GPT, GPTConfig
from models.checkpoint import load_checkpoint, read_checkpoint
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
    level = RULES[rule].level(scores, k, 0)
    weights = RULES[rule].weights(scores, level)
    for b, h, i, row in rows(scores):
        torch.testing.assert_close(weights[b, h, i, :i + 1], expected(rule, level, h, i, row), atol=1e-5,
                                   rtol=1e-4)
        assert not weights[b, h, i, i + 1:].any()


@pytest.mark.parametrize("rule", ["threshold", "shared", "entmax", "random"])
def test_a_budget_below_one_edge_or_above_is_met_on_average(rule):
    torch.manual_seed(0)
    scores = torch.randn(16, 8, 64, 64).masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -math.inf)
    for k in (0.5, 2.0) if rule != "entmax" else (2.0, 6.0):  # 1.5-entmax keeps one edge at least
        weights = RULES[rule].weights(scores, RULES[rule].level(scores, k, 0))
        assert (weights > 0).float().sum(-1).mean().item() == pytest.approx(k, rel=0.05)


def test_random_edges_are_others_in_every_layer_and_the_same_every_time():
    first, again, other = (RULES["random"].level(some_scores(), 2, layer) for layer in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not first.triu(1).any()


def test_the_window_at_one_edge_is_the_position_itself_and_from_two_on_has_the_sink():
    scores = some_scores()
    for k, reads in ((1, {11}), (2, {0, 11}), (4, {0, 9, 10, 11})):
        weights = RULES["window"].weights(scores, k)
        assert set(weights[0, 0, 11].nonzero().flatten().tolist()) == reads


def random_gpt(**settings):
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=T, vocab_size=10, n_layer=2, n_head=2, n_embd=16, **settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def test_with_room_for_all_edges_nothing_changes():
    model, x = random_gpt(), torch.randint(0, 10, (4, T))
    for rule in ("top-k", "threshold", "window"):
        cut = RuleAttention(rule, T)
        with attending(model, cut), torch.no_grad():
            logits = model(x)[0]
        torch.testing.assert_close(logits, model(x)[0], atol=1e-5, rtol=1e-5)


def test_the_gate_is_counted_as_the_judge_counts_it(counting):
    model, data = random_gpt(gated=True, gate_bias=0.3), prepare_data.load("count")
    c = Config(eval_batch_size=50, eval_batches=1)
    per_query = evaluate(model, data, "val", 50, 1)["open"] / (2 * 2 * T)
    assert judged(model, None, data, c)["edges"] == pytest.approx(per_query)
    assert 0 < per_query < T / 2


def test_a_rule_is_counted_as_the_judge_counts_it(counting):
    """The window of 2 has 1 edge at the first position and 2 at all others; who is dense stays so."""
    model, data, cut = random_gpt(), prepare_data.load("count"), RuleAttention("window", 2)
    found = judged(model, cut, data, Config(eval_batch_size=50, eval_batches=1))
    assert found["edges"] == pytest.approx((2 * T - 1) / T)
    assert not model.config.gated


def test_one_stand_in_may_lie_in_another():
    """The circuit of a model that is cut: the inner one calls the outer one, and leaves it in place."""
    model, x, calls = random_gpt(), torch.zeros(1, T, dtype=torch.long), []

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


def settings_of_training(**more):
    return Config(**SMALL | {"dataset": "count", "distill_weight": 0.0, "learning_rate": 1e-2,
                             "max_steps": 60, "eval_batch_size": 50, "eval_batches": 1, **more})


def test_training_on_brings_the_loss_down_at_the_same_budget(counting):
    data, dense, c = prepare_data.load("count"), random_gpt(), settings_of_training()
    model, cut = random_gpt(), RuleAttention("threshold", 1.5)
    fit(model, cut, data)
    before = judged(model, cut, data, c)["loss"]
    model = train_on(model, dense, cut, data, c, "model.pt", tqdm(disable=True))
    after = judged(model, cut, data, c)
    assert after["loss"] < before - 0.5
    assert after["edges"] == pytest.approx(1.5, rel=0.15)


def test_training_that_was_stopped_ends_as_if_it_had_not_been(counting):
    """In the middle, from a file of its own; and a model that is done is only read."""
    data, dense = prepare_data.load("count"), random_gpt()
    c = settings_of_training(eval_interval=20, average_decay=0.9)

    class Stop(Exception):
        pass

    class Stopping(tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == 47:
                raise Stop

    def trained(path, progress):
        model, cut = random_gpt(), RuleAttention("threshold", 1.5)
        model = train_on(model, dense, cut, data, c, path, progress)
        return torch.cat([p.flatten() for p in model.parameters()]), cut.levels[1]

    expected = trained("whole.pt", tqdm(disable=True))
    with open(os.devnull, "w") as nowhere, pytest.raises(Stop):
        trained("stopped.pt", Stopping(file=nowhere))
    assert torch.load("stopped.pt", weights_only=True)["step"] == 40
    for path in ("stopped.pt", "whole.pt"):
        for found, wanted in zip(trained(path, tqdm(disable=True)), expected, strict=True):
            assert torch.equal(found, wanted)


def test_training_on_that_leaves_the_numbers_stops_and_saves_nothing(counting):
    data, dense, c = prepare_data.load("count"), random_gpt(), settings_of_training(learning_rate=1e30)
    model, cut = random_gpt(), RuleAttention("window", 2)
    with pytest.raises(UserError, match="the loss is nan at step 19 of model.pt.* Leave this rule"):
        train_on(model, dense, cut, data, c, "model.pt", tqdm(disable=True))
    assert not os.path.exists("model.pt")


@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_the_learning_rate_is_that_of_the_loop(counting, monkeypatch, warmup_steps):
    c, rates, real = settings_of_training(warmup_steps=warmup_steps, min_lr=1e-4), [], torch.optim.AdamW.step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    data, progress = prepare_data.load("count"), tqdm(disable=True)
    train_on(random_gpt(), random_gpt(), RuleAttention("top-k", 2), data, c, "model.pt", progress)
    assert len(rates) == c.max_steps
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(get_lr(step, c))


def test_the_average_is_what_is_judged(counting):
    """Far behind its model after one step, as a decay of 0.9 says."""
    data, dense, start = prepare_data.load("count"), random_gpt(), random_gpt()
    found = {}
    for decay in (0.0, 0.9):
        c = settings_of_training(max_steps=1, warmup_steps=0, average_decay=decay)
        cut = RuleAttention("top-k", 2)
        model = train_on(random_gpt(), dense, cut, data, c, f"{decay}.pt", tqdm(disable=True))
        found[decay] = [p - was for p, was in zip(model.parameters(), start.parameters(), strict=True)]
    for one, averaged in zip(found[0.0], found[0.9], strict=True):
        torch.testing.assert_close(averaged, 0.1 * one, atol=1e-6, rtol=1e-3)


def test_the_table_of_another_parent_is_left_alone(counting):
    run("sparse.py")
    command = ["baselines", "out/sparse", "--budgets=2", "--rules=window"]
    call(analyze.main, *command)
    with open("out/sparse/baselines.json") as f:
        found = json.load(f)
    for key, value in (("parent", "out/other/best.pt"), ("parent_loss", found["parent_loss"] + 0.1)):
        with open("out/sparse/baselines.json", "w") as f:
            json.dump(found | {key: value}, f)
        done = call(analyze.main, *command)
        assert done.returncode == 1 and "baselines.json is of another parent" in done.stderr


def test_the_circuit_of_a_model_that_is_cut_is_found():
    """Each query keeps its largest weight: the planted circuit is two of those."""
    model = planted()
    model.config.gated = False
    cut = RuleAttention("top-k", 1)
    cut.fitting = False
    cut.levels = {0: 1, 1: 1}
    assert size_of_circuits(model, cut, PLANTED, LOGIT) == 2


def test_the_command_from_end_to_end(counting):
    run("sparse.py", distill_weight=1.0)
    assert call(analyze.main, "report", "out/sparse").returncode == 0
    command = ["baselines", "out/sparse", "--budgets=2", "--steps=3"]
    done = call(analyze.main, *command)
    assert done.returncode == 0, done.stderr
    for rule in ("the gate", *RULES):
        assert rule in done.stdout + done.stderr
    with open("out/sparse/baselines-3.json") as f:
        found = json.load(f)
    assert [row["rule"] for row in found["rows"]] == ["the parent", "the gate", *RULES]
    with open("out/sparse/report.json") as f:
        report = json.load(f)
    assert found["rows"][1]["loss"] == pytest.approx(report["sparse"]["val_loss"], rel=1e-5)
    assert found["rows"][0]["above_parent"] == 0
    assert found["rows"][0]["edges"] == 4.5  # of 8 positions: (1 + ... + 8) / 8
    assert found["parent_loss"] == pytest.approx(report["dense"]["val_loss"], rel=1e-5)
    assert read_checkpoint("out/sparse/baselines-3/top-k-2.pt")["step"] == 3
    assert load_checkpoint("out/sparse/best.pt").config.gated


def test_what_stands_in_the_table_is_not_trained_again(counting, monkeypatch):
    run("sparse.py")
    command = ["baselines", "out/sparse", "--budgets=2", "--steps=3"]
    call(analyze.main, *command, "--rules=top-k")
    trained = []

    def count(model, teacher, cut, *others):
        trained.append(cut.rule)
        fit(model, cut, others[0])
        return model

    monkeypatch.setattr(baselines, "train_on", count)
    done = call(analyze.main, *command, "--rules=top-k,threshold")
    assert done.returncode in (0, None), done.stderr
    assert trained == [RULES["threshold"]] and "top-k" in done.stdout + done.stderr
    with open("out/sparse/baselines-3.json") as f:
        names = [row["rule"] for row in json.load(f)["rows"]]
    assert names == ["the parent", "the gate", "top-k", "threshold"]


def test_commands_side_by_side_keep_each_others_rows(workplace):
    (workplace / "out").mkdir()
    one, two = (Table("out", "parent", 1.0, 0, []) for _ in range(2))
    for table, rule in ((one, "top-k"), (two, "window"), (one, "entmax")):
        table.add({"rule": rule, "budget": 2, "loss": 1.5, "edges": 2.0})
    assert [row["rule"] for row in read_json(two.place)["rows"]] == ["top-k", "window", "entmax"]


def test_a_row_keeps_its_tasks_unless_the_run_was_trained_on(workplace):
    (workplace / "out").mkdir()
    table = Table("out", "parent", 1.0, 0, ["quote"])
    row = {"rule": "the gate", "budget": None, "loss": 1.5, "edges": 2.0, "step": 5}
    table.add(row | {"quote": 3.0})
    other = Table("out", "parent", 1.0, 0, ["bracket"])
    assert not other.has("the gate", None, step=5)
    other.add(row | {"bracket": 4.0})
    table = Table("out", "parent", 1.0, 0, ["quote", "bracket"])
    assert table.has("the gate", None, step=5) and not table.has("the gate", None, step=9)
    table.add(row | {"step": 9, "quote": 2.0, "bracket": 2.0})
    assert [found["step"] for found in read_json(table.place)["rows"]] == [9]


@pytest.mark.parametrize("words, answer", [
    (["out/sparse", "--rules=topk"], "there is no rule 'topk'"),
    (["out/sparse", "--budgets=x"], "--budgets are numbers above 0"),
    (["out/sparse", "--budgets=1,nan"], "--budgets are numbers above 0"),
    (["out/none"], "there is no checkpoint out/none"),
])
def test_mistakes_are_answered(workplace, words, answer):
    done = call(analyze.main, "baselines", *words)
    assert done.returncode == 1 and answer in done.stderr
