"""The way out: transformers and TransformerLens compute our logits; with the few lines of docs/export.md also
those of a gated model.
"""

import os
import re
import sys

import pytest
import torch

import analyze
from conftest import REPOSITORY
from model import GPT, GPTConfig
from models import export
from models.checkpoint import checkpoint_of, load_checkpoint, save_checkpoint
from models.olmo import OLMo, OLMoConfig
from storage.files import UserError

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")


def random_model(**settings):
    """A gated model with all weights random and its edges about half open."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"block_size": 16, "vocab_size": 256, "n_layer": 3, "n_head": 2, "n_embd": 32,
                             "gated": True, "gate_bias": 0.3} | settings)).eval()
    for name, parameter in model.named_parameters():
        parameter.data += (0.3 if "c_attn" in name else 0.1) * torch.randn_like(parameter)
    return model


@pytest.fixture(
    params=[{}, {"bias": False}, {"tied": False, "gate_bias": [[0.3, -0.2], [0.1, 0.5], [0.2, 0.4]]}], ids=str
)
def run(request, workplace):
    model = random_model(**request.param)
    os.makedirs("out/run")
    save_checkpoint("out/run/best.pt", checkpoint_of(model))
    return model


IDX = torch.arange(24).view(2, 12) % 50


@torch.no_grad()
def logits_of(model, **overrides):
    """(gated logits, dense logits) of ours, and how many edges are open, which must be neither all nor none
    for the test to mean anything.
    """
    opened = []
    gated = model(IDX, record=lambda layer, gates: opened.append(gates.open.mean().item()))[0]
    model.config.gated = False
    dense = model(IDX)[0]
    model.config.gated = True
    assert all(0.05 < share < 0.5 for share in opened) and (gated - dense).abs().max() > 0.01
    return gated, dense


def readme_lines(mark):
    """The python block of docs/export.md that contains mark: what users paste is what is tested."""
    with open(os.path.join(REPOSITORY, "docs/export.md"), encoding="utf-8") as f:
        blocks = re.findall(r"```python\n(.*?)```", f.read(), re.S)
    return next(block for block in blocks if mark in block)


@pytest.mark.parametrize("settings", [
    {"generation": 1, "clip_qkv": 2.0, "gate_bias": [[0.3, -0.2, 0.1, 0.5]] * 2},
    {"generation": 2, "gate_bias": 0.1},
], ids=["OLMo 1", "OLMo 2"])
@torch.no_grad()
def test_an_olmo_goes_to_transformers_and_gets_its_gate_back(workplace, settings):
    torch.manual_seed(0)
    model = OLMo(OLMoConfig(**{"block_size": 16, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
                               "n_embd": 32, "n_hidden": 48, "gated": True} | settings)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    save_checkpoint("olmo.pt", checkpoint_of(model))
    analyze.main(["export", "olmo.pt", "--to", "hf", "hf"])
    gated, dense = logits_of(model)
    assert (transformers.AutoModelForCausalLM.from_pretrained("hf").eval()(IDX).logits
            - dense).abs().max() < 1e-4
    assert torch.equal(load_checkpoint("hf")(IDX)[0], gated)  # we read our own gates again
    names = {}
    exec(readme_lines("AttentionInterface").replace("GPT2LMHeadModel",
                                                    "AutoModelForCausalLM").replace("out/stdlib/hf", "hf"),
         names)
    assert (names["model"](IDX).logits - gated).abs().max() < 1e-4
    with pytest.raises(SystemExit, match="nanogpt knows GPT-2's format only"):
        analyze.main(["export", "olmo.pt", "--to", "nanogpt", "other"])


@torch.no_grad()
def test_transformers_dense_and_with_the_gate_put_back(run):
    analyze.main(["export", "out/run", "--to", "hf", "hf"])
    gated, dense = logits_of(run)
    model = transformers.GPT2LMHeadModel.from_pretrained("hf").eval()
    assert (model(IDX).logits - dense).abs().max() < 1e-4
    assert torch.equal(load_checkpoint("hf")(IDX)[0], gated)  # we read our own gates again
    names = {}
    exec(readme_lines("AttentionInterface").replace("out/stdlib/hf", "hf"), names)
    assert (names["model"](IDX).logits - gated).abs().max() < 1e-4
    # with transformers' cache of keys and values
    longer = names["model"].generate(IDX, attention_mask=torch.ones_like(IDX), max_new_tokens=3,
                                     do_sample=False, pad_token_id=0)
    for t in range(12, 15):
        assert torch.equal(run(longer[:, :t])[0][:, -1].argmax(-1), longer[:, t])


@torch.no_grad()
def test_hooked_transformer(run):
    pytest.importorskip("transformer_lens.HookedTransformer",
                        reason="TransformerLens 4 has none: the next test is for it")
    analyze.main(["export", "out/run", "--to", "transformer_lens", "lens.pt"])
    gated, dense = logits_of(run)
    names = {}
    exec(readme_lines("convert_nanogpt_weights").replace("out/stdlib/lens.pt", "lens.pt"), names)
    assert (names["model"](IDX) - dense).abs().max() < 1e-4
    hooked = names["model"].run_with_hooks(
        IDX, fwd_hooks=names["gate_hooks"](names["model"], names["saved"]["gate_bias"])
    )
    assert (hooked - gated).abs().max() < 1e-4


@torch.no_grad()
def test_transformer_bridge(run):
    pytest.importorskip("transformer_lens.model_bridge")
    analyze.main(["export", "out/run", "--to", "hf", "out/stdlib/hf"])
    gated, dense = logits_of(run)
    names = {"torch": torch}
    exec("def gate_hooks"
         + readme_lines("convert_nanogpt_weights").split("def gate_hooks")[1].split("logits = ")[0], names)
    exec(readme_lines("boot_transformers"), names)
    assert (names["bridge"](IDX) - dense).abs().max() < 1e-4
    hooked = names["bridge"].run_with_hooks(
        IDX, fwd_hooks=names["gate_hooks"](names["bridge"], run.config.gate_bias)
    )
    assert (hooked - gated).abs().max() < 1e-4


def test_nanogpt(workplace, capsys):
    """nanoGPT's own model is not a package; what it reads is names, shapes and model_args, which
    `load_checkpoint` reads as nanoGPT's.
    """
    model = random_model(gelu="none", gated=False)
    save_checkpoint("ours.pt", checkpoint_of(model))
    analyze.main(["export", "ours.pt", "--to", "nanogpt", "ckpt.pt"])
    found = torch.load("ckpt.pt", weights_only=True)  # as nanoGPT does
    assert set(found["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size",
                                        "dropout"}
    assert torch.equal(load_checkpoint("ckpt.pt")(IDX)[0], model(IDX)[0])
    assert "exact GELU" not in capsys.readouterr().out
    assert not load_checkpoint("ckpt.pt").config.gated
    save_checkpoint("ours.pt", checkpoint_of(random_model(tied=False)))
    with pytest.raises(SystemExit, match="ties the embeddings"):
        analyze.main(["export", "ours.pt", "--to", "nanogpt", "untied.pt"])


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("gate_bias", [0.3, [[0.3, -0.2], [0.1, 0.5], [0.2, 0.4]]])
def test_a_gated_model_that_went_to_nanogpt_is_read_back_gated(workplace, gelu, gate_bias):
    model = random_model(gelu=gelu, gate_bias=gate_bias)
    save_checkpoint("ours.pt", checkpoint_of(model))
    analyze.main(["export", "ours.pt", "--to", "nanogpt", "ckpt.pt"])
    assert torch.equal(load_checkpoint("ckpt.pt")(IDX)[0], model(IDX)[0])


def test_mistakes_are_named(workplace, monkeypatch):
    with pytest.raises(SystemExit, match="no checkpoint out/none"):
        analyze.main(["export", "out/none", "--to", "hf", "hf"])
    save_checkpoint("ours.pt", checkpoint_of(random_model()))
    os.makedirs("config")
    (workplace / "config/mine.py").touch()
    for kind, path in (("hf", "config"), ("nanogpt", "ours.pt")):
        with pytest.raises(UserError, match=f"{path} exists already. Choose another name"):
            export.export("ours.pt", kind, path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        export.export("ours.pt", "hf", "hf")
