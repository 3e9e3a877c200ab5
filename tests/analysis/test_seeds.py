"""Many seeds: what is run, what is skipped, the table."""

import json
import os

import pytest

from analysis import seeds, seeds_table
from analyze import main
from helpers import call, in_this_process, run
from storage.files import UserError


def test_numbers_and_ranges():
    assert seeds.parse_seeds("21-23") == [21, 22, 23]
    assert seeds.parse_seeds("1,5,9") == [1, 5, 9]
    assert seeds.parse_seeds("7,2-3") == [7, 2, 3]
    for wrong in ("", "a", "1-", "-3", "1,,2", "5-3", "1,5-3", "1,1", "1-99999999999999999999"):
        with pytest.raises(UserError, match="--seeds="):
            seeds.parse_seeds(wrong)


def test_flags_are_ours_or_train_s(echo, capsys):
    assert seeds.read_settings("sparse.py", ["--loss_slack=1"]) == {"loss_slack": 1.0}
    for wrong, message in (("--seed=3", "sets --seed itself"), ("--out_dir=x", "sets --out_dir itself"),
                           ("--los_slack=1", "Did you mean loss_slack"), ("dense.py", "one config file")):
        with pytest.raises(UserError, match=message):
            seeds.read_settings("sparse.py", [wrong])
    with pytest.raises(SystemExit, match="--threads and --jobs must be at least 1"):
        main(["seeds", "sparse.py", "--jobs=0"])
    with pytest.raises(SystemExit):
        main(["seeds"])
    assert "CONFIG" in capsys.readouterr().err


def test_what_one_seed_runs(echo):
    assert seeds.runs_for("sparse.py", {}, 3) == [("sparse.py", {"seed": 3, "out_dir": "out/sparse-seed3"})]
    # as `python train.py sparse.py` names it
    assert seeds.runs_for("sparse.py", {}, 1)[0][1]["out_dir"] == "out/sparse"
    assert seeds.runs_for("sparse.py", {"loss_slack": 0.01}, 3) == [
        ("sparse.py", {"loss_slack": 0.01, "seed": 3, "out_dir": "out/sparse-loss_slack=0.01-seed3"})
    ]
    parent, child = seeds.runs_for("sparse.py",
                                   {"n_head": 4, "dataset": "echo", "loss_slack": 0.01, "device": "cpu"}, 3)
    assert parent == (
        "dense.py",
        {
            "n_head": 4,
            "dataset": "echo",
            "device": "cpu",
            "seed": 3,
            "out_dir": "out/dense-dataset=echo-n_head=4-seed3",
        },
    )
    assert child == (
        "sparse.py",
        {
            "dataset": "echo",
            "loss_slack": 0.01,
            "device": "cpu",
            "seed": 3,
            "init_from": parent[1]["out_dir"],
            "out_dir": "out/sparse-dataset=echo-device=cpu-loss_slack=0.01-n_head=4-seed3",
        },
    )
    assert seeds.runs_for("dense.py", {"n_head": 4}, 3) == [
        ("dense.py", {"n_head": 4, "seed": 3, "out_dir": "out/dense-n_head=4-seed3"})
    ]
    assert seeds.folder_for("sparse.py", {"init_from": "out/x"}, 2) == "out/sparse-init_from=out_x-seed2"


def test_settings_that_contradict_each_other_are_found_before_anything_is_trained(echo):
    done = call(main, "seeds", "sparse.py", "--seeds=1", "--lambda_min=7")
    assert done.returncode == 1 and "lambda_init=4.0 must lie between lambda_min=7.0" in done.stderr
    assert not os.path.exists("out")


def test_seeds_are_trained_skipped_and_compared(echo):
    with open("sparse.py", "a") as f:
        f.write("loss_slack = 0.5\ndevice = 'cpu'\n")  # easily met
    run("sparse.py", seed=2, max_steps=60)  # trained, and not reported yet
    done = call(main, "seeds", "sparse.py", "--seeds=1-2", "--jobs=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["seed", "target"]
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "met"], ["2", "met"]]
    assert lines[3].startswith("met 2 of 2; open edges of those: min ")
    assert ", median " in lines[3]
    assert "seconds of training" in lines[3]
    found = json.load(open("out/sparse-seeds.json"))
    report = json.load(open("out/sparse-seed2/report.json"))
    row = found["rows"][1]
    assert row["open"] == report["edges"]["open"]
    assert row["parent_loss"] == report["dense"]["val_loss"]
    assert row["parent_steps"] == 60
    assert row["seconds"] == report["seconds"]
    assert row["correct"] == report["sparse"]["correct"]
    assert row["wall_seconds"] > 0
    assert found["summary"]["met"] == found["summary"]["of"] == 2 and os.path.exists("out/sparse-seed2.log")

    before = os.stat("out/sparse-seed2.log").st_size
    assert call(main, "seeds", "sparse.py", "--seeds=2").returncode == 0
    assert os.stat("out/sparse-seed2.log").st_size == before  # skipped
    # with the time that the command took when it ran, and the other seed's row stays
    assert json.load(open("out/sparse-seeds.json")) == found


