"""The plain gated attention against an independent computation, edge by edge, and the properties that the
paper relies on.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fast.attention import attention
from gate import gated_attention, logistic_noise, sampled_gates


def qkv(B=2, H=2, T=5, D=3, scale=1.5):
    return [(scale * torch.randn(B, H, T, D, dtype=torch.float64)).requires_grad_() for _ in range(3)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def edge_by_edge(q, k, v, bias, temperature, noise, linear, dy, ddensity):
    """Gated attention and its gradients with Python loops over single edges. noise: zeros are thresholds.

    The derivatives are written down by hand: dL/dA_ij = p_ij (dy_i . v_j); the straight-through dA/ds =
    sigma'((s + n) / t) / t; the softmax's dL/da_ij = p_ij (g_ij - sum_m p_im g_im) with g_ij = A_ij (dy_i .
    v_j); da_ij/dq_i = k_j / sqrt(D).
    """
    B, H, T, D = q.shape
    y, dq, dk, dv, density = np.zeros(q.shape), np.zeros(q.shape), np.zeros(q.shape), np.zeros(q.shape), 0.0
    edges = B * H * T * (T + 1) / 2
    for b in range(B):
        for h in range(H):
            for i in range(T):
                a = [sum(q[b, h, i, d] * k[b, h, j, d] for d in range(D)) / math.sqrt(D)
                     for j in range(i + 1)]
                top = max(a)
                z = sum(math.exp(x - top) for x in a)
                p = [math.exp(x - top) / z for x in a]
                s = [x + bias[h] for x in a]
                noisy = [x + noise[b, h, i, j] for j, x in enumerate(s)]
                A = [1.0 if x > 0 else 0.0 for x in noisy]
                reach = [sum(dy[b, h, i, d] * v[b, h, j, d] for d in range(D)) for j in range(i + 1)]
                mean = sum(p[j] * A[j] * reach[j] for j in range(i + 1))
                for j in range(i + 1):
                    y[b, h, i] += A[j] * p[j] * v[b, h, j]
                    dv[b, h, j] += A[j] * p[j] * dy[b, h, i]
                    da = p[j] * (A[j] * reach[j] - mean)
                    soft = sigmoid(noisy[j] / temperature)
                    da += p[j] * reach[j] * soft * (1 - soft) / temperature
                    open_ = sigmoid(s[j])
                    if linear and s[j] > 0:
                        density += (0.5 + s[j] / 4) / edges
                        da += ddensity / 4 / edges
                    else:
                        density += open_ / edges
                        da += ddensity * open_ * (1 - open_) / edges
                    dq[b, h, i] += da * k[b, h, j] / math.sqrt(D)
                    dk[b, h, j] += da * q[b, h, i] / math.sqrt(D)
    return y, density, dq, dk, dv


@pytest.mark.parametrize("gates", ["sample", "threshold"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bias, temperature", [([0.0, 0.0], 1.0), ([3.0, 3.0], 0.7), ([-1.0, 2.0], 2.0)])
@pytest.mark.parametrize("T", [1, 6])
def test_equals_a_loop_over_single_edges(gates, linear, bias, temperature, T):
    q, k, v = qkv(T=T)
    noise = logistic_noise((2, 2, T, T)).double() * (gates == "sample")
    dy = torch.randn(q.shape, dtype=torch.float64)
    y, density, _ = gated_attention(q, k, v, torch.tensor(bias).view(2, 1, 1), temperature, gates,
                                    noise=noise if gates == "sample" else None, linear_penalty=linear)
    ((y * dy).sum() + 7.0 * density).backward()
    arrays = [t.detach().numpy() for t in (q, k, v)]
    expected = edge_by_edge(*arrays, bias, temperature, noise.numpy(), linear, dy.numpy(), 7.0)
    for ours, by_hand in zip((y, density, q.grad, k.grad, v.grad), expected):
        np.testing.assert_allclose(ours.detach().numpy(), by_hand, rtol=1e-10, atol=1e-12)


def test_gradcheck_where_the_function_is_smooth():
    q, k, v = qkv(B=1, H=1, T=4, D=2, scale=1.0)
    # far from s = 0 the gates are constants
    assert torch.autograd.gradcheck(lambda *qkv: gated_attention(*qkv, 90.0)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: gated_attention(*qkv, dense=True)[0], (q, k, v))
    # the penalty is smooth everywhere
    for linear in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, linear=linear: gated_attention(q, k, v, 0.5, linear_penalty=linear)[1], (q, k))


def test_a_bias_that_opens_everything_is_ordinary_attention():
    q, k, v = qkv()
    ordinary = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for options in ({"bias": 1e4}, {"dense": True}, {"dense": True, "return_gates": True}):
        y, density, _ = gated_attention(q, k, v, **options)
        torch.testing.assert_close(y, ordinary)
        assert density.item() == pytest.approx(1)


def test_shut_heads_write_exactly_zero():
    q, k, v = qkv()
    y, density, gates = gated_attention(q, k, v, -1e4, gates="sample", return_gates=True)
    assert (y == 0).all() and (gates.open == 0).all() and density == 0


def test_shutting_an_edge_removes_its_term_and_changes_no_other():
    q, k, v = qkv(B=1, H=1)
    keep = torch.ones(5, 5, dtype=torch.bool)
    keep[4, 1] = False
    whole, _, gates = gated_attention(q, k, v, 1e4, return_gates=True)
    cut, _, cut_gates = gated_attention(q, k, v, 1e4, keep=keep, return_gates=True)
    torch.testing.assert_close(whole - cut, torch.zeros_like(whole).index_put_(
        (torch.tensor(0), torch.tensor(0), torch.tensor(4)), gates.pattern[0, 0, 4, 1] * v[0, 0, 1]))
    torch.testing.assert_close(cut_gates.pattern, gates.pattern)  # not renormalised


@pytest.mark.parametrize("how", ["sample", "threshold"])
def test_the_future_is_never_open_never_counted_and_sends_no_gradient(how):
    q, k, v = qkv(T=6)
    y, density, gates = gated_attention(q, k, v, 5.0, gates=how, return_gates=True)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    assert (gates.open[..., future] == 0).all() and (gates.pattern[..., future] == 0).all()
    y[:, :, 2].sum().backward()
    assert (k.grad[:, :, 3:] == 0).all() and (v.grad[:, :, 3:] == 0).all() and (q.grad[:, :, 3:] == 0).all()
    # what is counted: the mean over causal pairs alone
    s = (q @ k.transpose(-2, -1) / math.sqrt(3) + 5.0).detach()
    assert density.item() == pytest.approx(s.sigmoid()[..., ~future].mean().item(), rel=1e-6)


def test_sampled_gates_open_with_probability_sigmoid_of_s():
    s = torch.linspace(-4, 4, 9).repeat(20_000, 1)
    share = sampled_gates(s).mean(0)
    error = share - s[0].sigmoid()
    # five standard deviations
    assert (error.abs() < 5 * (s[0].sigmoid() * (1 - s[0].sigmoid()) / 20_000).sqrt()).all()


def test_noise_is_logistic_finite_and_different_every_time():
    n = logistic_noise((1_000_000,))
    assert n.isfinite().all() and n.dtype == torch.float32
    assert n.mean().item() == pytest.approx(0, abs=0.01)
    assert n.var().item() == pytest.approx(math.pi**2 / 3, rel=0.01)
    assert not torch.equal(n[:10], logistic_noise((10,)))


def test_half_precision_keeps_its_type_and_comes_close():
    q, k, v = (t.detach().float() for t in qkv(D=16))
    exact = gated_attention(q, k, v, 1e4)[0]
    y, density, _ = gated_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 1e4)
    assert y.dtype == torch.bfloat16 and density.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)


def test_wrong_arguments_are_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="one shape"):
        gated_attention(q, k[:, :, :3], v)
    with pytest.raises(ValueError, match="temperature"):
        gated_attention(q, k, v, temperature=0.0)
    with pytest.raises(ValueError, match="gates is 'sample' or 'threshold', not 'thresholds'"):
        gated_attention(q, k, v, gates="thresholds")


@pytest.mark.parametrize("dense", [True, False])
def test_under_autocast_the_scores_stay_exact_and_the_output_has_the_values_type(dense):
    """bfloat16 has 8 bits: a score of 20 would be off by 0.05, and the gate with it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 16, 8).bfloat16() * 3 for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        y, density, gates = gated_attention(q, k, v, 0.3, dense=dense, return_gates=True)
        fast = attention(q, k, v, 0.3, dense=dense)[0]
    expected, exact_density, exact = gated_attention(q.float(), k.float(), v.float(), 0.3, dense=dense,
                                                     return_gates=True)
    assert torch.equal(gates.open, exact.open)
    assert torch.equal(gates.pattern, exact.pattern)
    assert density.float() == exact_density
    assert y.dtype == fast.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() < 0.05 and (fast.float() - expected).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(8, 8), (3, 6, 6), (2, 2, 6), (4, 3, 6, 6)])
def test_a_keep_of_another_shape_is_refused(shape):
    q, k, v = qkv(B=2, H=2, T=6)
    with pytest.raises(ValueError, match="keep must be"):
        gated_attention(q, k, v, keep=torch.ones(shape, dtype=torch.bool))


def test_a_float_keep_gives_a_gradient_by_edges():
    q, k, v = qkv(T=6)
    keep = torch.ones(6, 6, dtype=torch.float64, requires_grad=True)
    y, _, gates = gated_attention(q, k, v, 1e4, keep=keep, return_gates=True)
    [by_edge] = torch.autograd.grad(y[:, :, 5].sum(), keep)
    expected = (gates.pattern[:, :, 5, :, None] * v).sum((0, 1, 3))  # of the last query's edges
    torch.testing.assert_close(by_edge[5], expected)
    assert (by_edge[:5] == 0).all()
