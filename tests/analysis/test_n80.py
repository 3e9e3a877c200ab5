"""The command `n80`: equal transcoders are compared, and what is printed is what the graphs say."""

import json
import statistics

import pytest
import torch

import analyze
from analysis import n80
from analysis.graph import summary
from circuits.attribution_graph import graph_of
from circuits.transcoder import Transcoder
from helpers import call, trained
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, load_checkpoint, read_checkpoint, save_checkpoint

BYTES = {"dataset": "stdlib", "tokenizer": "bytes", "sha256": {}}
QUALITY = {"dense": {"a": (0.80, 4.0), "b": (0.90, 9.0)}, "sparse": {"a": (0.70, 9.1), "b": (0.81, 20.0)}}
COMMAND = ["n80", "out/sparse", "--names=a,b", "--tasks=quote", "--n=2"]


@pytest.fixture
def made(workplace):
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


def test_transcoders_of_equal_quality_are_compared(made):
    done = call(analyze.main, *COMMAND)
    assert done.returncode in (0, None), done.stderr
    with open("out/sparse/n80-quote.json") as f:
        found = json.load(f)
    chosen = {by: [found[by][kind]["transcoder"] for kind in ("dense", "sparse")] for by in n80.MATCHED}
    assert chosen == {"l0": ["b", "a"], "explained": ["a", "b"]}
    assert found["prompts"] == 2 and set(found["untrained"]) == {"dense", "sparse"}
    assert f"{found['l0']['sparse']['heads_80']:.1f} heads for 80 %" in done.stdout


def test_means_are_those_of_the_prompts(made):
    call(analyze.main, *COMMAND)
    with open("out/sparse/n80-quote.json") as f:
        found = json.load(f)["explained"]["sparse"]
    models = n80.models_of("out/sparse")
    model, checkpoint = load_checkpoint("out/sparse/best.pt").eval(), read_checkpoint("out/sparse/best.pt")
    coder = n80.read_transcoder("out/sparse", "b", checkpoint)
    asked = n80.prompts_of(["quote"], models, 2)
    assert [chr(one.answer) for one in asked] == ['"', '"']
    one_by_one = [summary(graph_of(model, coder, *one)) for one in asked]
    for key in (*n80.SIZES, "replacement"):
        assert found[key] == pytest.approx(statistics.mean(one[key] for one in one_by_one))


def test_prompts_of_ones_own_are_asked_too(made):
    done = call(analyze.main, *COMMAND, "--prompt=x = (1", "--prompt=if a")
    assert done.returncode in (0, None), done.stderr
    assert "out/sparse, 4 prompts of quote, x = (1, if a" in done.stdout


def test_several_runs_make_a_range(made):
    done = call(analyze.main, "n80", "out/sparse", "out/sparse", "--names=a", "--tasks=quote", "--n=1")
    assert done.returncode in (0, None), done.stderr
    assert "2 runs, dense against sparse, mean (range):" in done.stdout
    with open("out/sparse/n80-quote.json") as f:
        found = json.load(f)["l0"]
    ratio = found["dense"]["heads_80"] / found["sparse"]["heads_80"]
    assert f"{ratio:.1f}x fewer ({ratio:.1f} to {ratio:.1f})" in done.stdout


def test_mistakes_are_answered(made):
    for words, answer in ((["out/dense", "--tasks=quote"], "out/dense is a dense run: n80 compares"),
                          (["out/sparse", "--tasks=quote", "--names=c"], "has no c.pt. Train one first"),
                          (["out/sparse", "--tasks=qote", "--names=a"], "there is no task 'qote'"),
                          (["out/sparse", "--tasks=quote", "--n=0"], "--n must be at least 1")):
        done = call(analyze.main, "n80", *words)
        assert done.returncode == 1 and answer in done.stderr, (words, done.stderr)


def test_a_prompt_counts_if_both_models_answer_it_right(made, monkeypatch):
    choices = iter([ord('"'), ord("x")] * 99)
    monkeypatch.setattr(n80, "first_choice", lambda model, tokens, position: next(choices))
    done = call(analyze.main, *COMMAND)
    assert done.returncode == 1 and "there is no prompt of quote that both models answer right" in done.stderr


def test_all_runs_are_matched_by_the_same_names():
    """The pair that is closest in the mean, and of L0 by its logarithm."""
    def quality(**l0):
        return {name: (None, {"l0": value, "explained": value / 100}) for name, value in l0.items()}

    runs = [{"dense": quality(a=4, b=40), "sparse": quality(a=5, b=43)},
            {"dense": quality(a=4, b=40), "sparse": quality(a=8, b=44)}]
    assert n80.closest(runs, ["a", "b"], "l0") == ("b", "b")
    assert n80.closest(runs, ["a", "b"], "explained") == ("a", "a")
