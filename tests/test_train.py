"""The loop: it learns, it shuts edges at the dense loss, it keeps the right checkpoint, and it cannot be
lost.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import prepare_data
from conftest import REPOSITORY
from helpers import SMALL, metrics, run
from model import GPT
from models.checkpoint import load_checkpoint, load_weights, read_checkpoint, save_checkpoint
from storage.files import UserError
from train import get_lr
from training import judge
from training.batches import Batches
from training.distillation import divergence
from training.evaluate import evaluate_splits
from training.folder import StopRequest
from training.settings import Config
from training.verdict import distance_from_target, meets_target


def parameters(folder, name="last.pt"):
    return read_checkpoint(f"{folder}/{name}")["model"]


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_circuit_of_a_few_edges_is_found(echo):
    """The whole method in five seconds: a dense parent that solves the task, and a child that needs one or
    two edges.
    """
    (echo / "dense.py").write_text(
        (echo / "dense.py").read_text().replace("max_steps = 60", "max_steps = 300")
    )
    folder = run(
        "sparse.py", max_steps=600, linear_penalty_steps=400, loss_slack=0.01, lambda_init=1.0, lambda_min=0.1
    )
    best = read_checkpoint(f"{folder}/best.pt")
    line = next(m for m in metrics(folder) if m["step"] == best["step"])
    assert line["passes"] and line["val_loss"] <= line["target_loss"] and line["accuracy"] == 1
    assert line["open"] <= 2.5  # of 2 layers * 2 heads * 10 causal pairs = 40
    model = load_checkpoint(f"{folder}/best.pt")
    x, _ = prepare_data.load("echo").batch("val", range(200), 4)
    open_edges = []
    model(torch.from_numpy(x), record=lambda layer, gates: open_edges.append(gates.open))
    # on every row the asking token reads the first one
    assert torch.stack(open_edges)[..., 3, 0].sum() >= 200


def test_best_is_the_fewest_edges_among_those_that_pass(echo):
    folder = run("sparse.py")
    lines = metrics(folder)
    assert [m["step"] for m in lines] == [0, 20, 40, 60]
    passing = [m for m in lines if m["passes"]]
    assert (
        read_checkpoint(f"{folder}/best.pt")["step"]
        == min(passing, key=lambda m: (m["open"], m["val_loss"]))["step"]
    )
    assert all((m["val_loss"] <= m["target_loss"]) or not m["passes"] for m in lines)
    dense = metrics("out/dense")
    assert read_checkpoint("out/dense/best.pt")["step"] == min(dense, key=lambda m: m["val_loss"])["step"]


def test_the_parent_is_trained_first_once_and_hands_over_its_weights(echo, capsys):
    run("sparse.py", max_steps=20)
    before = os.stat("out/dense/last.pt").st_mtime_ns
    assert json.load(open("out/sparse/config.json"))["n_layer"] == 2  # shape taken over
    parent, child = read_checkpoint("out/dense/best.pt"), read_checkpoint("out/sparse/last.pt")
    assert child["dense"]["val"]["loss"] == pytest.approx(metrics("out/dense")[-1]["val_loss"], rel=1e-6)
    assert (
        child["parent"] == "out/dense/best.pt"
        and child["target_loss"] == child["dense"]["val"]["loss"] + 0.001
    )
    assert parent["model_args"]["gated"] is False and child["model_args"]["gated"] is True
    run("sparse.py", max_steps=20, out_dir="out/second")
    assert (
        os.stat("out/dense/last.pt").st_mtime_ns == before
        and "out/dense is finished" in capsys.readouterr().out
    )


@pytest.mark.parametrize("cycle_steps", [0, 40])
def test_two_phases_with_a_cap_of_lambda_each(echo, cycle_steps):
    """The first cap holds as long as the linear penalty, the second from then on, or until the next cycle."""
    settings = {
        "linear_penalty_steps": 20,
        "lambda_init": 4.0,
        "lambda_max": 4.0,
        "repair_lambda_max": 8.0,
        "lambda_rate": 1.0,
        "loss_slack": 0.0,
        "eval_interval": 4,
        "max_steps": 80,
    }
    # a target it cannot meet: lambda wants to rise
    run(
        "sparse.py",
        cycle_steps=cycle_steps,
        target_from=run("dense.py", out_dir="out/better", max_steps=200),
        **settings,
    )
    lams = {line["step"]: line["lambda"] for line in metrics("out/sparse")}
    assert [lams[step] for step in (20, 40, 60, 80)] == [4.0, 8.0, 4.0 if cycle_steps else 8.0, 8.0]

def test_the_edge_that_a_cut_took_comes_back(echo):
    """Cut at a price below the edge's worth: the old rules (temperature 1, one cap of lambda) lose the needed
    edge for good, today's win it back.
    """
    (echo / "dense.py").write_text(
        (echo / "dense.py").read_text().replace("max_steps = 60", "max_steps = 300")
    )
    overshoot = {
        "seed": 2,
        "density_weight": 60.0,
        "linear_penalty_steps": 300,
        "max_steps": 1000,
        "loss_slack": 0.01,
        "constraint_scale": 0.01,
        "lambda_init": 4.0,
        "lambda_max": 4.0,
        "eval_interval": 50,
    }
    old = run("sparse.py", out_dir="out/old", **overshoot)
    new = run(
        "sparse.py",
        out_dir="out/new",
        gate_temperature=3.0,
        repair_lambda_max=30.0,
        average_decay=0.9,
        **overshoot,
    )
    lost = [line["accuracy"] < 0.9 for line in metrics(new) if line["step"] == 300]
    assert lost == [True]
    assert not any(line["passes"] for line in metrics(old) if line["step"] >= 700)
    assert any(line["passes"] for line in metrics(new) if line["step"] >= 700)



def test_seeds_reach_the_parent(echo):
    assert run("sparse.py", max_steps=20, seed=2) == "out/sparse-seed2"
    assert json.load(open("out/dense-seed2/config.json"))["seed"] == 2


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is saved."""


