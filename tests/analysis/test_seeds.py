"""Many seeds, and one change at a time: what is run, what is skipped, the tables."""

import json
import os

import pytest

from analysis import seeds
from analyze import main
from helpers import call, in_this_process, run
from storage.files import UserError, read_json
from training.config import make_config

ADDITION, TEXT = "config/addition.py", "config/stdlib.py"


@pytest.fixture
def easy(echo_parent, monkeypatch):
    """Runs on a small task, whose parent is there, that easily meet their target, in this process."""
    in_this_process(monkeypatch)
    with open("sparse.py", "a") as f:
        f.write("loss_slack = 0.5\ndevice = 'cpu'\n")


def test_numbers_and_ranges():
    assert seeds.parse_seeds("7,21-23,5") == [7, 21, 22, 23, 5]


@pytest.mark.parametrize("words, message", [
    *[([f"--seeds={wrong}"], f"--seeds={wrong}: write numbers and ranges")
      for wrong in ("", "a", "1-", "-3", "1,,2", "1,5-3", "1,1", "1-9999999")],
    (["--seed=3"], "sets --seed itself"),
    (["--out_dir=x"], "sets --out_dir itself"),
    (["--los_slack=1"], "Did you mean loss_slack"),
    (["--jobs=0"], "--threads and --jobs must be at least 1"),
    (["--lambda_min=7"], "lambda_init=4.0 must lie between lambda_min=7.0"),
    (["--changes=gate bias 7"], "there is no change 'gate bias 7'. There are as it is, fixed"),
])
def test_mistakes_are_found_before_anything_is_trained(echo, words, message):
    done = call(main, "seeds", "sparse.py", *words)
    assert done.returncode == 1 and message in done.stderr
    assert not os.path.exists("out")


def test_what_one_seed_runs(echo):
    assert seeds.runs_for("sparse.py", {}, 3) == [("sparse.py", {"seed": 3, "out_dir": "out/sparse-seed3"})]
    # as `python train.py sparse.py` names it
    assert seeds.runs_for("sparse.py", {}, 1)[0][1]["out_dir"] == "out/sparse"
    assert seeds.runs_for("sparse.py", {"loss_slack": 0.01}, 3) == [
        ("sparse.py", {"loss_slack": 0.01, "seed": 3, "out_dir": "out/sparse-loss_slack=0.01-seed3"})
    ]
    given = {"n_head": 4, "dataset": "echo", "loss_slack": 0.01, "device": "cpu"}
    parent, child = seeds.runs_for("sparse.py", given, 3)
    folder = "out/dense-dataset=echo-n_head=4-seed3"
    assert parent == ("dense.py", {"n_head": 4, "dataset": "echo", "device": "cpu", "seed": 3,
                                   "out_dir": folder})
    assert child == ("sparse.py", {
        "dataset": "echo", "loss_slack": 0.01, "device": "cpu", "seed": 3, "init_from": folder,
        "out_dir": "out/sparse-dataset=echo-device=cpu-loss_slack=0.01-n_head=4-seed3"})
    assert seeds.folder_for("sparse.py", {"init_from": "out/x"}, 2) == "out/sparse-init_from=out_x-seed2"


def test_seeds_are_trained_skipped_and_compared(easy):
    run("sparse.py", seed=2, max_steps=60)  # trained, and not reported yet
    done = call(main, "seeds", "sparse.py", "--seeds=1-2", "--jobs=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["seed", "target"]
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "met"], ["2", "met"]]
    found, report = read_json("out/sparse-seeds.json"), read_json("out/sparse-seed2/report.json")
    row = found["rows"][1]
    assert row["open"] == report["edges"]["open"]
    assert row["parent_loss"] == report["dense"]["val_loss"]
    assert row["parent_steps"] == 60
    assert row["seconds"] == report["seconds"]
    assert row["correct"] == report["sparse"]["correct"]

    before = os.stat("out/sparse-seed2.log").st_size
    assert call(main, "seeds", "sparse.py", "--seeds=2").returncode == 0
    assert os.stat("out/sparse-seed2.log").st_size == before  # skipped
    assert read_json("out/sparse-seeds.json") == found  # and the other seed's row stays


def test_every_seed_is_a_process_with_its_threads(echo, monkeypatch):
    started = []

    def start(command, env, **options):
        started.append((command[1:], env["OMP_NUM_THREADS"]))
        raise OSError("no process")

    monkeypatch.setattr(seeds.subprocess, "run", start)
    assert "no process" in call(main, "seeds", "sparse.py", "--seeds=4", "--threads=3").stderr
    [(command, threads)] = started
    assert command[0].endswith("train.py") and threads == "3"
    assert command[1:] == ["sparse.py", "--seed=4", "--out_dir=out/sparse-seed4"]


@pytest.mark.slow
def test_a_seed_that_fails_or_misses_stays_in_the_table(echo, monkeypatch):
    in_this_process(monkeypatch)
    folder = "out/sparse-learning_rate=0.5-loss_slack=0.0-max_steps=20"
    os.makedirs(folder)
    with open(f"{folder}/last.pt", "w") as f:
        f.write("no checkpoint")
    settings = ["--learning_rate=0.5", "--max_steps=20", "--loss_slack=0.0"]
    status, said, _ = call(main, "seeds", "sparse.py", "--seeds=1,2", *settings)
    first, second, together = said.splitlines()[1:4]
    assert status == 1
    assert first.split()[:2] == ["1", "FAILED"] and "error: " in first
    assert second.split()[:2] == ["2", "MISSED"] and "step 20: " in second
    assert together.startswith("met 0 of 2; lowest, median, highest: - open edges")
    rows = read_json(f"{folder}-seeds.json")["rows"]
    assert "config.json is missing or damaged" in rows[0]["failed"]
    assert not rows[1]["met"] and rows[1]["closest"]


