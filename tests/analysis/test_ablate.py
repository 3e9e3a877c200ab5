"""One change at a time: only changes that make a difference, and a table that hides no failure."""

import json

import pytest

import analyze
from analysis.ablate import CHANGES, changes_of, line_of, table
from helpers import call, in_this_process
from storage.files import UserError
from training.config import make_config

ADDITION, TEXT = "config/addition.py", "config/stdlib.py"


@pytest.fixture(autouse=True)
def in_the_repository(request, monkeypatch):
    if "counting" not in request.fixturenames:
        monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("path", [ADDITION, TEXT])
def test_every_change_differs_from_the_config_in_what_it_is_named_after(path):
    found, (c, _) = changes_of(path, {}, []), make_config(path, {})
    assert found.pop("as it is") == {}
    assert len(found) >= 8
    for name, changed in found.items():
        assert changed and all(getattr(c, key) != value for key, value in changed.items()), name


def test_what_is_on_goes_off_and_what_is_off_goes_on():
    addition, text = changes_of(ADDITION, {}, []), changes_of(TEXT, {}, [])
    assert "distillation" in addition and "no distillation" not in addition
    assert "no distillation" in text and "distillation" not in text
    assert {"no linear penalty", "temperature 1"} <= set(addition) - set(text)
    assert {"no hand-over", "noise to the end", "temperature 3"} <= set(text) - set(addition)
    # a run whose gates are thresholds all along has no samples to measure on
    assert addition["sampled constraint"] == {"constraint_gates": "sampled"}
    assert text["sampled constraint"] == {"constraint_gates": "sampled", "noise_free_steps": 0}
    fixed = addition["fixed penalty"]
    assert fixed == {"lambda_min": 4.0, "lambda_max": 4.0}  # as lambda_init


def test_settings_hold_for_all_and_some_changes_can_be_chosen():
    found = changes_of(TEXT, {"max_steps": 9}, ["gate bias 6"])
    assert found == {"as it is": {"max_steps": 9}, "gate bias 6": {"max_steps": 9, "gate_bias": 6.0}}
    with pytest.raises(UserError, match="there is no change 'gate bias 7'. There are as it is, fixed"):
        changes_of(TEXT, {}, ["gate bias 7"])
    with pytest.raises(UserError, match="dense run: there is no part of the method"):
        changes_of("config/stdlib_dense.py", {}, [])


def test_a_failed_seed_stays_in_the_table():
    failed = {"seed": 1, "failed": "error: out of memory", "met": False, "run": "out/x"}
    line = line_of("gate bias 6", {}, [failed])
    assert line["failed"] == ["error: out of memory"]
    assert table([line]).splitlines()[1].split() == ["gate", "bias", "6", "0", "of", "1", "-", "-"]


def test_a_line_holds_all_seeds_sorted():
    rows = [{"seed": seed, "failed": None, "met": met, "open": edges, "total": 40, "loss": loss,
             "parent_loss": 1.0} for seed, met, edges, loss in ((4, True, 9.0, 1.5), (2, False, 7.0, 1.25))]
    line = line_of("as it is", {}, rows)
    assert (line["met"], line["of"], line["open"], line["above"]) == (1, 2, [7.0, 9.0], [0.25, 0.5])
    assert line["seeds"] == [4, 2]


def test_the_command_trains_each_change_and_says_what_became_of_it(counting, monkeypatch):
    in_this_process(monkeypatch)
    done = call(analyze.main, "ablate", "sparse.py", "--seeds=1", "--max_steps=20", "--only=gate bias 6")
    assert done.returncode is None or done.returncode == 0, done.stderr
    with open("out/sparse-max_steps=20-ablations.json") as f:
        lines = json.load(f)
    assert [line["change"] for line in lines] == ["as it is", "gate bias 6"]
    for line in lines:
        assert line["of"] == 1 and len(line["open"]) == len(line["above"]) == 1 and not line["failed"]
        changed = "gate_bias=6.0-" if line["change"] == "gate bias 6" else ""
        folder = f"out/sparse-{changed}max_steps=20"
        with open(f"{folder}/report.json") as f:
            report = json.load(f)
        assert report["edges"]["open"] in line["open"]
        assert report["sparse"]["val_loss"] - report["dense"]["val_loss"] in line["above"]
        with open(f"{folder}/config.json") as f:
            assert json.load(f)["gate_bias"] == (6.0 if line["change"] == "gate bias 6" else 3.0)
    assert set(CHANGES) >= {line["change"] for line in lines}
    # the table of another command keeps these lines
    call(analyze.main, "ablate", "sparse.py", "--seeds=1", "--max_steps=20", "--only=temperature 3")
    with open("out/sparse-max_steps=20-ablations.json") as f:
        assert {line["change"] for line in json.load(f)} == {"as it is", "temperature 3", "gate bias 6"}
