"""FSDP2: two processes that hold half a model each do what one does, and leave checkpoints that any number
can go on from.
"""

import os
import shutil
import signal
import subprocess

import pytest
import torch

import prepare_data
from helpers import assert_same_losses, count_dataset, launch, metrics, torchrun, wait_for
from models.checkpoint import load_checkpoint, read_checkpoint
from training.judge import evaluate

SHAPE = ["--architecture=olmo2", "--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=8"]
RUN = ["--dataset=count", "--batch_size=16", "--micro_batch_size=4", "--learning_rate=3e-3",
       "--eval_interval=1", "--eval_batch_size=7", "--eval_batches=5", "--warmup_steps=2", "--max_steps=10",
       "--device=cpu"]
GATED = [*RUN, "--init_from=out/dense", "--gated=True", "--open_above=0.02", "--distill_weight=0.5",
         "--constraint_paired=True", "--linear_penalty_steps=5"]
# in blocks and outside; matrices, norms, and the embedding, which serves twice
LORA = ["--lora_rank=2", "--lora_targets=q_proj,k_proj,down_proj,q_norm,norm,embed_tokens"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the data and a dense parent."""
    folder = tmp_path_factory.mktemp("parent")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        count_dataset()
        launch(1, *RUN, *SHAPE, "--out_dir=out/dense")
    return folder


@pytest.fixture
def parent(workplace, trained):
    shutil.copytree(trained, workplace, dirs_exist_ok=True)


def loss_of(path):
    """Held-out loss of a checkpoint, as anybody reads it."""
    return evaluate(load_checkpoint(path), prepare_data.load("count"), "val", 7, 5)["loss"]


@pytest.mark.slow
def test_a_shift_into_the_key_biases_is_the_same_in_parts(workplace):
    """GPT-2 has key biases, OLMo none: two processes shift them as one does."""
    count_dataset()
    launch(1, *RUN, "--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=8", "--out_dir=out/dense")
    launch(1, *GATED, "--out_dir=out/one")
    launch(2, *GATED, "--parallel=fsdp", "--out_dir=out/two")
    assert_same_losses("out/one", "out/two")
    assert isinstance(load_checkpoint("out/two/last.pt").config.gate_bias, float)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [[], LORA], ids=["all weights", "LoRA"])
def test_two_processes_with_half_a_model_each_do_what_one_does(parent, adapters):
    launch(1, *GATED, *adapters, "--out_dir=out/one")
    launch(2, *GATED, *adapters, "--out_dir=out/two", "--parallel=fsdp")
    assert_same_losses("out/one", "out/two")
    assert loss_of("out/two/last.pt") == pytest.approx(metrics("out/two")[-1]["val_loss"], abs=1e-5)
    one, two = (read_checkpoint(f"out/{name}/last.pt")["optimizer"]["state"] for name in ("one", "two"))
    assert {k: v["exp_avg"].shape for k, v in one.items()} == {k: v["exp_avg"].shape for k, v in two.items()}
    # two wrote, one goes on; and the other way round
    for run, processes, more in (("two", 1, []), ("one", 2, ["--parallel=fsdp"])):
        launch(processes, *GATED, *adapters, f"--out_dir=out/{run}", "--init_from=resume", "--max_steps=14",
               *more)
    assert_same_losses("out/one", "out/two")
    a, b = (load_checkpoint(f"out/{run}/best.pt").state_dict() for run in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.slow
def test_what_large_models_use_all_at_once(parent):
    """FSDP, blocks compiled and recomputed, adapters on frozen weights in half precision that are their own
    teacher: config/olmo_7b.py and more.
    """
    settings = [*GATED, *LORA, "--base_dtype=bfloat16", "--max_steps=2"]
    launch(1, *settings, "--out_dir=out/one")
    launch(2, *settings, "--out_dir=out/two", "--parallel=fsdp", "--recompute_activations=True",
           "--compile=on")
    # compiled code rounds to half precision elsewhere
    assert_same_losses("out/one", "out/two", within=5e-3, but=("lambda", "violation", "fraction"))


@pytest.mark.slow
def test_a_sharded_run_that_is_killed_ends_like_one_that_is_not(parent):
    """kill -9 to all processes, at some moment after the first checkpoint, twice."""
    launch(2, *GATED, "--max_steps=20", "--parallel=fsdp", "--out_dir=out/whole")
    for wanted in (2, 11):
        process = torchrun(*GATED, "--max_steps=20", "--parallel=fsdp", "--out_dir=out/again")
        wait_for("out/again/last.pt", process)
        while read_checkpoint("out/again/last.pt")["step"] < wanted:
            assert process.poll() is None, process.communicate()[1]
        # torchrun gives each a session of its own
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                 text=True).stdout.split()
        assert len(workers) == 2
        for pid in [*map(int, workers), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    launch(2, *GATED, "--max_steps=20", "--parallel=fsdp", "--out_dir=out/again")
    assert_same_losses("out/whole", "out/again")
