"""Edges going out: what is stored at every evaluation, the picture, the film."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
from analysis import flow
from conftest import REPOSITORY
from helpers import call, run
from models.checkpoint import load_checkpoint
from prepare_data import load
from storage.addition import AdditionTask
from train import train
from training.config import make_config
from training.folder import StopRequest
from training.judge import evaluate
from training.log import edge_list

LINE = {"step": 300, "open": 12.4, "total": 264, "correct": 9998, "examples": 10000, "lambda": 3.5,
        "passes": True, "held_out_only": False, "kept": None}


class Shape:
    """As much of a model's config as a film needs."""

    def __init__(self, n_layer, n_head):
        self.n_layer, self.n_head = n_layer, n_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run on addition in out/whole, and the same, stopped after step 20 and gone on with, in
    out/again.
    """
    place = tmp_path_factory.mktemp("addition")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "dense.py").write_text(
            "n_layer = 2\nn_embd = 16\nmax_steps = 2\neval_interval = 15\neval_batches = 1"
        )
        (place / "sparse.py").write_text(
            "init_from = 'dense.py'\ngated = True\nmax_steps = 30\neval_interval = 15\neval_batches = "
            "1\ngate_bias = 0.0\ndevice = 'cpu'"
        )
        train(*make_config("sparse.py", {"out_dir": "out/whole"}))
        with pytest.MonkeyPatch.context() as stops:
            countdown = iter([False] * 19 + [True])
            stops.setattr(
                StopRequest,
                "asked",
                property(lambda self: next(countdown), lambda self, value: None),
                raising=False,
            )
            with pytest.raises(SystemExit):
                train(*make_config("sparse.py", {"out_dir": "out/again"}))
        with open("out/again/edges.jsonl", "a") as f:
            # what a killed run may have written
            f.write(json.dumps(LINE | {"step": 30, "edges": []}) + "\n" + '{"step": 4')
        train(*make_config("sparse.py", {"out_dir": "out/again"}))
    return place


def stored(folder):
    return [json.loads(line) for line in open(f"{folder}/edges.jsonl")]


def test_every_evaluation_stores_which_edges_are_open(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = stored("out/whole")
    assert [line["step"] for line in lines] == [0, 15, 30]
    found = evaluate(load_checkpoint("out/whole/last.pt"), load("addition"), "val", 1000, 1)
    shares = np.zeros((2, 1, 11, 11))
    for *at, share in lines[-1]["edges"]:
        shares[tuple(at)] = share
    assert shares == pytest.approx(np.array(found["by_edge"]), abs=1e-4)
    assert shares.sum() == pytest.approx(lines[-1]["open"], abs=0.01)
    assert (
        np.triu(shares, 1).sum() == 0
        and found["by_edge"]
        != evaluate(load_checkpoint("out/dense/best.pt"), load("addition"), "val", 1000, 1)["by_edge"]
        is None
    )


def test_a_run_that_was_stopped_stores_what_one_that_was_not_does(folder):
    assert stored(folder / "out/again") == stored(folder / "out/whole")


def test_only_gated_addition_has_a_flow(echo):
    run("sparse.py", max_steps=5)
    assert not os.path.exists("out/sparse/edges.jsonl")


def test_the_loop_does_without_matplotlib():
    code = "import sys, train; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_the_report_makes_the_film(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = call(analyze.main, "report", "out/whole")
    assert done.returncode == 0, done.stderr
    lines = stored(folder / "out/whole")
    with Image.open(folder / "out/whole/flow.gif") as film:
        assert film.n_frames == flow.kept_frame(lines) + 1
    assert (folder / "out/whole/flow.gif").stat().st_size < flow.MOST_BYTES
    assert Image.open("out/whole/flow.png").width > 400


def test_the_film_ends_with_what_is_kept():
    def frames(*kept):
        return [{"kept": name} for name in kept]

    assert flow.kept_frame(frames(None, "best", None, "best", None)) == 3
    assert flow.kept_frame(frames(None, "closest", "closest", None)) == 2
    assert flow.kept_frame(frames("closest", "best", None)) == 1  # best.pt is what a run is known by
    assert flow.kept_frame(frames(None, None)) == 1
    assert flow.caption(LINE | {"kept": "best"}, 4500, True) == (
        "kept: step 300,  12.4 of 264 attention edges open",
        "9,998 of 10,000 sums right, meets its target;  lambda 3.50",
    )
    missed = flow.caption(LINE | {"kept": "closest", "passes": False}, 4500, True)
    assert missed[0].startswith("target missed, closest: step 300") and "misses its target" in missed[1]
    assert (
        "9,998 of 10,000 held-out sums right" in flow.caption(LINE | {"held_out_only": True}, 4500, False)[1]
    )
    assert flow.caption(LINE, 4500, False)[0].startswith("step 300 of 4,500")


@pytest.mark.parametrize(
    "task, n_layer, n_head, evaluations",
    [(AdditionTask(), 4, 1, 60), (AdditionTask(1, 5), 1, 2, 1), (AdditionTask(4, 5), 6, 12, 12)],
)
def test_films_of_any_shape_stay_small(tmp_path, task, n_layer, n_head, evaluations):
    T = task.length
    random = np.random.default_rng(0).random((n_layer, n_head, T, T)) * np.tril(np.ones((T, T)))
    with open(tmp_path / "edges.jsonl", "w") as f:
        for i in range(evaluations):
            edges = edge_list(np.clip(3 * (random - i / evaluations), 0, 1))
            f.write(json.dumps(LINE | {"step": i, "kept": "best", "edges": edges}) + "\n")
    flow.film(str(tmp_path), task, Shape(n_layer, n_head), 100)
    with Image.open(tmp_path / "flow.gif") as film:
        assert film.n_frames <= flow.MOST_FRAMES and (tmp_path / "flow.gif").stat().st_size <= flow.MOST_BYTES
        shown = []
        for i in range(film.n_frames):
            film.seek(i)
            shown.append(film.info["duration"])
    assert shown[-1] == flow.LAST and (len(shown) == 1 or shown[0] == flow.FIRST)
    if n_layer == 4:
        assert film.n_frames >= 20
    assert len(Image.open(tmp_path / "flow.png").convert("L").getcolors()) > 10


def test_an_edge_is_as_dark_as_the_share_of_sums_that_open_it():
    canvas = flow.Canvas(AdditionTask(), 2, 1, 100)
    darkness = []
    for share in (0.0, 0.1, 0.5, 1.0):
        picture = np.asarray(
            canvas.draw(LINE | {"edges": [[0, 0, 4, 1, share]] if share else []}).convert("L")
        ).astype(int)
        # half-way between key and query, between two streams
        x, y = (canvas.x(1) + canvas.x(4)) // 2, (canvas.y(0) + canvas.y(1)) // 2
        darkness.append(255 - picture[y - 2:y + 3, x - 2:x + 3].min())
    assert darkness == sorted(darkness) and len(set(darkness)) == 4


def test_without_stored_edges_there_is_no_film(tmp_path):
    flow.film(str(tmp_path), AdditionTask(), Shape(2, 1), 100)
    assert os.listdir(tmp_path) == []
