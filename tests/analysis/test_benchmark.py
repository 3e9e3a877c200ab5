"""Benchmarks: what the harness gets from us is what it gets from its own model of the same weights and words; questions from a local file."""

import json
import os
import sys

import pytest
import torch

import analysis
import analyze
from analysis import report
from model import GPT, GPTConfig
from models import lora
from models.checkpoint import checkpoint_of, fingerprint, load_checkpoint, read_checkpoint, save_checkpoint
from models.olmo import OLMo, OLMoConfig
from storage import text

lm_eval = pytest.importorskip("lm_eval", reason="pip install -r tests/requirements.txt")
from analysis.harness import Harness, benchmark, lines
from helpers import theirs

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICES = "doc_to_target: label\ndoc_to_choice: \"{{choices}}\"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm, aggregation: mean, higher_is_better: true}]"
ROLLING = "doc_to_target: \"{{question}} {{choices[0]}}\"\nmetric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]"
TEXTS = "doc_to_target: \"{{choices[0]}}\"\ngeneration_kwargs: {until: [\"e\"], max_gen_toks: 12, do_sample: false}\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"


@pytest.fixture
def tasks(workplace, monkeypatch):
    """Three tasks of the harness' three kinds, 24 questions, one longer than the context."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workplace / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (workplace / "tasks").mkdir()
    with open("tasks/questions.jsonl", "w") as f:
        for i in range(24):
            f.write(json.dumps({"question": f"Where is number {i}?" * (1 + 5 * (i == 3)), "choices": [" here", " over there", f" in {i}"], "label": i % 3}) + "\n")
    for name, kind, rest in (("mine", "multiple_choice", CHOICES), ("rolling", "loglikelihood_rolling", ROLLING), ("texts", "generate_until", TEXTS)):
        (workplace / f"tasks/{name}.yaml").write_text(TASK.format(name=name, kind=kind, folder=workplace / "tasks", rest=rest))
    return str(workplace / "tasks")


def test_scores_are_those_of_the_harness_own_model(workplace, tasks):
    """A random OLMo and a tokenizer trained here, through transformers and through ours: every answer's log-probability, perplexity and text."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Where is number here over there in 0 1 2 3 4 5 6 7 8 9?"] * 10, vocab_size=290, min_frequency=1, special_tokens=["<|endoftext|>"])
    bpe.save("tokenizer.json")
    model = theirs("Olmo2", vocab_size=300, max_position_embeddings=40)
    model.save_pretrained("hf")
    words = transformers.PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokens = text.Tokenizer("own", 300, 0, lambda content: bpe.encode(content.decode()).ids, lambda ids: bpe.decode(list(ids)))
    both = {"own": Harness(load_checkpoint("hf"), tokens, batch_size=5), "harness": HFLM(pretrained=model, tokenizer=words, batch_size=1, max_length=40)}
    answers = {name: lm_eval.simple_evaluate(lm, tasks=["mine", "rolling", "texts"], task_manager=lm_eval.tasks.TaskManager(include_path=tasks), bootstrap_iters=10) for name, lm in both.items()}
    for task, metrics in (("mine", ("acc,none", "acc_norm,none", "acc_stderr,none")), ("rolling", ("word_perplexity,none",)), ("texts", ("exact_match,none",))):
        for metric in metrics:
            assert answers["own"]["results"][task][metric] == pytest.approx(answers["harness"]["results"][task][metric], rel=1e-3), (task, metric)
    for ours, others in zip(answers["own"]["samples"]["mine"], answers["harness"]["samples"]["mine"]):
        assert torch.allclose(torch.tensor([[r[0], r[1]] for [r] in ours["resps"]], dtype=torch.float), torch.tensor([[r[0], r[1]] for [r] in others["resps"]], dtype=torch.float), atol=1e-3)
    assert [s["resps"] for s in answers["own"]["samples"]["texts"]] == [s["resps"] for s in answers["harness"]["samples"]["texts"]]


