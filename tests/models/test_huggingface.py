"""OpenAI's format: models that the transformers package writes are computed alike by ours, and back;
downloads are whole or refused.
"""

import hashlib
import json
import os

import pytest
import safetensors.torch
import torch

from model import GPT, PRETRAINED, GPTConfig
from models import huggingface
from models.checkpoint import (
    checkpoint_of,
    load_checkpoint,
    read_checkpoint,
    require_tokenizer,
    save_checkpoint,
    tokenizer_of,
)
from storage.files import UserError

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 50}


def theirs(**settings):
    """A random GPT2LMHeadModel whose biases and norms are random too, so that none can be forgotten unseen.
    """
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def assert_same_logits(ours, model, T=12):
    idx = torch.randint(0, ours.config.vocab_size, (2, T))
    assert (ours(idx)[0] - model(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("settings, shards", [({}, True), ({"activation_function": "gelu"}, False),
                                              ({"tie_word_embeddings": False, "n_head": 4}, True)])
def test_a_tiny_model_of_transformers_gives_its_logits(workplace, settings, shards):
    model = theirs(**TINY | settings)
    model.save_pretrained("hf", **({"max_shard_size": "50KB"} if shards else {}))
    assert os.path.exists("hf/model.safetensors.index.json") == shards
    ours = load_checkpoint("hf")
    assert ours.config.tied == settings.get("tie_word_embeddings", True)
    assert_same_logits(ours, model)
    gated = load_checkpoint("hf", gated=True, gate_bias=50.0)  # all edges open
    assert_same_logits(gated, model)


def bin_file(path, model, prefix=""):
    """A pytorch_model.bin as OpenAI's models have it: no `transformer.`, no lm_head, the causal mask stored
    as attn.bias.
    """
    state = {prefix + name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()
             if name != "lm_head.weight"}
    state |= {f"{prefix}h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    torch.save(state, path)


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.transformer."])
def test_pytorch_model_bin_alone_and_in_a_folder(workplace, prefix):
    model = theirs(**TINY | {"n_head": 1})
    model.save_pretrained("hf")
    os.remove("hf/model.safetensors")
    bin_file("hf/pytorch_model.bin", model, prefix)
    assert_same_logits(load_checkpoint("hf"), model)
    # no config.json beside it: heads of width 64
    bin_file("weights.bin", theirs(**TINY | {"n_embd": 64, "n_head": 1}))
    assert_same_logits(load_checkpoint("weights.bin"), theirs(**TINY | {"n_embd": 64, "n_head": 1}))
    assert load_checkpoint("hf/pytorch_model.bin").config.n_head == 1  # config.json beside it


def test_wrong_files_are_named(workplace):
    model = theirs(**TINY)
    model.save_pretrained("hf")
    state = model.state_dict()

    def fails(state, message, **settings):
        with open("hf/config.json") as f:
            config = json.load(f)
        os.makedirs("bad", exist_ok=True)
        with open("bad/config.json", "w") as f:
            json.dump(config | settings, f)
        torch.save(state, "bad/pytorch_model.bin")
        with pytest.raises(UserError, match=message):
            load_checkpoint("bad")

    fails({k: v for k, v in state.items() if "h.1.mlp.c_fc.bias" not in k},
          "transformer.h.1.mlp.c_fc.bias is missing")
    fails(state | {"transformer.h.0.gate": torch.zeros(3)}, "transformer.h.0.gate is extra")
    fails(state | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(3, 4)},
          r"c_fc.weight is \(4, 3\), the model's is \(128, 32\)")
    fails({"a": torch.zeros(3)}, "holds no GPT-2: wte.weight")
    fails(state, "model_type='llama'", model_type="llama")
    fails(state, "activation_function='relu'", activation_function="relu")
    with open("bad/config.json", "w") as f:
        f.write("{")
    with pytest.raises(UserError, match="bad/config.json is damaged"):
        load_checkpoint("bad")
    with open("hf/model.safetensors", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(UserError, match="hf/model.safetensors cannot be read .*truncated or damaged"):
        load_checkpoint("hf")


def test_what_transformers_leaves_aside_is_left_aside_and_said(workplace, capsys):
    model = theirs(**TINY)
    model.save_pretrained("hf")
    tensors = safetensors.torch.load_file("hf/model.safetensors")
    safetensors.torch.save_file(tensors | {"score.weight": torch.ones(2, 64)}, "hf/model.safetensors",
                                metadata={"format": "pt"})
    assert_same_logits(load_checkpoint("hf"), model)
    assert "hf: score.weight is left aside, as transformers does" in capsys.readouterr().out


def test_a_missing_safetensors_package_says_what_to_install(workplace, monkeypatch):
    theirs(**TINY).save_pretrained("hf")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load_checkpoint("hf")


@pytest.fixture
def served(hub, monkeypatch):
    """A tiny gpt2 where Hugging Face hosts the real one."""
    folder = hub / "openai-community/gpt2/resolve/main"
    folder.mkdir(parents=True)
    model = theirs(**TINY | {"n_embd": 64, "n_head": 1})
    bin_file(folder / "pytorch_model.bin", model)
    content = (folder / "pytorch_model.bin").read_bytes()
    monkeypatch.setitem(PRETRAINED, "gpt2", hashlib.sha256(content).hexdigest())
    return model


def test_openais_name_is_downloaded_and_loaded(served, monkeypatch):
    assert_same_logits(GPT.from_pretrained("gpt2"), served)
    assert_same_logits(load_checkpoint("gpt2", gated=True, gate_bias=50.0), served)
    with pytest.raises(UserError, match="OpenAI's models are gpt2, .*not gpt3"):
        GPT.from_pretrained("gpt3")
    monkeypatch.setitem(PRETRAINED, "gpt2", "0" * 64)
    with pytest.raises(UserError, match="wrong sha256"):
        GPT.from_pretrained("gpt2")


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(workplace, where):
    theirs(**TINY).save_pretrained("hf")
    os.rename("hf/model.safetensors", "elsewhere.safetensors")
    with open("hf/model.safetensors.index.json", "w") as f:
        json.dump({"weight_map": {"transformer.wte.weight": where}}, f)
    with pytest.raises(UserError, match="no file beside it"):
        load_checkpoint("hf")


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"tied": False}, {"gelu": "none"}])
def test_what_we_write_transformers_reads_and_the_round_trip_is_the_identity(workplace, settings):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, **settings)).eval()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    huggingface.write("hf", ours.state_dict(), checkpoint_of(ours)["model_args"])
    model, info = transformers.GPT2LMHeadModel.from_pretrained("hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(ours, model.eval())
    again = read_checkpoint("hf")
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in ours.state_dict().items())


def test_nanogpt_and_the_authors_checkpoints(workplace):
    """nanoGPT's names and exact GELU, torch.compile's prefix, the mask of its old versions, a vocabulary
    padded to 50304.
    """
    args = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "bias": False, "vocab_size": 50304,
            "dropout": 0.0}
    ours = GPT(GPTConfig(**args, gelu="none")).eval()
    state = {f"_orig_mod.{name}": tensor for name, tensor in ours.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_checkpoint("ckpt.pt", {"model": state, "model_args": args, "iter_num": 3, "optimizer": {},
                                "best_val_loss": torch.tensor(3.0), "config": {"a": 1}})
    model = load_checkpoint("ckpt.pt")
    idx = torch.randint(0, 50257, (2, 4))
    assert torch.equal(model(idx)[0], ours(idx)[0]) and model.config.gelu == "none"
    assert tokenizer_of(read_checkpoint("ckpt.pt")) == "gpt2"
    with pytest.raises(UserError, match="trained on tokens of 'gpt2', the data has those of 'bytes'"):
        require_tokenizer(read_checkpoint("ckpt.pt"), "ckpt.pt", "bytes")
    require_tokenizer(read_checkpoint("ckpt.pt"), "ckpt.pt", "gpt2")