@pytest.mark.slow
def test_a_shape_reaches_the_parent_and_a_change_of_settings_is_not_taken_for_finished(easy):
    assert call(main, "seeds", "sparse.py", "--seeds=4", "--n_head=4").returncode == 0
    for run_of in ("dense", "sparse"):
        assert read_json(f"out/{run_of}-n_head=4-seed4/config.json")["n_head"] == 4
    assert read_json("out/sparse-n_head=4-seeds.json")["rows"][0]["parent_steps"] == 60
    assert all(seeds.is_finished(*each) for each in seeds.runs_for("sparse.py", {"n_head": 4}, 4))
    with open("sparse.py", "a") as f:
        f.write("warmup_steps = 8\n")
    assert not seeds.is_finished(*seeds.runs_for("sparse.py", {"n_head": 4}, 4)[1])


MET = {"seed": 4, "failed": None, "met": True, "parent_loss": 1.0, "parent_steps": 2000, "loss": 1.5,
       "open": 9.0, "total": 264, "correct": 10000, "examples": 10000, "closest": None,
       "seconds": {"dense": 57.2, "sparse": 151.0}}
ROWS = [
    MET,
    MET | {"seed": 2, "met": False, "parent_steps": None, "loss": 1.25, "open": 7.0, "correct": None,
           "seconds": {"dense": None, "sparse": 3.0}, "closest": "step 20: too dense"},
    {"seed": 1, "failed": "error: out of memory", "met": False},
]


def test_the_tables_of_seeds_and_of_changes():
    _, met, missed, failed, together = seeds.table(ROWS).splitlines()
    assert met.split() == "4 met 1.0000 (2000 steps) 9.00 of 264 10,000 of 10,000 57 151".split()
    assert missed.split() == "2 MISSED 1.0000 7.00 of 264 - - 3 step 20: too dense".split()
    assert failed.split() == "1 FAILED - - - - - error: out of memory".split()
    assert together == ("met 1 of 3; lowest, median, highest: 9.00, 9.00, 9.00 open edges of those, "
                        "3, 106, 208 seconds of training")
    line = seeds.line_of("as it is", {}, ROWS)
    assert (line["met"], line["of"], line["open"], line["above"]) == (1, 3, [7.0, 9.0], [0.25, 0.5])
    nothing = seeds.line_of("gate bias 6", {}, ROWS[2:])
    _, first, second = seeds.table_of_changes([line, nothing]).splitlines()
    assert first.split() == "as it is 1 of 3 7.0, 8.0, 9.0 +0.2500, +0.3750, +0.5000".split()
    assert second.split() == "gate bias 6 0 of 1 - -".split()


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


def test_what_is_on_goes_off_and_what_is_off_goes_on(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    addition, text = (seeds.chosen_changes(path, {}, []) for path in (ADDITION, TEXT))
    for path, found in ((ADDITION, addition), (TEXT, text)):
        c, _ = make_config(path, {})
        assert found.pop("as it is") == {} and len(found) >= 8
        for name, changed in found.items():
            assert changed and all(getattr(c, key) != value for key, value in changed.items()), name
    assert "distillation" in addition and "no distillation" not in addition
    assert "no distillation" in text and "distillation" not in text
    assert {"no linear penalty", "temperature 1"} <= set(addition) - set(text)
    assert {"no hand-over", "noise to the end", "temperature 3"} <= set(text) - set(addition)
    # a run whose gates are thresholds all along has no samples to measure on
    assert addition["sampled constraint"] == {"constraint_gates": "sampled"}
    assert text["sampled constraint"] == {"constraint_gates": "sampled", "noise_free_steps": 0}
    assert addition["fixed penalty"] == {"lambda_min": 10.0, "lambda_max": 10.0}  # as lambda_init
    found = seeds.chosen_changes(TEXT, {"max_steps": 9}, ["gate bias 6"])
    assert found == {"as it is": {"max_steps": 9}, "gate bias 6": {"max_steps": 9, "gate_bias": 6.0}}
    with pytest.raises(UserError, match="dense run: there is no part of the method"):
        seeds.chosen_changes("config/stdlib_dense.py", {}, [])


def test_each_change_is_trained_and_another_command_keeps_its_line(easy):
    for only in ("gate bias 6", "temperature 3"):
        done = call(main, "seeds", "sparse.py", "--seeds=1", "--max_steps=20", f"--changes={only}")
        assert done.returncode == 0, done.stderr
    lines = {line["change"]: line for line in read_json("out/sparse-max_steps=20-ablations.json")}
    assert list(lines) == ["as it is", "temperature 3", "gate bias 6"]
    for name, changed in (("as it is", ""), ("gate bias 6", "gate_bias=6.0-")):
        folder = f"out/sparse-{changed}max_steps=20"
        report = read_json(f"{folder}/report.json")
        assert lines[name]["open"] == [report["edges"]["open"]]
        assert lines[name]["above"] == [report["sparse"]["val_loss"] - report["dense"]["val_loss"]]
        assert read_json(f"{folder}/config.json")["gate_bias"] == (6.0 if changed else 3.0)
