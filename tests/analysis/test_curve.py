"""Open edges over loss: what stands in the table is what the reports say, and the control is its parent's."""

import json

import pytest

import analyze
from analysis.curve import lambda_of
from helpers import call, run


def report_of(folder):
    with open(f"{folder}/report.json") as f:
        return json.load(f)


def test_the_command_puts_runs_and_controls_side_by_side(counting, monkeypatch):
    run("sparse.py", out_dir="out/narrow", loss_slack=0.01)
    run("sparse.py", out_dir="out/wide", loss_slack=0.2)
    run("sparse.py", out_dir="out/short", loss_slack=0.2, max_steps=30)
    run("control.py")
    folders = ["out/narrow", "out/wide", "out/control", "out/short"]
    assert call(analyze.main, "report", "out/dense", *folders).returncode == 0
    cut = ["baselines", "out/wide", "--rules=top-k", "--budgets=1"]
    call(analyze.main, *cut)
    call(analyze.main, *cut, "--steps=60")
    for beside in ("wide.log", "control-seeds.json"):  # what `seeds` leaves there, and out/* names, too
        open(f"out/{beside}", "w").close()
    done = call(analyze.main, "curve", *folders[:2], "out/wide.log", "out/short", "--controls", "out/control",
                "out/control-seeds.json", "--to=out/found")
    assert done.returncode == 0, done.stderr
    with open("out/found.json") as f:
        points = {point["run"]: point for point in json.load(f)}
    dense, control = report_of("out/dense"), report_of("out/control")
    for folder in folders[:2]:
        report, point = report_of(folder), points[folder]
        assert point["above_parent"] == report["sparse"]["val_loss"] - report["dense"]["val_loss"]
        gain = dense["dense"]["val_loss"] - control["dense"]["val_loss"]
        assert point["control_gain"] == pytest.approx(gain)
        assert point["above_control"] == pytest.approx(point["above_parent"] + point["control_gain"])
        open_edges = report["edges"]["open"]
        assert point["per_head_and_token"] == pytest.approx(open_edges / 8 / 4)  # T = 8, 2 layers of 2 heads
        assert point["percent"] == pytest.approx(100 * open_edges / report["edges"]["total"])
        assert folder in done.stdout
    # the control was trained for other steps than this run
    assert points["out/short"]["steps"] == 30 and points["out/short"]["above_control"] is None
    assert points["out/narrow"]["other_rules"] == []
    with open("out/wide/baselines-60.json") as f:  # as many steps as the run; not what is only cut
        assert points["out/wide"]["other_rules"] == json.load(f)["rows"]
    assert {points["out/narrow"]["slack"], points["out/wide"]["slack"]} == {0.01, 0.2}
    with open("out/found.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    monkeypatch.chdir("out")  # a control is found beside its run from any folder
    call(analyze.main, "curve", "wide", "--controls", "control", "--to=near")
    with open("near.json") as f:
        assert json.load(f)[0]["above_control"] == points["out/wide"]["above_control"]


@pytest.mark.parametrize("values, inside", [((9.0, 1.0, 2.0), True), ((1.0, 1.0, 10.0), False),
                                            ((1.0, 0.1, 2.0), False)])
def test_lambda_is_looked_at_in_the_second_half_alone(workplace, values, inside):
    lines = [{"step": step, "lambda": value} for step, value in zip((0, 50, 100), values)]
    (workplace / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = lambda_of(".", {"max_steps": 100, "lambda_min": 0.1, "lambda_max": 10.0})
    assert found == {"low": min(values[1:]), "high": max(values[1:]), "inside": inside}


def test_mistakes_are_answered(counting):
    run("sparse.py")
    assert call(analyze.main, "report", "out/dense", "out/sparse").returncode == 0
    for words, answer in ((["out/dense"], "out/dense is a dense run"),
                          (["out/none"], "out/none has no report yet"),
                          (["out/sparse/best.pt"], "none of out/sparse/best.pt is a run's folder"),
                          (["out/sparse", "--controls", "out/dense"], "out/dense is no control")):
        done = call(analyze.main, "curve", *words)
        assert done.returncode == 1 and answer in done.stderr
