"""Checkpoints: round trips, none half written, none run as a program, and what does not fit is named."""

import errno

import pytest
import torch

from model import GPT, GPTConfig
from models import checkpoint
from models.checkpoint import (
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
from storage.files import UserError


def tiny(**changes):
    return GPT(
        GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes)
    )


def test_checkpoint_round_trip(workplace):
    m = tiny(gated=True, gate_bias=1.5)
    save_checkpoint("c.pt", checkpoint_of(m, step=7))
    again = load_checkpoint("c.pt")
    assert again.config == m.config and not again.training and read_checkpoint("c.pt")["step"] == 7
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), again.state_dict().values()))
    assert not load_checkpoint("c.pt", gated=False).config.gated


def test_a_parent_that_was_trained_on_is_no_parent_any_more(workplace):
    parent = tiny()
    save_checkpoint("parent.pt", checkpoint_of(parent))
    child = {"parent": "parent.pt", "reference": "parent.pt",
             "reference_fingerprint": fingerprint(read_checkpoint("parent.pt"))}
    assert torch.equal(load_parent(child).state_dict()["lm_head.weight"], parent.lm_head.weight)
    parent.lm_head.weight.data += 1
    save_checkpoint("parent.pt", checkpoint_of(parent))
    with pytest.raises(UserError, match="parent.pt holds other weights now than when its child was begun"):
        load_parent(child)
    assert load_parent(child | {"reference": "other.pt"})  # whose fingerprint it is then


def test_nanogpts_compiled_names_load():
    m = tiny()
    load_weights(tiny(), {f"_orig_mod.{name}": t for name, t in m.state_dict().items()})


def test_too_little_memory_is_not_called_a_damaged_file(workplace, monkeypatch):
    def too_large(*args, **options):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 240000000 bytes"
        )

    save_checkpoint("c.pt", checkpoint_of(tiny()))
    monkeypatch.setattr(torch, "load", too_large)
    with pytest.raises(UserError, match=r"c.pt cannot be read \(there is not enough memory for it\)$"):
        read_checkpoint("c.pt")


def test_bad_checkpoints_are_named(workplace):
    with pytest.raises(UserError, match="no checkpoint gone.pt"):
        read_checkpoint("gone.pt")
    save_checkpoint("c.pt", checkpoint_of(tiny()))
    content = (workplace / "c.pt").read_bytes()
    (workplace / "cut.pt").write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match="cut.pt cannot be read"):
        read_checkpoint("cut.pt")
    torch.save({"weights": 1}, "other.pt")
    with pytest.raises(UserError, match="no model and no model_args"):
        read_checkpoint("other.pt")
    state = tiny().state_dict()
    state["extra"] = state.pop("transformer.ln_f.bias")
    state["lm_head.weight"] = torch.zeros(3, 3)
    with pytest.raises(
        UserError,
        match=r"ln_f.bias is missing; extra is extra; lm_head.weight is \(3, 3\), the model's is \(11, 16\)",
    ):
        load_weights(tiny(), state)
    save_checkpoint("new.pt", {"model": {}, "model_args": {"n_expert": 8}})
    with pytest.raises(UserError, match="n_expert"):
        load_checkpoint("new.pt")


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


@pytest.mark.parametrize(
    "args, tokenizer",
    [
        ({"vocab_size": 50257}, "gpt2"),
        ({"vocab_size": 50304}, "gpt2"),
        ({"vocab_size": 50304, "architecture": "olmo"}, "olmo"),
        ({"vocab_size": 100352, "architecture": "olmo"}, "olmo2"),
        ({"vocab_size": 256, "architecture": "olmo"}, None),
        ({"vocab_size": 65}, None),
    ],
)
def test_whose_tokens_a_foreign_model_reads_is_told_by_its_vocabulary(args, tokenizer):
    found = {"model_args": args}
    assert tokenizer_of(found) == tokenizer
    for name in ("bytes", "gpt2", "olmo"):
        if tokenizer in (None, name):
            require_tokenizer(found, "x", name)
        else:
            with pytest.raises(
                UserError, match=f"x was trained on tokens of '{tokenizer}', the data has those of '{name}'"
            ):
                require_tokenizer(found, "x", name)


CRAFTED = [
    ("model_args a list", {"model_args": []}),
    ("model a string", {"model": "weights"}),
    ("vocab_size", {"vocab_size": -1}),
    ("n_head", {"n_head": 0}),
    ("n_head", {"n_head": "4"}),
    ("n_head=3", {"n_head": 3}),
    ("block_size", {"block_size": 10**12}),
    ("wpe.weight", {"block_size": 10**6}),
    ("n_layer=100000", {"n_layer": 100_000}),
    ("gate_bias", {"gate_bias": [[1.0]]}),
    ("gate_bias", {"gate_bias": float("nan")}),
    ("tied", {"tied": "no"}),
    ("ln_f.weight is a str", {"transformer.ln_f.weight": "ones"}),
    ("ln_f.weight is torch.sparse_coo", {"transformer.ln_f.weight": torch.ones(16).to_sparse()}),
    ("ln_f.weight is torch.strided of torch.int64", {"transformer.ln_f.weight": torch.ones(16).long()}),
    ("ln_f.weight holds NaN", {"transformer.ln_f.weight": torch.full((16,), float("nan"))}),
    ("adapters make no sense", {"lora": [1], "base": "c.pt"}),
    ("has adapters itself", {"lora": {"rank": 1, "alpha": 1.0, "targets": "q_proj"}, "base": "bad.pt"}),
]


@pytest.mark.parametrize("words, change", CRAFTED)
def test_a_crafted_checkpoint_is_refused_at_once(workplace, words, change):
    crafted = checkpoint_of(tiny(gated=True))
    save_checkpoint("c.pt", crafted)
    for key, value in change.items():
        for place in (crafted["model_args"], crafted["model"]):
            if key in place:
                place[key] = value
                break
        else:
            crafted[key] = value
    if "base" in change:
        crafted["base_fingerprint"] = checkpoint.fingerprint(crafted)
    save_checkpoint("bad.pt", crafted)
    expected = "dictionary" if words.startswith("model") else words
    with pytest.raises(UserError, match=f"bad.pt.*{expected}"):
        load_checkpoint("bad.pt")
