"""The progress line: it knows all parts of the job, a file gets plain lines, a terminal a bar."""

import io
import re

import pytest

from geco import GECO
from helpers import run
from train import State
from training.config import Config
from training.log import Progress


def found(loss=0.5, correct=3, accuracy=0.3):
    return {"val": {"loss": loss, "correct": correct, "examples": 10, "accuracy": accuracy, "open": 12.4,
                    "total": 40}}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr("training.log.time.perf_counter", lambda: now[0])
    return now


def two_parts(**of_parent):
    parent = Config(out_dir="out/dense", max_steps=100, batch_size=10, **of_parent)
    child = Config(out_dir="out/sparse", max_steps=200, batch_size=10, gated=True)
    return [parent, child]


def test_a_pipe_gets_one_plain_line_an_evaluation(echo, capsys):
    run("sparse.py")
    said = capsys.readouterr()
    assert "part 1 of 2, out/dense (then out/sparse): dense" in said.out
    assert "part 2 of 2, out/sparse: gated" in said.out
    lines = said.err.splitlines(keepends=True)
    assert not any("\r" in line for line in lines)
    assert [re.match(r"part (\d) of 2, (\S+): step (\d+) of 60, ", line).groups() for line in lines] == [
        (part, folder, str(step)) for part, folder in (("1", "out/dense"), ("2", "out/sparse"))
        for step in (0, 20, 40, 60)]
    assert re.search(r"step 20 of 60, 00:\d\d left, loss \d\.\d{4}, \d+ of 200 held-out right, "
                     r"best \d\.\d{4}$", lines[1])
    assert re.search(r"left, loss \d\.\d{4} \(target \d\.\d{4}\), \d+ of \d+ (held-out )?right, [\d.]+ of 40 "
                     r"edges open, (none met the target yet|best [\d.]+), lambda [\d.]+$", lines[5])
    assert "step 60 of 60, 00:00 left" in lines[7]
    run("sparse.py", init_from="resume", max_steps=64)  # the parent is not even looked at
    assert capsys.readouterr().err.startswith("out/sparse: step 64 of 64")


def test_the_time_left_is_that_of_all_parts(clock):
    runs = two_parts()
    with Progress(runs, 0, 0, io.StringIO()) as progress:
        assert progress.left() == "time left unknown"
        clock[0] += 50  # the first evaluation
        progress.evaluated(found(), State(), None)
        clock[0] += 10
        for _ in range(50):
            progress.step()
        # 0.2 s a step: 50 steps of the parent, 200 of the child, which take (3 + 1 / 4) / 3 as long
        assert progress.left() == "00:53 left"
    with Progress(runs, 1, 100, io.StringIO()) as progress:  # goes on from step 100
        clock[0] += 10
        for _ in range(50):
            progress.step()
        assert progress.left() == "00:10 left"


def test_a_parent_that_may_stop_early_makes_it_an_upper_bound(clock):
    stream = io.StringIO()
    with Progress(two_parts(ready_loss=0.1), 0, 0, stream) as progress:
        progress.step()
        clock[0] += 1
        progress.evaluated(found(loss=0.2), State(best=[40, 0.15]), None)
    assert stream.getvalue() == (
        "part 1 of 2, out/dense: step 1 of 100, at most 05:16 left, loss 0.2000 (ready at 0.1), 3 of 10 "
        "held-out right, best 0.1500\n")


def test_a_terminal_gets_a_bar_that_moves_and_a_text_has_no_right_answers():
    stream, geco = Terminal(), GECO(0.4, 1.0, 0.01, lambda_init=2.0)
    with Progress(two_parts(), 1, 0, stream) as progress:
        for _ in range(50):
            progress.step()
        progress.evaluated(found(accuracy=None), State(best=[12.4, 0.4], target_loss=0.4), geco)
    last = stream.getvalue().split("\r")[-1]
    assert "part 2 of 2, out/sparse" in last and "50/200" in last and last.count("\n") == 1
    assert "loss 0.5000 (target 0.4000), 12.4 of 40 edges open, best 12.4, lambda 2.000" in last


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr("training.log.parallel.rank", lambda: 1)
    for stream in (io.StringIO(), Terminal()):
        with Progress(two_parts(), 0, 0, stream) as progress:
            progress.evaluated(found(), State(), None)
            progress.step()
        assert stream.getvalue() == ""