@pytest.mark.parametrize(
    "config, settings",
    [
        ("dense.py", {"dropout": 0.1}),
        ("sparse.py", {"attention_impl": "tiled"}),
        ("sparse.py", {"constraint_gates": "sampled"}),
    ],
)
def test_a_run_that_is_stopped_and_killed_everywhere_ends_bit_for_bit_like_one_that_is_not(
    echo, config, settings, monkeypatch
):
    """Stopped after steps 1 and 33 (no evaluation steps), and killed before and after every single file that
    it renames.
    """
    run(config, out_dir="out/whole", **settings)
    again = {"out_dir": "out/again", **settings}

    for steps in (1, 32):
        with monkeypatch.context() as patch:
            countdown = iter([False] * (steps - 1) + [True])
            patch.setattr(
                StopRequest,
                "asked",
                property(lambda self: next(countdown), lambda self, value: None),
                raising=False,
            )
            with pytest.raises(SystemExit, match="To go on: python train.py"):
                run(config, **again)
    assert read_checkpoint("out/again/last.pt")["step"] == 33
    run(config, **again)
    finish = [("out/whole", "out/again")]

    real = os.replace
    for place in range(1, 40):
        calls = []

        def deadly(source, target):
            calls.append(target)
            if len(calls) == place and place % 2:
                raise Killed
            real(source, target)
            if len(calls) == place:
                raise Killed

        again["out_dir"] = f"out/killed{place}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", deadly)
            try:
                run(config, **again)
                break  # fewer files than that
            except Killed:
                finish.append(("out/whole", again["out_dir"]))
        run(config, **again)
    assert len(finish) > 8
    for a, b in finish:
        assert same(parameters(a), parameters(b)) and same(
            parameters(a, "best.pt"), parameters(b, "best.pt")
        ), b
        for x, y in zip(metrics(a), metrics(b), strict=True):
            assert {k: v for k, v in x.items() if k not in ("seconds", "tokens_per_second")} == {
                k: v for k, v in y.items() if k not in ("seconds", "tokens_per_second")
            }


