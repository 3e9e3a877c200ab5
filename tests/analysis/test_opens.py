"""The command `opens`: what it says of an edge is in the score, and the plots are the features'."""

import glob
import json
import os
import re

import numpy as np
import pytest
import torch

import analyze
import prepare_data
from analysis.explain import run_sums
from analysis.opens import differences, edge_to_explain, operand_plots
from circuits.attribution_graph import Node
from circuits.transcoder import Transcoder, read_and_written
from helpers import call, trained
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, save_checkpoint
from storage.addition import ADDITION_TOKENS, AdditionTask, addition_rows, token_names
from storage.files import UserError

TASK = AdditionTask(2)
NAMES = token_names(TASK)
L, F = 2, 20


@pytest.fixture
def made(workplace):
    """out/run, a random gated model that adds, and its random transcoder."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=TASK.length, vocab_size=len(ADDITION_TOKENS), n_layer=L, n_head=1,
                          n_embd=16, gated=True, gate_bias=0.1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    coder = Transcoder(L, 16, F)
    torch.nn.init.normal_(coder.b_enc, std=0.5)
    data = prepare_data.load("addition")
    (workplace / "out" / "run").mkdir(parents=True)
    about = {"dataset": "addition", "sha256": data.meta["sha256"]}
    save_checkpoint("out/run/best.pt", checkpoint_of(model, data=about))
    save_checkpoint("out/run/transcoder.pt", trained(coder, "out/run/best.pt"))
    return model, coder.eval()


def test_differences_are_of_means_over_sums_and_both_sides_add_up():
    a, b, c = (Node("feature", 0, 0, number) for number in range(3))
    on_open = [(["a", "b"], [a, b], np.array([[1.0, 2.0], [0.0, 4.0]]), None),
               (["b", "c"], [b, c], np.array([[2.0, 0.0], [0.0, 6.0]]), None)]
    on_shut = [(["a"], [a], np.array([[3.0]]), None)]
    found = differences(on_open, on_shut)
    assert found["pairs"] == [["b", "b", 3.0, 0.0], ["c", "c", 3.0, 0.0], ["a", "a", 0.5, 3.0],
                              ["a", "b", 1.0, 0.0]]
    assert found["key"] == [["b", 4.0, 0.0], ["c", 3.0, 0.0], ["a", 0.5, 3.0]]
    assert found["query"] == [["b", 3.0, 0.0], ["c", 3.0, 0.0], ["a", 1.5, 3.0]]


def test_an_edge_is_the_one_that_is_named_or_the_one_nearest_to_a_half():
    is_open = np.zeros((2, 1, 11, 11, 4), dtype=bool)
    is_open[1, 0, 9, 5] = [True, False, True, False]
    is_open[0, 0, 8, 0] = [True, False, False, False]
    config = GPTConfig(n_layer=2, n_head=1)
    assert edge_to_explain("", is_open, config, TASK) == (1, 0, 9, 5)
    assert edge_to_explain(f"0.{NAMES[8]}.{NAMES[0]}", is_open, config, TASK) == (0, 0, 8, 0)
    with pytest.raises(UserError, match="is open on 0 % of the sums"):
        edge_to_explain(f"1.{NAMES[8]}.{NAMES[0]}", is_open, config, TASK)
    with pytest.raises(UserError, match="--edge=1.s2 names no edge: write layer.query.key, such as --edge="):
        edge_to_explain("1.s2", is_open, config, TASK)
    with pytest.raises(UserError, match="every edge of this model is always open, or never"):
        edge_to_explain("", is_open[..., :1], config, TASK)


@torch.no_grad()
def test_operand_plots_have_a_feature_of_every_sum(made):
    model, coder = made
    nodes = [Node("feature", 1, 5, 3), Node("feature", 0, 7, 11)]
    grids = operand_plots(model, coder, TASK, nodes)
    assert grids.shape == (2, 100, 100) and (grids > 0).any()
    for a, b in ((36, 28), (0, 99), (99, 0)):
        question = torch.from_numpy(addition_rows([a], [b], *TASK).astype(np.int64))[:, 0]
        read, _ = read_and_written(model, question)
        for grid, node in zip(grids, nodes):
            expected = coder.features(read)[0, node.position, node.layer, node.number].item()
            assert grid[a, b] == pytest.approx(expected, abs=1e-5)


def named(model, layer):
    """The name of an edge of a layer that opens on some sums."""
    _, is_open = run_sums(model, TASK, *np.divmod(np.arange(0, 10_000, 100), 100))
    shares = is_open[layer, 0].mean(-1)
    query, key = np.argwhere((shares > 0.2) & (shares < 0.8))[0]
    return f"--edge={layer}.0.{NAMES[query]}.{NAMES[key]}"


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_printed_adds_up_to_the_difference_of_the_score(made, workplace, layer):
    done = call(analyze.main, "opens", "out/run", "--n=6", named(made[0], layer))
    assert ("feature 0." in done.stdout) == (layer == 1)
    assert done.returncode in (0, None), done.stderr
    total = float(re.search(r"(-?[\d.]+) more than on the others", done.stdout)[1])
    for block in done.stdout.split("\n\n")[1:]:
        added = [float(line.split()[0]) for line in block.splitlines()[1:] if re.match(r" *[+-]\d", line)]
        assert sum(added) == pytest.approx(total, abs=0.05)
    [place] = glob.glob("out/run/opens-*.json")
    with open(place) as f:
        found = json.load(f)
    assert 0 < found["open_on"] < 10_000 and len(found["edge"]) == 4
    assert sum(row[1] - row[2] for row in found["key"]) == pytest.approx(total, abs=0.01)
    assert os.stat(place.replace(".json", ".png")).st_size > (10_000 if layer else 2_000)


@pytest.mark.parametrize("words, answer", [
    (["--edge=2"], "--edge=2 names no edge: write layer.query.key"),
    (["--edge=9.s1.="], "--edge=9.s1.=: the model's layers are 0 to 1"),
    (["--n=1"], "--n must be at least 2"),
    (["--name=other"], "has no other.pt. Train one first: python analyze.py transcode")])
def test_mistakes_are_answered(made, words, answer):
    done = call(analyze.main, "opens", "out/run", *words)
    assert done.returncode == 1 and answer in done.stderr, done.stderr
