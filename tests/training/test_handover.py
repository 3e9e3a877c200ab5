"""The shift of the key biases: the dense function stays, and the gates start as thresholds on the attention
weight.
"""

import copy

import pytest
import torch

from helpers import same
from model import GPT, GPTConfig
from models.olmo import OLMo, OLMoConfig
from training import parallel
from training.handover import fold_shift


@pytest.fixture
def model():
    """Random, gated, with scores and levels of scores of a trained model's size."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=20, n_layer=2, n_head=2, n_embd=32, gated=True,
                          gate_bias=3.0)).eval()
    for name, parameter in model.named_parameters():
        parameter.data += (0.25 if "c_attn" in name else 0.1) * torch.randn_like(parameter)
    return model


def judge(model, idx):
    """Share of the edges with p_ij > 0.05 that are open, and the share of all that is open."""
    agree, opened = [], []
    causal = torch.ones(32, 32, dtype=torch.bool).tril()

    def look(layer, gates):
        agree.append(gates.open[gates.pattern > 0.05].mean().item())
        opened.append(gates.open[..., causal].mean().item())

    model(idx, record=look)
    return min(agree), max(opened)


def test_the_dense_function_does_not_change_and_the_gates_do(model):
    idx = torch.randint(0, 20, (8, 32))
    dense = {"gated": False}
    before = GPT(GPTConfig(**{**vars(model.config), **dense})).eval()
    before.load_state_dict(model.state_dict())
    fold_shift(model, torch.randint(0, 20, (64, 32)), open_above=0.05)
    assert model.config.gated and not model.training
    after = GPT(GPTConfig(**{**vars(model.config), **dense})).eval()
    after.load_state_dict(model.state_dict())
    assert (after(idx)[0] - before(idx)[0]).abs().max() < 1e-4
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before.state_dict()[name])}
    assert moved == {f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)}
    bias = (model.state_dict()["transformer.h.0.attn.c_attn.bias"]
            - before.state_dict()["transformer.h.0.attn.c_attn.bias"]).view(3, 32)
    assert (bias[0] == 0).all() and (bias[1] != 0).all() and (bias[2] == 0).all()  # the keys' alone


def folded(model, **options):
    """What `judge` says, on other tokens than those that the shift was fitted on."""
    other = copy.deepcopy(model)
    fold_shift(other, torch.randint(0, 20, (64, 32)), **options)
    return judge(other, torch.randint(0, 20, (8, 32)))


def test_all_processes_take_the_first_ones_shift(model, monkeypatch):
    """Each computes its own, with its own rounding."""
    monkeypatch.setattr(parallel, "broadcast", torch.zeros_like)
    before = copy.deepcopy(model.state_dict())
    fold_shift(model, torch.randint(0, 20, (8, 32)), open_above=0.05)
    assert same(before, model.state_dict())


def test_a_higher_threshold_opens_fewer_edges(model):
    shares = [folded(model, open_above=threshold)[1] for threshold in (0.01, 0.05, 0.2)]
    assert shares[0] > shares[1] > shares[2]


def test_edges_that_carry_weight_start_open_and_it_pays_to_fear_shutting_more_than_opening(model):
    """One bias that opened the same share would have to shut some of what is needed: levels differ between
    queries.
    """
    kept, opened = folded(model, open_above=0.05)
    assert kept > 0.97 and opened < 0.9
    plain_kept, plain_opened = folded(model, open_above=0.05, too_low=1.0)
    assert plain_kept < 0.9 and plain_opened < opened


@pytest.mark.parametrize("kind", ["GPT without biases", "OLMo", "GPT whose weights are not to be touched"])
def test_where_nothing_can_be_folded_every_head_gets_a_number(kind, model):
    if kind == "OLMo":
        model = OLMo(OLMoConfig(generation=2, block_size=32, vocab_size=20, n_layer=2, n_head=4, n_kv_head=2,
                                n_embd=32, n_hidden=64, gated=True)).eval()
        for attention in model.attentions:
            attention.q_norm.weight.data *= 4
    elif kind == "GPT without biases":
        model = GPT(GPTConfig(**vars(model.config) | {"bias": False})).eval()
        for attention in model.attentions:
            attention.c_attn.weight.data *= 10
    before = copy.deepcopy(model)
    fold_shift(model, torch.randint(0, 20, (64, 32)), open_above=0.05, fold="touched" not in kind)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values()))
    biases = torch.tensor(model.config.gate_bias)
    assert biases.shape == (2, model.config.n_head) and biases.unique().numel() == biases.numel()
    kept, opened = judge(model, torch.randint(0, 20, (8, 32)))
    # one number for all queries has to open more than a shift that follows them
    assert kept > 0.97 and opened < 0.995
    again = type(model)(model.config)  # a checkpoint's model_args hold the list
    again.load_state_dict(model.state_dict())
    idx = torch.randint(0, 20, (8, 32))
    assert torch.equal(again.eval()(idx)[0], model(idx)[0])
