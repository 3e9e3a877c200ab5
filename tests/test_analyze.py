"""From a finished run to numbers and pictures, through the command line."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from conftest import REPOSITORY
from evaluate import evaluate
from model import load_checkpoint
from prepare_data import load
from train import make_config, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run on addition, parent and child."""
    place = tmp_path_factory.mktemp("addition")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "dense.py").write_text("n_layer = 2\nn_embd = 16\nmax_steps = 30\neval_interval = 15\neval_batches = 1")
        (place / "sparse.py").write_text("init_from = 'dense.py'\ngated = True\nmax_steps = 30\neval_interval = 15\neval_batches = 1\ngate_bias = 0.0")
        train(*make_config("sparse.py", {"device": "cpu"}))
    return place


def analyze(folder, *arguments):
    return subprocess.run([sys.executable, f"{REPOSITORY}/analyze.py", *arguments], cwd=folder, capture_output=True, text=True)


def test_report(folder, monkeypatch):
    done = analyze(folder, "report", "out/sparse", "out/dense/")
    assert done.returncode == 0, done.stderr
    report = json.load(open(folder / "out/sparse/report.json"))
    monkeypatch.chdir(folder)
    again = evaluate(load_checkpoint("out/sparse/best.pt"), load("addition"), "val", 1000, 1)
    assert report["sparse"]["val_loss"] == pytest.approx(again["loss"], rel=1e-6) and report["sparse"]["accuracy"] == again["accuracy"]
    assert report["edges"] == {key: pytest.approx(again[key]) for key in ("open", "total", "fraction")} | {"per_head": again["per_head"]}
    assert report["edges"]["total"] == 2 * 66 and len(report["edges"]["per_head"]) == 2
    dense = evaluate(load_checkpoint("out/dense/best.pt"), load("addition"), "val", 1000, 1)
    assert report["dense"]["val_loss"] == pytest.approx(dense["loss"], rel=1e-6)
    assert report["target_loss"] == report["dense"]["val_loss"] + 0.001 and report["heads_off"] == 0
    assert report["seconds"]["dense"] > 0 and report["seconds"]["sparse"] > 0 and report["step"] in (0, 15, 30)
    assert json.load(open(folder / "out/dense/report.json"))["sparse"] is None
    assert f"{again['open']:.2f} of 132" in done.stdout and "out/dense" in done.stdout


@pytest.mark.parametrize("name", ["attention_flow", "training", "gates"])
def test_figures_are_pictures_of_a_sensible_size(folder, name):
    if not (folder / "out/sparse/report.json").exists():
        assert analyze(folder, "report", "out/sparse").returncode == 0
    path = folder / f"out/sparse/{name}.png"
    picture = Image.open(path).convert("L")
    assert picture.width > 200 and picture.height > 100 and path.stat().st_size < 300_000
    assert len(picture.getcolors()) > 10  # not blank


def test_explain(folder):
    done = analyze(folder, "explain", "out/sparse")
    assert done.returncode == 0, done.stderr
    edges = json.load(open(folder / "out/sparse/explain.json"))
    assert len(edges) == sum(line.lstrip()[:1].isdigit() for line in done.stdout.splitlines()[2:])
    assert (folder / "out/sparse/explain.png").exists()


@pytest.mark.parametrize("arguments, message", [
    ([], "usage"), (["draw", "out/sparse"], "usage"), (["report"], "usage"),
    (["report", "out/none"], "out/none is no run's folder"), (["explain", "out/dense"], "out/dense is a dense run on addition"),
])
def test_mistakes(folder, arguments, message):
    done = analyze(folder, *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
