"""The loop: it learns, it shuts edges at the dense loss, it keeps the right checkpoint, and it cannot be
lost.
"""

import json
import math
import os

import numpy as np
import pytest
import torch

import analyze
import prepare_data
from conftest import make_echo
from helpers import call, launch, metrics, parameters, run, same, unequal_rows
from model import GPT
from models.checkpoint import load_checkpoint, load_parent, read_checkpoint
from storage.addition import IGNORE
from training.config import Config
from training.handover import DivergenceInParts, divergence, divergence_formula
from training.judge import distance_from_target, meets_target
from training.steps import averaged, get_lr, update_average


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The whole method in a few seconds: a dense parent that solves the task, and a child that needs one or
    two edges. The folder that holds both.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("found"))
        make_echo()
        run("dense.py", max_steps=300)
        run("sparse.py", init_from="out/dense", max_steps=600, linear_penalty_steps=400, loss_slack=0.01,
            lambda_init=1.0, lambda_min=0.1)
        return os.getcwd()


def test_a_circuit_of_a_few_edges_is_found(found, monkeypatch):
    monkeypatch.chdir(found)
    best = read_checkpoint("out/sparse/best.pt")
    line = next(m for m in metrics("out/sparse") if m["step"] == best["step"])
    assert line["passes"] and line["val_loss"] <= line["target_loss"] and line["accuracy"] == 1
    assert line["open"] <= 2.5  # of 2 layers * 2 heads * 10 causal pairs = 40
    model = load_checkpoint("out/sparse/best.pt")
    x, _ = prepare_data.load("echo").batch("val", range(200), 4)
    open_edges = []
    model(torch.from_numpy(x), record=lambda layer, gates: open_edges.append(gates.open))
    # on every row the asking token reads the first one
    assert torch.stack(open_edges)[..., 3, 0].sum() >= 200


def test_best_is_the_fewest_edges_among_those_that_pass_and_the_lowest_loss_of_a_dense_run(found):
    lines = metrics(f"{found}/out/sparse")
    assert [m["step"] for m in lines] == list(range(0, 601, 20))
    best = min((m for m in lines if m["passes"]), key=lambda m: (m["open"], m["val_loss"]))
    assert read_checkpoint(f"{found}/out/sparse/best.pt")["step"] == best["step"]
    assert all((m["val_loss"] <= m["target_loss"]) or not m["passes"] for m in lines)
    best = min(metrics(f"{found}/out/dense"), key=lambda m: m["val_loss"])
    assert read_checkpoint(f"{found}/out/dense/best.pt")["step"] == best["step"]


def test_a_run_that_wins_nothing_for_a_while_stops_and_is_finished(found, monkeypatch, capsys):
    monkeypatch.chdir(found)
    options = {"init_from": "out/dense", "max_steps": 600, "linear_penalty_steps": 400, "loss_slack": 0.01,
               "lambda_init": 1.0, "lambda_min": 0.1, "patience": 60, "out_dir": "out/patient"}
    run("sparse.py", **options)
    lines, best = metrics("out/patient"), read_checkpoint("out/patient/best.pt")
    assert lines[-1]["step"] == best["step"] + 60 < 600
    passing = [m for m in lines if m["passes"]]
    assert best["step"] == min(passing, key=lambda m: (m["open"], m["val_loss"]))["step"]
    run("sparse.py", **options)  # the same command finds nothing left to do
    assert "is finished" in capsys.readouterr().out and metrics("out/patient") == lines
    assert "so far" not in call(analyze.main, "report", "out/patient").stdout


def test_only_an_evaluation_that_can_become_the_best_counts_all_rows(found):
    fewest, counted = None, []
    for line in metrics(f"{found}/out/sparse"):
        passes_held_out = line["val_loss"] <= line["target_loss"] and line["val_correct"] == 200
        counted.append(line["correct"] is not None)
        assert counted[-1] == (passes_held_out and (fewest is None or line["open"] <= fewest))
        if counted[-1] and line["passes"]:
            fewest = line["open"]
    assert {True, False} == set(counted) and fewest is not None


