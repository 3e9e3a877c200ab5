"""Transcoders: the equations, by loops; scales that change nothing; a planted dictionary; two hops."""

import math

import pytest
import torch

from features.transcoder import FIRES, JumpReLU, Transcoder, quality, read_and_written, replacing
from model import GPT, GPTConfig

L, C, F, N = 3, 6, 10, 7


def random_transcoder(cross=True, seed=0):
    """With every part random, scales too, in float64."""
    torch.manual_seed(seed)
    coder = Transcoder(L, C, F, cross).double()
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    coder.log_theta.data -= 1
    coder.scale_in.uniform_(0.5, 2)
    coder.scale_out.uniform_(0.5, 2)
    return coder


def random_model(**settings):
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=5, vocab_size=11, n_layer=L, n_head=2, n_embd=C, **settings)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model.eval()


@pytest.mark.parametrize("cross", [True, False])
@torch.no_grad()
def test_the_equations_by_loops(cross):
    coder, x, y = random_transcoder(cross), torch.randn(N, L, C).double(), torch.randn(N, L, C).double()
    c, d, loss, error = 0.3, 0.02, 0.0, 0.0
    theta, found = coder.log_theta.exp(), coder(x)
    for n in range(N):
        z, a = torch.zeros(L, F).double(), torch.zeros(L, F).double()
        for layer in range(L):
            for i in range(F):
                z[layer, i] = coder.encoder[layer, i] @ x[n, layer] * coder.scale_in[layer, 0]
                z[layer, i] += coder.b_enc[layer, i]
                a[layer, i] = z[layer, i] if z[layer, i] > theta[layer, i] else 0
                lasts = range(layer, L if cross else layer + 1)
                size = math.sqrt(sum(coder.decoder[layer, to, i].square().sum() for to in lasts))
                loss += c * math.tanh(4 * size * a[layer, i]) / N
                loss += d * max(0.0, theta[layer, i] - z[layer, i]) * size / N
        for to in range(L):
            scaled = coder.b_dec[to].clone()
            for layer in range(to + 1) if cross else (to,):
                scaled += a[layer] @ coder.decoder[layer, to]
            torch.testing.assert_close(found[n, to], scaled / coder.scale_out[to])
            error += (scaled - y[n, to] * coder.scale_out[to]).square().sum().item() / N
    measured, squared = coder.loss(x, y, c, d)
    assert squared.item() == pytest.approx(error) and measured.item() == pytest.approx(error + float(loss))