def test_a_run_that_goes_back_and_is_killed_near_its_end_ends_like_one_that_is_not(echo, monkeypatch):
    """The last evaluation is the best, the one before it goes back to an earlier best.pt: killed before every
    rename of the last two.
    """
    def judged(found, dense, target):  # as good as a coin, but the same for the same weights
        return int(found["val"]["loss"] * 1e7) % 5 < 2

    monkeypatch.setattr(judge, "meets_target", judged)
    settings = {
        "average_decay": 0.9,
        "cycle_steps": 5,
        "linear_penalty_steps": 2,
        "max_steps": 40,
        "eval_interval": 5,
        "lambda_init": 1.0,
        "seed": 2,
        "init_from": run("dense.py", seed=2),
    }
    real, renamed = os.replace, []

    def watched(source, target):
        real(source, target)
        renamed.append(os.path.basename(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        run("sparse.py", out_dir="out/whole", **settings)
    lines = metrics("out/whole")
    assert (
        lines[-2]["goes_back"] and lines[-1]["passes"] and read_checkpoint("out/whole/best.pt")["step"] == 40
    )
    assert renamed[-3:] == ["best.pt.next", "last.pt", "best.pt"]

    for place in range(len(renamed) - 5, len(renamed)):
        done = []

        def deadly(source, target):
            if len(done) == place:
                raise Killed
            real(source, target)
            done.append(target)

        again = f"out/killed{place}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", deadly)
            with pytest.raises(Killed):
                run("sparse.py", out_dir=again, **settings)
        run("sparse.py", out_dir=again, **settings)
        for name in ("last.pt", "best.pt"):
            assert same(parameters("out/whole", name), parameters(again, name)), (place, name)
        assert not [name for name in os.listdir(again) if name.endswith(".next")]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, f"{REPOSITORY}/train.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process, seconds=60):
    for _ in range(seconds * 50):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def test_kill_minus_nine_and_ctrl_c_leave_a_run_that_continues(echo):
    expected = run("sparse.py", max_steps=1000, eval_interval=50, out_dir="out/whole")
    command = ["sparse.py", "--max_steps=1000", "--eval_interval=50", "--out_dir=out/killed"]
    for number, evaluations in ((signal.SIGKILL, 2), (signal.SIGINT, 4), (signal.SIGTERM, 6)):
        process = start(*command)
        wait_for(
            lambda: (
                os.path.exists("out/killed/metrics.jsonl")
                and len(open("out/killed/metrics.jsonl").readlines()) >= evaluations
            ),
            process,
        )
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and "Traceback" not in errors
        if number != signal.SIGKILL:
            assert f"To go on: python train.py {' '.join(command)}" in errors
    with open("out/killed/metrics.jsonl", "a") as f:
        f.write('{"step": 4')  # what a kill in the middle of a line leaves
    process = start(*command)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "open edges" in out  # the report's table at the end
    assert same(parameters(expected), parameters("out/killed"))
    assert [m["step"] for m in metrics("out/killed")] == list(range(0, 1001, 50))
    report = json.load(open("out/killed/report.json"))
    assert report["step"] == read_checkpoint("out/killed/best.pt")["step"]


def test_a_finished_run_says_so_and_other_settings_are_refused(echo, capsys):
    run("dense.py")
    run("dense.py")
    run("dense.py", lambda_max=8.0)  # no business of a dense run's
    assert capsys.readouterr().out.count("out/dense is finished (60 steps)") == 2
    with pytest.raises(
        UserError, match="learning_rate 0.003 there, 0.001 here.*--out_dir=out/NEW.*--init_from=resume"
    ):
        run("dense.py", learning_rate=1e-3)
    run("dense.py", init_from="resume", max_steps=80)
    assert "changed settings: max_steps 60 there, 80 here" in capsys.readouterr().out
    assert read_checkpoint("out/dense/last.pt")["step"] == 80
    with pytest.raises(UserError, match="holds a run with another model or target"):
        run("dense.py", init_from="resume", n_layer=3)
    with pytest.raises(
        UserError, match="holds a run with another model or target .*average_decay 0.0 there, 0.9 here"
    ):
        run("dense.py", init_from="resume", max_steps=100, average_decay=0.9)


def test_a_run_that_cannot_start_from_its_parent_says_why(echo):
    run("dense.py", max_steps=1)
    with pytest.raises(UserError, match="n_layer=4, but out/dense/best.pt has n_layer=2"):
        run("sparse.py", init_from="out/dense", n_layer=4)
    with pytest.raises(UserError, match="no best.pt or last.pt in out/gone"):
        run("sparse.py", init_from="out/gone")
    run("sparse.py", init_from="out/dense", max_steps=1)
    for target in ({}, {"target_from": "out/dense"}):
        with pytest.raises(UserError, match="init_from=out/sparse is a gated run"):
            run("sparse.py", init_from="out/sparse", out_dir="out/twice", **target)
    # of another shape, but of the same rows: may set the target
    run("dense.py", max_steps=1, n_embd=8, n_head=1, seed=2, out_dir="out/narrow")
    run("sparse.py", max_steps=1, init_from="out/dense", target_from="out/narrow", out_dir="out/of-narrow")
    with pytest.raises(UserError, match="a row of data/echo has 4 tokens, the model's block_size is 3"):
        run("dense.py", block_size=3, out_dir="out/short")
    with pytest.raises(UserError, match="was trained on tokens of 'echo', the data has those of 'addition'"):
        run("sparse.py", init_from="out/dense", dataset="addition", out_dir="out/other")
    # as nanoGPT's, say
    torch.save(
        {key: value for key, value in read_checkpoint("out/dense/last.pt").items() if key != "data"},
        "unnamed.pt",
    )
    with pytest.raises(UserError, match="the model knows 9 tokens, data/addition has 13"):
        run("sparse.py", init_from="unnamed.pt", dataset="addition", out_dir="out/other")


def test_a_truncated_checkpoint_is_named_and_nothing_is_overwritten(echo):
    run("dense.py", max_steps=20)
    content = (echo / "out/dense/last.pt").read_bytes()
    (echo / "out/dense/last.pt").write_bytes(content[:1000])
    with pytest.raises(UserError, match="out/dense/last.pt cannot be read"):
        run("dense.py", max_steps=20)
    assert (echo / "out/dense/last.pt").read_bytes() == content[:1000]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(echo, monkeypatch):
    real = GPT.forward
    calls = []

    def overflowing(self, idx, targets=None, **options):
        logits, loss, density = real(self, idx, targets, **options)
        calls.append(self.training)
        return logits, loss * float("nan") if sum(calls) == 30 else loss, density

    monkeypatch.setattr(GPT, "forward", overflowing)
    with pytest.raises(
        UserError, match="the loss is nan, .* at step 29.*last.pt still holds.*--learning_rate="
    ):
        run("dense.py")
    assert read_checkpoint("out/dense/last.pt")["step"] == 20
    offending = json.load(open("out/dense/offending_batch.json"))
    assert (
        offending["step"] == 29
        and offending["indices"] == np.random.default_rng((1, False, 29)).integers(0, 400, 32).tolist()
    )
    assert all(p.isfinite().all() for p in parameters("out/dense").values())


def test_a_constraint_that_is_not_finite_stops_the_run_too(echo, monkeypatch):
    """To Python max(-1, nan) is -1: lambda would take it for a loss far below its target."""
    measured = Batches.mean_loss
    monkeypatch.setattr(
        Batches,
        "mean_loss",
        lambda self, step, model, *rest, **options: (
            float("nan")
            if step == 25 and model.config.gated
            else measured(self, step, model, *rest, **options)
        ),
    )
    with pytest.raises(UserError, match="the constraint nan at step 25"):
        run("sparse.py", constraint_interval=1)
    assert read_checkpoint("out/sparse/last.pt")["step"] == 20


def test_a_best_checkpoint_that_was_not_written_any_more_is_written_later(echo):
    """Killed between last.pt and best.pt, and gone on elsewhere, where the last digit of the loss is another.
    """
    run("dense.py", max_steps=20)
    last = read_checkpoint("out/dense/last.pt")
    last["best"][1] *= 1 - 1e-9
    save_checkpoint("out/dense/last.pt", last)
    os.remove("out/dense/best.pt")
    run("dense.py", init_from="resume", max_steps=40, learning_rate=3.0)
    assert (
        read_checkpoint("out/dense/best.pt")["step"] == 20
        and metrics("out/dense")[-1]["val_loss"] > last["best"][1] + 0.1
    )


def test_a_stream_of_tokens_trains_too(workplace):
    text = np.tile(np.arange(10, dtype=np.uint16), 300)
    prepare_data.write_dataset("data/count", text, text[:500], kind="stream", vocab_size=10)
    (workplace / "text.py").write_text(
        "".join(
            f"{k} = {v!r}\n"
            for k, v in (SMALL | {"dataset": "count", "block_size": 8, "eval_batches": 2}).items()
        )
    )
    lines = metrics(run("text.py"))
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] and lines[-1]["accuracy"] is None


