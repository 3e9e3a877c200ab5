"""bench.py: the inputs are as open as asked for, and one small run prints, writes and draws every way."""

import argparse
import os
import sys
import time

import pytest
import torch

import analyze
from analysis import bench
from gate import gated_attention
from helpers import call
from storage.files import read_json

OPTIONS = argparse.Namespace(B=2, most_memory=8.0)


@pytest.fixture
def tiny(monkeypatch):
    shape = dict(vocab_size=50, n_layer=2, n_head=2, n_embd=16, block_size=64)
    monkeypatch.setitem(bench.SHAPES, "tiny", shape)


@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_inputs_have_the_share_of_open_edges_and_they_lie_together(share):
    T = 512
    (q, k, v, _), bias = bench.make_inputs(1, 1, T, 64, share, torch.float32, "cpu")
    _, _, gates = gated_attention(q, k, v, bias, return_gates=True)
    opened = gates.open.sum().item() / (T * (T + 1) / 2)
    assert opened == 1 if share == 1 else 0.8 * share < opened < 1.25 * share
    tiles = gates.open.view(T // 64, 64, T // 64, 64).amax((1, 3))
    assert tiles.tril().mean().item() < 0.5 or share > 0.01


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak")
def test_peak_memory_sees_what_a_call_makes_and_frees():
    found = bench.peak_memory(lambda: torch.ones(50_000_000).sum(), "cpu")
    assert 190e6 < found < 300e6


def test_a_call_without_memory_is_left_out_and_time_is_in_seconds(capsys):
    def fails():
        raise torch.OutOfMemoryError

    found = bench.measure({"large": fails, "wait": lambda: time.sleep(0.01)}, "cpu", 3)
    assert list(found) == ["wait"] and "large: out of memory" in capsys.readouterr().out
    row = bench.row_of(8, None, "wait", found["wait"][0], 5e6)
    low, high = row["quartiles_ms"]
    assert 10 <= low <= row["ms"] <= high < 100 and row["memory_mb"] == 5


def test_a_small_run(workplace):
    flags = ["--lengths=64", "--B=1", "--H=1", "--D=8", "--repeats=2", "--device=cpu"]
    with torch.compiler.set_stance("force_eager"):  # what is compiled is tested in tests/fast
        done = call(analyze.main, "bench", *flags)
    assert done.returncode == 0, done.stderr
    rows = read_json("out/bench/bench.json")["rows"]
    ways = ["dense (SDPA)", "plain, eager", "plain, compiled", "tiled, eager", "tiled, compiled"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert row["forward_ms"] > 0 and row["ms"] > 0 and row["way"] in done.stdout
    assert os.path.getsize("out/bench/bench.png") > 5000


def test_where_the_compiler_does_not_work_nothing_is_compiled(monkeypatch, tiny):
    monkeypatch.setattr(bench.parallel, "can_compile", lambda setting, device: False)
    monkeypatch.setattr(torch, "compile", None)  # nobody calls it
    assert list(bench.ways("cpu", 64, 8, torch.float32)) == ["dense (SDPA)", "plain, eager", "tiled, eager"]
    assert bench.training_steps(OPTIONS, "cpu", "tiny")


def test_the_steps_of_a_model_count_what_they_compute(tiny, capsys):
    with torch.compiler.set_stance("force_eager"):
        rows = bench.whole_model(argparse.Namespace(**vars(OPTIONS), repeats=2), "cpu", "tiny")
        steps = bench.training_steps(OPTIONS, "cpu", "tiny")
    flop = {way: flop for way, (_, flop) in steps.items()}
    assert [row["way"] for row in rows] == list(flop)
    assert list(flop) == ["tiny, dense", "tiny, tiled", "tiny, plain", "tiny, tiled, taught"]
    assert flop["tiny, dense"] == flop["tiny, tiled"] == 3 / 4 * flop["tiny, tiled, taught"] > 0
    bench.show(rows)
    assert "graph breaks: none" in capsys.readouterr().out
