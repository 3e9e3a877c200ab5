"""What cannot work is refused early, in words, and nothing is lost."""

import json
import os
import shutil

import numpy as np
import pandas
import pytest

import prepare_data
from helpers import metrics, parameters, run
from model import GPT
from models.checkpoint import read_checkpoint, save_checkpoint
from storage.files import UserError, write_json
from training.config import lineage_of, make_config
from training.log import JsonLines
from training.steps import Batches


def refused(path, message, **given):
    with pytest.raises(UserError, match=message):
        run(path, **given)


@pytest.mark.parametrize("given, message", [
    ({"init_from": "out/dense", "n_layer": 4}, "n_layer=4, but out/dense/best.pt has n_layer=2"),
    ({"n_layer": 3}, "n_layer=3, but dense.py has n_layer=2.* --init_from=THAT"),
    ({"block_size": 8}, "block_size=8, but dense.py has block_size=4"),
    ({"init_from": "middle.py", "n_layer": 3}, "n_layer=3, but middle.py has n_layer=2"),
    ({"init_from": "out/gone"}, "no best.pt or last.pt in out/gone"),
    ({"init_from": "out/dense", "dataset": "addition"},
     "was trained on tokens of 'echo', the data has those of 'addition'"),
    ({"init_from": "unnamed.pt", "dataset": "addition"}, "the model knows 9 tokens, data/addition has 13"),
    ({"init_from": "half.pt"}, "half.pt cannot be read .*truncated"),
    ({"init_from": "gated.pt"}, "init_from=gated.pt is a gated run"),
    ({"init_from": "twice.py"}, "init_from=twice.py is a gated run"),
    ({"dataset": "gone"}, "there is no dataset data/gone"),
    ({"attention_impl": "triton", "device": "cpu"}, "attention_impl='triton' needs a GPU"),
    ({"init_from": "out/dense", "attention_impl": "triton", "device": "cpu"},
     "attention_impl='triton' needs a GPU"),
    ({"out_dir": "out/new"}, "own folder and its parent's"),
])
def test_what_cannot_start_says_why_before_the_parent_is_trained(echo_parent, monkeypatch, given, message):
    """Its parent would be dense.py, at out/new, which has not been trained."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which would let Triton run on a CPU
    write = {"dense.py": "out_dir = 'out/new'\n" + open("dense.py").read(),
             "twice.py": open("sparse.py").read(),
             "middle.py": open("sparse.py").read().replace("gated = True", "gated = False")}
    for name, text in write.items():
        (echo_parent / name).write_text(text)
    found = read_checkpoint("out/dense/best.pt")
    del found["data"]  # as nanoGPT's, say
    save_checkpoint("unnamed.pt", found)
    found["model_args"]["gated"] = True
    save_checkpoint("gated.pt", found)
    (echo_parent / "half.pt").write_bytes((echo_parent / "unnamed.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=message) as error:
        run("sparse.py", **given)
    assert "Errno" not in str(error.value) and os.listdir("out") == ["dense"]


def test_three_generations_are_one_line_of_runs(echo):
    (echo / "middle.py").write_text((echo / "sparse.py").read_text().replace("gated = True", "gated = False"))
    assert len(lineage_of(*make_config("sparse.py", {"init_from": "middle.py", "n_layer": 2}))) == 3


def test_a_truncated_checkpoint_is_named_and_nothing_is_overwritten(echo_parent):
    content = (echo_parent / "out/dense/last.pt").read_bytes()
    (echo_parent / "out/dense/last.pt").write_bytes(content[:1000])
    refused("dense.py", "out/dense/last.pt cannot be read")
    assert (echo_parent / "out/dense/last.pt").read_bytes() == content[:1000]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(echo, monkeypatch):
    real = GPT.forward
    calls = []

    def overflowing(self, idx, targets=None, **options):
        logits, loss, density = real(self, idx, targets, **options)
        calls.append(self.training)
        return logits, loss * float("nan") if sum(calls) == 30 else loss, density

    monkeypatch.setattr(GPT, "forward", overflowing)
    with pytest.raises(UserError,
                       match="the loss is nan, .* at step 29; out/dense/last.pt.*--learning_rate=0.001"):
        run("dense.py")
    assert read_checkpoint("out/dense/last.pt")["step"] == 20
    rows = pandas.read_csv("out/dense/steps.csv")
    assert rows["step"].iloc[-1] == 29 and rows["loss"].isna().tolist() == [False] * 29 + [True]
    assert all(p.isfinite().all() for p in parameters("out/dense").values())


def test_json_has_no_nan_and_the_message_names_the_file_and_the_key(workplace):
    write_json("rows.json", {"loss": None})  # what is not known is null
    with pytest.raises(UserError, match=r"rows.json cannot be written: rows\[1\].loss is nan"):
        write_json("rows.json", {"rows": [{"loss": 1.0}, {"loss": float("nan")}]})
    assert json.load(open("rows.json")) == {"loss": None}
    log = JsonLines("metrics.jsonl", 9)
    log.write({"step": 1, "density": None})
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: loss is -inf"):
        log.write({"step": 2, "loss": -float("inf")})
    assert open("metrics.jsonl").read() == '{"step": 1, "density": null}\n'


def test_a_constraint_that_is_not_finite_stops_the_run_too(echo, monkeypatch):
    """To Python max(-1, nan) is -1: lambda would take it for a loss far below its target."""
    measured = Batches.mean_loss
    monkeypatch.setattr(Batches, "mean_loss", lambda self, step, model,
                        *rest, **options: (float("nan") if step == 25 and model.config.gated
                                           else measured(self, step, model, *rest, **options)))
    with pytest.raises(UserError, match="the constraint is nan at step 25"):
        run("sparse.py", constraint_interval=1)
    assert read_checkpoint("out/sparse/last.pt")["step"] == 20


def test_folders_are_not_mixed_up(echo_parent):
    refused("dense.py", "a row of data/echo has 4 tokens, the model's block_size is 3", block_size=3,
            out_dir="out/short")
    (echo_parent / "dense.py").write_text((echo_parent / "dense.py").read_text() + "warmup_steps = 7\n")
    refused("sparse.py", "the parent, dense.py: out/dense holds a run with other settings")
    os.remove("out/dense/last.pt")
    refused("dense.py", "best.pt but no last.pt", learning_rate=1e-4)
    (echo_parent / "out/dense/config.json").write_text("[1]")
    (echo_parent / "out/dense/last.pt").write_bytes((echo_parent / "out/dense/best.pt").read_bytes())
    refused("dense.py", "out/dense/config.json is missing or damaged")


def test_what_the_target_hangs_on_cannot_change_on_the_way(counting_parent):
    run("sparse.py", max_steps=10)
    for changed in ({"open_above": 0.5}, {"loss_slack": -0.3}):
        refused("sparse.py", "another model or target", init_from="resume", max_steps=20, **changed)
    refused("sparse.py", "another model or target .*Start a new run with --out_dir=out/NEW", loss_slack=0.5)
    parent = read_checkpoint("out/dense/best.pt")
    # the parent becomes another behind its child's back, at the same step
    next(iter(parent["model"].values()))[0, 0] += 1
    save_checkpoint("out/dense/best.pt", parent)
    refused("sparse.py", "out/dense/best.pt holds other weights now than when out/sparse was begun",
            init_from="resume", max_steps=20)
    shutil.rmtree("out/dense")  # no other run is recommended
    refused("sparse.py", "to keep the loss of out/dense/best.pt, which is gone", init_from="resume",
            max_steps=20)


def test_other_data_than_the_run_began_with_is_refused(counting_parent):
    tokens = np.zeros(5000, np.uint16)
    prepare_data.write_dataset("data/count", tokens, tokens, kind="stream", vocab_size=10, tokenizer="digits")
    refused("dense.py", "data/count is not the data that out/dense was begun with", init_from="resume",
            max_steps=80)
    prepare_data.write_dataset("data/count", tokens, tokens, kind="stream", vocab_size=10,
                               tokenizer="letters")
    refused("sparse.py", "was trained on tokens of 'digits', the data has those of 'letters'",
            init_from="out/dense")


def test_an_unready_parent_is_refused_and_a_ready_one_stops(echo):
    """ready_loss: trained until all answers are right and the loss is low; until then no child starts from
    it.
    """
    (echo / "dense.py").write_text((echo / "dense.py").read_text() + "ready_loss = 0.05\n")
    refused("sparse.py", "out/dense/best.pt is no parent yet: .*ready_loss=0.05.*--out_dir=out/dense "
            "--max_steps=120; then the same command as now with --init_from=out/dense")
    run("dense.py", init_from="resume", max_steps=2000, learning_rate=1e-2)
    last = read_checkpoint("out/dense/last.pt")
    assert last["ready"] and last["step"] < 2000 and metrics("out/dense")[-1]["val_loss"] <= 0.05
    run("sparse.py", init_from="out/dense", max_steps=1)
    assert metrics("out/sparse")[-1]["step"] == 1
    # ready for less: it goes on
    run("dense.py", init_from="resume", max_steps=2000, ready_loss=0.5 * metrics("out/dense")[-1]["val_loss"])
    assert read_checkpoint("out/dense/last.pt")["step"] > last["step"]


def test_a_folder_that_was_moved_goes_on_where_it_is(echo):
    os.rename(run("dense.py", max_steps=20, seed=2), "out/dense")
    assert run("dense.py", init_from="resume", max_steps=40) == "out/dense"
    assert read_checkpoint("out/dense/last.pt")["step"] == 40 and os.listdir("out") == ["dense"]


def test_a_missing_run_names_the_command_that_would_make_it():
    for path, config in (("out/stdlib-seed3/best.pt", "stdlib"), ("out/mine", "addition")):
        with pytest.raises(UserError, match=f"Train one first: python train.py config/{config}.py"):
            read_checkpoint(path)
