"""The judge: what it counts is what a slow count by hand counts."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import prepare_data
from model import GPT, GPTConfig
from storage.addition import IGNORE
from storage.files import UserError
from training.judge import evaluate


def test_counts_on_rows(workplace):
    data = prepare_data.load("addition")
    model = GPT(GPTConfig(block_size=11, vocab_size=13, n_layer=2, n_head=2, n_embd=16, gated=True,
                          gate_bias=0.0)).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    found = evaluate(model, data, "val", batch_size=300)  # 2,000 is no multiple of 300
    assert model.training  # left as it was
    x, y = (torch.from_numpy(a) for a in data.batch("val", range(2000), 11))
    layers = []
    logits = model.eval()(x, record=lambda layer, gates: layers.append(gates.open))[0]
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[:, 6:].flatten(0, 1),
                                                          y[:, 6:].flatten()).item(), rel=1e-5)
    right = (logits[:, 6:].argmax(-1) == y[:, 6:]).all(1)
    assert found["correct"] == right.sum()
    assert found["accuracy"] == right.float().mean().item()
    assert found["examples"] == 2000
    assert found["total"] == 2 * 2 * 66
    assert found["open"] == pytest.approx(sum(g.sum().item() for g in layers) / 2000)
    assert found["fraction"] == pytest.approx(found["open"] / found["total"])
    gates = torch.stack(layers)  # (n_layer, B, H, T, T)
    assert found["by_distance"] == pytest.approx([gates.diagonal(-d, dim1=-2, dim2=-1).mean().item()
                                                  for d in range(11)])
    assert found["per_head"][1][0] == pytest.approx(layers[1][:, 0].sum().item() / 2000 / 66)


def test_a_stream_is_cut_into_windows_and_a_dense_model_is_all_open(workplace):
    tokens = np.random.default_rng(0).integers(0, 7, 103).astype(np.uint16)
    prepare_data.write_dataset("data/s", tokens, tokens, kind="stream", vocab_size=7)
    model = GPT(GPTConfig(block_size=8, vocab_size=7, n_layer=1, n_head=1, n_embd=8))
    found = evaluate(model, prepare_data.load("s"), "val", batch_size=5)
    assert found["examples"] == 12 and found["accuracy"] is None and found["open"] == found["total"] == 36
    windows = torch.from_numpy(tokens[:97].astype(np.int64))
    x, y = windows[:96].view(12, 8), windows[1:].view(12, 8)
    assert found["loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-5)
    assert found["by_distance"] == [1.0] * 8
    some = evaluate(model, prepare_data.load("s"), "val", batch_size=5, max_batches=1)
    spread = torch.tensor([0, 2, 4, 7, 9])  # five of twelve windows, from all over the text
    assert some["examples"] == 5
    assert some["loss"] == pytest.approx(model(x[spread], y[spread])[1].item(), rel=1e-5)
    assert evaluate(model, prepare_data.load("s"), "val", batch_size=5, max_batches=9)["examples"] == 12


def test_rows_that_ask_nothing_have_no_weight(workplace):
    rows = np.random.default_rng(0).integers(0, 7, (9, 2, 8)).astype(np.uint16)
    rows[:3, 1] = IGNORE  # a batch of them
    rows[3:6, 1, :7] = IGNORE  # and one that asks less than the next
    prepare_data.write_dataset("data/some", rows, rows, kind="rows", vocab_size=7)
    data = prepare_data.load("some")
    model = GPT(GPTConfig(block_size=8, vocab_size=7, n_layer=1, n_head=1, n_embd=8))
    x, y = (torch.from_numpy(a) for a in data.batch("val", range(3, 9), 8))
    expected = F.cross_entropy(model(x)[0][y != -1], y[y != -1]).item()
    assert evaluate(model, data, "val", batch_size=3)["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="none of the 1 val examples that are judged asks anything"):
        evaluate(model, data, "val", batch_size=1, max_batches=1)
