"""What became of a run: the judgement, the headline, the advice by cause, the exit status."""

import json
import os
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import analyze
from analysis import verdict
from analysis.report import advice_of
from analysis.verdict import Parent, advice, headline, learning, still_learning
from helpers import call, in_this_process, metrics, run, torchrun
from models.checkpoint import read_checkpoint
from train import main
from training.config import Config
from training.judge import MISSED

CONFIG = vars(Config(linear_penalty_steps=0, max_steps=400, gated=True))
CONSTANT = CONFIG | {"min_lr": CONFIG["learning_rate"]}
DENSE = CONSTANT | {"gated": False}
FALLING = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
FLAT = [1.0, 0.5, 0.3, 0.21, 0.2, 0.21, 0.2, 0.21, 0.2]
LOST = [1.0, 0.2, 0.11, 0.2, 0.5, 0.9, 1.0, 1.0, 1.0]


def lines(losses, **columns):
    """metrics.jsonl of a run of 400 steps with these held-out losses; columns: a list each, or one value for
    all.
    """
    columns = {"accuracy": None, "lambda": 1.0} | columns
    steps = np.linspace(0, 400, len(losses)).astype(int).tolist()
    return [{"step": step, "val_loss": loss}
            | {key: values[i] if isinstance(values, list) else values for key, values in columns.items()}
            for i, (step, loss) in enumerate(zip(steps, losses))]


def report(step=400, answers_lost=0, nats_too_many=0.0, **changes):
    side = {"val_loss": 0.5, "accuracy": 0.9, "correct": 90, "examples": 100}
    return {"run": "out/x", "step": step, "meets_target": False, "dense": side, "sparse": side,
            "target_loss": 0.1, "ready": None, "edges": {"open": 12.4, "total": 264},
            "closest": {"answers_lost": answers_lost, "nats_too_many": nats_too_many}} | changes


def dense_report(**changes):
    return report(sparse=None, meets_target=True, **changes)


def parent_with(losses):
    return Parent("out/dense", CONSTANT, lines(losses))


@pytest.mark.parametrize("losses, expected", [
    (FALLING, True), (FLAT, False),
    # settled: the last quarter brings less than a slack
    ([3.0, 2.5, 2.2, 2.1, 2.05, 2.02, 2.01, 2.0097, 2.0095], False),
    ([3.0, 2.5, 2.2, 2.1, 2.0, 1.9, 2.0, 1.85, 1.9], False),  # noise
    ([0.3, 0.2, 0.1], False),  # too few to tell
])
def test_still_learning_is_a_fall_that_noise_does_not_explain(losses, expected):
    assert still_learning(lines(losses), CONSTANT) is expected
    # nor does one tell anything that comes with the learning rate's end, before which it does
    assert not still_learning(lines(losses), CONFIG)
    assert still_learning(lines(losses), CONFIG | {"max_steps": 800}) is expected


def test_the_fall_is_counted_from_three_quarters_of_the_run():
    assert learning(lines(FALLING)) == (pytest.approx(0.2), pytest.approx(0, abs=1e-9))


RISING = {"lambda": [0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.9, 1.6, 3.0], "violation": [0.0] + 8 * [0.9]}
SOON = [0.01, 0.5, 2.0, 3.0, 3.0, 3.0, 2.0, 3.0, 2.5]
LOW = {"lambda_init": 0.01, "lambda_min": 0.01}
TO_HIGHER = (r"began too low, at 0.01, .* --lambda_init=3 --out_dir=out/x-higher, "
             "or .* --max_steps=800 --out_dir=out/x-longer")
LOOSER = "tighter than this training can meet. .*--loss_slack=0.003 --out_dir=out/x-loose"


@pytest.mark.parametrize("metrics, found, given, words", [
    (lines(FALLING)[:5], report(200, 3, 0.1), {},
     ["not at its end. To go on: python train.py --init_from=resume --out_dir=out/x"]),
    (lines(FLAT), report(400, 3, 0.0), {},
     ["slack is too wide: .* --loss_slack=0.0003 --constraint_scale=0.0003 --out_dir=out/x-tight"]),
    (lines(FLAT, **{"lambda": 4.0}), report(400, 3, 0.1), {},
     ["cap throughout, .*--lambda_max=12 --out_dir=out/x-slower"]),
    (lines(FALLING), report(400, 0, 0.1), {},
     ["still falling at the end, .*--max_steps=800 --out_dir=out/x-longer"]),
    (lines(FALLING, **{"lambda": 4.0}), report(400, 0, 0.1), {}, ["--lambda_max=12", "--max_steps=800"]),
    (lines(LOST), report(100, 0, 0.01), {},
     ["closest at step 100 and lost .*--learning_rate=0.0005 --lambda_min=0.4 --out_dir=out/x-careful"]),
    (lines(FLAT, accuracy=[0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1]), report(100, 1, 0.01), {},
     ["lost that again"]),
    (lines(FLAT), report(400, 0, 0.1), {}, [LOOSER]),
    (lines(FLAT), report(400, 0, 0.1), {"loss_slack": 0.0}, ["--loss_slack=0.01 "]),
    (lines(FLAT, **RISING), report(100, 0, 0.01), LOW, [TO_HIGHER]),
    (lines(LOST, **RISING), report(100, 0, 0.01), LOW, [TO_HIGHER]),
    # a target that comes down takes lambda along, slowly; and one that was soon there did not begin too low
    (lines(FLAT, **RISING | {"violation": 0.2}), report(400, 0, 0.01), {}, [LOOSER]),
    (lines(FLAT, **RISING | {"lambda": SOON}), report(400, 0, 0.01), {}, [LOOSER]),
    (lines(FLAT, **{"lambda": 0.01, "violation": 0.9}), report(400, 0, 0.01), {}, [LOOSER]),
])
def test_advice_fits_the_cause(metrics, found, given, words):
    for sentence, pattern in zip(advice(found, CONFIG | given, metrics), words, strict=True):
        assert re.search(pattern, sentence), sentence


