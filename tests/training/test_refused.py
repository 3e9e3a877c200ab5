"""What cannot work is refused early, in words, and nothing is lost."""

import glob
import json
import os
import shutil

import numpy as np
import pandas
import pytest
import torch

import prepare_data
from conftest import REPOSITORY
from helpers import metrics, parameters, run
from model import GPT
from models.checkpoint import read_checkpoint, save_checkpoint
from storage.files import UserError, write_json
from training.config import Config, limits, make_config, parse_command_line
from training.log import JsonLines
from training.parents import lineage_of
from training.steps import Batches


def test_a_run_that_cannot_start_from_its_parent_says_why(echo):
    run("dense.py", max_steps=1)
    with pytest.raises(UserError, match="n_layer=4, but out/dense/best.pt has n_layer=2"):
        run("sparse.py", init_from="out/dense", n_layer=4)
    with pytest.raises(UserError, match="no best.pt or last.pt in out/gone"):
        run("sparse.py", init_from="out/gone")
    run("sparse.py", init_from="out/dense", max_steps=1)
    with pytest.raises(UserError, match="init_from=out/sparse is a gated run"):
        run("sparse.py", init_from="out/sparse", out_dir="out/twice")
    with pytest.raises(UserError, match="a row of data/echo has 4 tokens, the model's block_size is 3"):
        run("dense.py", block_size=3, out_dir="out/short")
    with pytest.raises(UserError, match="was trained on tokens of 'echo', the data has those of 'addition'"):
        run("sparse.py", init_from="out/dense", dataset="addition", out_dir="out/other")
    # as nanoGPT's, say
    torch.save({key: value for key, value in read_checkpoint("out/dense/last.pt").items() if key != "data"},
               "unnamed.pt")
    with pytest.raises(UserError, match="the model knows 9 tokens, data/addition has 13"):
        run("sparse.py", init_from="unnamed.pt", dataset="addition", out_dir="out/other")


def test_a_truncated_checkpoint_is_named_and_nothing_is_overwritten(echo):
    run("dense.py", max_steps=20)
    content = (echo / "out/dense/last.pt").read_bytes()
    (echo / "out/dense/last.pt").write_bytes(content[:1000])
    with pytest.raises(UserError, match="out/dense/last.pt cannot be read"):
        run("dense.py", max_steps=20)
    assert (echo / "out/dense/last.pt").read_bytes() == content[:1000]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(echo, monkeypatch):
    real = GPT.forward
    calls = []

    def overflowing(self, idx, targets=None, **options):
        logits, loss, density = real(self, idx, targets, **options)
        calls.append(self.training)
        return logits, loss * float("nan") if sum(calls) == 30 else loss, density

    monkeypatch.setattr(GPT, "forward", overflowing)
    with pytest.raises(UserError,
                       match="the loss is nan, .* at step 29.*last.pt still holds.*--learning_rate="):
        run("dense.py")
    assert read_checkpoint("out/dense/last.pt")["step"] == 20
    rows = pandas.read_csv("out/dense/steps.csv")
    assert rows["step"].iloc[-1] == 29 and rows["loss"].isna().tolist() == [False] * 29 + [True]
    offending = json.load(open("out/dense/offending_batch.json"))
    assert offending["step"] == 29
    assert offending["indices"] == np.random.default_rng((1, False, 29)).integers(0, 400, 32).tolist()
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


def test_all_json_is_written_by_the_function_that_knows_no_nan():
    files = set(glob.glob("**/*.py", root_dir=REPOSITORY, recursive=True)) - set(
        glob.glob("tests/**/*.py", root_dir=REPOSITORY, recursive=True))
    assert [name for name in sorted(files) if "json.dump" in open(os.path.join(REPOSITORY, name)).read()] == [
        "storage/files.py"]


def test_a_constraint_that_is_not_finite_stops_the_run_too(echo, monkeypatch):
    """To Python max(-1, nan) is -1: lambda would take it for a loss far below its target."""
    measured = Batches.mean_loss
    monkeypatch.setattr(Batches, "mean_loss", lambda self, step, model,
                        *rest, **options: (float("nan") if step == 25 and model.config.gated
                                           else measured(self, step, model, *rest, **options)))
    with pytest.raises(UserError, match="the constraint is nan at step 25"):
        run("sparse.py", constraint_interval=1)
    assert read_checkpoint("out/sparse/last.pt")["step"] == 20


