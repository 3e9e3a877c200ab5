"""The plain gated attention against an independent computation, edge by edge, and the properties that the
paper relies on.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gate import gated_attention, logistic_noise, sampled_gates


def qkv(B=2, H=2, T=5, D=3, scale=1.5):
    return [(scale * torch.randn(B, H, T, D, dtype=torch.float64)).requires_grad_() for _ in range(3)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def edge_by_edge(q, k, v, bias, temperature, noise, linear, dy, ddensity):
    """Gated attention and its gradients with Python loops over single edges. noise None: deterministic gates.

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
                a = [
                    sum(q[b, h, i, d] * k[b, h, j, d] for d in range(D)) / math.sqrt(D) for j in range(i + 1)
                ]
                top = max(a)
                z = sum(math.exp(x - top) for x in a)
                p = [math.exp(x - top) / z for x in a]
                s = [x + bias[h] for x in a]
                noisy = s if noise is None else [x + noise[b, h, i, j] for j, x in enumerate(s)]
                A = [1.0 if x > 0 else 0.0 for x in noisy]
                reach = [sum(dy[b, h, i, d] * v[b, h, j, d] for d in range(D)) for j in range(i + 1)]
                mean = sum(p[j] * A[j] * reach[j] for j in range(i + 1))
                for j in range(i + 1):
                    y[b, h, i] += A[j] * p[j] * v[b, h, j]
                    dv[b, h, j] += A[j] * p[j] * dy[b, h, i]
                    da = p[j] * (A[j] * reach[j] - mean)
                    if noise is not None:
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


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bias, temperature", [([0.0, 0.0], 1.0), ([3.0, 3.0], 0.7), ([-1.0, 2.0], 2.0)])
@pytest.mark.parametrize("T", [1, 6])
def test_equals_a_loop_over_single_edges(sample, linear, bias, temperature, T):
    q, k, v = qkv(T=T)
    noise = logistic_noise((2, 2, T, T)).double() if sample else None
    dy = torch.randn(q.shape, dtype=torch.float64)
    y, density, _ = gated_attention(q, k, v, torch.tensor(bias).view(2, 1, 1), temperature, sample,
                                    noise=noise, linear_penalty=linear)
    ((y * dy).sum() + 7.0 * density).backward()
    arrays = [t.detach().numpy() for t in (q, k, v)]
    expected = edge_by_edge(*arrays, bias, temperature, noise.numpy() if sample else None, linear, dy.numpy(),
                            7.0)
    for ours, by_hand in zip((y, density, q.grad, k.grad, v.grad), expected):
        np.testing.assert_allclose(ours.detach().numpy(), by_hand, rtol=1e-10, atol=1e-12)


def test_gradcheck_where_the_function_is_smooth():
    q, k, v = qkv(B=1, H=1, T=4, D=2, scale=1.0)
    # far from s = 0 the gates are constants
    assert torch.autograd.gradcheck(lambda *qkv: gated_attention(*qkv, 9.0)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: gated_attention(*qkv, dense=True)[0], (q, k, v))
    # the penalty is smooth everywhere
    assert torch.autograd.gradcheck(lambda q, k: gated_attention(q, k, v, 0.5)[1], (q, k))
    assert torch.autograd.gradcheck(
        lambda q, k: gated_attention(q, k, v, 0.5, linear_penalty=True)[1], (q, k)
    )


def test_a_bias_that_opens_everything_is_ordinary_attention():
    q, k, v = qkv()
    ordinary = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for options in ({"bias": 1e4}, {"dense": True}, {"dense": True, "return_gates": True}):
        y, density, _ = gated_attention(q, k, v, **options)
        torch.testing.assert_close(y, ordinary)
        assert density.item() == pytest.approx(1)


def test_shut_heads_write_exactly_zero():
    q, k, v = qkv()
    y, density, gates = gated_attention(q, k, v, -1e4, sample=True, return_gates=True)
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


