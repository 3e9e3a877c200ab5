"""Open edges over loss: what stands in the table is what the reports say, and the control is its parent's."""

import os

import pytest
import torch

import analyze
from analysis.curve import lambda_of
from helpers import call
from storage.files import read_json, write_json
from training.config import Config

ROW = {"rule": "top-k", "budget": 1, "edges": 1.0, "above_parent": 0.2}


def write_run(name, loss, gated=True, parent="out/dense/best.pt", **settings):
    """The folder of a run of 2 layers of 2 heads on 8 tokens: what `curve` reads of it."""
    folder = f"out/{name}"
    os.makedirs(folder)
    settings = vars(Config()) | {"gated": gated, "out_dir": folder, "max_steps": 60, **settings}
    write_json(f"{folder}/config.json", settings)
    with open(f"{folder}/metrics.jsonl", "w") as f:
        f.write('{"step": 0, "lambda": 4.0}\n{"step": 60, "lambda": 3.0}\n')
    checkpoint = {"model": {}, "model_args": {"gated": gated}, "parent": parent, "config": settings}
    torch.save(checkpoint, f"{folder}/best.pt")
    judged = {"val_loss": loss}
    write_json(f"{folder}/report.json", {
        "run": folder, "seed": 1, "parent": parent, "meets_target": loss < 1.1,
        "dense": {"val_loss": 1.0} if gated else judged, "sparse": judged if gated else None,
        "edges": {"open": 3.6, "fraction": 3.6 / 144, "by_distance": [0.1] * 8, "per_head": [[0.1] * 2] * 2}})
    return folder


@pytest.fixture
def runs(workplace):
    write_run("dense", 1.0, gated=False, parent=None)
    write_run("narrow", 1.05, loss_slack=0.01)
    wide = write_run("wide", 1.2, loss_slack=0.2)
    write_json(f"{wide}/baselines-60.json", {"rows": [ROW]})  # as many steps as the run
    write_json(f"{wide}/baselines.json", {"rows": [ROW | {"rule": "window"}]})  # what is only cut
    write_run("short", 1.2, max_steps=30)
    write_run("control", 0.9, gated=False)


def test_the_command_puts_runs_and_controls_side_by_side(runs, monkeypatch):
    for beside in ("wide.log", "control-seeds.json"):  # what `seeds` leaves there, and out/* names, too
        open(f"out/{beside}", "w").close()
    done = call(analyze.main, "curve", "out/narrow", "out/wide", "out/wide.log", "out/short", "--controls",
                "out/control", "out/control-seeds.json", "--to=out/found")
    assert done.returncode == 0, done.stderr
    points = {point["run"]: point for point in read_json("out/found.json")}
    for name, above in (("narrow", 0.05), ("wide", 0.2)):
        point = points[f"out/{name}"]
        assert point["above_parent"] == pytest.approx(above)
        assert point["control_gain"] == pytest.approx(0.1)
        assert point["above_control"] == pytest.approx(above + 0.1)
        assert point["per_head_and_token"] == pytest.approx(3.6 / 8 / 4)
        assert point["percent"] == pytest.approx(2.5)
    assert points["out/narrow"]["met"] and not points["out/wide"]["met"]
    # the control was trained for other steps than this run
    assert points["out/short"]["steps"] == 30 and points["out/short"]["above_control"] is None
    assert points["out/narrow"]["other_rules"] == [] and points["out/wide"]["other_rules"] == [ROW]
    assert {points["out/narrow"]["slack"], points["out/wide"]["slack"]} == {0.01, 0.2}
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert table["out/wide"] == "60 0.2 MISSED +0.2000 +0.3000 2.50 % 0.5 0.11 3 to 3".split()
    assert "the control of out/dense/best.pt gains 0.1000 nats in 60 steps" in done.stdout
    with open("out/found.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    monkeypatch.chdir("out")  # a control is found beside its run from any folder
    call(analyze.main, "curve", "wide", "--controls", "control", "--to=near")
    assert read_json("near.json")[0]["above_control"] == points["out/wide"]["above_control"]


@pytest.mark.parametrize("values, inside", [((9.0, 1.0, 2.0), True), ((1.0, 1.0, 10.0), False),
                                            ((1.0, 0.1, 2.0), False)])
def test_lambda_is_looked_at_in_the_second_half_alone(workplace, values, inside):
    lines = [f'{{"step": {step}, "lambda": {value}}}\n' for step, value in zip((0, 50, 100), values)]
    (workplace / "metrics.jsonl").write_text("".join(lines))
    found = lambda_of(".", {"max_steps": 100, "lambda_min": 0.1, "lambda_max": 10.0})
    assert found == {"low": min(values[1:]), "high": max(values[1:]), "inside": inside}


@pytest.mark.parametrize("words, answer", [
    (["out/dense"], "out/dense is a dense run"),
    (["out/wide/best.pt"], "none of out/wide/best.pt is a run's folder"),
    (["out/wide", "--controls", "out/dense"], "out/dense is no control"),
])
def test_mistakes_are_answered(runs, words, answer):
    done = call(analyze.main, "curve", *words)
    assert done.returncode == 1 and answer in done.stderr
