"""A run that is stopped, killed or gone on with ends like one that is not."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train as train_file
from conftest import REPOSITORY
from helpers import metrics, parameters, run, same, stopped_after
from models.checkpoint import read_checkpoint, save_checkpoint
from storage.files import UserError
from training import judge
from training.folder import load_optimizer


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is saved."""


@contextlib.contextmanager
def killed_at(fatal, after=False):
    """Killed before or after the rename of a file for which fatal(its number from 1 on, from, to)."""
    real, numbers = os.replace, itertools.count(1)

    def deadly(source, target):
        dies = fatal(next(numbers), source, target)
        if dies and not after:
            raise Killed
        real(source, target)
        if dies:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", deadly)
        yield


@pytest.mark.parametrize("config, settings", [
    pytest.param("dense.py", {"dropout": 0.1}, marks=pytest.mark.slow),
    pytest.param("sparse.py", {"attention_impl": "tiled"}, marks=pytest.mark.slow),
    ("sparse.py", {"constraint_gates": "sampled"}),
])
def test_a_run_that_is_stopped_and_killed_everywhere_ends_bit_for_bit_like_one_that_is_not(
        echo_parent, config, settings):
    """Stopped after steps 1 and 13 (no evaluation steps), and killed before or after every single file that
    it renames.
    """
    settings = settings | {"max_steps": 30, "eval_interval": 10}
    if config == "sparse.py":
        settings["init_from"] = "out/dense"
    run(config, out_dir="out/whole", **settings)
    again = {"out_dir": "out/again", **settings}
    for steps in (1, 12):
        with stopped_after(steps), pytest.raises(SystemExit, match="To go on: python train.py"):
            run(config, **again)
    assert read_checkpoint("out/again/last.pt")["step"] == 13
    run(config, **again)
    finish = ["out/again"]
    for place in range(1, 40):
        again["out_dir"] = f"out/killed{place}"
        with killed_at(lambda number, *names: number == place, after=place % 2 == 0):
            try:
                run(config, **again)
                break  # fewer files than that
            except Killed:
                finish.append(again["out_dir"])
        run(config, **again)
    assert len(finish) > 8
    for folder in finish:
        for name in ("last.pt", "best.pt"):
            assert same(parameters("out/whole", name), parameters(folder, name)), folder
        with open("out/whole/steps.csv") as one, open(f"{folder}/steps.csv") as two:
            assert one.read() == two.read(), folder
        for x, y in zip(metrics("out/whole"), metrics(folder), strict=True):
            assert {key for key in x if x[key] != y[key]} <= {"seconds", "tokens_per_second"}


def test_who_is_stopped_in_the_last_step_of_a_parent_gets_no_child(echo):
    """Then no step is left that could see it; and the same command goes on."""
    with stopped_after(60), pytest.raises(KeyboardInterrupt):
        run("sparse.py")
    assert read_checkpoint("out/dense/last.pt")["step"] == 60
    assert not os.path.exists("out/sparse/last.pt")
    run("sparse.py", max_steps=1)
    assert read_checkpoint("out/sparse/last.pt")["step"] == 1


def test_an_optimizer_takes_over_moments_but_no_settings():
    """best.pt, to which a run goes back, may be older than its settings."""
    weights = torch.nn.Parameter(torch.ones(3))
    old, new = (torch.optim.AdamW([weights], weight_decay=decay) for decay in (0.5, 0.1))
    weights.sum().backward()
    old.step()
    load_optimizer(new, old.state_dict())
    assert new.param_groups[0]["weight_decay"] == 0.1
    assert torch.equal(new.state[weights]["exp_avg"], old.state[weights]["exp_avg"])


def judge_by(monkeypatch, meets_target):
    for place in judge, train_file:
        monkeypatch.setattr(place, "meets_target", meets_target)


def test_a_run_that_is_killed_near_its_end_ends_like_one_that_is_not(echo_parent, monkeypatch):
    """The last evaluation is the best: killed before every rename of the last two."""
    verdicts = {}  # of a held-out loss. The evaluations of steps 5 and 20, the second and the fifth, pass
    judge_by(monkeypatch, lambda found, dense, target: verdicts.setdefault(found["val"]["loss"],
                                                                           len(verdicts) in (1, 4)))
    settings = {"average_decay": 0.9, "linear_penalty_steps": 2, "max_steps": 20, "eval_interval": 5,
                "lambda_init": 1.0, "seed": 2, "init_from": "out/dense"}
    renamed = []
    with killed_at(lambda number, *names: renamed.append(os.path.basename(names[1]))):
        run("sparse.py", out_dir="out/whole", **settings)
    assert metrics("out/whole")[-1]["passes"]
    assert read_checkpoint("out/whole/best.pt")["step"] == 20
    assert renamed[-3:] == ["best.pt.next", "last.pt", "best.pt"]
    for place in range(len(renamed) - 4, len(renamed) + 1):
        again = f"out/killed{place}"
        with killed_at(lambda number, *names: number == place), pytest.raises(Killed):
            run("sparse.py", out_dir=again, **settings)
        run("sparse.py", out_dir=again, **settings)
        for name in ("last.pt", "best.pt"):
            assert same(parameters("out/whole", name), parameters(again, name)), (place, name)
        assert not [name for name in os.listdir(again) if name.endswith(".next")]


