"""FSDP2: two processes that hold half a model each do what one does, and leave checkpoints that any number
can go on from.
"""

import os
import pickle
import shutil
import signal
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import prepare_data
from helpers import assert_same_losses, call, count_dataset, launch, metrics, same, torchrun, wait_for
from models.checkpoint import load_checkpoint, read_checkpoint
from storage.files import UserError
from train import main
from training import sharding
from training.folder import folder_for, remove_old
from training.judge import evaluate

SHAPE = ["--architecture=olmo2", "--n_layer=2", "--n_head=4", "--n_kv_head=2", "--n_embd=32",
         "--block_size=8"]
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
    sharded = read_checkpoint("out/two/last.pt")
    # at its end a run's last.pt is whole
    assert sharded["model"] is not None and sharded["shards"] == "shards-10"
    assert loss_of("out/two/last.pt") == pytest.approx(metrics("out/two")[-1]["val_loss"], abs=1e-5)
    assert sorted(os.listdir("out/two/shards-10")) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    stored = FileSystemReader("out/two/shards-10").read_metadata().state_dict_metadata
    # of adapters nothing else
    assert {name.removeprefix("model.") for name in stored
            if name.startswith("model.")} == set(sharded["model"])
    # two wrote, one goes on; and the other way round
    for run, processes, more in (("two", 1, []), ("one", 2, ["--parallel=fsdp"])):
        launch(processes, *GATED, *adapters, f"--out_dir=out/{run}", "--init_from=resume", "--max_steps=14",
               *more)
    assert_same_losses("out/one", "out/two")
    assert not [name for name in os.listdir("out/two") if name.startswith("shards")]
    assert os.path.exists("out/one/shards-14")
    a, b = (load_checkpoint(f"out/{run}/best.pt").state_dict() for run in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.slow
def test_the_closest_checkpoint_of_a_sharded_run_that_misses_its_target_is_whole(parent):
    """All gates are shut, and the learning rate makes it worse: the closest evaluation is one in the middle.
    """
    launch(2, *GATED, "--open_above=0", "--gate_bias=-20", "--learning_rate=10.0", "--max_steps=4",
           "--parallel=fsdp", "--out_dir=out/missed")
    assert not os.path.exists("out/missed/best.pt")
    step = read_checkpoint("out/missed/closest.pt")["step"]
    assert 0 < step < 4
    loss = next(line["val_loss"] for line in metrics("out/missed") if line["step"] == step)
    assert loss_of("out/missed/closest.pt") == pytest.approx(loss, abs=1e-5)


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
        wait_for(f"out/again/shards-{wanted}", process)
        # torchrun gives each a session of its own
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                 text=True).stdout.split()
        assert len(workers) == 2
        for pid in [*map(int, workers), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    launch(2, *GATED, "--max_steps=20", "--parallel=fsdp", "--out_dir=out/again")
    assert_same_losses("out/whole", "out/again")
    assert [name for name in os.listdir("out/again") if name.startswith("shards")] == ["shards-20"]


def test_a_folder_that_last_pt_names_is_never_written_again():
    assert folder_for(6, None) == folder_for(6, "shards-4") == folder_for(6, "shards-6-again") == "shards-6"
    assert folder_for(6, "shards-6") == "shards-6-again"


@pytest.mark.slow
def test_a_sharded_run_that_was_stopped_is_no_model_yet(parent):
    """SIGTERM after some steps: last.pt names a folder.

    To read weights from it would give none; to go on does.
    """
    process = torchrun(*RUN, *SHAPE, "--max_steps=100000", "--eval_interval=50000", "--parallel=fsdp",
                       "--out_dir=out/run")
    wait_for("out/run/best.pt", process)
    os.killpg(process.pid, signal.SIGTERM)
    assert "stopped and saved after" in process.communicate(timeout=120)[1]
    stopped = read_checkpoint("out/run/last.pt")
    assert stopped["model"] is None and os.path.exists(f"out/run/{stopped['shards']}/.metadata")
    with pytest.raises(UserError, match="sharded run that has not ended"):
        load_checkpoint("out/run/last.pt")


@pytest.mark.slow
def test_a_checkpoint_without_its_shards_is_named(parent):
    launch(2, *RUN, *SHAPE, "--parallel=fsdp", "--out_dir=out/run")

    def resumed():
        done = call(main, *RUN, *SHAPE, "--out_dir=out/run", "--init_from=resume", "--max_steps=12")
        assert done.returncode == 1
        return done.stderr

    with open("out/run/shards-10/.metadata", "r+b") as f:
        f.truncate(50)
    assert "out/run/shards-10/.metadata is damaged" in resumed()
    os.rename("out/run/shards-10", "out/elsewhere")
    assert "out/run/shards-10 is missing or not whole" in resumed()


def test_old_shards_are_removed_and_nothing_else(workplace):
    for name in ("shards-10", "shards-20", "shards-20-again", "shards-backup"):
        os.makedirs(f"out/run/{name}")
    remove_old("out/run", keep="shards-20")
    assert sorted(os.listdir("out/run")) == ["shards-20", "shards-backup"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch it-ran",)


def stored(model, **more):
    """Write a folder `shards` as a run does, with more beside. Its model and optimizer."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    dcp.save({"model": model.state_dict(), **more,
              "optimizer": get_optimizer_state_dict(model, optimizer, options=sharding.TRAINED)},
             checkpoint_id="shards")
    return model, optimizer


def test_what_was_saved_comes_back(workplace):
    model, optimizer = stored(torch.nn.Linear(3, 2))
    other = torch.nn.Linear(3, 2)
    its = torch.optim.AdamW(other.parameters(), lr=0.5)
    sharding.load("shards", other.state_dict(), other, its)
    assert same(model.state_dict(), other.state_dict())
    assert its.state_dict()["param_groups"][0]["lr"] == optimizer.state_dict()["param_groups"][0]["lr"]
    assert torch.equal(its.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_a_strangers_index_and_numbers_run_no_code(workplace):
    model, optimizer = stored(torch.nn.Linear(3, 2))
    group = get_optimizer_state_dict(model, optimizer, options=sharding.TRAINED)
    group["param_groups"][0]["lr"] = Bomb()
    dcp.save({"model": model.state_dict(), "optimizer": group}, checkpoint_id="shards")
    with pytest.raises(OSError, match="shards is damaged"):
        sharding.load("shards", model.state_dict(), model, optimizer)
    with open("shards/.metadata", "wb") as f:
        pickle.dump(Bomb(), f)
    with pytest.raises(OSError, match="no checkpoint of ours .*has no business there"):
        sharding.load("shards", model.state_dict(), model, optimizer)
    assert not os.path.exists("it-ran")