@pytest.mark.parametrize("sample", [False, True])
def test_the_future_is_never_open_never_counted_and_sends_no_gradient(sample):
    q, k, v = qkv(T=6)
    y, density, gates = gated_attention(q, k, v, 5.0, sample=sample, return_gates=True)
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


def test_temperature_changes_gradients_and_no_value():
    q, k, v = qkv()
    noise = logistic_noise((2, 2, 5, 5)).double()
    y1, _, _ = gated_attention(q, k, v, 1.0, 1.0, True, noise=noise)
    y2, _, _ = gated_attention(q, k, v, 1.0, 0.3, True, noise=noise)
    assert torch.equal(y1, y2)
    g1, g2 = torch.autograd.grad(y1.sum(), q, retain_graph=True)[0], torch.autograd.grad(y2.sum(), q)[0]
    assert not torch.allclose(g1, g2)


def test_the_linear_penalty_pulls_at_wide_open_edges():
    q, k, v = qkv(B=1, H=1, T=1)
    pulls = {}
    for linear in (False, True):
        s = torch.tensor(20.0, requires_grad=True)
        gated_attention(q, k, v, s - (q * k).sum() / math.sqrt(3), linear_penalty=linear)[1].backward()
        pulls[linear] = s.grad.item()
    assert pulls[True] == 0.25 and pulls[False] < 1e-8


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


@pytest.mark.parametrize("dense", [True, False])
def test_under_autocast_the_scores_stay_exact_and_the_output_has_the_values_type(dense):
    """bfloat16 has 8 bits: a score of 20 would be off by 0.05, and the gate with it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 16, 8).bfloat16() * 3 for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        y, density, gates = gated_attention(q, k, v, 0.3, dense=dense, return_gates=True)
        fast = gated_attention(q, k, v, 0.3, dense=dense)[0]
    expected, exact_density, exact = gated_attention(q.float(), k.float(), v.float(), 0.3, dense=dense,
                                                     return_gates=True)
    assert torch.equal(gates.open, exact.open)
    assert torch.equal(gates.pattern, exact.pattern)
    assert density.float() == exact_density
    assert y.dtype == fast.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() < 0.05 and (fast.float() - expected).abs().max() < 0.05


def test_without_noise_values_are_those_of_evaluation_and_gradients_those_of_training():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y, density, _ = gated_attention(q, k, v, 0.3, sample=True, noise=0.0)
    judged, judged_density, _ = gated_attention(q, k, v, 0.3, sample=False)
    assert torch.equal(y, judged) and torch.equal(density, judged_density)
    as_zeros, _, _ = gated_attention(q, k, v, 0.3, sample=True,
                                     noise=torch.zeros(2, 2, 8, 8, dtype=torch.float64))
    ours, plain, frozen = (
        torch.autograd.grad(out.square().sum(), (q, k), retain_graph=True) for out in (y, as_zeros, judged)
    )
    assert all(torch.allclose(a, b) for a, b in zip(ours, plain))
    assert not any(torch.allclose(a, b) for a, b in zip(ours, frozen))


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


def test_renormalised_rows_of_open_edges_sum_to_one_and_shut_rows_stay_zero():
    q, k, v = qkv(T=7)
    y, density, gates = gated_attention(q, k, v, -0.5, renormalise=True, return_gates=True)
    weights = gates.open * gates.pattern
    some = gates.open.sum(-1) > 0
    assert 0 < some.double().mean() < 1
    torch.testing.assert_close(weights.sum(-1), some.to(weights.dtype))
    by_hand = (q @ k.transpose(-2, -1) / math.sqrt(3)).masked_fill(gates.open == 0, -math.inf).softmax(-1)
    torch.testing.assert_close(y, by_hand.nan_to_num() @ v)
    assert density == gated_attention(q, k, v, -0.5)[1]
    long = [torch.randn(1, 1, 80, 4) for _ in range(3)]  # a context that a fast form would take
    renormalised, plain = (gated_attention(*long, 1.0, renormalise=True, impl=impl)[0]
                           for impl in ("auto", "plain"))
    assert torch.equal(renormalised, plain)


def assert_straight_through(found, objective, q, k, v, A, s):
    """found: gradients of q, k, v. Those of objective, a function of A among others, with dA/ds = sigmoid'(s)
    added where the edge is causal.
    """
    *expected, dA = torch.autograd.grad(objective, (q, k, v, A), retain_graph=True)
    causal = torch.ones(A.shape[-2:], dtype=torch.bool).tril()
    through = torch.autograd.grad(s, (q, k), dA * s.sigmoid() * (1 - s.sigmoid()) * causal)
    for i in range(2):
        expected[i] = expected[i] + through[i]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_renormalised_gradients_are_those_of_the_formula():
    """Straight-through: dA/ds = sigmoid'(s) in y = sum_j A_j p_j v_j / sum_j A_j p_j."""
    q, k, v = qkv(T=5)
    y, _, _ = gated_attention(q, k, v, 0.3, sample=True, noise=0.0, renormalise=True)
    dy = torch.randn_like(y)
    found = torch.autograd.grad((y * dy).sum(), (q, k, v))
    a = q @ k.transpose(-2, -1) / math.sqrt(3)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    p, s = a.masked_fill(~causal, -math.inf).softmax(-1), a + 0.3
    A = ((s > 0) & causal).double().requires_grad_()
    norm = (A * p).sum(-1, keepdim=True).clamp(min=1e-9)
    assert_straight_through(found, ((A * p) @ v / norm * dy).sum(), q, k, v, A, s)


