"""Checkpoints: round trips, none half written, none run as a program, and what does not fit is named."""

import argparse
import contextlib
import errno
import os

import pytest
import torch

from model import GPT, GPTConfig
from models import checkpoint
from models.checkpoint import (
    Uninitialised,
    checkpoint_of,
    fingerprint,
    load_checkpoint,
    load_parent,
    load_weights,
    read_checkpoint,
    require_tokenizer,
    save_checkpoint,
    tokenizer_of,
)
from models.olmo import OLMo, OLMoConfig
from storage.files import UserError


def tiny(**changes):
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
                         | changes))


def test_an_empty_model_is_not_initialised():
    x = torch.ones(3)
    with Uninitialised():  # on the meta device torch would import its compiler to draw numbers
        assert torch.nn.init.normal_(x) is x and torch.nn.init.uniform_(tensor=x) is x
    assert (x == 1).all()


def test_checkpoint_round_trip(workplace):
    m = tiny(gated=True, gate_bias=1.5)
    save_checkpoint("c.pt", checkpoint_of(m, step=7))
    again = load_checkpoint("c.pt")
    assert again.config == m.config and not again.training and read_checkpoint("c.pt")["step"] == 7
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), again.state_dict().values()))
    assert not load_checkpoint("c.pt", gated=False).config.gated


def test_a_parent_that_was_trained_on_is_no_parent_any_more(workplace):
    parent = tiny(n_embd=64)
    save_checkpoint("parent.pt", checkpoint_of(parent))
    child = {"parent": "parent.pt", "reference": "parent.pt",
             "reference_fingerprint": fingerprint(read_checkpoint("parent.pt"))}
    assert torch.equal(load_parent(child).state_dict()["lm_head.weight"], parent.lm_head.weight)
    parent.lm_head.weight.data += 1
    save_checkpoint("parent.pt", checkpoint_of(parent))
    with pytest.raises(UserError, match="parent.pt holds other weights now than when its child was begun"):
        load_parent(child)
    assert load_parent(child | {"reference": "other.pt"})  # whose fingerprint it is then


def without_a_head(found):
    found["model"]["transformer.h.1.attn.c_attn.weight"][64:128] = 0


def with_other_heads(found):
    found["model_args"]["n_head"] = 4


def with_another_name(found):
    found["model"]["transformer.h.0.ln_1.weights"] = found["model"].pop("transformer.h.0.ln_1.weight")


def with_another_shape(found):
    found["model"]["lm_head.weight"] = found["model"]["lm_head.weight"].view(64, 11)


@pytest.mark.parametrize("change", [without_a_head, with_other_heads, with_another_name, with_another_shape])
def test_a_fingerprint_is_of_all_numbers_names_shapes_and_sizes(change):
    found = checkpoint_of(tiny(n_embd=64))
    before = fingerprint(found)
    change(found)
    assert fingerprint(found) != before


def test_what_only_training_uses_is_not_in_the_fingerprint():
    model = tiny()
    known = fingerprint(checkpoint_of(model))
    for key, value in {"gate_bias": 1.0, "gate_temperature": 2.0, "dropout": 0.5, "init_std": 0.1}.items():
        setattr(model.config, key, value)
    assert fingerprint(checkpoint_of(model)) == known
    model.config.gated = True
    gated = fingerprint(checkpoint_of(model))
    model.config.gate_bias = 2.0
    assert len({known, gated, fingerprint(checkpoint_of(model))}) == 3


# and a block compiled by itself, as others do
@pytest.mark.parametrize("wrapped", ["module._orig_mod.{}", "_orig_mod.module.{}", "{}"])
def test_the_names_that_compile_and_ddp_leave_in_any_order_load(wrapped):
    m, again = tiny(), tiny()
    state = {wrapped.format(name.replace("h.1.", "h.1._orig_mod.")): t for name, t in m.state_dict().items()}
    state[wrapped.format("transformer.h.1._orig_mod.attn.bias")] = torch.ones(1, 1, 8, 8)  # an old mask
    load_weights(again, state)
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("model", [tiny(), OLMo(OLMoConfig(vocab_size=11, n_layer=1, n_head=2, n_kv_head=2,
                                                           n_embd=16, n_hidden=16))], ids=["gpt2", "olmo"])
