"""The command `graph`: what it prints is the graph's, and the file is one that others can open; what it says
of an edge is in the score, and the plots are the features'; transcoders of equal quality are compared.
"""

import glob
import json
import os
import re
import shutil
import statistics

import jsonschema
import numpy as np
import pytest
import torch

import analyze
import prepare_data
from analysis import graphs
from analysis.explain import run_sums
from analysis.graph import name_of, parts_of_link, read_transcoder, summary
from analysis.graphs import differences, edge_to_explain, operand_grids
from features.attribution_graph import Node, graph_of, shares_of
from features.influence import NODES, attention_edges_of, heads_of, n80, pruned
from features.transcoder import read_and_written
from helpers import call, keep_run, keep_transcoder, random_gpt, trained
from model import GPTConfig
from models.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from storage.addition import AdditionTask, addition_rows, token_names
from storage.files import UserError, read_json

BYTES = {"dataset": "stdlib", "tokenizer": "bytes", "sha256": {}}
PROMPT = "x = (1"
SCHEMA = os.path.join(os.path.dirname(__file__), "graph-schema.json")
TASK = AdditionTask(2)
NAMES = token_names(TASK)
GATED = {"gated": True, "gate_bias": 0.1, "n_embd": 16}
QUALITY = {"dense": {"a": (0.80, 4.0), "b": (0.90, 9.0)}, "sparse": {"a": (0.70, 9.1), "b": (0.81, 20.0)}}
COMMAND = ["graph", "out/sparse", "--name=a,b", "--tasks=quote", "--n=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Random models with random transcoders: out/bytes; out/sums, which adds; and out/dense and out/sparse,
    of bytes, which close every quote and have two transcoders each.
    """
    place = tmp_path_factory.mktemp("graphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        keep_run("bytes", random_gpt(0, block_size=16, vocab_size=256, n_head=2, **GATED), data=BYTES)
        keep_transcoder("bytes", 2, 16, 20)
        data = {"dataset": "addition", "sha256": prepare_data.load("addition").meta["sha256"]}
        keep_run("sums", random_gpt(0, block_size=11, vocab_size=13, **GATED), data=data)
        keep_transcoder("sums", 2, 16, 20, decoder=0.2)
        for run, settings in (("dense", GATED | {"gated": False}), ("sparse", GATED)):
            model = random_gpt(0, block_size=64, vocab_size=256, n_head=2, **settings)
            with torch.no_grad():
                model.lm_head.weight[ord('"')] += 3 * model.transformer.ln_f.bias
            keep_run(run, model, data=BYTES, parent="out/dense/best.pt")
            for name, (explained, l0) in QUALITY[run].items():
                keep_transcoder(run, 2, 16, 20, name, decoder=0.2)
                quality = {"explained": explained, "l0": l0, "kl": 0.1, "agrees": 0.5}
                (place / f"out/{run}/{name}.json").write_text(json.dumps(quality))
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def graph_at(run, *words):
    done = call(analyze.main, "graph", run, *words)
    assert done.returncode in (0, None), done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------------
# one prompt


@pytest.fixture
def made(here):
    """(the model of out/bytes, the graph of PROMPT)."""
    model = load_checkpoint("out/bytes/best.pt").eval()
    coder = read_transcoder("out/bytes", "transcoder", read_checkpoint("out/bytes/best.pt"))
    return model, graph_of(model, coder, torch.tensor(list(PROMPT.encode())))


def test_what_is_printed_and_written_is_the_graphs(made):
    """And every link has its ends."""
    _, graph = made
    said = graph_at("out/bytes", f"--prompt={PROMPT}")
    heads, edges = heads_of(graph), attention_edges_of(graph)
    assert f"{n80(heads)} of 4 heads, {n80(edges)} of {int((edges > 0).sum())} attention edges" in said
    nodes, links = pruned(graph)
    assert f"{int(nodes.sum())} of " in said and f"{int(links.sum())} links" in said
    best = int(heads.argmax())
    assert f"heads: {best // 2}.{best % 2} {100 * heads.max() / heads.sum():.0f} %" in said

    [path] = glob.glob("out/bytes/graph-x-1-*.json")
    found = read_json(path)
    jsonschema.validate(found, read_json(SCHEMA))
    assert found["metadata"]["prompt_tokens"] and found["metadata"]["schema_version"] == 1
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    for link in found["links"]:
        assert link["source"] in ids and link["target"] in ids
        assert all(0 < share <= 1 for _, _, share in link["heads"])
    # what a page that prunes by it shows: all of a graph that was pruned to that share, and tokens
    features = [node for node in found["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert all(node["influence"] <= NODES + 0.05 for node in features)
    logits = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert len(logits) == len(graph.chances) and all("(p=" in node["clerp"] for node in logits)
    assert sum(node["is_target_logit"] for node in logits) == 1
    layer, number, position = map(int, features[0]["node_id"].split("_"))
    assert features[0]["feature"] == (layer + number) * (layer + number + 1) // 2 + number
    assert features[0]["ctx_idx"] == position and features[0]["layer"] == str(layer)


def test_every_prompt_answer_and_transcoder_has_a_file_of_its_own():
    assert name_of("36+28", "", "transcoder") == "graph-36-28"
    assert name_of("36+28", "s1", "small") == "graph-36-28-small-s1"
    texts = ["x = (1", "x = [1", "x_1", "(", ")", ""]
    assert len({name_of(text, "", "transcoder") for text in texts}) == len(texts)


def test_what_a_link_says_of_heads_is_its_own(made):
    """The share of the link itself: what goes through the heads, beside what is direct."""
    model, graph = made
    last = len(graph.targets) - 1
    for t, s in ((0, int(graph.edges[0].abs().argmax())), (last, 3), (last, len(graph.sources) - 1)):
        shares = shares_of(model, graph, t, s)
        whole = shares.abs().sum() + (graph.edges[t, s] - shares.sum()).abs()
        heads, direct = parts_of_link(model, graph, t, s)
        assert direct == pytest.approx(((graph.edges[t, s] - shares.sum()).abs() / whole).item(), abs=1e-6)
        for layer, head, share in heads:
            assert share == pytest.approx((shares[layer, head].abs() / whole).item(), abs=1e-6)


@pytest.mark.parametrize("value, said", [
    (float("nan"), "out/bad/transcoder.pt holds NaN or infinite numbers. Delete it"),
    (1e30, "this transcoder makes NaN or infinite numbers of the prompt"),
    (None, "was trained for other weights"),
])
def test_a_transcoder_that_left_the_numbers_or_is_of_other_weights_has_no_graph(here, value, said):
    shutil.copytree("out/bytes", "out/bad", dirs_exist_ok=True, ignore=shutil.ignore_patterns("graph-*"))
    coder = graphs.read_transcoder("out/bytes", "transcoder", read_checkpoint("out/bytes/best.pt"))
    if value is None:
        checkpoint = read_checkpoint("out/bad/best.pt")
        checkpoint["model"]["lm_head.weight"].add_(1)
        save_checkpoint("out/bad/best.pt", checkpoint)
    else:
        coder.encoder.data.fill_(value)
        coder.decoder.data.mul_(1e30)
        save_checkpoint("out/bad/transcoder.pt", trained(coder, "out/bad/best.pt"))
    done = call(analyze.main, "graph", "out/bad", f"--prompt={PROMPT}")
    assert done.returncode == 1 and said in done.stderr
    assert done.stdout == "" and not glob.glob("out/bad/graph-*")


# ------------------------------------------------------------------------------------------------------------
# what opens an edge


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
    with pytest.raises(UserError, match="every edge of this model is always open, or never"):
        edge_to_explain("", is_open[..., :1], config, TASK)


@torch.no_grad()
def test_operand_plots_have_a_feature_of_every_sum(here):
    model = load_checkpoint("out/sums/best.pt").eval()
    coder = graphs.read_transcoder("out/sums", "transcoder", read_checkpoint("out/sums/best.pt"))
    nodes = [Node("feature", 1, 5, 3), Node("feature", 0, 7, 11)]
    grids = operand_grids(model, coder, TASK, nodes)
    assert grids.shape == (2, 100, 100) and (grids > 0).any()
    for a, b in ((36, 28), (0, 99), (99, 0)):
        question = torch.from_numpy(addition_rows([a], [b], *TASK).astype(np.int64))[:, 0]
        read, _ = read_and_written(model, question)
        for grid, node in zip(grids, nodes):
            expected = coder.features(read)[0, node.position, node.layer, node.number].item()
            assert grid[a, b] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_printed_adds_up_to_the_difference_of_the_score(here, layer):
    model = load_checkpoint("out/sums/best.pt").eval()
    _, is_open = run_sums(model, TASK, *np.divmod(np.arange(0, 10_000, 100), 100))
    shares = is_open[layer, 0].mean(-1)
    query, key = np.argwhere((shares > 0.2) & (shares < 0.8))[0]
    said = graph_at("out/sums", "--n=6", f"--opens={layer}.0.{NAMES[query]}.{NAMES[key]}")
    assert ("feature 0." in said) == (layer == 1)
    total = float(re.search(r"(-?[\d.]+) more than on the others", said)[1])
    for block in said.split("\n\n")[1:]:
        added = [float(line.split()[0]) for line in block.splitlines()[1:] if re.match(r" *[+-]\d", line)]
        assert sum(added) == pytest.approx(total, abs=0.05)
    [path] = glob.glob(f"out/sums/opens-{layer}*.json")
    found = read_json(path)
    assert 0 < found["open_on"] < 10_000 and len(found["edge"]) == 4
    assert sum(row[1] - row[2] for row in found["key"]) == pytest.approx(total, abs=0.01)
    assert os.stat(path.replace(".json", ".png")).st_size > (10_000 if layer else 2_000)


# ------------------------------------------------------------------------------------------------------------
# how large graphs are


def test_transcoders_of_equal_quality_are_compared_by_means_over_prompts(here):
    """And prompts of one's own are asked, too."""
    said = graph_at(*COMMAND[1:])
    found = read_json("out/sparse/n80-quote.json")
    chosen = {by: [found[by][kind]["transcoder"] for kind in ("dense", "sparse")] for by in graphs.MATCHED}
    assert chosen == {"l0": ["b", "a"], "explained": ["a", "b"]}
    assert found["prompts"] == 2 and set(found["untrained"]) == {"dense", "sparse"}
    assert f"{found['l0']['sparse']['heads_80']:.1f} heads for 80 %" in said
    found, models = found["explained"]["sparse"], graphs.models_of("out/sparse")
    *_, checkpoint, model = models["sparse"]
    coder = graphs.read_transcoder("out/sparse", "b", checkpoint)
    asked = graphs.prompts_of(["quote"], models, 2)
    assert [chr(answer) for *_, answer in asked] == ['"', '"']
    one_by_one = [summary(graph_of(model, coder, *one)) for one in asked]
    for key in (*graphs.SIZES, "replacement"):
        assert found[key] == pytest.approx(statistics.mean(one[key] for one in one_by_one))
    own = graphs.prompts_of(["quote"], models, 2, ["x = (1", "if a"], "out/sparse")[2:]
    assert [bytes(tokens.tolist()) for tokens, *_ in own] == [b"x = (1", b"if a"]


def test_several_runs_make_a_range(here):
    said = graph_at("out/sparse", "out/sparse", "--name=a", "--tasks=quote", "--n=1")
    assert "2 runs, dense against sparse, mean (range):" in said
    found = read_json("out/sparse/n80-quote.json")["l0"]
    ratio = found["dense"]["heads_80"] / found["sparse"]["heads_80"]
    assert f"{ratio:.1f}x fewer ({ratio:.1f} to {ratio:.1f})" in said


def test_a_prompt_counts_if_both_models_answer_it_right(here, monkeypatch):
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