@pytest.mark.parametrize("constraint_gates", ["sampled", "deterministic"])
def test_gates_are_sampled_in_every_training_step_and_never_when_judging(echo, constraint_gates, monkeypatch):
    real, seen = GPT.forward, []

    def watched(self, *inputs, **options):
        seen.append(("linear_penalty" in options, self.training, self.config.gated))
        return real(self, *inputs, **options)

    run("dense.py")
    monkeypatch.setattr(GPT, "forward", watched)
    run("sparse.py", max_steps=20, constraint_gates=constraint_gates)
    training_steps = [mode for is_step, mode, _ in seen if is_step]
    assert training_steps == [True] * 20
    judging = [mode for is_step, mode, _ in seen if not is_step]
    # by a pass of its own, which samples if the constraint is on sampled gates; always in the training modes'
    # own noise
    measured = len(range(0, 20, 4))
    assert sum(judging) == (measured if constraint_gates == "sampled" else 0) and len(judging) > measured


def test_the_constraints_target_is_the_dense_loss_on_training_batches_by_the_same_measure(echo):
    folder = run("sparse.py", max_steps=20, loss_slack=0.01)
    parent, data = load_checkpoint("out/dense/best.pt"), prepare_data.load("echo")
    expected = []
    for step in range(50):
        rows = np.random.default_rng((1, True, step)).integers(0, 400, 32)
        x, y = (torch.from_numpy(a) for a in data.batch("train", rows, 4))
        expected.append(parent(x, y)[1].item())
    assert metrics(folder)[0]["constraint_target"] == pytest.approx(np.mean(expected) + 0.01, rel=1e-5)
    assert metrics(folder)[0]["target_loss"] == pytest.approx(metrics("out/dense")[-1]["val_loss"] + 0.01)