def test_the_parent_is_trained_first_once_and_hands_over_its_weights_and_its_seed(echo, capsys):
    assert run("sparse.py", max_steps=20, seed=2) == "out/sparse-seed2"
    before = os.stat("out/dense-seed2/last.pt").st_mtime_ns
    assert json.load(open("out/dense-seed2/config.json"))["seed"] == 2
    assert json.load(open("out/sparse-seed2/config.json"))["n_layer"] == 2  # shape taken over
    parent, child = read_checkpoint("out/dense-seed2/best.pt"), read_checkpoint("out/sparse-seed2/last.pt")
    loss = metrics("out/dense-seed2")[-1]["val_loss"]
    assert child["dense"]["val"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert child["parent"] == "out/dense-seed2/best.pt"
    assert child["target_loss"] == child["dense"]["val"]["loss"] + 0.001
    assert parent["model_args"]["gated"] is False and child["model_args"]["gated"] is True
    run("sparse.py", max_steps=1, seed=2, out_dir="out/second")
    assert os.stat("out/dense-seed2/last.pt").st_mtime_ns == before
    assert "out/dense-seed2 is finished" in capsys.readouterr().out


def test_a_run_that_goes_on_from_another_folder_or_stands_far_away_keeps_its_parent(
        echo_parent, tmp_path_factory, monkeypatch):
    far = tmp_path_factory.mktemp("far")
    for out in ("out/sparse", str(far / "sparse")):
        run("sparse.py", max_steps=1, out_dir=out)
    (echo_parent / "out/data").symlink_to(echo_parent / "data")
    monkeypatch.chdir("out")
    run("../sparse.py", init_from="resume", max_steps=2, out_dir="sparse")
    assert read_checkpoint("sparse/last.pt")["parent"] == "dense/best.pt"
    monkeypatch.chdir(far)
    assert load_parent(read_checkpoint("sparse/last.pt")).config.n_layer == 2


def test_lambda_may_rise_above_its_start_only_when_the_penalty_is_no_longer_linear(echo_parent):
    # a target it cannot meet: lambda wants to rise
    run("sparse.py", linear_penalty_steps=20, lambda_init=4.0, lambda_max=8.0, lambda_rate=1.0,
        eval_interval=4, max_steps=40, target_loss=1e-9)
    lams = {line["step"]: line["lambda"] for line in metrics("out/sparse")}
    assert [lams[step] for step in (8, 20, 40)] == [4.0, 4.0, 8.0]


@pytest.mark.parametrize("constraint_gates", ["sampled", "deterministic"])
def test_gates_are_sampled_in_training_but_for_the_last_steps_and_never_when_judging(
        echo_parent, constraint_gates, monkeypatch):
    real, steps, judging = GPT.forward, [], []

    def watched(self, *inputs, **options):
        if "linear_penalty" in options:
            assert self.training
            steps.append(options.get("gates"))
        else:
            judging.append(self.training)
        return real(self, *inputs, **options)

    monkeypatch.setattr(GPT, "forward", watched)
    run("sparse.py", max_steps=20, constraint_gates=constraint_gates, noise_free_steps=5)
    assert steps == ["sample"] * 15 + ["threshold"] * 5
    # the constraint is measured by passes of its own, at steps 0, 4, ... 16, which sample if it is on sampled
    # gates, as long as training does
    assert sum(judging) == (4 if constraint_gates == "sampled" else 0) and len(judging) > 5


def test_the_constraints_target_is_the_dense_loss_on_training_batches_by_the_same_measure(echo_parent):
    folder = run("sparse.py", max_steps=1, loss_slack=0.01)
    parent, data = load_checkpoint("out/dense/best.pt"), prepare_data.load("echo")
    expected = []
    for step in range(50):
        rows = np.random.default_rng((1, True, step)).integers(0, 400, 32)
        x, y = (torch.from_numpy(a) for a in data.batch("train", rows, 4))
        expected.append(parent(x, y)[1].item())
    assert metrics(folder)[0]["constraint_target"] == pytest.approx(np.mean(expected) + 0.01, rel=1e-5)
    assert metrics(folder)[0]["target_loss"] == pytest.approx(metrics("out/dense")[-1]["val_loss"] + 0.01)


def evaluation(loss, accuracy=0.5, **correct):
    return {split: {"loss": loss, "correct": n, "accuracy": accuracy} for split, n in correct.items()}


def test_how_far_a_model_is_from_its_target_is_told_by_what_was_counted_for_all():
    """The target is met with no fewer right answers, and no larger loss. Where held-out answers are lost the
    training rows are not counted: that must not look closer than a few training answers lost.
    """
    dense = evaluation(1.0, val=5, train=10)
    met, in_training, too_large, held_out = (
        distance_from_target(one, dense, 1.1)
        for one in (evaluation(1.1, val=5, train=10), evaluation(0.9, val=5, train=7), evaluation(1.2, val=5),
                    evaluation(0.9, val=4)))
    assert met < in_training < too_large < held_out and not any(met)
    assert meets_target(evaluation(1.1, val=5, train=10), dense, 1.1)
    assert not meets_target(evaluation(0.9, val=5, train=9), dense, 1.1)
    text = evaluation(1.0, None, val=0)
    assert meets_target(text, text, 1.1) and not meets_target(text, text, 0.9)


def test_learning_rate_warms_up_and_falls_to_its_minimum():
    c = Config(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    assert get_lr(0, c) == 0.1 and get_lr(9, c) == 1.0 and get_lr(10, c) == 1.0
    assert get_lr(60, c) == pytest.approx(0.55) and get_lr(110, c) == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------------------
# answers of unequal number


def test_a_step_has_one_denominator_however_it_is_cut(workplace, monkeypatch):
    """Its gradient, with a teacher's, and what is measured: of 16 rows in micro-batches of 16, 8 and 1."""
    real, gradients, lines, child = torch.nn.utils.clip_grad_norm_, [], [], unequal_rows()

    def watched(parameters, limit):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for micro in (16, 8, 1):
        launch(1, *child, f"--micro_batch_size={micro}", f"--out_dir=out/{micro}")
        lines.append(metrics(f"out/{micro}")[-1])
    for gradient, line in zip(gradients[1:], lines[1:]):
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-5)
        for key in ("constraint_loss", "constraint_target", "batch_loss", "density"):
            assert line[key] == pytest.approx(lines[0][key], rel=1e-6), key


def test_a_step_that_asks_nothing_adds_nothing(workplace, monkeypatch):
    """Of two rows only the second asks; batches of one row."""
    real, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *given: norms.append(real(*given)) or norms[-1])
    rows = np.zeros((2, 2, 8), dtype=np.uint16)
    rows[0, 1] = IGNORE
    prepare_data.write_dataset("data/half", rows, rows, kind="rows", vocab_size=9)
    launch(1, "--dataset=half", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=8",
           "--batch_size=1", "--max_steps=8", "--eval_interval=4", "--eval_batch_size=1", "--device=cpu",
           "--out_dir=out/half")
    asks = [np.random.default_rng((1, False, step)).integers(0, 2) for step in range(8)]
    assert {0, 1} == set(asks) and [norm > 0 for norm in norms] == [bool(row) for row in asks]
    assert all(math.isfinite(line["val_loss"]) for line in metrics("out/half"))


