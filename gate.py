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
- Training samples the gates (binary Gumbel-softmax, straight-through); evaluation, and on text training too,
  takes the threshold A = [s > 0], with the same gradient.
- The penalty is the expected open fraction, the mean of sigmoid(s) over causal pairs: an L0 norm made smooth.
  One addition of ours keeps it from going flat: see linear_penalty below.
- A pair with j > i is never open, never counted, and sends no gradient.

Everything here is written for reading: it stores T x T matrices. fast/ computes the same without.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

GATES = "sample", "threshold"


@dataclass
class GateConfig:
    """The gate's settings, part of every model's config. A new one needs a default, and the same in
    training/config.py.
    """

    gated: bool = False  # attention through Bernoulli gates
    gate_bias: float | list = 3.0  # b in s = a + b; a list has one for each head, [layer][head] (handover.py)
    gate_temperature: float = 1.0  # of the straight-through gradient


class Gates(NamedTuple):
    """What `gated_attention(..., return_gates=True)` shows of its inside. Both (B, H, T, T), query by key."""

    open: torch.Tensor  # A_ij, 1.0 where the edge is open, 0.0 where it is shut
    pattern: torch.Tensor  # softmax_j(a_i.)_j before the mask

    @property
    def weights(self):
        """A_ij softmax_j(a_i.)_j, by which values are weighted."""
        return self.open * self.pattern


def gated_attention(q, k, v, bias=3.0, temperature=1.0, gates="threshold", *, dense=False,
                    linear_penalty=False, keep=None, noise=None, return_gates=False):
    """Causal attention with a Bernoulli gate on every edge, as the paper writes it.

    q, k, v       (B, H, T, D) queries, keys, values. k and v may have fewer heads, each for a group of q's
    bias          b in s = a + b: a float, or a tensor that broadcasts to (B, H, T, T), such as (H, 1, 1)
    temperature   t of the straight-through gradient, sigmoid'((s + n) / t) / t. Never changes values
    gates         'sample': as in training, A ~ Bernoulli(sigmoid(s)). 'threshold': as in evaluation,
                  A = [s > 0], which is n = 0. Both with the straight-through gradient
    dense         True: no gates, ordinary attention; the density is then 1
    linear_penalty  not the paper's: where s > 0 the penalty goes on along its tangent, 1/2 + s/4, and pulls
                  at wide-open edges, too, where sigmoid(s) is flat and edges that do nothing stay open. The
                  density may then exceed 1. It charges needed edges for being certain: the last steps want
                  sigmoid(s) again
    keep          ([[B,] H,] T, T) bool: an edge that is False here is shut; the penalty counts it still. A
                  float multiplies the gate, so that a gradient by edges can be had
    noise         n of 'sample', (B, H, T, T); None draws it
    return_gates  True: the third value is a `Gates`, else it is None

    Returns y (B, H, T, D); density, a scalar, the mean of the penalty over causal pairs, heads and batch; and
    the gates. Raises ValueError if the arguments do not fit together.
    """
    k, v = shared_among_heads(k, q), shared_among_heads(v, q)
    check(q, k, v, temperature, gates, keep)
    B, H, T, D = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)  # half precision is too coarse at the threshold
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (T, T), True where j <= i
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(exact) @ k.to(exact).transpose(-2, -1) / math.sqrt(D)  # a_ij              (B, H, T, T)
    pattern = scores.masked_fill(~causal, -math.inf).softmax(dim=-1)  # over all causal keys     (B, H, T, T)

    if dense:
        A = causal.expand(B, H, T, T).to(pattern.dtype)
        density = q.new_ones(())
    else:
        s = scores + bias  # gate logit s_ij                                                      (B, H, T, T)
        A = sampled_gates(s, temperature, 0.0 if gates == "threshold" else noise).masked_fill(~causal, 0)
        penalty = s.sigmoid()  # the chance that the edge is open
        if linear_penalty:
            penalty = torch.where(s > 0, 0.5 + s / 4, penalty)
        density = penalty.masked_fill(~causal, 0).sum() / (B * H * T * (T + 1) / 2)
    if keep is not None:
        A = A * keep
    y = (A * pattern).to(v.dtype) @ v  # y_i = sum_j A_ij p_ij v_j                                (B, H, T, D)
    return y, density, Gates(A, pattern) if return_gates else None


def sampled_gates(s, temperature=1.0, noise=None):
    """Binary Gumbel-softmax, straight-through.

    The value is [s + n > 0], the gradient that of sigmoid((s + n) / t), t the temperature:
    dA/ds = sigmoid'((s + n) / t) / t, by autograd here and by hand in fast/ (from 64 tokens on).
    s (B, H, T, T); noise: None draws it, else a tensor of that shape or 0.0.
    Source: Maddison et al. 2017, Jang et al. 2017; straight-through: Bengio et al. 2013.
    """
    noisy = s + (logistic_noise(s.shape, s.device) if noise is None else noise)
    hard = (noisy > 0).to(s.dtype)
    if not noisy.requires_grad:
        return hard
    soft = (noisy / temperature).sigmoid()
    return hard + (soft - soft.detach())  # the bracket is exactly 0, so the value is exactly 0 or 1


def logistic_noise(shape, device=None):
    """n = logit(u), u ~ U(0, 1): with it [s + n > 0] is Bernoulli(sigmoid(s)). float32, any shape."""
    # eps keeps u away from 0 and 1, where n would be infinite: |n| <= 16.6, and P(|n| > 16.6) is 1.2e-7
    return torch.rand(shape, device=device).logit_(eps=6e-8)


def shared_among_heads(x, q):
    """Grouped queries: keys or values x (B, fewer heads, T, D), each repeated for its group of q's heads."""
    if q.dim() == x.dim() == 4 and x.shape[1] < q.shape[1] and q.shape[1] % x.shape[1] == 0:
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
    return x


def check(q, k, v, temperature, gates="threshold", keep=None):
    """Raise ValueError if the arguments of `gated_attention` do not fit together."""
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "q, k, v must share one shape (B, H, T, D), but for a smaller number of heads in k and v that "
            f"divides H, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if gates not in GATES:
        raise ValueError(f"gates is 'sample' or 'threshold', not {gates!r}")
    B, H, T, _ = q.shape
    if keep is not None and tuple(keep.shape) not in ((T, T), (H, T, T), (1, H, T, T), (B, H, T, T)):
        raise ValueError(f"keep must be ([[B,] H,] T, T), here B={B}, H={H}, T={T}, not {tuple(keep.shape)}")