def test_a_model_with_fewer_right_answers_does_not_meet_the_target():
    def found(loss, correct, accuracy=0.5):
        return {
            split: {"loss": loss, "correct": correct[split], "accuracy": accuracy}
            for split in ("train", "val")
        }

    dense = found(1.0, {"train": 10, "val": 5})
    assert meets_target(found(1.1, {"train": 10, "val": 5}), dense, 1.1)
    assert not meets_target(found(1.2, {"train": 10, "val": 5}), dense, 1.1)
    assert not meets_target(found(0.9, {"train": 9, "val": 5}), dense, 1.1)
    assert not meets_target(found(0.9, {"train": 10, "val": 4}), dense, 1.1)
    assert meets_target(
        found(1.1, {"train": 0, "val": 0}, None), found(1.0, {"train": 0, "val": 0}, None), 1.1
    )


def test_the_closest_evaluation_is_told_by_what_was_counted_for_all():
    """Where held-out answers are lost the training rows are not counted: that must not look closer than a few
    training answers lost.
    """
    def found(loss, **correct):
        return {
            split: {"loss": loss, "correct": number, "accuracy": 0.5} for split, number in correct.items()
        }

    dense = found(1.0, val=5, train=10)
    met = distance_from_target(found(1.0, val=5, train=10), dense, 1.1)
    in_training = distance_from_target(found(1.0, val=5, train=7), dense, 1.1)
    too_large = distance_from_target(found(1.2, val=5), dense, 1.1)
    held_out = distance_from_target(found(1.0, val=4), dense, 1.1)
    assert met < in_training < too_large < held_out and not any(met)


def test_folders_are_not_mixed_up(echo):
    with pytest.raises(UserError, match="own folder and its parent's"):
        run("sparse.py", out_dir="out/dense")
    assert not os.path.exists("out")
    run("dense.py")
    os.remove("out/dense/last.pt")
    with pytest.raises(UserError, match="best.pt but no last.pt"):
        run("dense.py", learning_rate=1e-4)
    (echo / "dense.py").write_text((echo / "dense.py").read_text() + "beta1 = 0.8\n")
    os.remove("out/dense/best.pt")
    run("dense.py")
    (echo / "dense.py").write_text((echo / "dense.py").read_text().replace("0.8", "0.7"))
    with pytest.raises(UserError, match="the parent, dense.py: out/dense holds a run with other settings"):
        run("sparse.py")
    with open("out/dense/config.json", "w") as f:
        f.write("[1]")
    with pytest.raises(UserError, match="out/dense/config.json is missing or damaged"):
        run("dense.py")