def test_a_tied_model_without_its_output_embedding_loads(workplace, model):
    found = checkpoint_of(model)
    del found["model"]["lm_head.weight"]
    save_checkpoint("c.pt", found)
    idx = torch.arange(8)[None]
    assert torch.equal(load_checkpoint("c.pt")(idx)[0], model.eval()(idx)[0])
    found["model_args"]["tied"] = False
    save_checkpoint("c.pt", found)
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        load_checkpoint("c.pt")


def test_the_two_embeddings_of_an_untied_fork_of_nanogpt_stay_two(workplace):
    model = tiny(tied=False)
    found = checkpoint_of(model)
    for key in ("tied", "gated"):  # as nanoGPT writes it
        del found["model_args"][key]
    found["model_args"]["gelu"] = "tanh"
    save_checkpoint("c.pt", found)
    idx = torch.arange(8)[None]
    assert torch.equal(load_checkpoint("c.pt")(idx)[0], model.eval()(idx)[0])


@pytest.mark.parametrize("held, content", [
    ("argparse.Namespace", {"model": {}, "model_args": argparse.Namespace(n_layer=2)}),
    ("model.GPT", tiny()),
], ids=["config object", "module"])
def test_a_file_with_an_object_says_which_and_how_to_save_it_anew(workplace, held, content):
    torch.save(content, "c.pt")
    with pytest.raises(UserError, match=f"c.pt cannot be read .it holds an object, {held}") as refused:
        read_checkpoint("c.pt")
    assert 'torch.save({"model": model.state_dict(), "model_args": ' in str(refused.value)
    assert "truncated" not in str(refused.value)


def test_what_is_typed_to_save_a_model_anew_makes_a_checkpoint_that_loads(workplace):
    model = tiny(n_layer=12, n_head=12, n_embd=12, vocab_size=50257, block_size=1024, gelu="none")
    command = checkpoint.huggingface.SAVE_ANEW.rpartition(", with")[0].replace("768", "12")
    exec(command, {"torch": torch, "model": model})
    assert torch.equal(load_checkpoint("NEW.pt")(torch.arange(8)[None])[0],
                       model.eval()(torch.arange(8)[None])[0])


def family(place):
    """A dense model and its gated child in folders below place, as runs leave them."""
    for name, gated in (("dense", False), ("child", True)):
        os.makedirs(f"{place}/out/{name}")
        origin = {"parent": "out/dense/best.pt", "reference": "out/dense/best.pt"} if gated else {}
        save_checkpoint(f"{place}/out/{name}/best.pt", checkpoint_of(
            tiny(gated=gated), config={"out_dir": f"out/{name}"}, **origin))


@pytest.mark.parametrize("here, folder", [
    (".", "out/child"), ("out", "child"), ("out/child", "."), ("elsewhere", "../out/child"),
])
def test_a_parent_is_found_from_any_folder(workplace, monkeypatch, here, folder):
    family(workplace)
    (workplace / "elsewhere/out/dense").mkdir(parents=True)
    save_checkpoint("elsewhere/out/dense/best.pt", checkpoint_of(tiny(n_layer=1)))  # another of that name
    monkeypatch.chdir(here)
    child = read_checkpoint(f"{folder}/best.pt")
    assert os.path.samefile(child["parent"], workplace / "out/dense/best.pt")
    assert load_parent(child).config.n_layer == 2
    if here == ".":
        assert child["parent"] == "out/dense/best.pt"


def test_runs_that_were_moved_together_find_each_other(workplace):
    family(workplace)
    os.rename("out", "archive")
    assert load_parent(read_checkpoint("archive/child/best.pt"))


def test_a_name_and_a_parent_that_is_gone_stay_as_they_were_written(workplace):
    family(workplace)
    os.rename("out/child", "child")
    child = read_checkpoint("child/best.pt")
    assert child["parent"] == "out/dense/best.pt" and load_parent(child)  # it has stayed where it was
    save_checkpoint("child/best.pt", child | {"parent": "gpt2", "reference": "out/none/best.pt"})
    os.makedirs("gpt2")
    assert read_checkpoint("child/best.pt")["parent"] == "gpt2"
    with pytest.raises(UserError, match="out/none/best.pt, from which .* was trained, is gone") as gone:
        load_parent(child | {"parent": "out/none/best.pt"})
    assert "train.py" not in str(gone.value)