def test_jumprelu_has_the_gradients_of_the_paper():
    z = torch.tensor([[-1.0, 0.1, 0.4, 0.6, 5.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.full((5,), 0.5, dtype=torch.float64, requires_grad=True)
    a = JumpReLU.apply(z, theta)
    assert a.tolist() == [[0, 0, 0, 0.6, 5.0]]
    (a * torch.arange(1, 6)).sum().backward()
    assert z.grad.tolist() == [[0, 0, 0, 4, 5]]
    # -theta / width K((z - theta) / width): within half a width of the threshold
    torch.testing.assert_close(theta.grad, -0.5 * torch.tensor([0, 2, 3, 4, 0]).double())


@pytest.mark.parametrize("cross", [True, False])
@torch.no_grad()
def test_scales_fold_into_the_weights(cross):
    coder, x = random_transcoder(cross), torch.randn(N, L, C).double()
    plain = coder.folded().double()
    assert (plain.scale_in == 1).all() and (plain.scale_out == 1).all()
    torch.testing.assert_close(plain(x), coder(x))
    torch.testing.assert_close(plain.features(x), coder.features(x))


@torch.no_grad()
def test_at_the_start_norms_are_one_and_features_fire_as_often_as_asked():
    torch.manual_seed(0)
    x, y = 3 * torch.randn(4000, L, C), 0.1 * torch.randn(4000, L, C) + 1
    coder = Transcoder(L, C, F)
    coder.start(x, y)
    for scaled in (x * coder.scale_in, y * coder.scale_out):
        torch.testing.assert_close(scaled.norm(dim=-1).mean(0), torch.full((L,), math.sqrt(C)))
    rates = (coder.features(x) > 0).float().mean(0)
    assert (rates - FIRES).abs().max() < 0.005


@torch.no_grad()
def test_what_mlps_read_and_write_is_the_models():
    model, tokens = random_model(), torch.randint(0, 11, (2, 5))
    x, y = read_and_written(model, tokens)
    assert x.shape == y.shape == (2, 5, L, C)
    for layer, block in enumerate(model.blocks):
        torch.testing.assert_close(block.mlp(x[:, :, layer]), y[:, :, layer])
    parts = model.transformer
    stream = parts.wte(tokens) + parts.wpe(torch.arange(5))
    stream = stream + model.blocks[0].attn(model.blocks[0].ln_1(stream))[0]
    torch.testing.assert_close(x[:, :, 0], model.blocks[0].ln_2(stream))


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_a_replaced_model_is_the_model_with_those_writes(gated):
    """By hand: block by block, each MLP's write computed from the features of this run's layers."""
    model, coder = random_model(gated=gated, gate_bias=0.2), random_transcoder()
    tokens, parts = torch.randint(0, 11, (2, 5)), model.transformer
    with replacing(model, coder):
        replaced = model(tokens)[0]
    x, read = parts.wte(tokens) + parts.wpe(torch.arange(5)), torch.zeros(2, 5, L, C).double()
    for layer, block in enumerate(model.blocks):
        x = x + block.attn(block.ln_1(x), bias=0.2)[0]
        read[:, :, layer] = block.ln_2(x)
        x = x + coder(read)[:, :, layer]  # of layers that are not there yet it needs nothing
    torch.testing.assert_close(replaced, model.lm_head(parts.ln_f(x)))
    assert not torch.allclose(model(tokens)[0], replaced)


@torch.no_grad()
def test_quality_is_the_definition_and_what_it_says_counts_where_something_is_asked():
    """Of two batches with one and three places: a mean over these four, and over no other."""
    model, coder = random_model(), random_transcoder()
    tokens, targets = torch.randint(0, 11, (2, 1, 5)), torch.full((2, 1, 5), -1)
    asked = [(0, 4), (1, 1), (1, 2), (1, 3)]
    for row, place in asked:
        targets[row, 0, place] = 0
    found = quality(model, coder, zip(tokens, targets))
    x, y = read_and_written(model, tokens[:, 0])
    by_hand = 1 - (coder(x) - y).square().sum() / (y - y.flatten(0, 1).mean(0)).square().sum()
    assert found["explained"] == pytest.approx(by_hand.item())
    assert found["l0"] == pytest.approx((coder.features(x) > 0).sum().item() / (10 * L))
    before = model(tokens[:, 0])[0].log_softmax(-1)
    with replacing(model, coder):
        after = model(tokens[:, 0])[0].log_softmax(-1)
    kl = [(before[at].exp() * (before[at] - after[at])).sum().item() for at in asked]
    agrees = [before[at].argmax() == after[at].argmax() for at in asked]
    assert found["kl_where_asked"] == pytest.approx(sum(kl) / 4)
    assert found["agrees_where_asked"] == sum(agrees) / 4


def fitted(x, y, shape, steps, c, cross=True, d=0.1):
    torch.manual_seed(0)
    coder = Transcoder(**shape, cross=cross)
    coder.start(x, y)
    optimizer = torch.optim.Adam(coder.parameters(), lr=5e-3)
    for step in range(steps):
        loss, _ = coder.loss(x, y, c * min(1, step / (0.7 * steps)), d)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return coder


@pytest.mark.slow
def test_a_planted_dictionary_is_found():
    """y = sum of relu(x . e_i) d_i over few i at a time: the decoders are the planted ones, up to length."""
    torch.manual_seed(0)
    planted, width = 8, 16
    read = torch.linalg.qr(torch.randn(width, width))[0][:planted]
    write = torch.nn.functional.normalize(torch.randn(planted, width), dim=-1)
    active = (torch.rand(2000, planted) < 0.05) * torch.rand(2000, planted).add(0.5)
    x, y = active @ read, active @ write
    coder = fitted(x[:, None], y[:, None], {"L": 1, "C": width, "F": 16}, 1500, c=30.0)
    decoders = torch.nn.functional.normalize(coder.folded().decoder[0, 0], dim=-1)
    fires = (coder.features(x[:, None]) > 0).float().mean(0)[0] > 0.02
    best = (decoders[fires] @ write.T).max(0).values
    assert (best > 0.99).all() and fires.sum() == planted, best


@pytest.mark.slow
def test_two_hops_are_one_for_a_cross_layer_transcoder_and_two_for_a_per_layer_one():
    """The second MLP repeats what the first has written: the cross-layer one says it from the first layer's
    features, and needs none in the second. (Lange et al. 2026 warn of it.)
    """
    torch.manual_seed(0)
    planted, width = 6, 12
    read = torch.linalg.qr(torch.randn(width, width))[0]
    active = (torch.rand(1500, planted) < 0.05) * torch.rand(1500, planted).add(0.5)
    first, second = active @ read[:planted], active @ read[planted:]
    x, y = torch.stack([first, second], 1), torch.stack([second, first], 1)  # y^2 is made of x^1 as well
    fires = {}
    for cross in (True, False):
        coder = fitted(x, y, {"L": 2, "C": width, "F": 12}, 1500, c=30.0, cross=cross)
        off = (coder(x) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert off < 0.1
        fires[cross] = (coder.features(x) > 0).float().sum((1, 2)).mean().item()
    assert fires[True] < 0.7 * fires[False], fires