def test_resume_takes_over_what_was_not_typed_and_applies_what_was(echo):
    run("dense.py", max_steps=20)
    run(None, init_from="resume", out_dir="out/dense", max_steps=40, weight_decay=0.2, beta2=0.5)
    config = json.load(open("out/dense/config.json"))
    assert (config["max_steps"], config["batch_size"], config["init_from"]) == (40, 32, "scratch")
    groups = read_checkpoint("out/dense/last.pt")["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.2, 0.0] and groups[0]["betas"] == (0.9, 0.5)


def test_a_resumed_run_may_get_a_lower_cap_and_a_parent_keeps_its_own_files_settings(echo):
    (echo / "dense.py").write_text((echo / "dense.py").read_text() + "dtype = 'bfloat16'\n")
    run("sparse.py", max_steps=1)
    assert (
        json.load(open("out/dense/config.json"))["dtype"] == "bfloat16"
        and json.load(open("out/sparse/config.json"))["dtype"] == "float32"
    )
    # measured at step 4
    run(None, init_from="resume", out_dir="out/sparse", max_steps=6, lambda_init=2.0, lambda_max=2.0)
    assert metrics("out/sparse")[-1]["lambda"] <= 2


def test_learning_rate_warms_up_and_falls_to_its_minimum():
    c = Config(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    assert get_lr(0, c) == 0.1 and get_lr(9, c) == 1.0 and get_lr(10, c) == 1.0
    assert get_lr(60, c) == pytest.approx(0.55) and get_lr(110, c) == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------------------
# text: the hand-over, a teacher, another target, a control


@pytest.fixture
def counting(workplace):
    """A stream in which every token is the one before plus 1 or 2, by a coin that its position tosses: a loss
    above 0, a few edges needed.
    """
    tokens = (np.cumsum(np.random.default_rng(0).integers(1, 3, 6000)) % 10).astype(np.uint16)
    prepare_data.write_dataset(
        "data/count", tokens[:5000], tokens[5000:], kind="stream", vocab_size=10, tokenizer="digits"
    )
    shared = {k: v for k, v in SMALL.items() if k not in ("block_size", "n_layer", "n_head", "n_embd")} | {
        "dataset": "count",
        "eval_batches": 1,
        "eval_batch_size": 50,
    }
    shape = {k: SMALL[k] for k in ("n_layer", "n_head", "n_embd")} | {"block_size": 8}
    (workplace / "dense.py").write_text("".join(f"{k} = {v!r}\n" for k, v in (shared | shape).items()))
    (workplace / "control.py").write_text(
        "init_from = 'dense.py'\n" + "".join(f"{k} = {v!r}\n" for k, v in shared.items())
    )
    (workplace / "sparse.py").write_text(
        (workplace / "control.py").read_text()
        + "gated = True\nopen_above = 0.02\nconstraint_paired = True\nloss_slack = 0.02\n"
    )
    return workplace


def test_a_control_goes_on_from_the_parent_in_another_order_and_can_set_the_target(counting):
    run("sparse.py", target_from="control.py", max_steps=20)
    control, sparse = read_checkpoint("out/control/last.pt"), read_checkpoint("out/sparse/last.pt")
    assert (
        control["parent"] == sparse["parent"] == "out/dense/best.pt"
        and sparse["reference"] == "out/control/best.pt"
    )
    assert sparse["target_loss"] == pytest.approx(min(m["val_loss"] for m in metrics("out/control")) + 0.02)
    # it starts where the parent ended
    assert metrics("out/control")[0]["val_loss"] == pytest.approx(
        min(m["val_loss"] for m in metrics("out/dense")), abs=1e-6
    )
    with pytest.raises(UserError, match="target_from=out/sparse is a gated run"):
        run("sparse.py", target_from="out/sparse", out_dir="out/other")
    run("dense.py", block_size=4, max_steps=1, out_dir="out/short")
    # it would be judged on other windows
    with pytest.raises(UserError, match="out/short/best.pt has another vocabulary or block_size"):
        run("sparse.py", target_from="out/short", out_dir="out/other")


def test_the_paired_constraint_is_free_of_the_batchs_luck(counting):
    """At step 0 with all edges open the gated model is the dense one: the measured loss is then exactly the
    dense mean, whatever the batch.
    """
    folder = run("sparse.py", max_steps=1, open_above=0.0, gate_bias=50.0)
    line = metrics(folder)[-1]
    assert line["constraint_loss"] == pytest.approx(line["constraint_target"] - 0.02, abs=1e-5)
    unpaired = metrics(
        run(
            "sparse.py",
            max_steps=1,
            open_above=0.0,
            gate_bias=50.0,
            constraint_paired=False,
            out_dir="out/unpaired",
        )
    )[-1]
    assert abs(unpaired["constraint_loss"] - line["constraint_loss"]) > 1e-3


def test_what_the_target_hangs_on_cannot_change_on_the_way(counting):
    run("sparse.py", max_steps=10)
    for changed in ({"open_above": 0.5}, {"constraint_margin": 0.3}, {"target_from": "out/nowhere"}):
        with pytest.raises(UserError, match="another model or target"):
            run("sparse.py", init_from="resume", max_steps=20, **changed)
    parent = read_checkpoint("out/dense/best.pt")
    # the parent becomes another behind its child's back, at the same step
    next(iter(parent["model"].values()))[0, 0] += 1
    save_checkpoint("out/dense/best.pt", parent)
    with pytest.raises(
        UserError, match="out/dense/best.pt holds other weights now than when out/sparse was begun"
    ):
        run("sparse.py", init_from="resume", max_steps=20)


def test_an_evaluation_that_is_not_finite_leaves_the_last_good_checkpoint(counting):
    with pytest.raises(
        UserError, match="is nan at step|is inf at step|is nan, the gradient|is inf, the gradient"
    ):
        run("dense.py", learning_rate=1e30, eval_interval=1, max_steps=20, warmup_steps=0, grad_clip=0.0)
    assert all(p.isfinite().all() for p in parameters("out/dense").values())
    assert all(np.isfinite(m["val_loss"]) for m in metrics("out/dense"))


def test_the_last_steps_without_noise(counting, monkeypatch):
    real, seen = GPT.forward, []

    def watched(self, *inputs, **options):
        seen.append(options.get("noise")) if "linear_penalty" in options else None
        return real(self, *inputs, **options)

    run("dense.py")
    monkeypatch.setattr(GPT, "forward", watched)
    run("sparse.py", max_steps=20, noise_free_steps=5)
    assert seen == [None] * 15 + [0.0] * 5
    line = metrics("out/sparse")[-1]
    assert line["val_loss"] != metrics(run("sparse.py", max_steps=20, out_dir="out/noisy"))[-1]["val_loss"]


def test_a_teacher_changes_the_gradient_and_only_the_gradient(counting):
    with_teacher = metrics(run("sparse.py", max_steps=20, distill_weight=2.0, out_dir="out/taught"))
    without = metrics(run("sparse.py", max_steps=20, out_dir="out/untaught"))
    assert (
        with_teacher[0]["constraint_target"] == without[0]["constraint_target"]
        and with_teacher[0]["target_loss"] == without[0]["target_loss"]
    )
    assert not same(parameters("out/taught"), parameters("out/untaught"))
    teacher = load_checkpoint("out/dense/best.pt")
    x, _ = prepare_data.load("count").batch("val", range(0, 400, 8), 8)
    x = torch.from_numpy(x)
    distance = [
        divergence(load_checkpoint(f"out/{name}/last.pt")(x)[0], teacher(x)[0], x).item()
        for name in ("taught", "untaught")
    ]
    assert distance[0] < distance[1]


def test_divergence_is_the_textbook_sum():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    targets = torch.tensor([[1, 2, -1], [0, -1, -1]])
    expected = (p * (p / q).log()).sum(-1)[targets != -1].mean().item()
    assert divergence(student, teacher, targets).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(teacher, teacher, targets).item() == pytest.approx(0, abs=1e-6)


def test_other_data_than_the_run_began_with_is_refused(counting):
    run("dense.py", max_steps=20)
    tokens = np.zeros(5000, np.uint16)
    prepare_data.write_dataset("data/count", tokens, tokens, kind="stream", vocab_size=10, tokenizer="digits")
    with pytest.raises(UserError, match="data/count is not the data that out/dense was begun with"):
        run("dense.py", init_from="resume", max_steps=40)
    prepare_data.write_dataset(
        "data/count", tokens, tokens, kind="stream", vocab_size=10, tokenizer="letters"
    )
    with pytest.raises(UserError, match="was trained on tokens of 'digits', the data has those of 'letters'"):
        run("sparse.py", init_from="out/dense")


def test_a_checkpoint_of_transformers_is_a_parent_and_resumes(counting):
    """What init_from='gpt2' does, with a tiny folder in GPT-2's place."""
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=300)
    ).save_pretrained("hf")
    prepare_data.write_dataset(
        "data/count",
        *(np.arange(n, dtype=np.uint16) % 7 for n in (500, 100)),
        kind="stream",
        vocab_size=300,
        tokenizer="gpt2",
    )
    run("sparse.py", init_from="hf", max_steps=20, gate_bias=5.0, batch_size=8)
    run("sparse.py", init_from="resume", max_steps=30)
    saved = read_checkpoint("out/sparse/last.pt")
    assert (
        saved["step"] == 30
        and saved["parent"] == saved["reference"] == "hf"
        and saved["model_args"]["n_embd"] == 16
    )