@pytest.mark.parametrize("given, flags", [
    ({"lambda_min": 0.2}, {"lambda_min": 0.4}),
    ({"lambda_min": 0.01, "lambda_init": 0.01}, {"lambda_min": 0.02, "lambda_init": 0.02}),
    ({"lambda_min": 0.02, "lambda_init": 0.02, "lambda_max": 0.02, "min_lr": 2e-3},
     {"lambda_min": 0.04, "min_lr": 0.001, "lambda_init": 0.04, "lambda_max": 0.04}),
])
def test_more_care_is_smaller_steps_and_a_floor_that_is_higher_than_it_was(given, flags):
    config = CONFIG | {"learning_rate": 2e-3} | given
    assert verdict.smaller_steps_and_higher_floor(config) == {"learning_rate": 0.001} | flags


def test_a_parent_that_was_still_learning_is_named_first():
    first, second = advice(report(400, 0, 0.1), CONFIG, lines(FLAT), parent_with(FALLING))
    assert first.startswith("Its parent was still learning")
    assert "--init_from=resume --out_dir=out/dense --max_steps=800" in first
    assert "--loss_slack" in second
    assert advice(report(), CONFIG, lines(FLAT), parent_with(FLAT))[0] != first


@pytest.mark.parametrize("found, config, metrics, words, what_to_do", [
    (report(300, 3, 0.0004), CONFIG, lines(FLAT),
     "MISSED: no evaluation of out/x met its target. The closest, of step 300: 12.40 of 264 edges open, "
     "3 answers lost, 0.0004 nats too many. Table and pictures show that one", None),
    (report(150, 0, 0.1), CONFIG, lines(FLAT)[:5], "MISSED: .* so far .step 200 of 400.", None),
    (report(meets_target=True), CONFIG, lines(FLAT),
     "out/x meets its target: 12.40 of 264 edges open, 90 of 100 answers right$", None),
    (report(0, 0, 0.1), CONFIG, lines(FLAT)[:1], "NOT TRAINED: out/x is at its start", None),
    # another evaluation of that run may have met it
    (report(400, 3, 0.0004, run="out/x/last.pt"), CONFIG, lines(FLAT),
     "out/x/last.pt misses its target: 12.40 of", ""),
    (dense_report(), DENSE, lines(FALLING), "out/x was STILL LEARNING at its end: held-out loss 0.5000, 90 "
     "of 100 answers right. The loss fell by 0.2 nats",
     "python train.py --init_from=resume --out_dir=out/x --max_steps=800"),
    (dense_report(), DENSE, lines(FLAT), "out/x has settled", ""),
    (dense_report(), CONFIG, lines(FLAT), "out/x has settled", ""),
    (dense_report(), CONFIG, lines(FALLING),
     "out/x: held-out loss 0.5000, 90 of 100 answers right, at the end of its learning rate. What more "
     "steps would have brought, only a control can tell: docs/text.md", ""),
    (dense_report(dense={"val_loss": 2.0, "correct": None}), DENSE, lines([1, 1]),
     "out/x: held-out loss 2.0000; too few evaluations to tell whether it was still learning", ""),
    (dense_report(ready=False), DENSE | {"ready_loss": 0.01}, lines(FLAT),
     "NOT READY: out/x is no parent yet", "--max_steps=800"),
    (dense_report(ready=True), DENSE | {"ready_loss": 0.01}, lines(FALLING),
     "out/x is ready to be a parent", ""),
])
def test_headlines_and_what_to_do(found, config, metrics, words, what_to_do):
    assert re.match(words, headline(found, config, metrics))
    if what_to_do is not None:  # '': nothing
        said = advice(found, config, metrics)
        assert what_to_do in said[0] if what_to_do else said == []


