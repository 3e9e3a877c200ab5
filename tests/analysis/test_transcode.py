"""The command that trains a transcoder: it learns, it goes on where it stopped, it mixes nothing up."""

import json
import os
import re

import pytest
import torch

import analyze
from analysis import transcode
from analysis.graph import read_transcoder
from helpers import call, run
from models.checkpoint import read_checkpoint
from storage.files import UserError

COMMAND = ["transcode", "out/dense", "--features=12", "--batch=64", "--price=0.01"]


def weights(name="transcoder"):
    return read_checkpoint(f"out/dense/{name}.pt")["model"]


def test_it_learns_and_reports(echo_parent):
    done = call(analyze.main, *COMMAND, "--steps=400", "--lr=0.01")
    assert done.returncode in (0, None), done.stderr
    with open("out/dense/transcoder.json") as f:
        found = json.load(f)
    agrees = found["agrees_where_asked"]
    assert found["explained"] > 0.8 and agrees > 0.8 and 0 < found["l0"] <= 12
    assert f"{100 * found['explained']:.1f} % of the variance explained" in done.stdout
    assert re.search(rf"where an answer is asked, KL .* {100 * agrees:.1f} % of first choices", done.stdout)
    call(analyze.main, *COMMAND, "--steps=1", "--name=untrained")
    with open("out/dense/untrained.json") as f:
        assert json.load(f)["explained"] < found["explained"] - 0.3


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(echo_parent, monkeypatch):
    monkeypatch.setattr(transcode, "SAVED", 20)
    assert call(analyze.main, *COMMAND, "--steps=40", "--name=whole").returncode in (0, None)
    save = transcode.save_checkpoint

    def save_and_stop(place, parts):
        save(place, parts)
        if parts["step"] == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(transcode, "save_checkpoint", save_and_stop)
    assert call(analyze.main, *COMMAND, "--steps=40").stderr == "stopped\n"
    assert read_checkpoint("out/dense/transcoder.pt")["step"] == 20
    assert call(analyze.main, *COMMAND, "--steps=40").returncode in (0, None)
    assert all(torch.equal(weights()[name], tensor) for name, tensor in weights("whole").items())


def test_other_settings_and_other_weights_are_refused(echo_parent):
    call(analyze.main, *COMMAND, "--steps=2")
    other = call(analyze.main, *COMMAND, "--steps=3")
    assert other.returncode == 1 and "was trained with other settings" in other.stderr
    run("dense.py", seed=2, out_dir="out/two")
    (echo_parent / "out/dense/best.pt").write_bytes((echo_parent / "out/two/best.pt").read_bytes())
    changed = call(analyze.main, *COMMAND, "--steps=2")
    assert changed.returncode == 1 and "for other weights" in changed.stderr
    for name, answer in (("config", "out/dense/config.json is there already"),
                         ("best", "was trained with other settings")):
        ours = call(analyze.main, *COMMAND, "--steps=2", f"--name={name}")
        assert ours.returncode == 1 and answer in ours.stderr
    os.remove("out/dense/transcoder.pt")  # as that message says; its .json is still there
    assert call(analyze.main, *COMMAND, "--steps=2").returncode in (0, None)


@pytest.mark.parametrize("flags, said", [
    (["--lr=1e30", "--steps=5"], "training left the numbers at step 1,.* Try smaller steps, --lr=0.001"),
    (["--lr=1e30", "--steps=1"], "explains (nan|-inf) of the variance, KL .* Try smaller steps, --lr=0.001"),
])
def test_what_is_not_finite_stops_and_is_no_result(echo, flags, said):
    run("dense.py")
    done = call(analyze.main, *COMMAND, *flags)
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr
    assert done.stdout == "" and not os.path.exists("out/dense/transcoder.json")


def test_a_training_that_leaves_the_numbers_leaves_what_was_saved_before(echo_parent, monkeypatch):
    monkeypatch.setattr(transcode, "SAVED", 1)
    assert call(analyze.main, *COMMAND, "--lr=1e30", "--steps=5").returncode == 1
    assert read_checkpoint("out/dense/transcoder.pt")["step"] == 1
    assert all(tensor.isfinite().all() for tensor in weights().values())


def test_activations_beyond_half_precision_are_kept(echo_parent):
    """They were infinite in the cache, and what was trained on them NaN."""
    checkpoint = read_checkpoint("out/dense/best.pt")
    checkpoint["model"]["transformer.h.1.mlp.c_proj.weight"] *= 1e7
    torch.save(checkpoint, "out/dense/best.pt")
    done = call(analyze.main, *COMMAND, "--steps=300", "--lr=0.01")
    assert done.returncode in (0, None), done.stderr
    with open("out/dense/transcoder.json") as f:
        assert json.load(f)["by_layer"][1] > 0.5


def test_a_transcoder_that_is_not_done_is_not_asked(echo_parent):
    call(analyze.main, *COMMAND, "--steps=2")
    path = "out/dense/transcoder.pt"
    half = read_checkpoint(path)
    half["step"] = 1
    torch.save(half, path)
    checkpoint = read_checkpoint("out/dense/best.pt")
    with pytest.raises(UserError, match="is not finished, 1 of 2 steps: give the same transcode command"):
        read_transcoder("out/dense", "transcoder", checkpoint)
    with pytest.raises(UserError, match="only a run's folder, such as out/addition"):
        read_transcoder(None, "transcoder", checkpoint)