def test_bfloat16_trains_and_is_judged_in_float32(counting):
    torch.manual_seed(0)
    exact, half = (
        metrics(run("dense.py", dtype=dtype, out_dir=f"out/{dtype}", max_steps=20))
        for dtype in ("float32", "bfloat16")
    )
    # before training they are one model, and the judge is one
    assert exact[0]["val_loss"] == half[0]["val_loss"]
    assert half[-1]["val_loss"] != exact[-1]["val_loss"] and half[-1]["val_loss"] == pytest.approx(
        exact[-1]["val_loss"], abs=0.05
    )
    assert all(p.dtype == torch.float32 for p in parameters("out/bfloat16").values())
    assert half[-1]["tokens_per_second"] > 0


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_torch_compile_gives_the_same_run(counting, impl):
    run("sparse.py", max_steps=20, attention_impl=impl)
    run("sparse.py", max_steps=20, attention_impl=impl, compile="on", out_dir="out/compiled")
    eager, compiled = metrics("out/sparse")[-1], metrics("out/compiled")[-1]
    assert compiled["constraint_target"] == pytest.approx(eager["constraint_target"], abs=1e-5)
    # the noise is the same, its sums are in another order
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], abs=2e-3)


def test_the_ways_of_computing_attention_train_alike_and_the_choice_is_printed(counting, capsys):
    """Without noise they compute the same numbers but for rounding; with it they draw from different
    generators.
    """
    found = {}
    for impl in ("plain", "tiled", "triton"):
        # without a GPU in Triton's interpreter
        device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
        found[impl] = metrics(
            run(
                "sparse.py",
                max_steps=10,
                noise_free_steps=10,
                attention_impl=impl,
                device=device,
                out_dir=f"out/{impl}",
            )
        )[-1]
        assert f"attention {impl}" in capsys.readouterr().out
    for impl in ("tiled", "triton"):
        assert found[impl]["val_loss"] == pytest.approx(found["plain"]["val_loss"], abs=1e-3) and found[impl][
            "open"
        ] == pytest.approx(found["plain"]["open"], abs=0.5)