def test_dense_beside_sparse(workplace, tasks, capsys):
    shape = {"block_size": 64, "vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 16}
    os.makedirs("out/sparse")
    for name, gated in (("dense.pt", False), ("out/sparse/best.pt", True)):
        torch.manual_seed(1)
        model = GPT(GPTConfig(**shape, gated=gated, gate_bias=-5.0))
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        save_checkpoint(name, checkpoint_of(model, data={"tokenizer": "bytes"}, parent="dense.pt"))
    analyze.main(["benchmark", "out/sparse", "--tasks=mine", f"--include={tasks}", "--limit=20"])
    out = capsys.readouterr().out
    with open("out/sparse/benchmark.json") as f:
        table = json.load(f)
    assert set(table["mine"]) == {"acc", "acc_norm"} and set(table["mine"]["acc"]) == {"dense", "sparse"}
    score, error = table["mine"]["acc"]["sparse"]
    assert error == pytest.approx((score * (1 - score) / 19) ** 0.5, rel=1e-6) and f"{score:.3f} +- {error:.3f}" in out
    with pytest.raises(SystemExit, match="the harness knows no task 'mein'"):
        analyze.main(["benchmark", "out/sparse", "--tasks=mein", f"--include={tasks}"])
    with pytest.raises(SystemExit, match="none of rolling is scored by accuracy"):
        analyze.main(["benchmark", "out/sparse", "--tasks=rolling", f"--include={tasks}", "--limit=2"])
    assert "N/A" in lines({"one": {"acc": {"dense": [1.0, "N/A"]}}})
    assert lines(table) in out and table == benchmark({"dense": lambda: load_checkpoint("dense.pt"), "sparse": lambda: load_checkpoint("out/sparse/best.pt")}, text.tokenizer("bytes"), "mine", 20, tasks)


def test_of_a_run_with_adapters_both_are_one_model(workplace, tasks, monkeypatch):
    """An OLMo of half precision with adapters, the commonest run: dense is the same model, adapters and gates switched off. It is loaded once, as it was judged."""
    config = {"generation": 2, "block_size": 64, "vocab_size": 256, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_hidden": 32}
    torch.manual_seed(1)
    model = OLMo(OLMoConfig(**config))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    os.makedirs("out/sparse")
    save_checkpoint("dense.pt", checkpoint_of(model, data={"tokenizer": "bytes"}))
    adapters = {"rank": 2, "alpha": 4.0, "targets": "q_proj,v_proj"}
    model.config.gated, model.config.gate_bias = True, -1.0
    lora.add(model, **adapters)
    for layer in lora.adapters_of(model).values():
        for name, tensor in layer.initial().items():
            getattr(layer, name).data = tensor + 0.3 * torch.randn_like(tensor)
    save_checkpoint("out/sparse/best.pt", checkpoint_of(model, data={"tokenizer": "bytes"}, parent="dense.pt", lora=adapters, base="dense.pt",
                                                        base_fingerprint=fingerprint(read_checkpoint("dense.pt")), config={"base_dtype": "bfloat16"}))
    loaded, real = [], report.model_of
    monkeypatch.setattr(report, "model_of", lambda *inputs, **options: loaded.append(real(*inputs, **options)) or loaded[-1])
    analyze.main(["benchmark", "out/sparse", "--tasks=mine", f"--include={tasks}"])
    assert {p.dtype for name, p in loaded[0].named_parameters() if "lora" not in name} == {torch.bfloat16} and len(loaded) == 1
    with open("out/sparse/benchmark.json") as f:
        table = json.load(f)
    dense = load_checkpoint("dense.pt").bfloat16()
    assert table["mine"]["acc"]["dense"] == benchmark({"dense": lambda: dense}, text.tokenizer("bytes"), "mine", None, tasks)["mine"]["acc"]["dense"]


def test_a_missing_harness_and_a_run_without_text_are_named(workplace, monkeypatch):
    os.makedirs("out/run")
    save_checkpoint("out/run/best.pt", checkpoint_of(GPT(GPTConfig(block_size=11, vocab_size=13, n_layer=1, n_head=1, n_embd=8)), data={"tokenizer": "addition"}))
    with pytest.raises(SystemExit, match="trained on addition, which is no text"):
        analyze.main(["benchmark", "out/run"])
    monkeypatch.setitem(sys.modules, "analysis.harness", None)  # as if its import failed
    monkeypatch.delattr(analysis, "harness", raising=False)
    with pytest.raises(SystemExit, match="pip install lm_eval"):
        analyze.main(["benchmark", "out/run"])