# ------------------------------------------------------------------------------------------------------------
# text: the hand-over, a teacher, another target, a control


def test_a_control_goes_on_from_the_parent_in_another_order_and_its_loss_can_be_the_target(counting_parent):
    dense = metrics("out/dense")
    assert dense[-1]["val_loss"] < dense[0]["val_loss"] and dense[-1]["accuracy"] is None  # a text
    control = metrics(run("control.py", max_steps=20))
    # it starts where the parent ended
    parent = min(m["val_loss"] for m in dense)
    assert control[0]["val_loss"] == pytest.approx(parent, abs=1e-6)
    below = control[-1]["val_loss"] - parent
    loss = control[-1]["val_loss"]
    aimed = read_checkpoint(run("sparse.py", target_loss=loss, max_steps=1) + "/last.pt")
    assert aimed["target_loss"] == loss
    assert aimed["geco"]["target"] == pytest.approx(aimed["dense_on_training"] + below)


def test_the_paired_constraint_is_free_of_the_batchs_luck(counting_parent):
    """At step 0 with all edges open the gated model is the dense one: the measured loss is then exactly the
    dense mean, whatever the batch.
    """
    settings = {"max_steps": 1, "open_above": 0.0, "gate_bias": 50.0}
    line = metrics(run("sparse.py", **settings))[-1]
    assert line["constraint_loss"] == pytest.approx(line["constraint_target"] - 0.02, abs=1e-5)
    unpaired = metrics(run("sparse.py", **settings, constraint_paired=False, out_dir="out/unpaired"))[-1]
    assert abs(unpaired["constraint_loss"] - line["constraint_loss"]) > 1e-3


def test_a_teacher_changes_the_gradient_and_only_the_gradient(counting_parent):
    with_teacher = metrics(run("sparse.py", max_steps=20, distill_weight=2.0, out_dir="out/taught"))
    without = metrics(run("sparse.py", max_steps=20, out_dir="out/untaught"))
    assert with_teacher[0]["constraint_target"] == without[0]["constraint_target"]
    assert with_teacher[0]["target_loss"] == without[0]["target_loss"]
    assert not same(parameters("out/taught"), parameters("out/untaught"))
    teacher = load_checkpoint("out/dense/best.pt")
    x, _ = prepare_data.load("count").batch("val", range(0, 400, 8), 8)
    x = torch.from_numpy(x)
    distance = [divergence(load_checkpoint(f"out/{name}/last.pt")(x)[0], teacher(x)[0], x).item()
                for name in ("taught", "untaught")]
    assert distance[0] < distance[1]