def test_folders_are_not_mixed_up(echo):
    with pytest.raises(UserError, match="own folder and its parent's"):
        run("sparse.py", out_dir="out/dense")
    assert not os.path.exists("out")
    run("dense.py")
    os.remove("out/dense/last.pt")
    with pytest.raises(UserError, match="best.pt but no last.pt"):
        run("dense.py", learning_rate=1e-4)
    (echo / "dense.py").write_text((echo / "dense.py").read_text() + "beta1 = 0.8\n")
    os.remove("out/dense/best.pt")
    run("dense.py")
    (echo / "dense.py").write_text((echo / "dense.py").read_text().replace("0.8", "0.7"))
    with pytest.raises(UserError, match="the parent, dense.py: out/dense holds a run with other settings"):
        run("sparse.py")
    with open("out/dense/config.json", "w") as f:
        f.write("[1]")
    with pytest.raises(UserError, match="out/dense/config.json is missing or damaged"):
        run("dense.py")


def test_what_the_target_hangs_on_cannot_change_on_the_way(counting):
    run("sparse.py", max_steps=10)
    for changed in ({"open_above": 0.5}, {"constraint_margin": 0.3}, {"target_loss": 0.3}):
        with pytest.raises(UserError, match="another model or target"):
            run("sparse.py", init_from="resume", max_steps=20, **changed)
    with pytest.raises(UserError, match="another model or target .*Start a new run with --out_dir=out/NEW"):
        run("sparse.py", loss_slack=0.5)
    parent = read_checkpoint("out/dense/best.pt")
    # the parent becomes another behind its child's back, at the same step
    next(iter(parent["model"].values()))[0, 0] += 1
    save_checkpoint("out/dense/best.pt", parent)
    with pytest.raises(UserError,
                       match="out/dense/best.pt holds other weights now than when out/sparse was begun"):
        run("sparse.py", init_from="resume", max_steps=20)


def test_an_evaluation_that_is_not_finite_leaves_the_last_good_checkpoint(counting):
    with pytest.raises(UserError,
                       match="is nan at step|is inf at step|is nan, the gradient|is inf, the gradient"):
        run("dense.py", learning_rate=1e30, eval_interval=1, max_steps=20, warmup_steps=0, grad_clip=0.0)
    assert all(p.isfinite().all() for p in parameters("out/dense").values())
    assert all(np.isfinite(m["val_loss"]) for m in metrics("out/dense"))


def test_other_data_than_the_run_began_with_is_refused(counting):
    run("dense.py", max_steps=20)
    tokens = np.zeros(5000, np.uint16)
    prepare_data.write_dataset("data/count", tokens, tokens, kind="stream", vocab_size=10, tokenizer="digits")
    with pytest.raises(UserError, match="data/count is not the data that out/dense was begun with"):
        run("dense.py", init_from="resume", max_steps=40)
    prepare_data.write_dataset("data/count", tokens, tokens, kind="stream", vocab_size=10,
                               tokenizer="letters")
    with pytest.raises(UserError, match="was trained on tokens of 'digits', the data has those of 'letters'"):
        run("sparse.py", init_from="out/dense")


def test_triton_without_a_gpu_is_refused_before_anything_is_built(counting, monkeypatch):
    run("dense.py", max_steps=5)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="attention_impl='triton' needs a GPU"):
        run("sparse.py", attention_impl="triton", device="cpu", init_from="out/dense")
    assert not os.path.exists("out/sparse")


def test_an_unready_parent_is_refused_and_a_ready_one_stops(echo):
    """ready_loss: trained until all answers are right and the loss is low; until then no child starts from
    it.
    """
    dense = (echo / "dense.py").read_text()
    (echo / "dense.py").write_text(dense + "ready_loss = 0.05\n")
    with pytest.raises(
        UserError,
        match="out/dense/best.pt is no parent yet: .*ready_loss=0.05.*--out_dir=out/dense --max_steps=120; "
        "then the same command as now with --init_from=out/dense",
    ):
        run("sparse.py")
    run("dense.py", init_from="resume", max_steps=2000, learning_rate=1e-2)
    last = read_checkpoint("out/dense/last.pt")
    assert last["ready"] and last["step"] < 2000 and metrics("out/dense")[-1]["val_loss"] <= 0.05
    run("sparse.py", init_from="out/dense", max_steps=20)
    assert metrics("out/sparse")[-1]["step"] == 20
    # ready for less: it goes on
    run("dense.py", init_from="resume", max_steps=2000, ready_loss=0.5 * metrics("out/dense")[-1]["val_loss"])
    assert read_checkpoint("out/dense/last.pt")["step"] > last["step"]


