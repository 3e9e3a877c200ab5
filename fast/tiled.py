"""Gated attention on a CPU without T x T matrices: a strip of queries at a time, forward and backward.

    keys      0 ........ T
    queries  +-----------------+   A strip: some queries of some heads, with all the keys before them. It is
       0     |##               |   made, used and thrown away while it is still in the cache. For the backward
             |#####            |   pass a number per query is kept, the logsumexp of its scores, and the strip
             |========##       |<- is made again: 30 % more multiplications, but no trip to memory. What lies
             |                 |   above the diagonal is never computed, half of the plain formula's work.
       T     +-----------------+

Forward, for a strip, by gate.py's formula:

    p_ij = exp(a_ij - lse_i)    y_i = sum_j A_ij p_ij v_j

Backward. Given dy and the gradient g of the penalty's sum, with w_ij = dy_i . v_j, n the noise and t the
temperature:

    dv_j     = sum_i A_ij p_ij dy_i                                     y is linear in v
    d(A)_ij  = p_ij w_ij,   d(p)_ij = A_ij w_ij                         the product rule
    through the gate     p_ij w_ij sigmoid'((s_ij + n_ij) / t) / t      straight-through: the soft gate's
    through the softmax  p_ij (A_ij w_ij - delta_i)                     softmax' = p_ij ([j = k] - p_ik)
                         delta_i = sum_k A_ik p_ik w_ik = y_i . dy_i    known before any strip is made
    through the penalty  g sigmoid'(s_ij)                               linear penalty, s > 0: g / 4
    e_ij     = d(a)_ij = the three together: s and a differ by a constant
    dq_i     = sum_j e_ij k_j / sqrt(D),   dk_j = sum_i e_ij q_i / sqrt(D)

Notable: sigmoid'(x) = sigmoid(x) sigmoid(-x). Where gates are thresholds, n = 0. Arithmetic is float32, or
float64 if the queries are. The noise comes from noise.py, made again in the backward pass. Inside a compiled
model the two functions that compute a strip are compiled as well: everything between their matrix products
becomes one loop. attention.py makes this an operator of torch, kernels.py does the same on a GPU.
"""

import functools
import math

import torch

from fast.noise import edge_codes, uniform

# scores in a strip, where contexts are short enough: half a megabyte in float32; the few such arrays that are
# alive at once stay in the cache
STRIP = 2**17
# queries in a strip: enough for a matrix product to be fast, and few enough that little is computed above the
# diagonal
ROWS = 64


