"""The command `graph`: what it prints is the graph's, and the file is one that others can open."""

import glob
import json
import os

import jsonschema
import pytest
import torch

import analyze
from analysis.graph import name_of, parts_of_link
from features.attribution_graph import graph_of, shares_of
from features.influence import NODES, attention_edges_of, heads_of, n80, pruned
from features.transcoder import Transcoder
from helpers import call, trained
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, read_checkpoint, save_checkpoint

BYTES = {"dataset": "stdlib", "tokenizer": "bytes", "sha256": {}}
PROMPT = "x = (1"
SCHEMA = os.path.join(os.path.dirname(__file__), "graph-schema.json")


@pytest.fixture
def made(workplace):
    """out/run, a random gated model of bytes, with a random transcoder."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16, gated=True,
                          gate_bias=0.1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    coder = Transcoder(2, 16, 20)
    torch.nn.init.normal_(coder.b_enc, std=0.5)
    torch.nn.init.normal_(coder.decoder, std=1.0)  # so that features matter, and pruning leaves some
    (workplace / "out" / "run").mkdir(parents=True)
    save_checkpoint("out/run/best.pt", checkpoint_of(model, data=BYTES))
    save_checkpoint("out/run/transcoder.pt", trained(coder, "out/run/best.pt"))
    return model, coder, graph_of(model, coder, torch.tensor(list(PROMPT.encode())))


def test_what_is_printed_is_the_graphs(made):
    model, coder, graph = made
    done = call(analyze.main, "graph", "out/run", f"--prompt={PROMPT}")
    assert done.returncode in (0, None), done.stderr
    heads, edges = heads_of(graph), attention_edges_of(graph)
    assert f"{n80(heads)} of 4 heads, {n80(edges)} of {int((edges > 0).sum())} attention edges" in done.stdout
    nodes, links = pruned(graph)
    assert f"{int(nodes.sum())} of " in done.stdout and f"{int(links.sum())} links" in done.stdout
    best = int(heads.argmax())
    assert f"heads: {best // 2}.{best % 2} {100 * heads.max() / heads.sum():.0f} %" in done.stdout


def test_the_file_fits_the_schema_and_every_link_has_its_ends(made):
    _, _, graph = made
    call(analyze.main, "graph", "out/run", f"--prompt={PROMPT}")
    [place] = glob.glob("out/run/graph-x-1-*.json")
    with open(place) as f, open(SCHEMA) as schema:
        found = json.load(f)
        jsonschema.validate(found, json.load(schema))
    assert found["metadata"]["prompt_tokens"] and found["metadata"]["schema_version"] == 1
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    for link in found["links"]:
        assert link["source"] in ids and link["target"] in ids
        assert all(0 < share <= 1 for _, _, share in link["heads"])
    # what a page that prunes by it shows: all of a graph that was pruned to that share, and tokens
    for node in found["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            assert node["influence"] <= NODES + 0.05
    logits = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert len(logits) == len(graph.chances) and all("(p=" in node["clerp"] for node in logits)
    assert sum(node["is_target_logit"] for node in logits) == 1
    feature = next(node for node in found["nodes"] if node["feature_type"] == "cross layer transcoder")
    layer, number, position = map(int, feature["node_id"].split("_"))
    assert feature["feature"] == (layer + number) * (layer + number + 1) // 2 + number
    assert feature["ctx_idx"] == position and feature["layer"] == str(layer)


def test_every_prompt_answer_and_transcoder_has_a_file_of_its_own():
    assert name_of("36+28", "", "transcoder") == "graph-36-28"
    assert name_of("36+28", "s1", "small") == "graph-36-28-small-s1"
    texts = ["x = (1", "x = [1", "x_1", "(", ")", ""]
    assert len({name_of(text, "", "transcoder") for text in texts}) == len(texts)


def test_what_a_link_says_of_heads_is_its_own(made):
    """The share of the link itself: what goes through the heads, beside what is direct."""
    model, _, graph = made
    last = len(graph.targets) - 1
    for t, s in ((0, int(graph.edges[0].abs().argmax())), (last, 3), (last, len(graph.sources) - 1)):
        shares = shares_of(model, graph, t, s)
        whole = shares.abs().sum() + (graph.edges[t, s] - shares.sum()).abs()
        heads, direct = parts_of_link(model, graph, t, s)
        assert direct == pytest.approx(((graph.edges[t, s] - shares.sum()).abs() / whole).item(), abs=1e-6)
        for layer, head, share in heads:
            assert share == pytest.approx((shares[layer, head].abs() / whole).item(), abs=1e-6)


@pytest.mark.parametrize("value, said", [
    (float("nan"), "out/run/transcoder.pt holds NaN or infinite numbers. Delete it"),
    (1e30, "this transcoder makes NaN or infinite numbers of the prompt"),
])
def test_a_transcoder_that_left_the_numbers_has_no_graph(made, value, said):
    _, coder, _ = made
    coder.encoder.data.fill_(value)
    coder.decoder.data.mul_(1e30)
    save_checkpoint("out/run/transcoder.pt", trained(coder, "out/run/best.pt"))
    done = call(analyze.main, "graph", "out/run", f"--prompt={PROMPT}")
    assert done.returncode == 1 and said in done.stderr
    assert done.stdout == "" and not glob.glob("out/run/graph-*")


def test_a_transcoder_that_is_missing_is_advised_at_the_price_of_the_docs(made):
    done = call(analyze.main, "graph", "out/run", f"--prompt={PROMPT}", "--name=other")
    assert "Train one first: python analyze.py transcode out/run --price=0.1 --name=other" in done.stderr


def test_mistakes_are_answered(made):
    for words, answer in ((["--name=other"], "has no other.pt. Train one first: python analyze.py transcode"),
                          (["--at=s1"], "--at=s1: this prompt is answered at its end")):
        done = call(analyze.main, "graph", "out/run", f"--prompt={PROMPT}", *words)
        assert done.returncode == 1 and answer in done.stderr
    checkpoint = read_checkpoint("out/run/best.pt")
    checkpoint["model"]["lm_head.weight"].add_(1)
    save_checkpoint("out/run/best.pt", checkpoint)
    done = call(analyze.main, "graph", "out/run", f"--prompt={PROMPT}")
    assert done.returncode == 1 and "was trained for other weights" in done.stderr