def test_a_best_checkpoint_that_a_kill_left_waiting_is_not_lost_by_going_on_for_longer(
        echo_parent, monkeypatch):
    """The run ends between two evaluations, so nothing is evaluated when it goes on."""
    passing = {"passes"}
    judge_by(monkeypatch, lambda found, dense, target: "passes" in passing)
    with killed_at(lambda number, *names: names[0].endswith("best.pt.next")), pytest.raises(Killed):
        run("sparse.py", max_steps=15, eval_interval=10, init_from="out/dense")
    passing.clear()
    run("sparse.py", max_steps=25, eval_interval=10, init_from="resume")
    assert read_checkpoint("out/sparse/best.pt")["step"] in (10, 15)
    assert not os.path.exists("out/sparse/closest.pt")
    best = read_checkpoint("out/sparse/last.pt")["best"]
    assert read_checkpoint("out/sparse/best.pt")["best"] == best


def start(*arguments):
    return subprocess.Popen([sys.executable, f"{REPOSITORY}/train.py", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(condition, process, seconds=60):
    for _ in range(seconds * 50):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@pytest.mark.slow
def test_kill_minus_nine_and_ctrl_c_leave_a_run_that_continues(echo):
    expected = run("sparse.py", max_steps=1000, eval_interval=50, out_dir="out/whole")
    command = ["sparse.py", "--max_steps=1000", "--eval_interval=50", "--out_dir=out/killed"]
    for number, evaluations in ((signal.SIGKILL, 2), (signal.SIGINT, 4), (signal.SIGTERM, 6)):
        process = start(*command)
        wait_for(lambda: (os.path.exists("out/killed/metrics.jsonl")
                          and len(open("out/killed/metrics.jsonl").readlines()) >= evaluations), process)
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


def test_a_finished_run_says_so_and_other_settings_are_refused(echo_parent, capsys):
    run("dense.py")
    run("dense.py", lambda_max=8.0)  # no business of a dense run's
    assert capsys.readouterr().out.count("out/dense is finished (60 steps)") == 2
    run("dense.py", init_from="resume", max_steps=80)
    assert "changed settings: max_steps 60 there, 80 here" in capsys.readouterr().out
    assert read_checkpoint("out/dense/last.pt")["step"] == 80
    for given, message in (
        ({"learning_rate": 1e-3},
         "learning_rate 0.003 there, 0.001 here.*--out_dir=out/NEW.*--init_from=resume"),
        ({"init_from": "resume", "n_layer": 3}, "holds a run with another model or target"),
        ({"init_from": "resume", "max_steps": 100, "average_decay": 0.9},
         "holds a run with another model or target .*average_decay 0.0 there, 0.9 here"),
    ):
        with pytest.raises(UserError, match=message):
            run("dense.py", **given)


def test_a_best_checkpoint_that_was_not_written_any_more_is_written_later(echo):
    """Killed between last.pt and best.pt, and gone on elsewhere, where the last digit of the loss is another.
    """
    run("dense.py", max_steps=20)
    last = read_checkpoint("out/dense/last.pt")
    last["best"][1] *= 1 - 1e-9
    save_checkpoint("out/dense/last.pt", last)
    os.remove("out/dense/best.pt")
    run("dense.py", init_from="resume", max_steps=40, learning_rate=3.0)
    assert read_checkpoint("out/dense/best.pt")["step"] == 20
    assert metrics("out/dense")[-1]["val_loss"] > last["best"][1] + 0.1


def test_resume_takes_over_what_was_not_typed_and_applies_what_was(echo):
    run("dense.py", max_steps=20)
    run(None, init_from="resume", out_dir="out/dense", max_steps=40, weight_decay=0.2)
    config = json.load(open("out/dense/config.json"))
    assert (config["max_steps"], config["batch_size"], config["init_from"]) == (40, 32, "scratch")
    groups = read_checkpoint("out/dense/last.pt")["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.2, 0.0]


def test_a_resumed_run_may_get_a_lower_cap_and_a_parent_keeps_its_own_files_settings(echo):
    (echo / "dense.py").write_text((echo / "dense.py").read_text() + "dtype = 'bfloat16'\n")
    run("sparse.py", max_steps=1)
    assert json.load(open("out/dense/config.json"))["dtype"] == "bfloat16"
    assert json.load(open("out/sparse/config.json"))["dtype"] == "float32"
    # measured at step 4
    run(None, init_from="resume", out_dir="out/sparse", max_steps=6, lambda_init=2.0, lambda_max=2.0)
    assert metrics("out/sparse")[-1]["lambda"] <= 2