def strips(heads, T):
    """Yield (heads, queries, keys), three slices, of every strip.

    Keys are rounded up to quarters of T, and heads are taken in equal groups: few different sizes, so that
    few functions are compiled. (What is rounded up lies in the future and is masked.)
    """
    quarter = ROWS * math.ceil(T / (4 * ROWS))
    for i in range(0, T, ROWS):
        end = min(i + ROWS, T)
        keys = min(math.ceil(end / quarter) * quarter, T)
        most = max(1, STRIP // (ROWS * keys))
        together = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
        for h in range(0, heads, together):
            yield slice(h, h + together), slice(i, end), slice(keys)


def strip_gates(q, k, bias, position, rows, columns):
    """Scores a, gate logits s, and s + n, of a strip (heads, queries, keys).

    position (queries): where they stand. rows: codes of the noise, or None.
    """
    a = q @ k.transpose(-2, -1)
    past = torch.arange(k.shape[1], device=k.device) <= position[:, None]
    a = torch.where(past, a, -math.inf)  # exp and sigmoid of it are 0, so it needs no further thought
    s = a + bias[:, None, None]
    return a, s, s if rows is None else s + uniform(rows[:, :, None], columns[:, None, :]).logit()


def forward_strip(q, k, v, bias, position, rows, columns, linear_penalty):
    """q (heads, queries, D), divided by sqrt(D); k, v (heads, keys, D).

    Returns y, lse (heads, queries, 1), the penalty's sum (heads).
    """
    a, s, noisy = strip_gates(q, k, bias, position, rows, columns)
    lse = a.logsumexp(-1, keepdim=True)
    p = (a - lse).exp()
    penalty = s.sigmoid()
    if linear_penalty:
        penalty = torch.where(s > 0, 0.5 + s / 4, penalty)
    return (noisy > 0).to(p.dtype) * p @ v, lse, penalty.sum((1, 2))  # a product, so that a NaN is seen


def backward_strip(dy, dpenalty, q, k, v, bias, position, rows, columns, lse, delta, temperature,
                   linear_penalty):
    """Gradients of what `forward_strip` returns: of q, and this strip's share of those of k and v.

    delta (heads, queries, 1), dpenalty (heads).
    """
    a, s, noisy = strip_gates(q, k, bias, position, rows, columns)
    p = (a - lse).exp()
    gate = (noisy > 0).to(p.dtype)
    dv = (gate * p).transpose(-2, -1) @ dy
    w = dy @ v.transpose(-2, -1)
    soft = (noisy / temperature).sigmoid()
    through = gate + soft * (1 - soft) / temperature
    share = s.sigmoid()
    slope = share * (1 - share)
    if linear_penalty:
        slope = torch.where(s > 0, 0.25, slope)
    e = p * (through * w - delta) + dpenalty[:, None, None] * slope
    return e @ k, e.transpose(-2, -1) @ q, dv


@functools.cache
def compiled(strip):
    """`strip` with all between its matrix products in one loop.

    Every size of a strip gets machine code of its own: fast, and no result hangs on which came first.
    """
    # sizes times options, not a mistake that repeats
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(strip, dynamic=False)


def prepare(q, k, v, bias, seed):
    """Heads of all examples in one row, in float32 or better: q / sqrt(D), k, v (B H, T, D); bias (B H); the
    noise's codes or two Nones.
    """
    B, H, T, D = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.reshape(B * H, T, D).to(exact).contiguous() for x in (q, k, v))
    codes = (None, None) if seed is None else edge_codes(seed, B * H, T)
    return q / math.sqrt(D), k, v, bias.to(exact).repeat(B), *codes


def forward(q, k, v, bias, seed, temperature, linear_penalty, fuse=False):
    """q, k, v (B, H, T, D); bias (H,); seed (2,) of the noise, or None.

    Returns y (B, H, T, D), the penalty's sum per head (B H), lse (B, H, T). fuse: compile the strips.
    """
    (B, H, T, D), dtype = q.shape, v.dtype
    q, k, v, bias, rows, columns = prepare(q, k, v, bias, seed)
    y, lse, penalty = torch.empty_like(q), q.new_empty(B * H, T, 1), q.new_zeros(B * H)
    strip, position = compiled(forward_strip) if fuse else forward_strip, torch.arange(T)
    for h, i, j in strips(B * H, T):
        noise = (None, None) if rows is None else (rows[h, i], columns[h, j])
        y[h, i], lse[h, i], part = strip(q[h, i], k[h, j], v[h, j], bias[h], position[i], *noise,
                                         linear_penalty)
        penalty[h] += part
    return y.view(B, H, T, D).to(dtype), penalty, lse.view(B, H, T)


def backward(dy, dpenalty, q, k, v, bias, seed, y, lse, temperature, linear_penalty, fuse=False):
    """dy as y, dpenalty (B H), the rest as in `forward`. Returns dq, dk, dv (B, H, T, D).

    The docstring above has the formulas.
    """
    (B, H, T, D), dtypes = q.shape, (q.dtype, k.dtype, v.dtype)
    q, k, v, bias, rows, columns = prepare(q, k, v, bias, seed)
    dy, y, lse = dy.reshape(q.shape).to(q.dtype), y.reshape(q.shape).to(q.dtype), lse.view(B * H, T, 1)
    delta = (y * dy).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    strip, position = compiled(backward_strip) if fuse else backward_strip, torch.arange(T)
    for h, i, j in strips(B * H, T):
        noise = (None, None) if rows is None else (rows[h, i], columns[h, j])
        dq[h, i], for_k, for_v = strip(dy[h, i], dpenalty[h], q[h, i], k[h, j], v[h, j], bias[h], position[i],
                                       *noise, lse[h, i], delta[h, i], temperature, linear_penalty)
        dk[h, j] += for_k
        dv[h, j] += for_v
    return [x.view(B, H, T, D).to(dtype) for x, dtype in zip((dq / math.sqrt(D), dk, dv), dtypes)]
