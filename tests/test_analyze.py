"""From a finished run to numbers and pictures, through the command line."""

import contextlib
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import analyze as analyze_file
import prepare_data
import train as train_file
from analysis import curve, explain, figures, graph, report_figures, verdict
from analysis.report import pages_of, text_seen
from conftest import REPOSITORY
from helpers import call, in_this_process, keep_run, random_gpt, run, write_config
from model import GPT, GPTConfig
from models import huggingface
from models.checkpoint import checkpoint_of, load_checkpoint, read_checkpoint, save_checkpoint
from prepare_data import load
from storage.addition import AdditionTask
from storage.dataset import Dataset
from storage.files import UserError
from training.config import SHAPE
from training.judge import MISSED, evaluate

SHORT = {"device": "cpu", "eval_batches": 1, "n_layer": 2, "n_embd": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two short runs, parents and children: on addition, and on text."""
    place = tmp_path_factory.mktemp("addition")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "novel.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 200)
        prepare_data.main(["text", "--file=novel.txt"])
        text = {"dataset": "text", "max_steps": 20, "eval_interval": 10, "eval_batch_size": 20,
                "batch_size": 8, "block_size": 32}
        for name, more in (("", {"max_steps": 30, "eval_interval": 15}), ("text_", text)):
            write_config(f"{name}dense.py", **SHORT | more)
            child = {key: value for key, value in (SHORT | more).items() if key not in SHAPE}
            write_config(f"{name}sparse.py", init_from=f"{name}dense.py", gated=True, gate_bias=0.0, **child)
            run(f"{name}sparse.py")
    return place


def analyze(folder, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return call(analyze_file.main, *arguments)


def test_report(folder, monkeypatch):
    done = analyze(folder, "report", "out/sparse", "out/dense/")
    assert done.returncode == 0, done.stderr
    report = json.load(open(folder / "out/sparse/report.json"))
    monkeypatch.chdir(folder)
    again = evaluate(load_checkpoint("out/sparse/best.pt"), load("addition"), "val", 1000, 1)
    assert report["sparse"]["val_loss"] == pytest.approx(again["loss"], rel=1e-6)
    assert report["sparse"]["accuracy"] == again["accuracy"]
    assert report["edges"] == {key: pytest.approx(again[key]) for key in ("open", "total", "fraction")} | {
        key: again[key] for key in ("per_head", "by_distance")
    }
    assert report["edges"]["total"] == 2 * 66 and len(report["edges"]["per_head"]) == 2
    dense = evaluate(load_checkpoint("out/dense/best.pt"), load("addition"), "val", 1000, 1)
    assert report["dense"]["val_loss"] == pytest.approx(dense["loss"], rel=1e-6)
    assert report["target_loss"] == report["dense"]["val_loss"] + 0.001 and report["heads_off"] == 0
    assert report["seconds"]["dense"] > 0
    assert report["seconds"]["sparse"] > 0
    assert report["step"] in (0, 15, 30)
    assert json.load(open(folder / "out/dense/report.json"))["sparse"] is None
    assert re.search(rf"^held-out open edges +{again['open']:.2f} of 132 ", done.stdout, re.MULTILINE)


def test_a_run_at_its_start_is_pointed_out_and_not_drawn(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run("sparse.py", max_steps=0, out_dir="out/untrained")
    done = analyze(folder, "report", "out/sparse", "out/untrained")
    assert "NOT TRAINED: out/untrained is at its start" in done.stdout
    assert "NOT TRAINED: out/sparse" not in done.stdout
    assert (folder / "out/untrained/training.png").exists()
    assert not (folder / "out/untrained/attention_flow.png").exists()


def test_a_run_on_text(folder):
    done = analyze(folder, "report", "out/text_sparse")
    assert done.returncode == 0, done.stderr
    report = json.load(open(folder / "out/text_sparse/report.json"))
    assert report["sparse"]["accuracy"] is report["sparse"]["correct"] is None
    assert len(report["edges"]["by_distance"]) == 32
    assert f"{report['edges']['open'] / 32:.2f}" in done.stdout


def test_a_dollar_among_the_tokens_is_no_formula(tmp_path):
    figures.gallery(str(tmp_path / "dollar.png"), ["head 0.0"], ["a", "$$", "$x$"],
                    [("dense", [np.tril(np.ones((3, 3)))])])
    assert (tmp_path / "dollar.png").exists()


@pytest.mark.parametrize("run, names", [
    ("sparse", ["attention_flow", "training", "gates", "distance"]),
    ("text_sparse", ["distance", "gallery"]),
])
def test_figures_are_pictures_of_a_sensible_size(folder, run, names):
    assert analyze(folder, "report", f"out/{run}").returncode == 0
    for name in names:
        path = folder / f"out/{run}/{name}.png"
        picture = Image.open(path).convert("L")
        assert picture.width > 200 and picture.height > 100 and path.stat().st_size < 300_000
        assert len(picture.getcolors()) > 10  # not blank


def test_a_line_that_a_kill_cut_off_does_no_harm(folder):
    with open(folder / "out/sparse/metrics.jsonl", "a") as f:
        f.write('{"step": 99, "val_l')
    done = analyze(folder, "report", "out/sparse")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def few(folder):
    """What `explain` prints of a run in the same place, out/few, that opens few edges."""
    data = read_checkpoint(str(folder / "out/sparse/best.pt"))["data"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        keep_run("few", random_gpt(block_size=11, vocab_size=13, gated=True, gate_bias=-1.5), data=data)
    done = analyze(folder, "explain", "out/few")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_explain(folder, few):
    done = analyze(folder, "explain", "out/sparse")  # hardly trained: every other edge is open
    assert done.returncode == 1 and "edges open on one sum or another: that is not sparse" in done.stderr
    found = json.load(open(folder / "out/few/explain.json"))
    assert 0 < len(found["edges"]) <= 60
    assert len(found["edges"]) == sum(line.lstrip()[:1].isdigit() for line in few.splitlines()[2:])
    assert found["task"] == {"name": "addition", "digits": 2, "answers": 5} and found["sums"] == 10_000
    assert f"algorithm: {found['algorithm']}" in few
    assert (folder / "out/few/explain.png").exists()
    # `report` and `explain` of one run say different numbers, and which
    assert few.startswith(f"out/few: {found['open']:.2f} open edges, the mean of all 10,000 sums; ")


def test_a_picture_that_fails_is_named_and_the_run_keeps_its_status(folder, monkeypatch):
    def fails(path, *arguments):
        raise ValueError("no such colour")

    in_this_process(monkeypatch)  # train.py's report, too
    monkeypatch.chdir(folder)
    monkeypatch.setattr(figures, "training", fails)
    monkeypatch.setattr(report_figures, "load_parent", fails)
    os.remove("out/sparse/report.json")
    done = call(train_file.main, "sparse.py", "--device=cpu")
    assert done.returncode == (0 if os.path.exists("out/sparse/best.pt") else MISSED), done.stderr
    for name in ("training.png", "attention_flow.png"):
        assert f"out/sparse/{name} could not be drawn: ValueError: no such colour\n" in done.stdout
    assert "held-out open edges" in done.stdout and os.path.exists("out/sparse/report.json")


@pytest.mark.parametrize("content, snippet", [
    ("a" * 99 + "\n", "a" * 32),
    ("a" * 80 + "\n" + "b" * 19, "a" * 32),
    ("a" * 60 + "\n" + "b" * 39, "b" * 32),
    ("a" * 16 + "\n", "a" * 16 + "↵"),
])
def test_a_gallery_of_a_short_text_begins_a_line_only_if_a_whole_snippet_follows(
        tmp_path, monkeypatch, content, snippet):
    drawn = []
    monkeypatch.setattr(figures, "gallery", lambda path, titles, pieces, rows: drawn.append("".join(pieces)))
    monkeypatch.setattr(report_figures, "parent_of", lambda *arguments: None)
    held_out = np.frombuffer((content + content).encode(), np.uint8)  # of which the second half is shown
    data = Dataset("short", {"tokenizer": "bytes"}, None, held_out, "")
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=1, n_embd=8, gated=True))
    report_figures.gallery(str(tmp_path / "gallery.png"), model, {}, data, [[0.5]], "sparse")
    assert drawn == [snippet]


def test_a_notebooks_way_of_drawing_is_not_taken_over():
    """Jupyter and Colab hand theirs to every `!python train.py`, whose Python need not know it."""
    done = subprocess.run([sys.executable, os.path.join(REPOSITORY, "analyze.py"), "report", "--help"],
                          capture_output=True, text=True,
                          env=os.environ | {"MPLBACKEND": "a notebook's"})
    assert done.returncode == 0, done.stderr


def test_the_sums_that_are_drawn_have_no_carry_one_from_the_units_and_one_into_the_highest_place():
    sums = report_figures.example_sums(AdditionTask())
    assert [sum_[:2] for sum_ in sums] == [(53, 21), (36, 28), (43, 59)]
    for digits in (1, 2, 3, 4):
        drawn, carries = report_figures.example_sums(AdditionTask(digits, 5)), []
        for a, b, _ in drawn:
            ends = [10 ** (place + 1) for place in range(digits)]
            carries.append([a % end + b % end >= end for end in ends])
        assert not any(carries[0]) and carries[1] == [True] + [False] * (digits - 1) and carries[2][-1]
    assert drawn[2][2] == "carry into the ten-thousands"


def test_other_data_than_the_runs_and_a_damaged_config_are_named(folder):
    shutil.copytree(folder / "out/sparse", folder / "out/moved")
    checkpoint = read_checkpoint(str(folder / "out/moved/best.pt"))
    save_checkpoint(str(folder / "out/moved/best.pt"),
                    checkpoint | {"data": checkpoint["data"] | {"sha256": {"train": "", "val": ""}}})
    for command in ("report", "explain"):
        done = analyze(folder, command, "out/moved")
        assert done.returncode == 1
        assert "is not the data that out/moved was trained and judged on" in done.stderr
    (folder / "out/moved/config.json").write_text("{")
    done = analyze(folder, "report", "out/moved")
    assert done.returncode == 1 and "out/moved/config.json is missing or damaged" in done.stderr


def test_a_parent_that_was_ready_is_not_called_unfinished(folder, monkeypatch):
    """It stops as soon as it is ready, its loss still falling."""
    monkeypatch.setattr(verdict, "still_learning", lambda lines, config: True)
    monkeypatch.setattr(verdict, "FAR", math.inf)  # no word of how far the child is below it
    path = folder / "out/dense/config.json"
    before = path.read_text()
    assert "Its parent was still learning" in analyze(folder, "report", "out/sparse").stdout
    path.write_text(json.dumps(json.loads(before) | {"ready_loss": 0.1}))
    assert "Its parent was still learning" not in analyze(folder, "report", "out/sparse").stdout
    path.write_text(before)


def test_every_question_takes_one_checkpoint_too(folder):
    done = analyze(folder, "report", "out/sparse/last.pt")
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out/sparse/last/report.json").read_text())
    assert report["step"] == read_checkpoint(str(folder / "out/sparse/last.pt"))["step"]
    assert (folder / "out/sparse/last/training.png").exists()
    assert analyze(folder, "circuit", "out/sparse/last.pt", "--task=induction").returncode == 0
    assert (folder / "out/sparse/last/induction.json").exists()


@pytest.mark.parametrize("command", analyze_file.COMMANDS)
def test_every_command_explains_itself(command):
    parser = analyze_file.parser_for(command).chosen
    words = parser.format_help()
    assert f"analyze.py {command}" in words and len(words) > 300


@pytest.mark.parametrize("old", analyze_file.MOVED)
def test_an_old_name_answers_with_the_new_one(old):
    new, *_ = analyze_file.MOVED[old].split()
    assert old not in analyze_file.COMMANDS and new in analyze_file.COMMANDS
    with pytest.raises(SystemExit, match=f"^error: {old} is part of {new} now: python analyze.py {new} "):
        analyze_file.main([old, "out/addition"])


def test_a_report_without_a_vocabulary_shows_numbers_and_says_why(monkeypatch, capsys):
    def no_network(name):
        raise OSError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    assert report_figures.pieces_of([5, 17], "gpt2") == ["5", "17"]
    assert "the numbers of tokens, not their words: OpenAI's vocabulary" in capsys.readouterr().out
    assert report_figures.pieces_of([100, 10], "bytes") == ["d", "↵"]


def test_a_reader_that_has_read_enough_is_no_error():
    started = subprocess.Popen([sys.executable, os.path.join(REPOSITORY, "analyze.py"), "--help"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.stdout.close()
    assert started.stderr.read() == ""
    assert started.wait() == -signal.SIGPIPE


@pytest.mark.parametrize("program", ["train.py", "analyze.py", "prepare_data.py"])
def test_a_terminal_that_cannot_show_a_sign_gets_its_number(program, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, terminal)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    with contextlib.suppress(SystemExit):
        runpy.run_path(os.path.join(REPOSITORY, program), run_name="__main__")
    print("→", flush=True)
    assert terminal.buffer.getvalue().endswith(b"\\u2192\n")


def test_no_file_has_a_temporary_name_that_another_process_may_have_taken(workplace):
    for name in ("best.pt", "train.bin", "val.bin", "meta.json", "model.safetensors", "config.json", "a.png"):
        os.mkdir(name + ".tmp")
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    save_checkpoint("best.pt", checkpoint_of(model))
    huggingface.write(".", model.state_dict(), checkpoint_of(model)["model_args"])
    tokens = np.zeros(9, np.uint16)
    prepare_data.write_dataset(".", tokens, tokens, kind="stream", vocab_size=9)
    figures.save(figures.plt.figure(), "a.png")
    assert sum(map(os.path.isfile, os.listdir())) == 7


def test_a_tilde_is_the_home_folder_in_every_command(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    for words, path in ((["report", "~/x"], "x"), (["export", "~/x", "y", "--to=hf"], "x"),
                        (["curve", "~/x", "--controls", "~/y"], "y"), (["seeds", "~/x.py"], "x.py")):
        assert f"{workplace}/{path}" in call(analyze_file.main, *words).stderr
    parser = analyze_file.parser_for("sample")
    options = parser.parse_args(["sample", "~/x", "--prompt=~/x"])
    analyze_file.check_values(options, parser)
    assert (options.run, options.prompt) == (f"{workplace}/x", "~/x")


def test_a_command_in_an_answer_can_be_typed_whatever_a_folder_is_called(workplace, monkeypatch):
    os.makedirs("my run")
    said = pages_of([{"run": "my run", "sparse": True}])
    monkeypatch.setattr(explain, "read_addition_run", lambda run: (None, None, AdditionTask(2, 5)))
    for wrong in (lambda: curve.read_report("my run"), lambda: graph.read_transcoder("my run", "a b", {}),
                  lambda: explain.run(SimpleNamespace(run="my run", sum=["1"], shut=[]), [])):
        with pytest.raises(UserError) as error:
            wrong()
        said.append(str(error.value))
    assert [shlex.split(words.partition("python ")[2]) for words in said] == [
        ["analyze.py", "view", "my run"], ["analyze.py", "report", "my run"],
        ["analyze.py", "transcode", "my run", "--price=0.1", "--name=a b"],
        ["analyze.py", "explain", "my run", "33+49"]]


def test_a_report_says_which_text_a_run_saw():
    assert text_seen("addition", {"kind": "rows"}) is None
    assert text_seen("mine", {"kind": "stream"}) == "mine"
    meta = {"kind": "stream", "python": "3.11.2", "packages": {"torch": {}, "numpy": {}}}
    assert text_seen("python", meta) == "python, Python 3.11.2, 2 packages"
