"""One sum through a small random model: the answer, the edges, a cut, and what is said of every mistake."""

import os

import numpy as np
import pytest
import torch

import analyze
import prepare_data
from analysis.ask import ask, parse_edge, parse_sum, run_sum
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, save_checkpoint
from storage.addition import ADDITION_TOKENS, AdditionTask, addition_rows
from storage.files import UserError

TWO, THREE = AdditionTask(), AdditionTask(3, 5)


def random_model(task=TWO, gated=True, n_head=1):
    """About half of the edges open."""
    torch.manual_seed(1)
    config = GPTConfig(block_size=task.length, vocab_size=13, n_layer=2, n_head=n_head, n_embd=8, gated=gated,
                       gate_bias=-0.5)
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.fixture
def runs(workplace):
    """Folders as train.py leaves them: out/sparse, out/dense and out/heads of two digits, out/three,
    out/text.
    """
    nothing = np.zeros(99, np.uint16)
    prepare_data.write_dataset("data/text", nothing, nothing, kind="stream", vocab_size=13)
    prepare_data.load("addition")
    prepare_data.load("addition3")
    models = {"sparse": random_model(), "dense": random_model(gated=False), "heads": random_model(n_head=2),
              "three": random_model(THREE), "text": random_model()}
    datasets = {"three": "addition3", "text": "text"}
    for name, model in models.items():
        os.makedirs(f"out/{name}")
        dataset = datasets.get(name, "addition")
        data = {"dataset": dataset, "tokenizer": dataset}
        save_checkpoint(f"out/{name}/best.pt", checkpoint_of(model, data=data))
    return workplace


@pytest.mark.parametrize("task", [TWO, THREE])
def test_the_answer_and_its_edges_are_the_models(task):
    model = random_model(task)
    answer = run_sum(model, task, 36, 28)
    layers = []
    question = torch.from_numpy(addition_rows([36], [28], *task)[:, 0].astype(np.int64))
    logits, _, _ = model(question, record=lambda layer, gates: layers.append(gates.open * gates.pattern))
    assert answer.digits == "".join(ADDITION_TOKENS[i] for i in logits[0, task.first:].argmax(-1))
    assert np.allclose(answer.weights, torch.cat(layers).detach())
    lines = ask(model, task, 36, 28)
    assert lines[0] == f"36+28 = {answer.digits}, wrong, 00064 is right"
    total = task.length * (task.length + 1)
    assert lines[1].startswith(f"{answer.open.sum()} of {total} edges opened")
    assert len(lines) - 2 == min(60, answer.open.sum())


def test_an_edge_that_is_cut_is_shut_and_what_it_changes_is_listed():
    model = random_model()
    before = run_sum(model, TWO, 36, 28)
    flips = {}
    for edge in map(tuple, np.argwhere(before.open).tolist()):
        after = run_sum(model, TWO, 36, 28, [edge])
        assert not after.open[edge]
        flips[edge] = (before.open != after.open).sum() - 1 + (before.digits != after.digits)
    edge = max(flips, key=flips.get)
    assert flips[edge] > 0
    lines = ask(model, TWO, 36, 28, [edge])
    after = run_sum(model, TWO, 36, 28, [edge])
    changed = sum(x != y for x, y in zip(before.digits, after.digits))
    line = next(line for line in lines if line.startswith("after:"))
    assert after.digits in line and (line.count("->") == changed if changed else "no digit changed" in line)
    opened = sum(line.endswith("opened because of it") for line in lines)
    shut = sum(line.endswith("  shut because of it") for line in lines)
    assert opened == (after.open & ~before.open).sum()
    assert shut == (before.open & ~after.open).sum() - 1


def test_an_edge_that_is_shut_anyway_changes_nothing():
    model = random_model()
    causal = np.tril(np.ones((11, 11), dtype=bool))
    edge = tuple(np.argwhere(causal & ~run_sum(model, TWO, 36, 28).open)[0].tolist())
    lines = ask(model, TWO, 36, 28, [edge])
    assert any("it was shut anyway" in line for line in lines)
    assert lines[-2].endswith("no digit changed")
    assert lines[-1] == "no other edge opened or shut because of it"


def test_from_the_command_line(runs, capsys):
    analyze.main(["ask", "out/sparse/", "36+28", "--shut=1.s2.s2", "--shut=0.a0.a1"])
    out = capsys.readouterr().out
    assert out.startswith("36+28 = ") and out.count("\ncut:") == 2 and "layer 1  s2 reads s2" in out
    analyze.main(["ask", "out/three", "736", "+", "528"])
    assert "736+528 = " in capsys.readouterr().out
    analyze.main(["ask", "out/heads", "36+28", "--shut=1.0.s2.s2"])
    assert "layer 1 head 0  s2 reads s2" in capsys.readouterr().out


def test_a_dense_run_shows_its_strongest_edges(runs, capsys):
    analyze.main(["ask", "out/dense", "36+28"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("dense: all 132 edges are open") and lines[1].endswith("the strongest 10")
    weights = [float(line.split()[-1]) for line in lines[2:]]
    assert len(weights) == 10 and weights == sorted(weights, reverse=True)


def test_sums_are_read():
    assert parse_sum("36+28", TWO) == parse_sum(" 36 + 28 =", TWO) == (36, 28)
    assert parse_sum("736+5", THREE) == (736, 5)


def test_edges_are_read():
    model = random_model(n_head=2)
    assert parse_edge("1.0.s2.s4", model.config, TWO) == (1, 0, 8, 6)
    assert parse_edge("1.s2.s4", random_model().config, TWO) == (1, 0, 8, 6)
    assert parse_edge("1.0.s2.+", random_model().config, TWO) == (1, 0, 8, 2)
    with pytest.raises(UserError, match="layer.head.query.key, such as --shut=0.0.s0.a1"):
        parse_edge("1.s2.s4", model.config, TWO)


@pytest.mark.parametrize("arguments, message", [
    (["out/sparse", "36-28"], "'36-28' is not a sum. Type two numbers from 0 to 99, for instance: "
                              "python analyze.py ask out/sparse 33[+]49"),
    (["out/sparse"], "there is no sum to ask for. Type two numbers"),
    (["out/sparse", "136+28"], "136 is too large for this model. Type two numbers from 0 to 99"),
    (["out/sparse", "36+28", "--shut=s2"], "--shut=s2 names no edge: write layer.query.key"),
    (["out/sparse", "36+28", "--shut=1.s2.s9"], "--shut=1.s2.s9: no position is called 's9'"),
    (["out/sparse", "36+28", "--shut=2.s2.s4"], "the model's layers are 0 to 1, '2' is none of them"),
    (["out/sparse", "36+28", "--shut=1.s4.s2"], "s4 cannot read s2, which comes after it"),
    (["out/text", "36+28"], "out/text is a gated run on text: .* they need a run on addition"),
    (["out/none", "36+28"], "there is no checkpoint out/none"),
])
def test_mistakes_are_one_sentence(runs, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        analyze.main(["ask", *arguments])
