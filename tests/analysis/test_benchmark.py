"""Benchmarks: the harness gets from us what it gets from its own model of the same weights and words.

The questions come from a local file.
"""

import importlib
import json
import sys
from functools import partial

import pytest
import torch

import analysis
import analyze
from analysis import benchmark
from helpers import keep_run, random_gpt, theirs
from models import lora
from models.checkpoint import checkpoint_of, fingerprint, load_checkpoint, read_checkpoint, save_checkpoint
from models.olmo import OLMo, OLMoConfig
from storage import text
from storage.files import read_json

lm_eval = pytest.importorskip("lm_eval", reason="pip install -r tests/requirements.txt")
harness = importlib.import_module("analysis.harness")  # it imports lm_eval

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
KINDS = {  # name: (output_type, the rest of the task)
    "mine": ("multiple_choice", """doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, \
{metric: acc_norm, aggregation: mean, higher_is_better: true}]"""),
    "said": ("loglikelihood", """doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"""),
    "texts": ("generate_until", """doc_to_target: "{{choices[0]}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""),
}


@pytest.fixture
def tasks(workplace, monkeypatch):
    """A task that can be benchmarked and two that cannot, 24 questions, one longer than the context. The
    harness knows these alone: to read the list of its own takes ten seconds.
    """
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workplace / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (workplace / "tasks").mkdir()
    with open("tasks/questions.jsonl", "w") as f:
        for i in range(24):
            times = 6 if i == 3 else 1
            question = {"question": f"Where is number {i}?" * times,
                        "choices": [" here", " over there", f" in {i}"], "label": i % 3}
            f.write(json.dumps(question) + "\n")
    for name, (kind, rest) in KINDS.items():
        task = TASK.format(name=name, kind=kind, folder=workplace / "tasks", rest=rest)
        (workplace / f"tasks/{name}.yaml").write_text(task)
    return str(workplace / "tasks")


def models_of_theirs_and_ours(transformers, tokenizers):
    """A random OLMo and a tokenizer trained here, through ours and through the harness' own model."""
    from lm_eval.models.huggingface import HFLM

    end = "<|endoftext|>"
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Where is number here over there in 0 1 2 3 4 5 6 7 8 9?"] * 10,
                            vocab_size=290, min_frequency=1, special_tokens=[end])
    bpe.save("tokenizer.json")
    model = theirs("Olmo2", vocab_size=300, max_position_embeddings=40)
    model.save_pretrained("hf")
    words = transformers.PreTrainedTokenizerFast(tokenizer_file="tokenizer.json",
                                                 eos_token=end, pad_token=end)

    def encode(content):
        return bpe.encode(content.decode()).ids

    def decode(ids):
        return bpe.decode(list(ids))

    tokens = text.Tokenizer("own", 300, 0, encode, decode)
    return {"own": harness.Harness(load_checkpoint("hf"), tokens, batch_size=5),
            "harness": HFLM(pretrained=model, tokenizer=words, batch_size=1, max_length=40)}


def likelihoods(answers):
    """(questions, choices, 2): log-probability and whether it is what the model would have said."""
    questions = []
    for sample in answers["samples"]["mine"]:
        questions.append([[response[0], response[1]] for [response] in sample["resps"]])
    return torch.tensor(questions, dtype=torch.float)


@pytest.mark.slow
def test_scores_are_those_of_the_harness_own_model(workplace, tasks):
    """Every answer's log-probability, through transformers and through ours."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    answers, manager = {}, lm_eval.tasks.TaskManager(include_path=tasks)
    for name, lm in models_of_theirs_and_ours(transformers, tokenizers).items():
        answers[name] = lm_eval.simple_evaluate(lm, tasks=["mine"], task_manager=manager, bootstrap_iters=10)
    own, other = answers["own"], answers["harness"]
    for metric in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert own["results"]["mine"][metric] == pytest.approx(other["results"]["mine"][metric], rel=1e-3)
    assert torch.allclose(likelihoods(own), likelihoods(other), atol=1e-3)


@pytest.mark.slow
def test_dense_beside_sparse(workplace, tasks, capsys):
    shape = {"block_size": 64, "vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 16}
    for name, gated in (("dense", False), ("sparse", True)):
        model = random_gpt(std=0.3, **shape, gated=gated, gate_bias=-5.0)
        keep_run(name, model, data={"tokenizer": "bytes"}, parent="out/dense/best.pt")
    analyze.main(["benchmark", "out/sparse", "--tasks=mine", f"--include={tasks}", "--limit=20"])
    out = capsys.readouterr().out
    table = {"mine": read_json("out/sparse/benchmark-mine-20.json")}
    assert set(table["mine"]) == {"acc", "acc_norm"}
    assert set(table["mine"]["acc"]) == {"dense", "sparse"}
    score, error = table["mine"]["acc"]["sparse"]
    assert error == pytest.approx((score * (1 - score) / 19) ** 0.5, rel=1e-6)
    assert f"{score:.3f} +- {error:.3f}" in out
    for task, answer in (("mein", "the harness knows no task 'mein'"),
                         ("texts", "has no answers to choose from"),
                         ("said", "none of said is scored by accuracy")):
        with pytest.raises(SystemExit, match=answer):
            analyze.main(["benchmark", "out/sparse", f"--tasks={task}", f"--include={tasks}", "--limit=2"])
    assert "N/A" in harness.lines({"one": {"acc": {"dense": [1.0, "N/A"]}}})
    assert harness.lines(table) in out
    models = {name: partial(load_checkpoint, f"out/{name}/best.pt") for name in ("dense", "sparse")}
    assert table == harness.benchmark(models, text.tokenizer("bytes"), "mine", 20, tasks)


def test_of_a_run_with_adapters_both_are_one_model(workplace):
    """An OLMo of half precision with adapters, the commonest run. It is loaded once, as it was judged.

    Dense is the same model, adapters and gates switched off.
    """
    config = {"generation": 2, "block_size": 64, "vocab_size": 256, "n_layer": 1, "n_head": 2, "n_kv_head": 1,
              "n_embd": 16, "n_hidden": 32}
    torch.manual_seed(1)
    model = OLMo(OLMoConfig(**config))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    save_checkpoint("dense.pt", checkpoint_of(model, data={"tokenizer": "bytes"}))
    adapters = {"rank": 2, "alpha": 4.0, "targets": "q_proj,v_proj"}
    model.config.gated, model.config.gate_bias = True, -1.0
    lora.add(model, **adapters)
    for layer in lora.adapters_of(model).values():
        for name, tensor in layer.initial().items():
            getattr(layer, name).data = tensor + 0.3 * torch.randn_like(tensor)
    base = fingerprint(read_checkpoint("dense.pt"))
    keep_run("sparse", model, data={"tokenizer": "bytes"}, parent="dense.pt", lora=adapters, base="dense.pt",
             base_fingerprint=base, config={"base_dtype": "bfloat16"})
    models = benchmark.models_to_compare(read_checkpoint("out/sparse/best.pt"), "out/sparse/best.pt")
    dense, sparse = models["dense"](), models["sparse"]()
    assert isinstance(dense, lora.Base) and dense.model is sparse
    assert {p.dtype for name, p in sparse.named_parameters() if "lora" not in name} == {torch.bfloat16}
    x = torch.randint(0, 256, (2, 64))
    wanted = load_checkpoint("dense.pt").bfloat16()(x)[0]
    assert torch.equal(dense(x)[0], wanted) and not torch.equal(sparse(x)[0], wanted)


def test_a_missing_harness_and_a_run_without_text_are_named(workplace, monkeypatch):
    keep_run("run", random_gpt(block_size=11, vocab_size=13), data={"tokenizer": "addition"})
    with pytest.raises(SystemExit, match="trained on addition, which is no text"):
        analyze.main(["benchmark", "out/run"])
    monkeypatch.setitem(sys.modules, "analysis.harness", None)  # as if its import failed
    monkeypatch.delattr(analysis, "harness", raising=False)
    with pytest.raises(SystemExit, match="pip install lm_eval"):
        analyze.main(["benchmark", "out/run"])
