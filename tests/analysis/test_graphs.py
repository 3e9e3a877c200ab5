"""The command `graph` over many graphs: what it says of an edge is in the score, and the plots are the
features'; transcoders of equal quality are compared, and what is printed is what the graphs say.
"""

import glob
import json
import os
import re
import statistics

import numpy as np
import pytest
import torch

import analyze
import prepare_data
from analysis import graphs
from analysis.explain import run_sums
from analysis.graph import summary
from analysis.graphs import differences, edge_to_explain, operand_grids
from features.attribution_graph import Node, graph_of
from features.transcoder import Transcoder, read_and_written
from helpers import call, trained
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, load_checkpoint, read_checkpoint, save_checkpoint
from storage.addition import ADDITION_TOKENS, AdditionTask, addition_rows, token_names
from storage.files import UserError

TASK = AdditionTask(2)
NAMES = token_names(TASK)
L, F = 2, 20


@pytest.fixture
def adding(workplace):
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
    on_open = [{"key": {"a": 1.0, "b": 6.0}, "query": {"a": 3.0, "b": 4.0}},
               {"key": {"b": 2.0, "c": 6.0}, "query": {"b": 2.0, "c": 6.0, "d": 0.0}}]
    on_shut = [{"key": {"a": 3.0}, "query": {"a": 3.0}}]
    assert differences(on_open, on_shut) == {
        "key": [["b", 4.0, 0.0], ["c", 3.0, 0.0], ["a", 0.5, 3.0]],
        "query": [["b", 3.0, 0.0], ["c", 3.0, 0.0], ["a", 1.5, 3.0]]}


def test_an_edge_is_the_one_that_is_named_or_the_one_nearest_to_a_half():
    is_open = np.zeros((2, 1, 11, 11, 4), dtype=bool)
    is_open[1, 0, 9, 5] = [True, False, True, False]
    is_open[0, 0, 8, 0] = [True, False, False, False]
    config = GPTConfig(n_layer=2, n_head=1)
    assert edge_to_explain("", is_open, config, TASK) == (1, 0, 9, 5)
    assert edge_to_explain(f"0.{NAMES[8]}.{NAMES[0]}", is_open, config, TASK) == (0, 0, 8, 0)
    with pytest.raises(UserError, match="is open on 0 % of the sums"):
        edge_to_explain(f"1.{NAMES[8]}.{NAMES[0]}", is_open, config, TASK)
    with pytest.raises(UserError, match="--opens=1.s2 names no edge: write layer.query.key, such as"):
        edge_to_explain("1.s2", is_open, config, TASK)
    with pytest.raises(UserError, match="every edge of this model is always open, or never"):
        edge_to_explain("", is_open[..., :1], config, TASK)


@torch.no_grad()
def test_operand_plots_have_a_feature_of_every_sum(adding):
    model, coder = adding
    nodes = [Node("feature", 1, 5, 3), Node("feature", 0, 7, 11)]
    grids = operand_grids(model, coder, TASK, nodes)
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
    return f"--opens={layer}.0.{NAMES[query]}.{NAMES[key]}"


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_printed_adds_up_to_the_difference_of_the_score(adding, workplace, layer):
    done = call(analyze.main, "graph", "out/run", "--n=6", named(adding[0], layer))
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
    (["--opens=2"], "--opens=2 names no edge: write layer.query.key"),
    (["--opens=9.s1.="], "--opens=9.s1.=: the model's layers are 0 to 1"),
    (["--n=1"], "--n must be at least 2"),
    (["--name=other"], "has no other.pt. Train one first: python analyze.py transcode")])
def test_mistakes_about_an_edge_are_answered(adding, words, answer):
    done = call(analyze.main, "graph", "out/run", "--opens", *words)
    assert done.returncode == 1 and answer in done.stderr, done.stderr


# how large graphs are


BYTES = {"dataset": "stdlib", "tokenizer": "bytes", "sha256": {}}
QUALITY = {"dense": {"a": (0.80, 4.0), "b": (0.90, 9.0)}, "sparse": {"a": (0.70, 9.1), "b": (0.81, 20.0)}}
COMMAND = ["graph", "out/sparse", "--name=a,b", "--tasks=quote", "--n=2"]