def test_gates_on_weights_are_open_above_a_weight_and_do_not_feel_a_shift_of_a_row():
    q, k, v = qkv(T=7)
    y, density, gates = gated_attention(q, k, v, 1.5, on_weights=True, return_gates=True)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    p = (q @ k.transpose(-2, -1) / math.sqrt(3)).masked_fill(~causal, -math.inf).softmax(-1)
    torch.testing.assert_close(gates.pattern, p)
    assert torch.equal(gates.open, (p > math.exp(-1.5)).double())
    assert 0 < gates.open.sum() < causal.sum() * 2
    torch.testing.assert_close(y, (p * gates.open) @ v)
    chance = 1 / (1 + math.exp(-1.5) / p[..., causal])  # sigmoid(log p + b)
    torch.testing.assert_close(density, chance.mean())
    shifted = gated_attention(q, k + torch.randn(3, dtype=k.dtype), v, 1.5, on_weights=True)
    torch.testing.assert_close(shifted[0], y)
    torch.testing.assert_close(shifted[1], density)
    long = [torch.randn(1, 1, 80, 4) for _ in range(3)]  # a context that a fast form would take
    one, other = (gated_attention(*long, 1.5, on_weights=True, impl=impl)[0] for impl in ("auto", "plain"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("renormalise", [False, True])
def test_gradients_of_gates_on_weights_are_those_of_the_formula(renormalise):
    """Straight-through, s_ij = log p_ij + b: through A and through p."""
    q, k, v = qkv(T=5)
    q.data *= 0.2  # some rows are flat, and all of their edges shut
    y, density, _ = gated_attention(q, k, v, 1.2, sample=True, noise=0.0, on_weights=True,
                                    renormalise=renormalise)
    dy = torch.randn_like(y)
    found = torch.autograd.grad((y * dy).sum() + density, (q, k, v))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    a = (q @ k.transpose(-2, -1) / math.sqrt(3)).masked_fill(~causal, -1e4)
    log_p = a.log_softmax(-1)
    s, p = log_p + 1.2, log_p.exp() * causal
    A = ((s > 0) & causal).double().requires_grad_()
    assert (A.sum(-1) == 0).any() and (A.sum(-1) > 1).any()
    # a row of which nothing is open is divided by the least open weight
    norm = (A * p).sum(-1, keepdim=True).clamp(min=math.exp(-1.2)) if renormalise else 1.0
    objective = ((A * p) @ v / norm * dy).sum() + s.sigmoid()[..., causal].mean()
    assert_straight_through(found, objective, q, k, v, A, s)