def test_a_run_that_missed_says_so_first_draws_its_closest_and_exits_with_2(echo, monkeypatch):
    in_this_process(monkeypatch)
    # steps so large that what the parent knows is lost
    impossible = ["sparse.py", "--loss_slack=0.0", "--learning_rate=0.5", "--device=cpu"]
    done = call(main, *impossible)
    assert done.returncode == MISSED == 2, done.stderr
    found = json.load(open("out/sparse/report.json"))
    closest = read_checkpoint("out/sparse/closest.pt")
    again = call(analyze.main, "report", "out/sparse", "out/dense")
    assert again.returncode == 0
    first, second = again.stdout.splitlines()[:2]
    assert first == found["headline"] and second.startswith("out/dense: held-out loss")
    assert first.startswith("MISSED: no evaluation of out/sparse met its target")
    assert f"The closest, of step {closest['step']}: " in first and found["step"] == closest["step"] > 0
    assert found["closest"]["answers_lost"] + found["closest"]["nats_too_many"] > 0
    assert not found["meets_target"] and found["advice"]
    assert all(f"out/sparse: {sentence}" in again.stdout for sentence in found["advice"])
    assert not os.path.exists("out/sparse/best.pt")
    assert Image.open("out/sparse/training.png").width > 200
    assert os.path.exists("out/sparse/gates.png")
    assert call(main, *impossible).returncode == 2  # it is finished, and still has missed


@pytest.mark.slow
def test_an_unready_dense_run_exits_with_2_and_a_ready_one_with_0(echo, monkeypatch):
    in_this_process(monkeypatch)
    done = call(main, "dense.py", "--ready_loss=0.01", "--device=cpu")
    assert done.returncode == 2
    assert "NOT READY: out/dense is no parent yet" in done.stdout
    assert "--init_from=resume --out_dir=out/dense --max_steps=120" in done.stdout
    done = call(main, "dense.py", "--init_from=resume", "--ready_loss=5.0", "--max_steps=1000",
                "--learning_rate=0.01", "--device=cpu")
    assert done.returncode == 0 and "out/dense is ready to be a parent" in done.stdout, done
    assert json.load(open("out/dense/report.json"))["ready"] is True


@pytest.mark.slow
def test_the_other_processes_of_a_run_that_missed_come_to_their_end(echo):
    run("dense.py")
    started = torchrun("sparse.py", "--init_from=out/dense", "--loss_slack=0.0", "--learning_rate=0.5",
                       "--max_steps=20", "--device=cpu")
    _, said = started.communicate(timeout=120)
    assert started.returncode == 1 and "exitcode  : 2" in said
    assert json.load(open("out/sparse/report.json"))["headline"].startswith("MISSED")


def test_what_came_closest_is_forgotten_once_the_target_is_met(echo):
    """A folder with closest.pt is that of a run that missed."""
    run("sparse.py", max_steps=60, loss_slack=0.05, lambda_init=0.2)
    assert any(not line["passes"] for line in metrics("out/sparse")[1:])
    assert os.path.exists("out/sparse/best.pt") != os.path.exists("out/sparse/closest.pt")


def met(dense=0.5, sparse=0.5, step=400):
    sides = {"dense": {"val_loss": dense}, "sparse": {"val_loss": sparse}}
    return report(step, meets_target=True, closest=None, **sides)


@pytest.mark.parametrize("found, parent, words", [
    (met(step=300), parent_with(FLAT), None),
    (met(), parent_with(FALLING), "unfinished model's loss.* --out_dir=out/dense --max_steps=800"),
    (met(step=50), parent_with(FLAT), "best.pt is of step 50 of 400"),
    (met(4.1, 2.3), None, "hardly trained: its held-out loss is 4.1, the child's 2.3.* Train that longer"),
    (met(4.1, 2.3), parent_with(FLAT), "hardly trained.* --out_dir=out/dense --max_steps=800"),
    (met(4.1, 2.3), parent_with(FALLING), "hardly trained"),  # said once
    # 2 %, next to nothing, noise
    (met(1.36, 1.33), parent_with(FLAT), None), (met(0.0009, 0.0001), parent_with(FLAT), None),
    (met(0.2, 0.18), parent_with(FLAT), None),
])
def test_a_target_that_is_worth_little_and_an_early_best_are_said(found, parent, words):
    said = advice(found, CONFIG, lines(FLAT), parent)
    assert len(said) == bool(words) and re.search(words or "", "".join(said))


def test_a_run_of_the_same_table_is_not_advised_again():
    lines = ["Lambda stood at its cap: --lambda_max=3 --out_dir=out/x-slower",
             "To go on: python train.py --init_from=resume --out_dir=out/x"]
    missed = {"run": "out/x", "advice": lines}
    assert advice_of([missed]) == [f"out/x: {line}" for line in lines]
    assert advice_of([missed, {"run": "out/x-slower", "advice": []}]) == [f"out/x: {lines[1]}"]


def test_what_is_advised_can_be_typed_whatever_a_run_is_called():
    assert shlex.split(verdict.train_on("out/my run", 9)) == [
        "python", "train.py", "--init_from=resume", "--out_dir=out/my run", "--max_steps=9"]
    missed = report(answers_lost=3, run="out/my run")
    [sentence] = advice(missed, CONFIG, lines(FLAT))
    assert shlex.split(sentence)[-1] == "--out_dir=out/my run-tight"
    missed["advice"] = [sentence]
    assert advice_of([missed]) and not advice_of([missed, {"run": "out/my run-tight", "advice": []}])
