"""What became of a run: the judgement, the headline, the advice by cause, the exit status."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import analyze
from analysis import verdict
from analysis.report import advice_of
from analysis.verdict import Parent, advice, headline, learning, still_learning
from conftest import REPOSITORY
from helpers import call, in_this_process, metrics, run
from models.checkpoint import read_checkpoint
from train import main
from training.config import Config
from training.judge import MISSED

CONFIG = vars(Config(linear_penalty_steps=0, max_steps=400, gated=True))
CONSTANT = CONFIG | {"min_lr": CONFIG["learning_rate"]}


def lines(losses, **columns):
    """metrics.jsonl of a run of 400 steps with these held-out losses; columns: a list each, or one value for
    all.
    """
    steps = np.linspace(0, 400, len(losses)).astype(int).tolist()
    found = [
        {"step": step, "val_loss": loss, "accuracy": None, "lambda": 1.0} for step, loss in zip(steps, losses)
    ]
    for key, values in columns.items():
        for i, line in enumerate(found):
            line[key] = values[i] if isinstance(values, list) else values
    return found


def report(step=400, answers_lost=0, nats_too_many=0.0, **changes):
    side = {"val_loss": 0.5, "accuracy": 0.9, "correct": 90, "examples": 100}
    return {
        "run": "out/x",
        "step": step,
        "meets_target": False,
        "dense": side,
        "sparse": side,
        "target_loss": 0.1,
        "ready": None,
        "edges": {"open": 12.4, "total": 264},
        "closest": {"answers_lost": answers_lost, "nats_too_many": nats_too_many},
    } | changes


def parent_with(losses):
    return Parent("out/dense", CONSTANT, lines(losses))


FALLING = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
FLAT = [1.0, 0.5, 0.3, 0.21, 0.2, 0.21, 0.2, 0.21, 0.2]


@pytest.mark.parametrize("losses, expected", [
    (FALLING, True), (FLAT, False),
    # settled: the last quarter brings less than a slack
    ([3.0, 2.5, 2.2, 2.1, 2.05, 2.02, 2.01, 2.0097, 2.0095], False),
    ([3.0, 2.5, 2.2, 2.1, 2.0, 1.9, 2.0, 1.85, 1.9], False),  # noise
    ([0.3, 0.2, 0.1], False),  # too few to tell
])
def test_still_learning_is_a_fall_that_noise_does_not_explain(losses, expected):
    assert still_learning(lines(losses), CONSTANT) is expected


def test_a_loss_that_falls_with_the_learning_rate_tells_nothing():
    assert not still_learning(lines(FALLING), CONFIG)
    assert still_learning(lines(FALLING), CONFIG | {"max_steps": 800})  # not at its end
    dense = report(sparse=None, meets_target=True)
    assert headline(dense, CONFIG, lines(FALLING)) == (
        "out/x: held-out loss 0.5000, 90 of 100 answers right, at the end of its learning rate. What more "
        "steps would have brought, only a control can tell: docs/text.md"
    )
    assert advice(dense, CONFIG | {"gated": False}, lines(FALLING)) == []
    assert headline(dense, CONFIG, lines(FLAT)).startswith("out/x has settled")


def test_the_fall_is_counted_from_three_quarters_of_the_run():
    assert learning(lines(FALLING)).fall == pytest.approx(0.2)
    assert learning(lines(FALLING)).noise == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "what, metrics, found, words",
    [
        (
            "not at its end",
            lines(FALLING)[:5],
            report(200, 3, 0.1),
            ["not at its end. To go on: python train.py --init_from=resume --out_dir=out/x"],
        ),
        (
            "answers lost, nats met",
            lines(FLAT),
            report(400, 3, 0.0),
            [
                "slack is too wide: the same command with "
                "--loss_slack=0.0003 "
                "--constraint_scale=0.0003 "
                "--out_dir=out/x-tight"
            ],
        ),
        (
            "lambda at its cap",
            lines(FLAT, **{"lambda": 4.0}),
            report(400, 3, 0.1),
            ["cap throughout, .*--lambda_max=12 --out_dir=out/x-slower"],
        ),
        (
            "still improving",
            lines(FALLING),
            report(400, 0, 0.1),
            ["still falling at the end, .*--max_steps=800 --out_dir=out/x-longer"],
        ),
        (
            "both",
            lines(FALLING, **{"lambda": 4.0}),
            report(400, 0, 0.1),
            ["--lambda_max=12", "--max_steps=800"],
        ),
        (
            "lost late",
            lines([1.0, 0.2, 0.11, 0.2, 0.5, 0.9, 1.0, 1.0, 1.0]),
            report(100, 0, 0.01),
            [
                "closest at step 100 and lost that again.*"
                "--learning_rate=0.0005 --lambda_min=0.4 --out_dir=out/x-careful"
            ],
        ),
        (
            "answers lost late",
            lines(FLAT, accuracy=[0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1]),
            report(100, 1, 0.01),
            ["lost that again"],
        ),
        (
            "neither",
            lines(FLAT),
            report(400, 0, 0.1),
            ["tighter than this training can meet. .*--loss_slack=0.003 --out_dir=out/x-loose"],
        ),
    ],
)
def test_advice_fits_the_cause(what, metrics, found, words):
    sentences = advice(found, CONFIG, metrics)
    assert len(sentences) == len(words)
    for sentence, pattern in zip(sentences, words):
        assert re.search(pattern, sentence), (what, sentence)


def test_a_parent_that_was_still_learning_is_named_first():
    first, second = advice(report(400, 0, 0.1), CONFIG, lines(FLAT), parent_with(FALLING))
    assert first.startswith("Its parent was still learning")
    assert "--init_from=resume --out_dir=out/dense --max_steps=800" in first
    assert "--loss_slack" in second
    assert advice(report(), CONFIG, lines(FLAT), parent_with(FLAT))[0] != first


def test_headlines():
    assert headline(report(300, 3, 0.0004), CONFIG, lines(FLAT)) == (
        "MISSED: no evaluation of out/x met its target. The closest, of step 300: 12.40 of 264 edges open, "
        "3 answers lost, 0.0004 nats too many. "
        "Table and pictures show that one"
    )
    assert "so far (step 200 of 400)" in headline(report(150, 0, 0.1), CONFIG, lines(FLAT)[:5])
    assert (
        headline(report(meets_target=True), CONFIG, lines(FLAT))
        == "out/x meets its target: 12.40 of 264 edges open, 90 of 100 answers right"
    )
    assert headline(report(0, 0, 0.1), CONFIG, lines(FLAT)[:1]).startswith(
        "NOT TRAINED: out/x is at its start"
    )
    one = report(400, 3, 0.0004, run="out/x/last.pt")  # another evaluation of that run may have met it
    assert headline(one, CONFIG, lines(FLAT)).startswith("out/x/last.pt misses its target: 12.40 of")
    assert advice(one, CONFIG, lines(FLAT)) == []
    dense, config = report(sparse=None, meets_target=True), CONSTANT | {"gated": False}
    assert headline(dense, config, lines(FALLING)).startswith(
        "out/x was STILL LEARNING at its end: held-out loss 0.5000, 90 of 100 answers right. The loss fell "
        "by 0.2 nats"
    )
    assert "python train.py --init_from=resume --out_dir=out/x --max_steps=800" in advice(
        dense, config, lines(FALLING)
    )[0]
    assert headline(dense, config, lines(FLAT)).startswith("out/x has settled")
    assert advice(dense, config, lines(FLAT)) == []
    text = dense | {"dense": {"val_loss": 2.0, "correct": None}}
    assert (
        headline(text, config, lines([1, 1]))
        == "out/x: held-out loss 2.0000; too few evaluations to tell whether it was still learning"
    )
    config |= {"ready_loss": 0.01}
    assert headline(dense | {"ready": False}, config, lines(FLAT)).startswith(
        "NOT READY: out/x is no parent yet"
    )
    assert "--max_steps=800" in advice(dense | {"ready": False}, config, lines(FLAT))[0]
    assert "is ready to be a parent" in headline(dense | {"ready": True}, config, lines(FLAT))
    assert advice(dense | {"ready": True}, config, lines(FALLING)) == []


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
    assert again.stdout.startswith("MISSED: no evaluation of out/sparse met its target")
    first, second = again.stdout.splitlines()[:2]
    assert first == found["headline"]
    assert second.startswith("out/dense: held-out loss")
    assert f"The closest, of step {closest['step']}: " in first
    assert closest["step"] > 0
    assert found["closest"]["answers_lost"] + found["closest"]["nats_too_many"] > 0
    assert not found["meets_target"]
    assert found["step"] == closest["step"]
    assert found["advice"]
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
    assert done.returncode == 0 and "out/dense is ready to be a parent" in done.stdout, (
        done.stdout + done.stderr
    )
    assert json.load(open("out/dense/report.json"))["ready"] is True


@pytest.mark.slow
def test_the_other_processes_of_a_run_that_missed_come_to_their_end(echo):
    run("dense.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            f"{REPOSITORY}/train.py",
            "sparse.py",
            "--init_from=out/dense",
            "--loss_slack=0.0",
            "--learning_rate=0.5",
            "--max_steps=20",
            "--device=cpu",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "exitcode  : 2" in done.stderr
    assert "MISSED: no evaluation of out/sparse" in done.stdout
    assert os.path.exists("out/sparse/report.json")


def test_more_loss_is_advised_where_there_was_no_slack_at_all():
    config = CONFIG | {"loss_slack": 0.0}
    assert "--loss_slack=0.01 " in advice(report(nats_too_many=0.1), config, lines(FLAT))[-1]


def test_what_came_closest_is_forgotten_once_the_target_is_met(echo):
    """A folder with closest.pt is that of a run that missed."""
    run("sparse.py", max_steps=60, loss_slack=0.05, lambda_init=0.2)
    assert any(not line["passes"] for line in metrics("out/sparse")[1:])
    assert os.path.exists("out/sparse/best.pt") != os.path.exists("out/sparse/closest.pt")


def test_a_target_that_is_worth_little_and_an_early_best_are_said():
    met = report(step=300, meets_target=True, closest=None)
    assert advice(met, CONFIG, lines(FLAT), parent_with(FLAT)) == []
    [remark] = advice(met, CONFIG, lines(FLAT), parent_with(FALLING))
    assert "unfinished model's loss" in remark and "--out_dir=out/dense --max_steps=800" in remark
    [remark] = advice(met | {"step": 50}, CONFIG, lines(FLAT), parent_with(FLAT))
    assert "best.pt is of step 50 of 400" in remark


def test_a_lambda_that_began_too_low_is_to_begin_higher_and_no_laxer_slack_is_advised():
    rising = {"lambda": [0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.9, 1.6, 3.0], "violation": [0.0] + 8 * [0.9]}
    config, missed = CONFIG | {"lambda_init": 0.01, "lambda_min": 0.01}, report(100, 0, 0.01)
    lost = lines([1.0, 0.2, 0.11, 0.2, 0.5, 0.9, 1.0, 1.0, 1.0], **rising)
    for losses in lines(FLAT, **rising), lost:
        [sentence] = advice(missed, config, losses)
        assert "began too low, at 0.01" in sentence and "--loss_slack" not in sentence
        assert "--lambda_init=3 --out_dir=out/x-higher" in sentence and "--max_steps=800" in sentence
    # a target that comes down takes lambda along, slowly; and one that was soon there did not begin too low
    slowly = rising | {"violation": 0.2}
    soon = rising | {"lambda": [0.01, 0.5, 2.0, 3.0, 3.0, 3.0, 2.0, 3.0, 2.5]}
    for healthy in slowly, soon, {"lambda": 0.01, "violation": 0.9}:
        [sentence] = advice(report(nats_too_many=0.01), config, lines(FLAT, **healthy))
        assert "--loss_slack=0.003" in sentence


def test_a_parent_that_was_hardly_trained_is_said_of_a_child_that_meets_its_target():
    def met(dense, sparse):
        sides = {"dense": {"val_loss": dense}, "sparse": {"val_loss": sparse}}
        return report(meets_target=True, closest=None, **sides)

    for parent, words in (None, "Train that longer first"), (parent_with(FLAT), "--out_dir=out/dense --max"):
        [remark] = advice(met(4.1, 2.3), CONFIG, lines(FLAT), parent)
        assert "hardly trained: its held-out loss is 4.1, the child's 2.3" in remark and words in remark
    [remark] = advice(met(4.1, 2.3), CONFIG, lines(FLAT), parent_with(FALLING))  # said once
    assert "hardly trained" in remark
    for dense, sparse in (1.36, 1.33), (0.0009, 0.0001), (0.2, 0.18):  # 2 %, next to nothing, noise
        assert advice(met(dense, sparse), CONFIG, lines(FLAT), parent_with(FLAT)) == []


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


@pytest.mark.parametrize("given, flags", [
    ({"lambda_min": 0.2}, "--learning_rate=0.001 --lambda_min=0.4"),
    ({"lambda_min": 0.01, "lambda_init": 0.01}, "--learning_rate=0.001 --lambda_min=0.02 --lambda_init=0.02"),
    ({"lambda_min": 0.02, "lambda_init": 0.02, "lambda_max": 0.02, "min_lr": 2e-3},
     "--learning_rate=0.001 --lambda_min=0.04 --min_lr=0.001 --lambda_init=0.04 --lambda_max=0.04"),
])
def test_more_care_is_smaller_steps_and_a_floor_that_is_higher_than_it_was(given, flags):
    config = CONFIG | {"learning_rate": 2e-3} | given
    assert verdict.smaller_steps_and_higher_floor(config) == flags
