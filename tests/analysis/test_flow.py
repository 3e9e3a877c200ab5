"""Edges going out: what is stored at every evaluation, and the film."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import analyze
from analysis import flow
from conftest import REPOSITORY
from helpers import call, run, stopped_after, write_config
from models.checkpoint import load_checkpoint
from prepare_data import load
from storage.addition import AdditionTask
from training.judge import evaluate
from training.log import edge_list

LINE = {"step": 300, "open": 12.4, "total": 264, "correct": 9998, "examples": 10000, "lambda": 3.5,
        "passes": True, "held_out_only": False, "kept": None}


def stored(folder):
    return [json.loads(line) for line in open(f"{folder}/edges.jsonl")]


def test_every_evaluation_stores_open_edges_and_the_report_films_them(workplace):
    """And a run that is stopped and goes on stores what one that is not does."""
    shared = {"eval_interval": 15, "eval_batches": 1, "device": "cpu"}
    write_config("dense.py", n_layer=2, n_embd=16, max_steps=2, **shared)
    write_config("sparse.py", init_from="dense.py", gated=True, max_steps=30, gate_bias=0.0, **shared)
    run("sparse.py", out_dir="out/whole")
    lines = stored("out/whole")
    assert [line["step"] for line in lines] == [0, 15, 30]
    found = evaluate(load_checkpoint("out/whole/last.pt"), load("addition"), "val", 1000, 1)
    shares = np.zeros((2, 1, 11, 11))
    for *at, share in lines[-1]["edges"]:
        shares[tuple(at)] = share
    assert shares == pytest.approx(np.array(found["by_edge"]), abs=1e-4)
    assert shares.sum() == pytest.approx(lines[-1]["open"], abs=0.01)

    with stopped_after(20), pytest.raises(SystemExit):
        run("sparse.py", out_dir="out/again")
    with open("out/again/edges.jsonl", "a") as f:  # what a killed run may have written
        f.write(json.dumps(LINE | {"step": 30, "edges": []}) + "\n" + '{"step": 4')
    run("sparse.py", out_dir="out/again")
    assert stored("out/again") == lines

    done = call(analyze.main, "report", "out/whole")
    assert done.returncode == 0, done.stderr
    with Image.open("out/whole/flow.gif") as film:
        assert film.n_frames == flow.kept_frame(lines) + 1
    assert os.stat("out/whole/flow.gif").st_size < flow.MOST_BYTES


def test_only_gated_addition_has_a_flow(echo, tmp_path):
    run("sparse.py", max_steps=5)
    assert not os.path.exists("out/sparse/edges.jsonl")
    flow.film("out/sparse", AdditionTask(), 2, 100)
    assert not os.path.exists("out/sparse/flow.gif")


def test_the_loop_does_without_matplotlib():
    code = "import sys, train; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("kept, place", [
    ((None, "best", None, "best", None), 3), ((None, "closest", "closest", None), 2),
    (("closest", "best", None), 1),  # best.pt is what a run is known by
    ((None, None), 1)])
def test_the_film_ends_with_what_is_kept(kept, place):
    assert flow.kept_frame([{"kept": name} for name in kept]) == place


@pytest.mark.parametrize("more, is_kept, words", [
    ({"kept": "best"}, True, ("kept: step 300,  12.4 of 264 attention edges open",
                              "9,998 of 10,000 sums right, meets its target;  lambda 3.50")),
    ({"kept": "closest", "passes": False}, True, ("target missed, closest: step 300", "misses its target")),
    ({"held_out_only": True}, False, ("step 300 of 4,500", "9,998 of 10,000 held-out sums right"))])
def test_a_caption_says_where_the_run_stands(more, is_kept, words):
    for line, part in zip(flow.caption(LINE | more, 4500, is_kept), words, strict=True):
        assert part in line


@pytest.mark.parametrize("task, n_layer, n_head, evaluations", [
    (AdditionTask(), 4, 1, 60), (AdditionTask(1, 5), 1, 2, 1), (AdditionTask(4, 5), 6, 12, 12)])
def test_films_of_any_shape_stay_small_and_darken_with_the_share_of_sums(tmp_path, task, n_layer, n_head,
                                                                         evaluations):
    T = task.length
    random = np.random.default_rng(0).random((n_layer, n_head, T, T)) * np.tril(np.ones((T, T)))
    with open(tmp_path / "edges.jsonl", "w") as f:
        for i in range(evaluations):
            edges = edge_list(np.clip(3 * (random - i / evaluations), 0, 1))
            f.write(json.dumps(LINE | {"step": i, "kept": "best", "edges": edges}) + "\n")
    flow.film(str(tmp_path), task, n_layer, 100)
    assert os.stat(tmp_path / "flow.gif").st_size <= flow.MOST_BYTES
    shown, ink = [], []
    with Image.open(tmp_path / "flow.gif") as film:
        assert film.n_frames <= flow.MOST_FRAMES and (n_layer != 4 or film.n_frames >= 20)
        for i in range(film.n_frames):
            film.seek(i)
            shown.append(film.info["duration"])
            ink.append((255 - np.asarray(film.convert("L")).astype(int)).sum())
    assert shown[-1] == flow.LAST and (len(shown) == 1 or shown[0] == flow.FIRST)
    if n_head < 12:  # else so many lines cover each other that colours count
        assert ink == sorted(ink, reverse=True)  # shares go down from frame to frame