def test_triton_without_a_gpu_is_refused_before_anything_is_built(counting, monkeypatch):
    run("dense.py", max_steps=5)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="attention_impl='triton' needs a GPU"):
        run("sparse.py", attention_impl="triton", device="cpu", init_from="out/dense")
    assert not os.path.exists("out/sparse")


def test_an_unready_parent_is_refused_and_a_ready_one_stops(echo):
    """ready_loss: trained until all answers are right and the loss is low; until then no child starts from
    it.
    """
    dense = (echo / "dense.py").read_text()
    (echo / "dense.py").write_text(dense + "ready_loss = 0.05\n")
    with pytest.raises(
        UserError,
        match="out/dense/best.pt is no parent yet: .*ready_loss=0.05.*--init_from=resume --max_steps=120",
    ):
        run("sparse.py")
    run("dense.py", init_from="resume", max_steps=2000, learning_rate=1e-2)
    last = read_checkpoint("out/dense/last.pt")
    assert last["ready"] and last["step"] < 2000 and metrics("out/dense")[-1]["val_loss"] <= 0.05
    run("sparse.py", init_from="out/dense", max_steps=20)
    assert metrics("out/sparse")[-1]["step"] == 20


def test_the_average_of_the_weights_is_what_is_judged_and_kept(echo):
    run("dense.py", average_decay=0.9)
    last = read_checkpoint("out/dense/last.pt")
    assert not same(last["model"], last["trained"])
    model = load_checkpoint("out/dense/last.pt")
    data = prepare_data.load("echo")
    x, y = (torch.from_numpy(a) for a in data.batch("val", range(200), 4))
    assert metrics("out/dense")[-1]["val_loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-5)


def test_only_an_evaluation_that_can_become_the_best_counts_all_rows(echo):
    (echo / "dense.py").write_text(
        (echo / "dense.py").read_text().replace("max_steps = 60", "max_steps = 300")
    )
    fewest = None
    for line in metrics(
        run("sparse.py", max_steps=300, linear_penalty_steps=100, lambda_init=1.0, lambda_min=0.2)
    ):
        held_out_passes = line["val_loss"] <= line["target_loss"] and line["val_correct"] == 200
        assert (line["correct"] is not None) == (
            held_out_passes and (fewest is None or line["open"] <= fewest)
        )
        if line["correct"] is not None and line["passes"]:
            fewest = line["open"]
    assert fewest is not None


def test_a_cycle_that_was_not_repaired_starts_again_from_the_last_state_that_met_the_target(
    echo, monkeypatch
):
    parent, evaluated = run("dense.py"), []
    monkeypatch.setattr(
        judge, "evaluate_splits", lambda *given: evaluated.append(1) or evaluate_splits(*given)
    )
    # steps 0, 20, 40, 60 and 80 are judged
    monkeypatch.setattr(judge, "meets_target", lambda *given: len(evaluated) in (2, 5))
    starts = []
    monkeypatch.setattr(
        judge, "load_weights", lambda model, weights: starts.append(weights) or load_weights(model, weights)
    )
    folder = run(
        "sparse.py",
        init_from=parent,
        cycle_steps=40,
        linear_penalty_steps=10,
        max_steps=80,
        lambda_init=1.0,
        lambda_min=0.2,
    )
    assert [line["passes"] for line in metrics(folder)] == [False, True, False, False, True]
    assert [line["goes_back"] for line in metrics(folder)] == [False, False, True, False, False]
    assert len(starts) == 1 and read_checkpoint(f"{folder}/best.pt")["step"] in (20, 80)
    with pytest.raises(UserError, match="cycle_steps=50 must be a multiple of eval_interval=20"):
        run("sparse.py", cycle_steps=50, out_dir="out/other")
