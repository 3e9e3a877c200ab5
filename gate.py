"""The Bernoulli edge gate: attention in which every edge can be shut.

For one head with queries q, keys k and values v of width D, query position i and key position j <= i
(arXiv 2512.05865, the definition of its gated attention):

    a_ij = q_i . k_j / sqrt(D)                   the ordinary attention score
    s_ij = a_ij + b                              gate logit; b is the gate bias, a constant
    A_ij ~ Bernoulli(sigmoid(s_ij))              the edge is open (1) or shut (0)
    y_i  = sum_j A_ij softmax_j(a_i.)_j v_j      softmax over ALL causal keys, then masked

Notable:
- No parameters of its own. The gate reuses q and k, so any pre-trained checkpoint fits as it is.
- The softmax is not renormalised after the mask: to shut an edge removes its term and changes no other.
  A head whose edges are all shut writes exactly zero (then c_proj adds its bias): whole heads switch off.
- Training samples the gates (binary Gumbel-softmax, straight-through); evaluation is deterministic, A = [s > 0].
- The penalty is the expected open fraction, the mean of sigmoid(s) over causal pairs: an L0 norm made smooth.
  One addition of ours, off by default, keeps it from going flat: see linear_penalty below.
- A pair with j > i is never open, never counted, and sends no gradient.

Everything here is written for reading: it stores T x T matrices. Two fast forms compute the same without: fast/tiled.py for CPUs,
fast/kernels.py for GPUs; `choose_impl` says when. Nothing else in the project knows which one is used.
"""

import importlib.util
import math
import os
from typing import NamedTuple

import torch
from torch.nn import functional as F

from fast.noise import new_seed

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Gates(NamedTuple):
    """What `gated_attention(..., return_gates=True)` shows of its inside. Both are (B, H, T, T), query by key."""

    open: torch.Tensor  # A_ij, 1.0 where the edge is open, 0.0 where it is shut
    pattern: torch.Tensor  # softmax_j(a_i.)_j before the mask; open * pattern is what the values are weighted with


def logistic_noise(shape, device=None):
    """n = logit(u), u ~ U(0, 1): the noise for which [s + n > 0] is Bernoulli(sigmoid(s)). float32, any shape."""
    # eps keeps u away from 0 and 1, where n would be infinite; it caps |n| at 16.6, and P(|n| > 16.6) is 1.2e-7
    return torch.rand(shape, device=device).logit_(eps=6e-8)


def gated_attention(q, k, v, bias=3.0, temperature=1.0, sample=False, *,
                    dense=False, linear_penalty=False, noise=None, keep=None, return_gates=False, impl="auto"):
    """Causal attention with a Bernoulli gate on every edge, as the paper writes it.

    q, k, v       (B, H, T, D) queries, keys, values; k and v may have fewer heads, each for H / (their number) neighbours of q (grouped queries)
    bias          b in s = a + b: a float, or a tensor that broadcasts to (B, H, T, T), such as (H, 1, 1). > 0: starts open
    temperature   of the straight-through gradient: sigmoid((s + n) / temperature). Changes gradients, never values
    sample        True: A ~ Bernoulli(sigmoid(s)), as in training.  False: A = [s > 0], as in evaluation
    dense         True: no gates, ordinary attention; the density is then 1
    linear_penalty  not the paper's: where s > 0 the penalty goes on along its tangent, 1/2 + s/4, so that it pulls as hard at a
                  wide-open edge as at one on the threshold. sigmoid(s) hardly pulls there: edges that do nothing stay open.
                  But it also charges needed edges for being certain to open, so the last steps want sigmoid(s) again
    noise         n when sampling: None draws it, a tensor (B, H, T, T) is taken as it is, 0.0 leaves it out: then values are those of
                  evaluation, A = [s > 0], and gradients those of training
    keep          bool, broadcasts to (B, H, T, T): an edge that is False here is shut whatever its gate says. The penalty does not see it
    return_gates  True: the third value is a `Gates`, else it is None
    impl          'plain', 'tiled', 'triton' or 'auto', see `choose_impl`. The fast forms know no keep, no return_gates, no noise tensor, no bias that
                  varies inside a head, no dense=True: those are computed by the plain formula always

    Returns y (B, H, T, D); density, a scalar, the mean of the penalty sigmoid(s) over causal pairs, heads and batch;
    and the gates. (Under linear_penalty the density may exceed 1.) Raises ValueError if q, k and v do not fit or temperature is not above 0.
    """
    if q.dim() == k.dim() == 4 and k.shape == v.shape and k.shape[1] < q.shape[1] and q.shape[1] % k.shape[1] == 0:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, H, T, D)
    if not q.shape == k.shape == v.shape or q.dim() != 4:
        raise ValueError(f"q, k, v must share one shape (B, H, T, D), but for a smaller number of heads in k and v that divides H, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    B, H, T, D = q.shape
    dtype, exact = v.dtype, torch.promote_types(q.dtype, torch.float32)  # half precision is too coarse at the gate's threshold

    if dense and keep is None and not return_gates:
        if q.device.type == "cpu":  # whose backward pass in bfloat16 is eight times slower than in float32
            q, k, v = q.to(exact), k.to(exact), v.to(exact)
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).to(dtype), q.new_ones(()), None

    knows_not = dense or return_gates or keep is not None or torch.is_tensor(noise) or noise not in (None, 0)  # what the fast forms cannot do
    if not knows_not and (impl := choose_impl(impl, q.device.type, T, D, q.dtype)) != "plain" and (head_bias := bias_of_heads(bias, H, q.device, exact)) is not None:
        from fast import op  # here, so that the formula can be read, and run, without it
        seed = new_seed(q.device) if sample and noise is None else None
        impl = "tiled compiled" if impl == "tiled" and torch.compiler.is_compiling() else impl
        y, penalty, _ = op.forward(q, k, v, head_bias, seed, sample, temperature, linear_penalty, impl)
        return y, penalty.sum() / (B * H * T * (T + 1) / 2), None

    # The plain formula: everything below
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (T, T), True where j <= i
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(exact) @ k.to(exact).transpose(-2, -1) / math.sqrt(D)  # a_ij       (B, H, T, T)
    pattern = scores.masked_fill(~causal, -math.inf).softmax(dim=-1)  #    softmax over all causal keys

    if dense:
        gates, density = causal.expand(B, H, T, T).to(pattern.dtype), q.new_ones(())
    else:
        s = scores + bias  # gate logit s_ij                               (B, H, T, T)
        gates = sampled_gates(s, temperature, noise) if sample else (s > 0).to(pattern.dtype)
        gates = gates.masked_fill(~causal, 0)
        penalty = s.sigmoid()  # expected number of open edges
        if linear_penalty:
            penalty = torch.where(s > 0, 0.5 + s / 4, penalty)  # continued along its tangent at s = 0
        density = penalty.masked_fill(~causal, 0).sum() / (B * H * T * (T + 1) / 2)
    if keep is not None:
        gates = gates * keep

    y = (gates * pattern).to(dtype) @ v  # y_i = sum_j A_ij p_ij v_j      (B, H, T, D)
    return y, density, Gates(gates, pattern) if return_gates else None