def test_a_folder_that_was_moved_goes_on_where_it_is(echo):
    os.rename(run("dense.py", max_steps=20, seed=2), "out/dense")
    assert run("dense.py", init_from="resume", max_steps=40) == "out/dense"
    assert read_checkpoint("out/dense/last.pt")["step"] == 40 and os.listdir("out") == ["dense"]


def test_another_shape_than_the_parents_is_refused_before_the_parent_is_trained(echo):
    with pytest.raises(UserError, match="n_layer=3, but dense.py has n_layer=2.* --out_dir=out/PARENT"):
        run("sparse.py", n_layer=3)
    with pytest.raises(UserError, match="block_size=8, but dense.py has block_size=4"):
        run("sparse.py", block_size=8)
    with pytest.raises(UserError, match="init_std=0.5, but dense.py has init_std=0.02"):
        run("sparse.py", init_std=0.5)
    (echo / "middle.py").write_text((echo / "sparse.py").read_text().replace("gated = True", "gated = False"))
    with pytest.raises(UserError, match="n_layer=3, but middle.py has n_layer=2"):
        run("sparse.py", init_from="middle.py", n_layer=3)
    assert len(lineage_of(*make_config("sparse.py", {"init_from": "middle.py", "n_layer": 2}))) == 3
    assert not os.path.exists("out/dense")


def test_a_parent_that_is_gone_is_named_and_no_other_run_recommended(echo):
    run("sparse.py", max_steps=20)
    shutil.rmtree("out/dense")
    with pytest.raises(UserError, match="to keep the loss of out/dense/best.pt, which is gone"):
        run("sparse.py", init_from="resume", out_dir="out/sparse", max_steps=30)


def test_a_folder_of_other_things_is_no_place_for_a_run(echo):
    with pytest.raises(UserError, match="out_dir=. is no run's folder: .*py is in it"):
        run("sparse.py", out_dir=".")


def test_a_config_is_found_from_its_own_folder_with_its_parent(workplace, monkeypatch):
    monkeypatch.chdir(os.path.join(REPOSITORY, "config"))
    config, given = make_config("addition.py", {"out_dir": str(workplace / "run")})
    assert lineage_of(config, given)[0][0].ready_loss == 0.0003


@pytest.mark.parametrize("path", ["addition", "config/adition.py", "config\\addition.py", "addition.py"])
def test_a_config_that_is_not_there_is_guessed(workplace, path):
    with pytest.raises(UserError, match=f"no config file .* Did you mean .*config{os.sep}addition.py"):
        make_config(path, {})


def test_numbers_must_be_finite():
    with pytest.raises(UserError, match="learning_rate on the command line is inf: it must be a finite"):
        parse_command_line(["--learning_rate=1e999"], Config, limits())


def test_half_a_checkpoint_is_named_and_not_called_an_invalid_argument(echo):
    run("dense.py", max_steps=20)
    with open("out/dense/best.pt", "r+b") as f:
        f.truncate(os.path.getsize("out/dense/best.pt") // 2)
    with pytest.raises(UserError, match="out/dense/best.pt cannot be read .*truncated") as refused:
        run("sparse.py", init_from="out/dense", max_steps=20)
    assert "Errno" not in str(refused.value)


def test_a_missing_run_names_the_command_that_would_make_it():
    for path, config in (("out/stdlib-seed3/best.pt", "stdlib"), ("out/mine", "addition")):
        with pytest.raises(UserError, match=f"Train one first: python train.py config/{config}.py"):
            read_checkpoint(path)


def test_a_dataset_that_is_not_there_is_missed_before_the_parent_is_trained(echo):
    with pytest.raises(UserError, match="there is no dataset data/gone"):
        run("sparse.py", dataset="gone")
    assert not os.path.exists("out/dense")


def test_a_folder_is_no_config(workplace):
    os.makedirs("config")
    with pytest.raises(UserError, match="config is a folder. Name a config file"):
        make_config("config", {})


def test_attention_that_this_machine_has_not_is_refused_before_the_parent_trains(echo, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # let it run on a CPU
    with pytest.raises(UserError, match="attention_impl='triton' needs a GPU"):
        run("sparse.py", init_from="dense.py", attention_impl="triton", device="cpu")
    assert not os.path.exists("out/dense")