@pytest.fixture
def pair(workplace):
    """out/dense and out/sparse, random but for closing every quote, with two random transcoders each."""
    torch.manual_seed(0)
    for run, settings in (("dense", {"gated": False}), ("sparse", {"gated": True, "gate_bias": 0.1})):
        model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=16, **settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.lm_head.weight[ord('"')] += 3 * model.transformer.ln_f.bias
        place = workplace / "out" / run
        place.mkdir(parents=True)
        path = str(place / "best.pt")
        save_checkpoint(path, checkpoint_of(model, data=BYTES) | {"parent": "out/dense/best.pt"})
        for name, (explained, l0) in QUALITY[run].items():
            coder = Transcoder(2, 16, 20)
            torch.nn.init.normal_(coder.b_enc, std=0.5)
            save_checkpoint(str(place / f"{name}.pt"), trained(coder, path))
            quality = {"explained": explained, "l0": l0, "kl": 0.1, "agrees": 0.5}
            (place / f"{name}.json").write_text(json.dumps(quality))


def test_transcoders_of_equal_quality_are_compared(pair):
    done = call(analyze.main, *COMMAND)
    assert done.returncode in (0, None), done.stderr
    with open("out/sparse/n80-quote.json") as f:
        found = json.load(f)
    chosen = {by: [found[by][kind]["transcoder"] for kind in ("dense", "sparse")] for by in graphs.MATCHED}
    assert chosen == {"l0": ["b", "a"], "explained": ["a", "b"]}
    assert found["prompts"] == 2 and set(found["untrained"]) == {"dense", "sparse"}
    assert f"{found['l0']['sparse']['heads_80']:.1f} heads for 80 %" in done.stdout


def test_means_are_those_of_the_prompts(pair):
    call(analyze.main, *COMMAND)
    with open("out/sparse/n80-quote.json") as f:
        found = json.load(f)["explained"]["sparse"]
    models = graphs.models_of("out/sparse")
    model, checkpoint = load_checkpoint("out/sparse/best.pt").eval(), read_checkpoint("out/sparse/best.pt")
    coder = graphs.read_transcoder("out/sparse", "b", checkpoint)
    asked = graphs.prompts_of(["quote"], models, 2)
    assert [chr(answer) for *_, answer in asked] == ['"', '"']
    one_by_one = [summary(graph_of(model, coder, *one)) for one in asked]
    for key in (*graphs.SIZES, "replacement"):
        assert found[key] == pytest.approx(statistics.mean(one[key] for one in one_by_one))


def test_prompts_of_ones_own_are_asked_too(pair):
    done = call(analyze.main, *COMMAND, "--prompt=x = (1", "--prompt=if a")
    assert done.returncode in (0, None), done.stderr
    assert "out/sparse, 4 prompts of quote, x = (1, if a" in done.stdout


def test_several_runs_make_a_range(pair):
    done = call(analyze.main, "graph", "out/sparse", "out/sparse", "--name=a", "--tasks=quote", "--n=1")
    assert done.returncode in (0, None), done.stderr
    assert "2 runs, dense against sparse, mean (range):" in done.stdout
    with open("out/sparse/n80-quote.json") as f:
        found = json.load(f)["l0"]
    ratio = found["dense"]["heads_80"] / found["sparse"]["heads_80"]
    assert f"{ratio:.1f}x fewer ({ratio:.1f} to {ratio:.1f})" in done.stdout


def test_mistakes_about_sizes_are_answered(pair):
    for words, answer in ((["out/dense", "--tasks=quote"], "out/dense is a dense run: --tasks compares"),
                          (["out/sparse", "--tasks=quote", "--name=c"], "has no c.pt. Train one first"),
                          (["out/sparse", "--tasks=qote", "--name=a"], "there is no task 'qote'"),
                          (["out/sparse", "--tasks=quote", "--n=0"], "--n must be at least 1"),
                          (["out/sparse"], "say what to explain: --prompt=..., --opens or --tasks=..."),
                          (["out/sparse", "out/dense", "--opens"], "several runs are compared with --tasks")):
        done = call(analyze.main, "graph", *words)
        assert done.returncode == 1 and answer in done.stderr, (words, done.stderr)


def test_a_prompt_counts_if_both_models_answer_it_right(pair, monkeypatch):
    choices = iter([ord('"'), ord("x")] * 99)
    monkeypatch.setattr(graphs, "first_choice", lambda model, tokens, position: next(choices))
    done = call(analyze.main, *COMMAND)
    assert done.returncode == 1 and "there is no prompt of quote that both models answer right" in done.stderr


def test_all_runs_are_matched_by_the_same_names():
    """The pair that is closest in the mean, and of L0 by its logarithm."""
    def quality(**l0):
        return {name: (None, {"l0": value, "explained": value / 100}) for name, value in l0.items()}

    runs = [{"dense": quality(a=4, b=40), "sparse": quality(a=5, b=43)},
            {"dense": quality(a=4, b=40), "sparse": quality(a=8, b=44)}]
    assert graphs.closest(runs, ["a", "b"], "l0") == ("b", "b")
    assert graphs.closest(runs, ["a", "b"], "explained") == ("a", "a")
