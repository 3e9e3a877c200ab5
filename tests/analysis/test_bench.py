"""bench.py: the inputs are as open as asked for, and one small run prints, writes and draws every way."""

import argparse
import json
import os
import sys

import pytest
import torch

import analyze
from analysis import bench, bench_model
from analysis.bench import make_inputs
from analysis.stopwatch import peak_memory
from gate import gated_attention
from helpers import call


@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_inputs_have_the_share_of_open_edges_and_they_lie_together(share):
    T = 512
    (q, k, v, _), bias = make_inputs(1, 1, T, 64, share, torch.float32, "cpu")
    _, _, gates = gated_attention(q, k, v, bias, return_gates=True)
    opened = gates.open.sum().item() / (T * (T + 1) / 2)
    if share == 1:
        assert opened == 1
    else:
        assert 0.7 * share < opened < 1.4 * share
    tiles = gates.open.view(T // 64, 64, T // 64, 64).amax((1, 3))
    assert tiles.tril().mean().item() < 0.5 or share > 0.01


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak")
def test_peak_memory_sees_what_a_call_makes_and_frees():
    found = peak_memory(lambda: torch.ones(50_000_000).sum(), "cpu")
    assert 190e6 < found < 300e6


def test_a_small_run(workplace):
    flags = ["--lengths=64", "--B=1", "--H=1", "--D=8", "--repeats=2", "--device=cpu"]
    with torch.compiler.set_stance("force_eager"):  # what is compiled is tested in tests/fast
        done = call(analyze.main, "bench", *flags)
    assert done.returncode == 0, done.stderr
    with open("out/bench/bench.json") as f:
        rows = json.load(f)["rows"]
    ways = ["dense (SDPA)", "plain, eager", "plain, compiled", "tiled, eager", "tiled, compiled"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert row["forward_ms"] > 0 and row["ms"] > 0
        assert row["way"] in done.stdout
    assert os.path.getsize("out/bench/bench.png") > 5000


def test_where_the_compiler_does_not_work_the_compiled_rows_are_left_out(monkeypatch):
    monkeypatch.setattr(bench.parallel, "can_compile", lambda setting, device: False)
    ways = bench.ways("cpu", 64, 8, torch.float32)
    assert list(ways) == ["dense (SDPA)", "plain, eager", "tiled, eager"]
    shape = dict(vocab_size=9, n_layer=1, n_head=1, n_embd=8, block_size=64)
    monkeypatch.setitem(bench_model.SHAPES, "tiny", shape)
    monkeypatch.setattr(torch, "compile", None)  # nobody calls it
    options = argparse.Namespace(B=1, most_memory=8.0)
    assert bench_model.training_steps(options, "cpu", "tiny")


def test_the_steps_of_a_model_count_what_they_compute(monkeypatch):
    shape = dict(vocab_size=50, n_layer=2, n_head=2, n_embd=16, block_size=64)
    monkeypatch.setitem(bench_model.SHAPES, "tiny", shape)
    with torch.compiler.set_stance("force_eager"):
        options = argparse.Namespace(B=2, most_memory=8.0)
        steps = bench_model.training_steps(options, "cpu", "tiny")
        for step, _ in steps.values():
            step()
    flop = {way: flop for way, (_, flop) in steps.items()}
    assert list(flop) == ["tiny, dense", "tiny, tiled", "tiny, plain", "tiny, tiled, taught"]
    assert flop["tiny, dense"] == flop["tiny, tiled"] == 3 / 4 * flop["tiny, tiled, taught"] > 0


@pytest.mark.parametrize("flag", ["--open=x", "--open=0", "--open=nan", "--lengths=64,", "--T=0"])
def test_numbers_that_are_none_are_named(workplace, flag):
    done = call(analyze.main, "bench", flag, "--device=cpu")
    assert done.returncode == 1
    assert "write numbers above 0" in done.stderr
