"""The plan: counts that are known, memory that is what autograd really keeps, and what depends on what."""

import json
import os

import pytest
import torch

import analyze
from analysis import plan
from models.olmo import OLMo, OLMoConfig, rotations
from training.config import make_config


def settings(**given):
    return make_config(None, {"micro_batch_size": 4, "batch_size": 64, **given})[0]


def test_parameters_are_those_of_the_published_models():
    counts = {}
    for name, (_, config) in plan.MODELS.items():
        model = plan.built(config, settings())
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts == {"1b": 1_176_764_416, "7b": 6_888_095_744, "13b": 13_716_198_400, "30b": 32_234_279_936}


def one_block(generation):
    """The shape of an OLMo of one block."""
    return OLMoConfig(generation=generation, n_layer=1, n_head=4, n_kv_head=4, n_embd=256, n_hidden=512,
                      vocab_size=100, block_size=256)


@pytest.mark.parametrize("generation", [1, 2])
def test_activations_are_what_autograd_keeps_on_a_real_device(generation):
    """The same block on the CPU, with PyTorch's fused attention, as autocast would make it on a GPU."""
    config = one_block(generation)
    with_meta, _ = plan.activations(plan.built(config, settings()), 2, 256, settings())
    model = OLMo(config).bfloat16()
    x, rotation = torch.randn(2, 256, 256, requires_grad=True), rotations(config, 256, "cpu")

    def attend(q, k, v, **options):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), None, None

    for attention in model.attentions:  # gated_attention would compute in float32 on a CPU
        attention.attend = attend
    real = plan.kept_bytes(lambda: model.blocks[0](x, rotation)[0], model)
    assert with_meta == pytest.approx(real, rel=0.05)


def test_products_are_in_half_precision_and_norms_in_full():
    """By hand, for an OLMo 2 block of frozen weights, adapters on q alone: all that a gradient asks for."""
    given = settings(lora_rank=4, lora_targets="q_proj", base_dtype="bfloat16")
    config = one_block(2)
    kept, _ = plan.activations(plan.built(config, given), 2, 256, given)
    rows, half, full = 2 * 256, 2, 4  # positions; bytes
    wanted = 256 * half  # x for the adapter's A
    wanted += 4 * half  # A x for B
    wanted += 256 * full * 2 + full * 2  # what the norms of q and k take, and a number for each row
    wanted += 256 * half * 4 + 4 * full  # q, k, v, y, and a number for each row and head
    wanted += 256 * full * 2 + full * 2  # the norms behind attention and MLP
    wanted += 512 * half * 3  # gate_proj's output, its silu, up_proj's
    assert kept == pytest.approx(rows * wanted, rel=0.1)


def test_what_depends_on_what():
    def memory(gpus=8, **given):
        return plan.plan("1b", settings(**given), gpus, 512)["memory"]

    def flops(**given):
        return plan.plan("1b", settings(**given), 8, 512)["flops"]

    adapters = memory(parallel="fsdp", lora_rank=16, base_dtype="bfloat16")
    full = memory(parallel="fsdp", distill_weight=1.0)
    assert full["optimizer"] == 2 * full["gradients"] == 8 * 1_176_764_416 / 8
    assert full["teacher"] == full["parameters"]
    assert adapters["teacher"] == memory(parallel="fsdp")["teacher"] == 0
    assert memory()["gradients"] == 2 * memory(1)["gradients"]
    assert adapters["copies"] == 0 < full["copies"]
    assert adapters["parameters"] == pytest.approx(full["parameters"] / 2, rel=0.02)
    assert adapters["optimizer"] < full["optimizer"] / 50
    assert memory(16, parallel="fsdp")["gradients"] == full["gradients"] / 2
    assert memory(16)["gradients"] == memory(8)["gradients"]
    recomputed = memory(recompute_activations=True)
    assert recomputed["activations"] < full["activations"] / 4
    assert recomputed["copies"] == 0
    assert memory(micro_batch_size=8)["logits"] == 2 * memory()["logits"] == full["logits"]
    assert flops(lora_rank=16) < 0.75 * flops() < 0.75 * flops(recompute_activations=True)


def test_the_command(capsys, workplace):
    analyze.main(["plan", "--model=7b", "--gpus", "8", "--context", "512"])
    out = capsys.readouterr().out
    assert "allenai/OLMo-7B-hf" in out and "ASSUMED" in out and "GB per GPU" in out
    os.makedirs("out/run")
    with open("out/run/metrics.jsonl", "w") as f:
        f.writelines(json.dumps({"mfu": mfu}) + "\n" for mfu in (None, 0.2, 0.3, 0.31))
    analyze.main(["plan", "--model=1b", "--gpus=1", "--measured=out/run", "--full"])
    assert "30 % of the peak measured in out/run" in capsys.readouterr().out
    with open("out/run/metrics.jsonl", "w") as f:
        f.write(json.dumps({"mfu": None}) + "\n")
    wrong = [(["--measured=out/run"], "no mfu"), (["--measured=out/gone"], "No such file"),
             (["--gpus=0"], "at least 1"), (["--model=1b", "--gpus=64"], "does not divide into 64"),
             (["--context=4096"], "context of 2,048"), (["--micro_batch=2"], "Did you mean micro_batch_size")]
    for flags, message in wrong:
        with pytest.raises(SystemExit, match=message):
            analyze.main(["plan", *flags])


def test_what_does_not_fit_says_so_and_with_which_flags_it_would(capsys):
    analyze.main(["plan", "--model=7b", "--gpus=8", "--gpu=L4"])
    said = capsys.readouterr().out
    assert "7b DOES NOT FIT into the 24 GB of a L4: with --" in said
    flags = said.split(": with ")[1].split(" it does")[0].split()
    analyze.main(["plan", "--model=7b", "--gpus=8", "--gpu=L4", *flags])
    assert "DOES NOT FIT" not in capsys.readouterr().out
    analyze.main(["plan", "--model=30b", "--gpus=1", "--gpu=L4"])
    assert "30b DOES NOT FIT into the 24 GB of a L4: more GPUs" in capsys.readouterr().out
    # no micro-batch that is larger, or does not divide, is proposed
    analyze.main(["plan", "--model=30b", "--gpus=1", "--gpu=L4", "--batch_size=1", "--micro_batch_size=1"])
    assert "30b DOES NOT FIT" in capsys.readouterr().out
    assert set(plan.GPU_MEMORY) == set(plan.PEAK_FLOPS)