@pytest.mark.slow
def test_a_seed_that_fails_or_misses_stays_in_the_table(echo, monkeypatch):
    in_this_process(monkeypatch)
    os.makedirs("out/sparse-learning_rate=0.5-loss_slack=0.0-max_steps=20")
    with open("out/sparse-learning_rate=0.5-loss_slack=0.0-max_steps=20/last.pt", "w") as f:
        f.write("no checkpoint")
    settings = ["--learning_rate=0.5", "--max_steps=20", "--loss_slack=0.0"]
    status, said, _ = call(main, "seeds", "sparse.py", "--seeds=1,2", *settings)
    assert status == 1
    first, second = said.splitlines()[1:3]
    assert first.split()[:2] == ["1", "FAILED"]
    assert "error: " in first
    assert second.split()[:2] == ["2", "MISSED"]
    assert "step 20: " in second
    assert "met 0 of 2; seconds of training" in said
    rows = json.load(open("out/sparse-learning_rate=0.5-loss_slack=0.0-max_steps=20-seeds.json"))["rows"]
    assert "config.json is missing or damaged" in rows[0]["failed"]
    assert not rows[1]["met"]
    assert rows[1]["closest"]


@pytest.mark.slow
def test_a_shape_reaches_the_parent_and_a_change_of_settings_is_not_taken_for_finished(echo, monkeypatch):
    in_this_process(monkeypatch)
    with open("sparse.py", "a") as f:
        f.write("loss_slack = 0.5\ndevice = 'cpu'\n")
    done = call(main, "seeds", "sparse.py", "--seeds=4", "--n_head=4", "--explain")
    assert done.returncode == 0
    assert (
        json.load(open("out/dense-n_head=4-seed4/config.json"))["n_head"]
        == json.load(open("out/sparse-n_head=4-seed4/config.json"))["n_head"]
        == 4
    )
    assert json.load(open("out/sparse-n_head=4-seeds.json"))["rows"][0]["parent_steps"] == 60
    assert "out/sparse-n_head=4-seed4 is a gated run on echo: explain counts over sums" in done.stdout
    assert all(seeds.is_finished(*each) for each in seeds.runs_for("sparse.py", {"n_head": 4}, 4))
    with open("sparse.py", "a") as f:
        f.write("warmup_steps = 8\n")
    assert not seeds.is_finished(*seeds.runs_for("sparse.py", {"n_head": 4}, 4)[1])


def test_explain_adds_the_algorithm():
    row = {"seed": 3, "failed": None, "met": True, "parent_loss": 0.001, "parent_steps": 2000, "open": 6.5,
           "total": 264, "correct": 10000, "examples": 10000, "seconds": {"dense": 57.2, "sparse": 151.0},
           "wall_seconds": None, "closest": None, "algorithm": "carry edge"}
    assert seeds_table.cells(row) == ["3", "met", "0.0010 (2000 steps)", "6.50 of 264", "10,000 of 10,000",
                                      "57", "151", "-", "carry edge"]
    failed = {"seed": 4, "failed": "error: no", "met": False, "wall_seconds": 3.2}
    assert (
        seeds_table.in_words(seeds_table.summary([row, failed]))
        == "met 1 of 2; open edges of those: min 6.50, median 6.50, max 6.50; seconds of training: min 208, "
           "median 208, max 208"
    )
    assert seeds_table.table([row, failed]).splitlines()[2].split() == [
        "4", "FAILED", "-", "-", "-", "-", "-", "3", "error:", "no"
    ]


def test_a_parents_steps_are_found_from_any_folder(workplace, monkeypatch):
    os.makedirs("out/dense")
    os.makedirs("out/sparse")
    (workplace / "out/dense/best.pt").touch()
    (workplace / "out/dense/metrics.jsonl").write_text('{"step": 40}\n')
    report = {"run": "out/sparse", "meets_target": True, "ready": None, "parent": "out/dense/best.pt",
              "dense": {"val_loss": 1.0}, "sparse": {"val_loss": 1.0, "correct": 1, "examples": 1},
              "edges": {"open": 1, "total": 2}, "seconds": {}, "closest": None}
    (workplace / "out/sparse/report.json").write_text(json.dumps(report))
    monkeypatch.chdir("out")
    assert seeds.row_of("sparse", 1)["parent_steps"] == 40