def test_too_little_memory_is_not_called_a_damaged_file(workplace, monkeypatch):
    def too_large(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 24000000 bytes")

    save_checkpoint("c.pt", checkpoint_of(tiny()))
    monkeypatch.setattr(torch, "load", too_large)
    with pytest.raises(UserError, match=r"c.pt cannot be read \(there is not enough memory for it\)$"):
        read_checkpoint("c.pt")


@pytest.mark.parametrize("name, message", [
    ("gone.pt", "no checkpoint gone.pt"),
    ("cut.pt", "cut.pt cannot be read .*truncated"),
    ("other.pt", "no model and no model_args. To make one of a model: torch.save"),
    ("new.pt", "n_expert"),
    ("renamed.pt", r"ln_f.bias is missing; extra is extra; transformer.ln_f.weight is a str, the model's is "
                   r"\(16,\); lm_head.weight is \(3, 3\), the model's is \(11, 16\)"),
    ("sizes.pt", "sizes.pt: its model_args make no model: .*multiple of n_head=3"),
    ("nan.pt", "ln_f.weight holds NaN"),
])
def test_bad_checkpoints_are_named(workplace, name, message):
    good = checkpoint_of(tiny())
    save_checkpoint("c.pt", good)
    content = (workplace / "c.pt").read_bytes()
    (workplace / "cut.pt").write_bytes(content[:len(content) // 2])
    torch.save({"weights": 1}, "other.pt")
    save_checkpoint("new.pt", {"model": {}, "model_args": {"n_expert": 8}})
    save_checkpoint("sizes.pt", good | {"model_args": good["model_args"] | {"n_head": 3}})
    save_checkpoint("nan.pt", good | {"model": good["model"] | {
        "transformer.ln_f.weight": torch.full((16,), torch.nan)}})
    good["model"]["extra"] = good["model"].pop("transformer.ln_f.bias")
    good["model"] |= {"lm_head.weight": torch.zeros(3, 3), "transformer.ln_f.weight": "ones"}
    save_checkpoint("renamed.pt", good)
    with pytest.raises(UserError, match=message):
        load_checkpoint(name)


def test_a_checkpoint_that_would_run_code_is_not_run(workplace):
    class Harm:
        def __reduce__(self):
            return (open, ("harmed", "w"))

    torch.save({"model": Harm(), "model_args": {}}, "harm.pt")
    with pytest.raises(UserError):
        read_checkpoint("harm.pt")
    assert not (workplace / "harmed").exists()


def test_a_full_disk_leaves_the_old_checkpoint(workplace, monkeypatch):
    save_checkpoint("c.pt", checkpoint_of(tiny(), step=1))

    def half_written(content, f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half_written)
    with pytest.raises(UserError, match="No space left on device.*untouched"):
        save_checkpoint("c.pt", checkpoint_of(tiny(), step=2))
    monkeypatch.undo()
    assert read_checkpoint(str(workplace / "c.pt"))["step"] == 1
    assert [f.name for f in workplace.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("vocab_size, architecture, tokenizer", [
    (50257, "gpt2", "gpt2"), (50304, "gpt2", "gpt2"), (50280, "gpt2", None), (65, "gpt2", None),
    (50258, "gpt2", "gpt2"),  # with a pad token
    (50304, "olmo", "olmo"), (100352, "olmo", "olmo2"), (256, "olmo", None),
])
def test_whose_tokens_a_foreign_model_reads_is_told_by_its_vocabulary(vocab_size, architecture, tokenizer):
    args = {"vocab_size": vocab_size} | ({"architecture": "olmo"} if architecture == "olmo" else {})
    assert tokenizer_of({"model_args": args}) == tokenizer
    for name in ("bytes", "gpt2", "olmo"):
        right = tokenizer in (None, name)
        message = f"x was trained on tokens of '{tokenizer}', the data has those of '{name}'"
        with contextlib.nullcontext() if right else pytest.raises(UserError, match=message):
            require_tokenizer({"model_args": args}, "x", name)
