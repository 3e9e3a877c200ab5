"""analyze.py circuit, from the command line, on a small dense and a small gated run."""

import json
import os

import pytest
import torch
from matplotlib import pyplot as plt

import analyze
from analysis.circuit import two_models
from analysis.circuit_figures import band
from circuits import compare
from circuits.attribution import effects
from circuits.graph import ComponentGraph
from circuits.tasks import make_pairs, vocabulary
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, load_checkpoint, read_checkpoint, save_checkpoint, tokenizer_of


@pytest.fixture
def runs(workplace):
    """out/dense, out/sparse and out/short on bytes and out/sums on addition, random weights, in folders as
    train.py leaves them.
    """
    for name, gated, shape in (("dense", False, {}), ("sparse", True, {}), ("short", True, {"block_size": 8}),
                               ("sums", False, {"vocab_size": 13})):
        shape = {"block_size": 128, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16} | shape
        model = GPT(GPTConfig(**shape, gated=gated, gate_bias=0.2))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        os.makedirs(f"out/{name}")
        save_checkpoint(f"out/{name}/best.pt",
                        checkpoint_of(model, data={"tokenizer": "addition" if name == "sums" else "bytes"}))
    return workplace


def lead_to_the_right_answer(path, task):
    """A random model knows a task a little, or its opposite a little: then turn its logits round."""
    model, graph = load_checkpoint(path), ComponentGraph(2, 2)
    pairs, metric = make_pairs(task, 6, 3, vocabulary("bytes"))
    clean, corrupted, _ = effects(model, pairs, metric, [graph.edges])
    if clean.mean() < corrupted.mean():
        model.transformer.ln_f.weight.data *= -1
        model.transformer.ln_f.bias.data *= -1
    save_checkpoint(path, read_checkpoint(path) | {"model": model.state_dict()})


def test_circuit_prints_a_table_and_leaves_numbers_and_pictures(runs, capsys):
    for path in ("out/dense/best.pt", "out/sparse/best.pt"):
        lead_to_the_right_answer(path, "quote")
    analyze.main(["circuit", "out/dense", "out/sparse", "--task=quote", "--n=6", "--steps=2"])
    out = capsys.readouterr().out
    assert "component edges for 90 % of the effect" in out and "quote, logit difference; 6 pairs" in out
    with open("out/sparse/circuit-quote.json") as f:
        result = json.load(f)
    for model in ("dense", "sparse"):
        for by in ("by_heads", "by_edges"):
            curve = result[model][by]
            assert len(curve["n"]) == len(curve["explained"]) == len(curve["low"]) == len(curve["high"])
            assert curve["n"] == sorted(curve["n"])
            assert curve["explained"][-1] == pytest.approx(1, abs=1e-4)  # all of it explains everything
    assert set(result["attention_edges"]) == {"zero", "interchange"}
    for name in ("", "-graph", "-gallery"):
        assert os.path.getsize(f"out/sparse/circuit-quote{name}.png") > 3000


def test_where_a_draw_has_no_effect_the_band_is_null_and_not_drawn(monkeypatch):
    clean, corrupted = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])  # one pair that shows nothing
    monkeypatch.setattr(compare, "effects", lambda *_: (clean, corrupted, torch.tensor([[0.5, 0], [1, 0]])))
    curve, _ = compare.curve_of(None, None, None, {1: None, 2: None})
    assert curve["explained"] == [0.5, 1.0] and curve["low"] == curve["high"] == [None, None]
    ax = plt.figure().subplots()
    band(ax, curve["n"], curve["explained"], curve["low"], curve["high"], "red", "sparse")
    plt.close(ax.figure)


def test_a_parent_whose_tokens_nobody_wrote_down_reads_its_childs(runs):
    """As a GPT-2 of transformers' does."""
    kept = {key: value for key, value in read_checkpoint("out/dense/best.pt").items() if key != "data"}
    save_checkpoint("out/dense/best.pt", kept)
    assert tokenizer_of(kept) is None
    *_, tokenizer = two_models("out/dense", "out/sparse")
    assert tokenizer == "bytes"


def test_induction_writes_every_head(runs, capsys):
    analyze.main(["circuit", "out/sparse", "--task=induction"])
    assert "prefix matching" in capsys.readouterr().out
    with open("out/sparse/induction.json") as f:
        assert len(json.load(f)) == 4


@pytest.mark.parametrize("arguments, words", [
    (["out/sparse", "out/dense", "--task=quote"], "compares a dense run with a sparse one"),
    (["out/sparse", "--task=quote"], "circuit compares two runs"),
    (["out/sums", "out/sparse", "--task=quote"], "of the same vocabulary"),
    (["out/dense", "out/none", "--task=quote"], "no checkpoint out/none"),
    (["out/dense", "out/short", "--task=quote"], "and a model has a context of 8"),
    (["out/dense", "out/none-open", "--task=quote"], "model does not know the task.*There is no effect"),
])
def test_mistakes_are_named(runs, arguments, words):
    blind = read_checkpoint("out/sparse/best.pt")
    os.makedirs("out/none-open")
    # no head opens: clean and corrupted end alike
    save_checkpoint("out/none-open/best.pt",
                    blind | {"model_args": blind["model_args"] | {"gate_bias": -100.0}})
    with pytest.raises(SystemExit, match=words):
        analyze.main(["circuit", *arguments])