@pytest.mark.parametrize("kl", (divergence_formula, divergence))
def test_divergence_is_the_textbook_sum(kl, monkeypatch):
    monkeypatch.setattr(DivergenceInParts, "ELEMENTS", 20)  # parts of 4, 2 rows
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    targets = torch.tensor([[1, 2, -1], [0, -1, -1]])
    expected = (p * (p / q).log()).sum(-1)[targets != -1].mean().item()
    assert kl(student, teacher, targets).item() == pytest.approx(expected, rel=1e-5)
    assert kl(teacher, teacher, targets).item() == pytest.approx(0, abs=1e-6)
    student.requires_grad_()
    (3 * kl(student, teacher, targets)).backward()
    torch.testing.assert_close(student.grad, (q - p) * (targets != -1)[..., None], atol=1e-6, rtol=0)
    assert kl(student, teacher, torch.full((2, 3), -1)) == 0  # nothing is asked


def test_a_checkpoint_of_transformers_is_a_parent_and_resumes(counting):
    """What init_from='gpt2' does, with a tiny folder in GPT-2's place."""
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8,
                                                         vocab_size=300)).save_pretrained("hf")
    prepare_data.write_dataset("data/count", *(np.arange(n, dtype=np.uint16) % 7 for n in (500, 100)),
                               kind="stream", vocab_size=300, tokenizer="gpt2")
    run("sparse.py", init_from="hf", max_steps=20, gate_bias=5.0, batch_size=8)
    run("sparse.py", init_from="resume", max_steps=30)
    saved = read_checkpoint("out/sparse/last.pt")
    assert saved["step"] == 30
    assert saved["parent"] == "hf"
    assert saved["model_args"]["n_embd"] == 16


def test_bfloat16_trains_and_is_judged_in_float32(counting):
    torch.manual_seed(0)
    exact, half = (metrics(run("dense.py", dtype=dtype, out_dir=f"out/{dtype}", max_steps=20))
                   for dtype in ("float32", "bfloat16"))
    # before training they are one model, and the judge is one
    assert exact[0]["val_loss"] == half[0]["val_loss"]
    assert half[-1]["val_loss"] != exact[-1]["val_loss"]
    assert half[-1]["val_loss"] == pytest.approx(exact[-1]["val_loss"], abs=0.05)
    assert all(p.dtype == torch.float32 for p in parameters("out/bfloat16").values())
    assert half[-1]["tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_torch_compile_gives_the_same_run(counting_parent, impl):
    run("dense.py", n_layer=1, out_dir="out/one")  # a second layer is compiled again
    run("sparse.py", init_from="out/one", max_steps=20, attention_impl=impl)
    run("sparse.py", init_from="out/one", max_steps=20, attention_impl=impl, compile="on",
        out_dir="out/compiled")
    eager, compiled = metrics("out/sparse")[-1], metrics("out/compiled")[-1]
    assert compiled["constraint_target"] == pytest.approx(eager["constraint_target"], abs=1e-5)
    # the noise is the same, its sums are in another order
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], abs=2e-3)


def test_the_average_is_the_weighted_sum_of_what_it_saw():
    model, seen = torch.nn.Linear(3, 2), []
    average = averaged(model, 0.9)
    start = average.weight.clone()
    for _ in range(4):
        with torch.no_grad():
            model.weight.normal_()
        seen.append(model.weight.detach().clone())
        update_average(average, model, 0.9)
    expected = 0.9**4 * start + sum(0.1 * 0.9 ** (3 - i) * weight for i, weight in enumerate(seen))
    assert torch.allclose(average.weight, expected) and not average.training
    assert averaged(model, 0.0) is model  # without an average the model itself is judged


def test_the_average_of_the_weights_is_what_is_judged_and_kept(echo):
    run("dense.py", average_decay=0.9)
    last = read_checkpoint("out/dense/last.pt")
    assert not same(last["model"], last["trained"])
    model = load_checkpoint("out/dense/last.pt")
    data = prepare_data.load("echo")
    x, y = (torch.from_numpy(a) for a in data.batch("val", range(200), 4))
    assert metrics("out/dense")[-1]["val_loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-5)


def test_the_peak_slack_goes_to_nothing_along_the_learning_rates_cosine(counting_parent):
    folder = run("sparse.py", peak_slack=0.4, out_dir="out/eased")
    targets = {m["step"]: m["constraint_target"] for m in metrics(folder)}
    dense = read_checkpoint(f"{folder}/last.pt")["dense_on_training"]
    end = dense + 0.02  # counting's loss_slack
    assert targets[0] == pytest.approx(end)  # nothing has been measured yet
    for step in (20, 40, 60):
        done = (step - 4 - 5) / (60 - 5)  # at the last measurement, behind 5 steps of warm-up
        assert targets[step] == pytest.approx(end + 0.4 * (1 + math.cos(math.pi * done)) / 2)
    assert [m["target_loss"] for m in metrics(folder)] == 4 * [metrics(folder)[0]["target_loss"]]
