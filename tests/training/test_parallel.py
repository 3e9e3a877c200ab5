"""One process or two: the same losses, densities, lambda and checkpoints."""

import functools
import os
import signal
import time

import pytest
import torch

from helpers import (
    TRAIN_AND_REPORT,
    assert_same_losses,
    begin,
    count_dataset,
    launch,
    metrics,
    run,
    torchrun,
    wait_for,
)
from models.checkpoint import read_checkpoint
from storage.files import UserError
from training import parallel
from training.folder import alone_in

SETTINGS = ["--dataset=count", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8",
            "--batch_size=16", "--learning_rate=3e-3", "--eval_interval=1", "--eval_batch_size=7",
            "--eval_batches=5", "--warmup_steps=2", "--max_steps=10", "--dropout=0.1", "--device=cpu"]
GATED = ["--init_from=out/dense", "--gated=True", "--distill_weight=0.5", "--constraint_paired=True",
         "--open_above=0.02", "--linear_penalty_steps=5", "--lambda_max=8", "--attention_impl=tiled"]


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does_with_accumulation(workplace, compiled):
    count_dataset()
    dense = list(SETTINGS)
    if compiled == "on":  # a layer takes the compiler half a minute, in both processes
        dense[dense.index("--n_layer=2")] = "--n_layer=1"
    launch(1, *dense, "--out_dir=out/dense")
    shape = [s for s in SETTINGS if not s.startswith(("--n_", "--block", "--dropout"))]
    launch(1, *shape, *GATED, "--micro_batch_size=8", "--out_dir=out/one")
    out = launch(2, *shape, *GATED, "--micro_batch_size=8", "--out_dir=out/two", f"--compile={compiled}",
                 code=TRAIN_AND_REPORT)
    assert "2 x cpu" in out and ("not compiled" in out) == (compiled == "off")
    assert out.count("held-out loss, sparse") == 1  # one process prints and reports
    one = metrics("out/one")
    assert len(one) == 11 and one[-1]["lambda"] != one[0]["lambda"]
    assert_same_losses("out/one", "out/two")
    a, b = (read_checkpoint(f"out/{name}/last.pt")["model"] for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    # and a run of two processes goes on as one, with the same micro-batches or none
    launch(1, *shape, *GATED, "--micro_batch_size=16", "--out_dir=out/two", "--init_from=resume",
           "--max_steps=12")
    assert read_checkpoint("out/two/last.pt")["step"] == 12


def test_a_scheduler_that_stops_everybody_at_once_loses_nothing(workplace):
    """SIGTERM to torchrun and to both its workers, as Slurm sends it."""
    count_dataset()
    process = torchrun(*SETTINGS, "--eval_interval=1000000", "--max_steps=1000000", "--out_dir=out/run")
    wait_for("out/run/best.pt", process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    step = read_checkpoint("out/run/last.pt")["step"]
    assert step > 0
    assert errors.count(f"stopped and saved after {step} steps. The same command goes on from there") == 1


def broken(function, **how):
    """torch.compile, where Python's headers are missing."""
    def call(*inputs):
        raise RuntimeError("C++ compile error\n\nCommand:\ng++ error.cpp\n\nOutput:\nIncluded from a:\n"
                           "a.cpp:1:10: fatal error: Python.h: No such file\ncompilation terminated.\n")

    return call


@pytest.fixture
def long_texts(counting, monkeypatch):
    """Configs that are compiled on a CPU, and a probe that remembers nothing of other tests."""
    for name in "dense.py", "sparse.py":
        words = (counting / name).read_text().replace("block_size = 8", "block_size = 64")
        (counting / name).write_text(words.replace("max_steps = 60", "max_steps = 2"))
    monkeypatch.setattr(parallel, "can_compile", functools.cache(parallel.can_compile.__wrapped__))


def test_a_compiler_that_does_not_work_costs_a_line_or_is_an_error_before_anything_is_trained(
        long_texts, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"^compile=on: .*fatal error: Python.h.*--compile=off"):
        run("sparse.py", compile="on")
    assert not os.path.exists("out")
    run("sparse.py")  # auto
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("not compiled, so slower: torch.compile does not work here (a.cpp:1:10: fatal error: "
                       "Python.h: No such file)") == 1
    assert metrics("out/sparse")[-1]["step"] == 2


def test_the_compiler_is_tried_once_a_command_and_never_where_nothing_is_compiled(long_texts, monkeypatch):
    tried = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: tried.append(function) or function)
    run("sparse.py", compile="off")
    run("dense.py", out_dir="out/again")  # a dense GPT is no faster
    assert not tried
    run("sparse.py", out_dir="out/compiled")
    assert len([function for function in tried if "can_compile" in function.__qualname__]) == 1


def test_a_small_model_takes_one_thread_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(parallel, "ALL_THREADS", 2)
    for told, tokens, expected in ((None, 1024, 1), (None, 2048, 2), ("2", 1024, 7)):
        monkeypatch.setenv("OMP_NUM_THREADS", told) if told else monkeypatch.delenv("OMP_NUM_THREADS", False)
        chosen = [7]
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        parallel.set_threads("cpu", 64, tokens)
        assert chosen[-1] == expected


def test_settings_in_words(monkeypatch):
    for dtype in ("bfloat16", "float32"):
        context, name = parallel.precision(dtype, "cpu", 64)
        with context():
            assert name == dtype and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, dtype)
    assert parallel.precision("auto", "mps", 64)[1] == "float32"
    for amx, avx512, width, expected in ((True, False, 64, "bfloat16"), (False, True, 768, "bfloat16"),
                                         (False, True, 64, "float32"), (False, False, 768, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert parallel.precision("auto", "cpu", width)[1] == expected
    assert parallel.all_reduce_sum([1.5, 2], torch.device("mps")) == [1.5, 2.0]  # which has no doubles
    monkeypatch.setattr(parallel, "can_compile", lambda setting, device: True)
    assert parallel.compiles("auto", "cuda:0", False)
    assert parallel.compiles("on", "cpu", False)
    assert not parallel.compiles("off", "cuda", True)
    assert not parallel.compiles("auto", "cpu", False)
    for device, message, world in (("cuda:99", "device=cuda:99.*--device=cpu", "1"),
                                   ("foo", "device=foo: it is", "1"),
                                   ("cuda:0", "all processes on one GPU", "2")):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(UserError, match=message):
            parallel.pick_device(device)


def test_peak_flops_are_those_of_the_very_gpu(monkeypatch):
    for name, flops in {
        "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "A100-SXM4-80GB": 312e12,
        "RTX A1000": None, "L40S": 362e12, "L4": 121e12, "GeForce RTX 4090": 165e12, "H100 NVL": 835e12,
        "GeForce RTX 4090 Laptop GPU": None, "GeForce RTX 3090 Ti": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: f"NVIDIA {name}")
        assert parallel.peak_flops("cuda:0") == flops, name
    assert parallel.peak_flops("cpu") is None


def test_two_runs_in_one_folder_are_refused(workplace):
    """The lock is the system's: it ends with the process that holds it."""
    other = begin("import os, time; from training.folder import alone_in\n"
                  "with alone_in('out/run'): os.mkdir('in'); time.sleep(60)")
    while not os.path.exists("in"):
        assert other.is_alive()
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is training in out/run"), alone_in("out/run"):
        raise AssertionError("both are in")
    other.kill()
    other.join()
    with alone_in("out/run"):
        assert os.path.isdir("out/run")


def test_the_stopwatch_leaves_evaluations_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parallel.time, "perf_counter", lambda: now[0])
    speed = parallel.Speed(tokens_per_step=100, flops_per_token=6, device="cpu", start=3)
    speed.pause()
    assert speed.read(3)["tokens_per_second"] is None
    speed.go_on()
    now[0] += 20
    speed.pause()
    now[0] += 1000  # an evaluation
    assert speed.read(13) == {"tokens_per_second": 50.0, "mfu": None, "gpu_memory_gb": None}


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_one_line_and_no_traceback(workplace):
    """The other process says that it stopped because of another."""
    errors = torchrun("--dataset=openwebtext", "--device=cpu").communicate(timeout=300)[1]
    ours = errors.partition("torch/distributed/elastic")[0]  # whose own traceback follows
    assert "error: there is no dataset data/openwebtext. Make it: " in ours
    assert "Traceback" not in ours
