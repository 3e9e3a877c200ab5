"""Text from a model, and what every token read."""

import pytest
import torch

import analyze
from analysis import sample
from helpers import call
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, save_checkpoint
from storage import text

SMALL = {"block_size": 8, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16, "gated": True,
         "gate_bias": 0.0}


def random_model(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | settings)).eval()


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_the_likeliest_token_of_the_coldest_and_the_context_slides(temperature):
    model = random_model()
    idx = torch.tensor([[1, 2, 3]])
    found = list(sample.generate(model, idx, 12, temperature))
    for token, read in found:
        window = idx[:, -8:]
        assert token == model(window)[0][0, -1].argmax()
        assert read.shape == (2, 2, window.shape[1])
        idx = torch.cat([idx, torch.tensor([[token]])], dim=1)


def test_top_k_temperature_and_padding_are_kept_to():
    model, idx = random_model(), torch.tensor([[1, 2, 3]])
    likeliest = set(model(idx)[0][0, -1].topk(3).indices.tolist())
    drawn = {next(sample.generate(model, idx, 1, temperature=2.0, top_k=3))[0] for _ in range(60)}
    assert drawn == likeliest
    assert all(token < 5 for token, _ in sample.generate(model, idx, 30, temperature=5.0, vocab_size=5))


def test_what_is_marked_is_what_can_change_the_next_token():
    """Shut every edge that is not marked, with `keep`: the last position's logits stay.

    Shut a marked one: they change.
    """
    model = random_model(n_layer=1, gate_bias=-0.02)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    idx = torch.randint(0, 256, (1, 8))
    _, read = next(sample.generate(model, idx, 1))
    assert 0 < read.sum() < read.numel()
    keep = torch.ones(1, 2, 8, 8, dtype=torch.bool)
    keep[0, :, -1] = read[0]
    logits = model(idx)[0][0, -1]
    assert torch.equal(model(idx, keep=keep)[0][0, -1], logits)
    keep[0, :, -1] = read[0] & (torch.arange(8) != read[0].any(0).nonzero()[0])
    assert not torch.equal(model(idx, keep=keep)[0][0, -1], logits)


def test_the_line_of_edges_fits_and_marks(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    tokens = text.tokenizer("bytes")
    read = torch.zeros(2, 2, 6, dtype=torch.bool)
    read[0, 0, 5] = read[1, 1, 5] = read[1, 0, 0] = True
    b = f"{sample.READ}b{sample.PLAIN}"
    f = f"{sample.READ}f{sample.PLAIN}"
    new = f"{sample.NEW}!{sample.PLAIN}"
    line = sample.edges_line(list(b"0123456789ab\ncdef"), ord("!"), read, tokens, width=200)
    assert line == f"0123456789a{b}↵cde{f}{new}  3 edges"
    narrow = sample.edges_line(list(b"0123456789abcdef"), ord("!"), read, tokens, width=37)
    assert narrow == f"cde{f}{new}  3 edges, 1 further left"
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    piped = sample.edges_line(list(b"0123456789abcdef"), ord("!"), read, tokens, width=40)
    assert piped == "de[f][!]  3 edges, 1 further left"


def test_command_line(models_to_ask):
    command = ["sample", "out/text", "--prompt=def f(", "--tokens=5", "--device=cpu"]
    done = call(analyze.main, *command)
    assert done.returncode == 0 and done.stdout.startswith("def f("), done.stderr
    assert call(analyze.main, *command).stdout == done.stdout  # a seed
    done = call(analyze.main, *command, "--edges")
    assert done.stdout.count(" edges\n") == 5 and sample.NEW not in done.stdout  # no colours into a pipe
    # what is no UTF-8 on a command line Python takes for halves of surrogate pairs
    done = call(analyze.main, "sample", "out/text", "--prompt=a\udcff", "--tokens=1")
    assert done.stdout.startswith("a\udcff"), done.stderr


def test_a_gpt2_with_a_pad_token_writes_gpt2s_tokens(workplace, monkeypatch):
    model = random_model(vocab_size=50258, n_embd=4)
    del (found := checkpoint_of(model))["model_args"]["gated"]  # as others write it
    save_checkpoint("padded.pt", found)
    asked, tokenizer = [], text.tokenizer
    monkeypatch.setattr(text, "tokenizer", lambda name: asked.append(name) or tokenizer("bytes"))
    done = call(analyze.main, "sample", "padded.pt", "--tokens=3", "--device=cpu")
    assert done.returncode == 0 and asked == ["gpt2"], done.stderr
