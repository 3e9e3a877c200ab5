"""One process or two: the same losses, densities, lambda and checkpoints."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import hardware
import prepare_data
from conftest import REPOSITORY
from hardware import HardwareError
from model import read_checkpoint

SETTINGS = ["--dataset=count", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=16", "--learning_rate=3e-3", "--eval_interval=1",
            "--eval_batch_size=7", "--eval_batches=5", "--warmup_steps=2", "--max_steps=20", "--dropout=0.1", "--device=cpu"]
GATED = ["--init_from=out/dense", "--gated=True", "--distill_weight=0.5", "--constraint_paired=True", "--open_above=0.02", "--linear_penalty_steps=10"]


def launch(processes, *arguments):
    """train.py in so many processes; its output. torchrun is `python -m torch.distributed.run`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *torchrun, os.path.join(REPOSITORY, "train.py"), *arguments], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(folder):
    with open(f"{folder}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def test_two_processes_do_what_one_does_with_accumulation(workplace):
    tokens = (np.cumsum(np.random.default_rng(0).integers(1, 3, 3000)) % 10).astype(np.uint16)
    prepare_data.write_dataset("data/count", tokens[:2000], tokens[2000:], kind="stream", vocab_size=10, tokenizer="digits")
    launch(1, *SETTINGS, "--out_dir=out/dense")
    shape = [s for s in SETTINGS if not s.startswith(("--n_", "--block", "--dropout"))]
    launch(1, *shape, *GATED, "--micro_batch_size=8", "--out_dir=out/one")
    out = launch(2, *shape, *GATED, "--micro_batch_size=8", "--out_dir=out/two")
    assert "2 x cpu" in out and out.count("held-out loss, sparse") == 1  # one process prints and reports
    one, two = metrics("out/one"), metrics("out/two")
    assert len(one) == len(two) == 21 and one[-1]["lambda"] != one[0]["lambda"]
    for a, b in zip(one, two):
        for key in ("val_loss", "batch_loss", "density", "lambda", "constraint_loss", "constraint_target", "violation", "fraction", "target_loss"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)
    a, b = (read_checkpoint(f"out/{name}/last.pt")["model"] for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    # and a run of two processes goes on as one, with the same micro-batches or none
    launch(1, *shape, *GATED, "--micro_batch_size=16", "--out_dir=out/two", "--init_from=resume", "--max_steps=24")
    assert read_checkpoint("out/two/last.pt")["step"] == 24


def test_settings_in_words():
    context, name = hardware.precision("bfloat16", "cpu")
    with context():
        assert name == "bfloat16" and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    context, name = hardware.precision("float32", "cpu")
    with context():
        assert name == "float32" and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert hardware.precision("auto", "mps")[1] == "float32"
    assert hardware.compiles("auto", "cuda:0", 8) and hardware.compiles("on", "cpu", 8) and not hardware.compiles("off", "cuda", 99)
    assert not hardware.compiles("auto", "cpu", 11)
    with pytest.raises(HardwareError, match="device=cuda:7.*--device=cpu"):
        hardware.pick_device("cuda:7")


def test_one_process_is_its_own_average():
    assert hardware.total([1.5, 2]) == [1.5, 2.0] and hardware.rank() == 0 and hardware.world() == 1
    hardware.wait_for_all()


def test_the_stopwatch_leaves_evaluations_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    speed = hardware.Speed(tokens_per_step=100, flops_per_token=6, device="cpu")
    speed.pause()
    assert speed.read()["tokens_per_second"] is None
    speed.go_on()
    for _ in range(10):
        now[0] += 2
        speed.step()
    speed.pause()
    now[0] += 1000  # an evaluation
    assert speed.read() == {"tokens_per_second": 50.0, "mfu": None, "gpu_memory_gb": None}
    speed.go_on()
    speed.pause()
    assert speed.read()["tokens_per_second"] is None