def sampled_gates(s, temperature=1.0, noise=None):
    """Binary Gumbel-softmax, straight-through: the value is [s + n > 0], the gradient that of sigmoid((s + n) / temperature).

    s (B, H, T, T); noise: None draws it, else a tensor of that shape or 0.0. Source: Maddison et al. 2017, Jang et al. 2017; straight-through: Bengio et al. 2013.
    """
    noisy = s + (logistic_noise(s.shape, s.device) if noise is None else noise)
    hard = (noisy > 0).to(s.dtype)
    soft = (noisy / temperature).sigmoid()
    return hard + (soft - soft.detach())  # the bracket is exactly 0, so the value is exactly 0 or 1


def choose_impl(name, device, T, D, dtype=torch.float32):
    """Who computes gated attention: 'plain', this file's formula; 'tiled' (fast/tiled.py); 'triton' (fast/kernels.py). 'auto' is the fastest that fits.

    That is, for contexts of 64 and more, triton on a GPU (half precision, heads up to 128 wide) and tiled on a CPU. In float32 the kernels failed on an H100 (fast/kernels.py).
    device: 'cpu', 'cuda', ...; T tokens of context, D the width of a head. TRITON_INTERPRET=1 lets 'triton', asked for by name, run on a CPU, slowly.
    Raises ValueError if name is none of these, or 'tiled' or 'triton' where they cannot run.
    """
    gpu = device.startswith("cuda")
    if name == "tiled" and device != "cpu":
        raise ValueError(f"attention_impl='tiled' is for CPUs; on {device} use 'auto'")
    half = dtype in (torch.bfloat16, torch.float16)
    triton_fits = D <= 128 and HAS_TRITON and (half if gpu else dtype != torch.float64)
    if name == "auto":
        return "plain" if T < 64 else "triton" if gpu and triton_fits else "tiled" if device == "cpu" else "plain"
    if name not in ("plain", "tiled", "triton"):
        raise ValueError(f"attention_impl is 'auto', 'plain', 'tiled' or 'triton', not {name!r}")
    if name == "triton" and not (triton_fits and (gpu or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(f"attention_impl='triton' needs a GPU, the triton package, heads up to 128 wide and half precision (--dtype=bfloat16); here: {device}, width {D}, {dtype}. Use 'auto'")
    return name


def bias_by_layer(config, device):
    """For every layer the bias that `gated_attention` takes: config.gate_bias itself, or of a list [layer][head] a (H, 1, 1)."""
    b = config.gate_bias
    return torch.tensor(b, device=device)[:, :, None, None].unbind(0) if isinstance(b, list) else [b] * config.n_layer


def bias_of_heads(bias, H, device, dtype):
    """bias as a tensor (H,), or None if it varies inside a head or wants a gradient."""
    if not torch.is_tensor(bias):
        return torch.full((H,), bias, device=device, dtype=dtype)
    if bias.requires_grad:
        return None
    if bias.numel() == 1:
        return bias.reshape(1).to(device, dtype).expand(H)
    return bias.reshape(H).to(device, dtype) if bias.shape[-3:] == (H, 1, 1) and bias.numel() == H else None
