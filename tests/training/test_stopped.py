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

import train as train_file
from conftest import REPOSITORY
from helpers import metrics, parameters, run, same, stopped_after
from models.checkpoint import read_checkpoint, save_checkpoint
from storage.files import UserError, write_json
from training import judge
from training.folder import alone_in


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
        with stopped_after(steps), pytest.raises(SystemExit, match="stopped and saved after"):
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


def test_a_best_checkpoint_that_is_newer_than_last_pt_is_not_lost_by_going_on_for_longer(
        echo_parent, monkeypatch):
    """Killed at its end between the two; the longer run never comes to that evaluation again."""
    passing, written = {"passes"}, itertools.count(1)
    for place in judge, train_file:
        monkeypatch.setattr(place, "meets_target", lambda found, dense, target: "passes" in passing)
    with killed_at(lambda number, *names: names[1].endswith("last.pt") and next(written) == 3):
        with pytest.raises(Killed):
            run("sparse.py", max_steps=15, eval_interval=10, init_from="out/dense")
    assert [read_checkpoint(f"out/sparse/{name}.pt")["step"] for name in ("best", "last")] == [15, 10]
    passing.clear()
    run("sparse.py", max_steps=25, eval_interval=10, init_from="resume")
    best, last = (read_checkpoint(f"out/sparse/{name}.pt") for name in ("best", "last"))
    assert (best["step"], last["step"]) == (15, 25) and best["best"] == last["best"]
    assert not os.path.exists("out/sparse/closest.pt")


def test_a_run_whose_end_comes_sooner_is_judged_there(echo):
    with stopped_after(13), pytest.raises(SystemExit):
        run("dense.py")
    with pytest.raises(UserError, match="out/dense has made 13 steps: max_steps=12 is less"):
        run("dense.py", init_from="resume", max_steps=12)
    run("dense.py", init_from="resume", max_steps=13)
    assert [line["step"] for line in metrics("out/dense")] == [0, 13]


def test_a_run_of_an_earlier_version_goes_on(echo_parent):
    """Its settings have names that are gone, and its checkpoint does not say when it was judged."""
    run("sparse.py", max_steps=20, init_from="out/dense", out_dir="out/whole")
    for folder, steps in (("out/whole", 40), ("out/old", 20)):
        run("sparse.py", max_steps=steps, out_dir=folder, init_from="resume" if steps == 40 else "out/dense")
    gone = {"beta1": 0.9, "lambda_average": 0.9, "bias": True, "target_loss": 0.0, "wandb": ""}
    settings = json.load(open("out/old/config.json")) | gone
    write_json("out/old/config.json", settings)
    saved = read_checkpoint("out/old/last.pt")
    del saved["evaluated"]
    save_checkpoint("out/old/last.pt", saved | {"config": settings, "reference": saved["parent"]})
    run("sparse.py", max_steps=40, out_dir="out/old", init_from="resume")
    assert same(parameters("out/whole"), parameters("out/old"))
    assert [line["step"] for line in metrics("out/old")] == [0, 20, 40]


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
            assert "The same command goes on from there" in errors
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


def test_a_folder_is_locked_before_it_is_read(echo_parent, monkeypatch):
    real, read = train_file.claim_folder, []

    def watched(config, given):
        with pytest.raises(UserError, match="another process is training"), alone_in(config.out_dir):
            raise AssertionError("two are in")
        read.append(config.out_dir)
        return real(config, given)

    monkeypatch.setattr(train_file, "claim_folder", watched)
    run("dense.py")
    assert read == ["out/dense"]


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
