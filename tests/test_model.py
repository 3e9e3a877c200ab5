"""GPT-2: names, shapes, initialisation, gates in and out."""

import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig


def tiny(**changes):
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
                         | changes))


def test_names_and_shapes_are_nanogpts():
    shapes = {name: tuple(p.shape) for name, p in tiny().named_parameters()}
    layer = {"ln_1.weight": (16,), "ln_1.bias": (16,), "attn.c_attn.weight": (48, 16),
             "attn.c_attn.bias": (48,), "attn.c_proj.weight": (16, 16), "attn.c_proj.bias": (16,),
             "ln_2.weight": (16,), "ln_2.bias": (16,), "mlp.c_fc.weight": (64, 16), "mlp.c_fc.bias": (64,),
             "mlp.c_proj.weight": (16, 64), "mlp.c_proj.bias": (16,)}
    expected = {"transformer.wte.weight": (11, 16), "transformer.wpe.weight": (8, 16),
                "transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,)}
    expected |= {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert shapes == expected  # lm_head is wte
    assert "lm_head.weight" in tiny().state_dict()
    assert "lm_head.weight" in dict(tiny(tied=False).named_parameters())
    assert not any(n.endswith("bias") for n, _ in tiny(bias=False).named_parameters())


def test_gpt2_has_124_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808


def test_initialisation_is_gpt2s():
    m = tiny(n_embd=128, n_layer=3)
    for name, p in m.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all()


def test_forward_by_hand():
    """The dense model once more, from its state dict, written with plain matrix products."""
    m = tiny(tied=False)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3)
    w = m.state_dict()
    idx = torch.randint(11, (3, 8))

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"]
    for i in range(2):
        h = f"transformer.h.{i}."
        qkv = norm(x, h + "ln_1") @ w[h + "attn.c_attn.weight"].T + w[h + "attn.c_attn.bias"]
        q, k, v = qkv.split(16, -1)
        heads, future = [], torch.full((8, 8), -torch.inf).triu(1)
        for head in (slice(0, 8), slice(8, 16)):
            a = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(8) + future
            heads.append(a.softmax(-1) @ v[..., head])
        x = x + torch.cat(heads, -1) @ w[h + "attn.c_proj.weight"].T + w[h + "attn.c_proj.bias"]
        z = norm(x, h + "ln_2") @ w[h + "mlp.c_fc.weight"].T + w[h + "mlp.c_fc.bias"]
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        x = x + z @ w[h + "mlp.c_proj.weight"].T + w[h + "mlp.c_proj.bias"]
    torch.testing.assert_close(m(idx)[0], norm(x, "transformer.ln_f") @ w["lm_head.weight"].T, atol=1e-4,
                               rtol=1e-4)


def test_loss_ignores_positions_and_density_is_one_when_dense():
    m, idx, targets = tiny(), torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    targets[:, :5] = -1
    logits, loss, density = m(idx, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:, 5:].flatten(0, 1),
                                                        targets[:, 5:].flatten()).item(), rel=1e-6)
    assert density.item() == 1 and m(idx)[1] is None


def test_where_nothing_is_asked_the_loss_is_0_and_teaches_nothing():
    m = tiny()
    loss = m(torch.randint(11, (3, 8)), torch.full((3, 8), -1))[1]
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in m.parameters())


def test_the_gate_adds_no_parameter_and_a_wide_open_gate_changes_nothing():
    dense, gated = tiny(), tiny(gated=True, gate_bias=1e4)
    gated.load_state_dict(dense.state_dict())
    idx = torch.randint(11, (3, 8))
    torch.testing.assert_close(gated(idx)[0], dense(idx)[0])


def test_train_samples_and_eval_is_deterministic():
    m, idx = tiny(gated=True, gate_bias=0.0), torch.randint(11, (3, 8))
    assert not torch.equal(m(idx)[0], m(idx)[0])
    m.eval()
    assert torch.equal(m(idx)[0], m(idx)[0])


def test_density_trains_the_queries_and_keys_of_every_layer():
    m = tiny(gated=True)
    m(torch.randint(11, (3, 8)))[2].backward()
    for block in m.transformer.h:
        gradient = block.attn.c_attn.weight.grad
        assert (gradient[:32].abs().sum(1) > 0).all()
    # the last layer's values have no part in it
    assert (m.transformer.h[1].attn.c_attn.weight.grad[32:] == 0).all()


def test_record_sees_every_layer_and_keep_shuts_an_edge():
    m, idx = tiny(gated=True, gate_bias=1e4).eval(), torch.randint(11, (3, 8))
    seen = {}
    whole = m(idx, record=lambda layer, gates: seen.update({layer: gates}))[0]
    assert set(seen) == {0, 1} and seen[1].open.shape == (3, 2, 8, 8)
    assert seen[0].open.sum() == 3 * 2 * 36
    keep = torch.ones(2, 2, 8, 8, dtype=torch.bool)
    keep[1, :, 4, 2] = False  # in the last layer: only position 4 can change
    cut = m(idx, keep=keep)[0]
    changed = (whole - cut).abs().amax(dim=(0, 2)) > 1e-7
    assert changed.tolist() == [i == 4 for i in range(8)]


def test_a_keep_of_one_layer_is_not_taken_for_one_of_all():
    m, idx = tiny(gated=True).eval(), torch.randint(11, (3, 8))
    for shape in ((8, 8), (2, 8, 8), (3, 2, 8, 8)):
        with pytest.raises(ValueError, match="keep must be .n_layer, H, T, T. .* n_layer=2"):
            m(idx, keep=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("impl", ["auto", "plain", "tiled"])
def test_looking_at_the_gates_changes_nothing_in_training_either(impl):
    m = tiny(gated=True, block_size=80).train()
    m.attention_impl = impl
    idx = torch.randint(11, (2, 80))
    torch.manual_seed(3)
    logits, _, density = m(idx)
    torch.manual_seed(3)
    watched, _, density_watched = m(idx, record=lambda layer, gates: None)
    torch.testing.assert_close(logits, watched)
    torch.testing.assert_close(density, density_watched)


def test_a_context_that_is_too_long_and_heads_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="context of 9 tokens"):
        tiny()(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of n_head"):
        tiny(n_head=3)
