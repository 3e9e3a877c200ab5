"""Gated attention on a GPU as three Triton kernels: tiles of scores that never leave the chip.

    keys j   0 . . . . . . . . T  A program owns ROWS queries of one head and walks over the key tiles up to
    queries +-----+-----+-----+   the diagonal. A tile of scores lives in registers and is gone with the next.
       i    |  1  |     |     |   For the softmax it carries, per query, the largest score so far (m) and the
            +-----+-----+-----+   sum l of exp(a - m); when m grows, what has been summed is multiplied by
            |  1  |  2  |     |   exp(m_old - m_new). At the end y = (sum of open terms) / l and
            +-----+-----+-----+   lse = m + log l, all of the forward pass that the backward pass needs.
       T    |  1  |  2  |  3  |
            +-----+-----+-----+   `forward_kernel` and `dq_kernel` walk rows of this picture, `dkdv_kernel`
                                  columns. Every program writes sums of its own: nothing races.

    a = q k^T / sqrt(D)     s = a + b     A = [u > sigmoid(-s)]     u of noise.py, made again in every kernel
    y_i  = sum_j A p v_j                  p = exp(a - lse_i)
    w    = dy_i . v_j                     delta_i = y_i . dy_i
    e    = p (A w - delta_i)              through the softmax
         + p w sigmoid'((s + n) / t) / t  through the gate, straight-through; n = logit(u), t the temperature
         + g sigmoid'(s)                  through the penalty, g its gradient
    dv_j = sum_i A p dy_i     dq_i = sum_j e k_j / sqrt(D)     dk_j = sum_i e q_i / sqrt(D)

(tiled.py derives this line by line.) Products: two forward; dq three, dk and dv four, because both make a and
w. One kernel for all three would need five, and atomic additions.

Notable:
- Half-precision inputs are multiplied as they are and summed in float32, so a is exact at the gate's
  threshold. e and A p are rounded to the inputs' type for their products, as in flash attention. float16
  needs a loss scaler, or the penalty's gradient underflows; bfloat16 needs none.
- Every tile is computed whole, open edges or none. Branches that left out the products of dead tiles were
  compiled wrongly on an H100: in float32 dv was noise (torch 2.11, Triton 3.6; docs/speed.md).
- Widths that are no power of two are padded inside the kernel. Queries beyond the end of the text are zeros:
  what is computed for them is finite, meets zeros, and is not stored.
- TRITON_INTERPRET=1 runs all of it on a CPU (tests/fast/test_attention.py).

Online softmax: Milakov & Gimelshein 2018. Tiles, and the backward pass with lse and delta: Dao et al.,
FlashAttention 1, 2.
"""

import math

import torch
import triton
import triton.language as tl

from fast.noise import MULTIPLY_1, MULTIPLY_2

# unsigned here: shifts to the right bring zeros
M1, M2 = tl.constexpr(MULTIPLY_1), tl.constexpr(MULTIPLY_2 + 2**32)


@triton.jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)  # the hardware's exponential has base 2


# --- noise.py, in Triton ------------------------------------------------------------------------------------
@triton.jit
def scramble(x):
    x = (x ^ (x >> 16)) * M1
    return (x ^ (x >> 15)) * M2


@triton.jit
def mix(x):
    x = scramble(x)
    return x ^ (x >> 16)


@triton.jit
def codes(seed, head, position):
    """noise.edge_codes for one head and some positions.

    seed: where the rows' seed lies, or the columns', one further.
    """
    return mix(mix(mix(tl.load(seed).to(tl.uint32)) + head.to(tl.uint32)) + position.to(tl.uint32))


# --- what all three kernels do with a tile ------------------------------------------------------------------
@triton.jit
def gate_tile(left, right, i, j, scale, bias, row_codes, column_codes, NOISE: tl.constexpr):
    """a, s, share = sigmoid(s), odds of being shut given the noise, and open gates, of a tile.

    i and j broadcast to it; it may lie on its side: (keys, queries).
    """
    a = tl.dot(left, right, input_precision="ieee") * scale
    a = tl.where(j <= i, a, -float("inf"))  # sigmoid and exp of it are 0
    s = a + bias
    odds = exp(-s)
    share = 1 / (1 + odds)
    if NOISE:
        u = ((scramble(row_codes ^ column_codes) >> 16).to(tl.float32) + 0.5) * (1 / 65536)
        gate = u > 1 - share  # s + logit(u) > 0, without a logarithm
        odds = odds * ((1 - u) / u)  # exp(-(s + n))
    else:
        gate = s > 0
    return a, s, share, odds, gate


@triton.jit
def gradient_tile(
    s, share, odds, gate, p, dy, v, delta, dpenalty,
    TEMPERATURE: tl.constexpr, LINEAR: tl.constexpr,
):
    """e, the gradient of the scores of a tile, and p where gates are open.

    dy and v: the two factors of w, in the tile's orientation.
    """
    open_p = tl.where(gate, p, 0.0)
    if TEMPERATURE != 1.0:
        odds = exp(tl.log(odds) / TEMPERATURE)
    soft = 1 / (1 + odds)
    weight = open_p + p * (soft * (1 - soft) / TEMPERATURE)  # of w
    e = weight * tl.dot(dy, v, input_precision="ieee") - p * delta
    slope = share * (1 - share)
    if LINEAR:
        slope = tl.where(s > 0, 0.25, slope)
    return e + dpenalty * slope, open_p


# --- the three kernels --------------------------------------------------------------------------------------
@triton.jit
def forward_kernel(
    q, k, v, y, lse, penalty, bias, seed,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NOISE: tl.constexpr, LINEAR: tl.constexpr,
):
    # the longest rows first, so that none is left alone at the end
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    i, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (i < T)[:, None] & (d < D)[None, :]
    q_tile = tl.load(q + b * q_b + h * q_h + i[:, None] * q_t + d[None, :], inside, 0.0)  # (ROWS, WIDTH)
    head_bias = tl.load(bias + h)
    row_codes = codes(seed, head, i) if NOISE else i
    m, l = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    summed, charged = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS,), tl.float32)

    for start in range(0, tl.minimum((tile + 1) * ROWS, T), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k_there = (j < T)[None, :] & (d < D)[:, None]
        v_there = (j < T)[:, None] & (d < D)[None, :]
        # (WIDTH, COLUMNS)
        k_tile = tl.load(k + b * k_b + h * k_h + j[None, :] * k_t + d[:, None], k_there, 0.0)
        column_codes = codes(seed + 1, head, j) if NOISE else j
        # (COLUMNS, WIDTH); on its way early
        v_tile = tl.load(v + b * v_b + h * v_h + j[:, None] * v_t + d[None, :], v_there, 0.0)
        a, s, share, _, gate = gate_tile(
            q_tile, k_tile, i[:, None], j[None, :], scale, head_bias,
            row_codes[:, None], column_codes[None, :], NOISE,
        )
        if LINEAR:
            share = tl.where(s > 0, 0.5 + s / 4, share)
        charged += tl.sum(share, 1)

        m_new = tl.maximum(m, tl.max(a, 1))  # key 0 is in the first tile and every query sees it: finite
        p = exp(a - m_new[:, None])  # as yet without its denominator
        shrink = exp(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        summed *= shrink[:, None]
        m = m_new
        open_p = tl.where(gate, p, 0.0)
        summed += tl.dot(open_p.to(v_tile.dtype), v_tile, input_precision="ieee")

    row = head.to(tl.int64) * T + i
    tl.store(y + row[:, None] * D + d[None, :], (summed / l[:, None]).to(y.dtype.element_ty), inside)
    tl.store(lse + row, m + tl.log(l), i < T)
    tl.store(penalty + head * tl.num_programs(1) + tile, tl.sum(tl.where(i < T, charged, 0.0), 0))


@triton.jit
def dq_kernel(
    q, k, v, y, dy, dq, lse, delta, dpenalty, bias, seed,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TEMPERATURE: tl.constexpr, NOISE: tl.constexpr, LINEAR: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    i, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (i < T)[:, None] & (d < D)[None, :]
    row = head.to(tl.int64) * T + i
    q_tile = tl.load(q + b * q_b + h * q_h + i[:, None] * q_t + d[None, :], inside, 0.0)  # (ROWS, WIDTH)
    dy_tile = tl.load(dy + row[:, None] * D + d[None, :], inside, 0.0)  # (ROWS, WIDTH)
    lse_i = tl.load(lse + row, i < T, 0.0)
    y_tile = tl.load(y + row[:, None] * D + d[None, :], inside, 0.0)
    delta_i = tl.sum(y_tile.to(tl.float32) * dy_tile.to(tl.float32), 1)
    tl.store(delta + row, delta_i, i < T)  # for dkdv_kernel, which runs after this one
    head_bias, g = tl.load(bias + h), tl.load(dpenalty + head)
    row_codes = codes(seed, head, i) if NOISE else i
    gathered = tl.zeros((ROWS, WIDTH), tl.float32)

    for start in range(0, tl.minimum((tile + 1) * ROWS, T), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        there = (j < T)[None, :] & (d < D)[:, None]
        # (WIDTH, COLUMNS)
        k_tile = tl.load(k + b * k_b + h * k_h + j[None, :] * k_t + d[:, None], there, 0.0)
        v_tile = tl.load(v + b * v_b + h * v_h + j[None, :] * v_t + d[:, None], there, 0.0)
        column_codes = codes(seed + 1, head, j) if NOISE else j
        a, s, share, odds, gate = gate_tile(
            q_tile, k_tile, i[:, None], j[None, :], scale, head_bias,
            row_codes[:, None], column_codes[None, :], NOISE,
        )
        p = exp(a - lse_i[:, None])
        e, _ = gradient_tile(
            s, share, odds, gate, p, dy_tile, v_tile, delta_i[:, None], g, TEMPERATURE, LINEAR
        )
        gathered += tl.dot(e.to(k_tile.dtype), tl.trans(k_tile), input_precision="ieee")

    tl.store(dq + row[:, None] * D + d[None, :], (gathered * scale).to(dq.dtype.element_ty), inside)


@triton.jit
def dkdv_kernel(
    q, k, v, dy, dk, dv, lse, delta, dpenalty, bias, seed,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TEMPERATURE: tl.constexpr, NOISE: tl.constexpr, LINEAR: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.program_id(1)  # the first keys are read by the most queries
    b, h = (head // H).to(tl.int64), head % H
    j, d = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    inside = (j < T)[:, None] & (d < D)[None, :]
    k_tile = tl.load(k + b * k_b + h * k_h + j[:, None] * k_t + d[None, :], inside, 0.0)  # (COLUMNS, WIDTH)
    v_tile = tl.load(v + b * v_b + h * v_h + j[:, None] * v_t + d[None, :], inside, 0.0)
    head_bias, g = tl.load(bias + h), tl.load(dpenalty + head)
    column_codes = codes(seed + 1, head, j) if NOISE else j
    dk_tile, dv_tile = tl.zeros((COLUMNS, WIDTH), tl.float32), tl.zeros((COLUMNS, WIDTH), tl.float32)

    # tiles lie on their side here, (COLUMNS, ROWS): no transposing before the products
    for start in range(tile * COLUMNS // ROWS * ROWS, T, ROWS):
        i = start + tl.arange(0, ROWS)
        row = head.to(tl.int64) * T + i
        there = (i < T)[None, :] & (d < D)[:, None]
        q_tile = tl.load(q + b * q_b + h * q_h + i[None, :] * q_t + d[:, None], there, 0.0)  # (WIDTH, ROWS)
        dy_tile = tl.load(dy + row[None, :] * D + d[:, None], there, 0.0)
        lse_i, delta_i = tl.load(lse + row, i < T, 0.0), tl.load(delta + row, i < T, 0.0)
        row_codes = codes(seed, head, i) if NOISE else i
        a, s, share, odds, gate = gate_tile(
            k_tile, q_tile, i[None, :], j[:, None], scale, head_bias,
            row_codes[None, :], column_codes[:, None], NOISE,
        )
        p = exp(a - lse_i[None, :])
        e, open_p = gradient_tile(
            s, share, odds, gate, p, v_tile, dy_tile, delta_i[None, :], g, TEMPERATURE, LINEAR
        )
        dv_tile += tl.dot(open_p.to(dy_tile.dtype), tl.trans(dy_tile), input_precision="ieee")
        dk_tile += tl.dot(e.to(q_tile.dtype), tl.trans(q_tile), input_precision="ieee")

    at = head.to(tl.int64) * T * D + j[:, None] * D + d[None, :]
    tl.store(dk + at, (dk_tile * scale).to(dk.dtype.element_ty), inside)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), inside)


# --- what calls them ----------------------------------------------------------------------------------------
def ready(q, k, v, bias, seed):
    """Arguments that all kernels share: tensors whose last axis is dense, with their strides; shapes; sizes
    known when the kernel is compiled.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, H, T, D = q.shape
    # a kernel takes no None; without noise the seed is not read
    tensors = q, k, v, bias.to(torch.float32).contiguous(), bias if seed is None else seed
    numbers = *(x.stride(axis) for x in (q, k, v) for axis in range(3)), H, T, 1 / math.sqrt(D)
    return tensors, numbers, {"D": D, "WIDTH": max(16, triton.next_power_of_2(D)), "NOISE": seed is not None}


def launch(kernel, D, dtype, tile=None):
    """ROWS and COLUMNS of a kernel's tile, and options of its launch: what was fastest on an H100, of up
    to 22 choices a kernel at T = 1,024 and 4,096 that fit into small GPUs' registers and shared memory, too.

    tile: (ROWS, COLUMNS), powers of two from 16; None chooses.
    """
    if dtype == torch.float32:
        rows = columns = 16 if kernel is not forward_kernel and D > 64 else 32
        stages = 2
    elif kernel is forward_kernel:
        rows, columns, stages = (64, 32, 3) if D <= 64 else (64, 64, 2)
    elif kernel is dq_kernel:
        rows, columns, stages = 64, 32, 3
    else:
        rows, columns, stages = 32, 64, 3 if D <= 64 else 2
    rows, columns = tile or (rows, columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 4, "num_stages": stages}


def forward(q, k, v, bias, seed, temperature, linear_penalty, tile=None):
    """q, k, v (B, H, T, D); bias (H,); seed (2,) of the noise, or None.

    Returns y (B, H, T, D), the penalty's sum per head (B H), lse (B, H, T). tile: see `launch`.
    """
    (q, k, v, bias, seed), numbers, options = ready(q, k, v, bias, seed)
    B, H, T, D = q.shape
    options |= launch(forward_kernel, D, q.dtype, tile)
    tiles = triton.cdiv(T, options["ROWS"])
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    penalty = q.new_empty(B * H, tiles, dtype=torch.float32)
    with torch.cuda.device_of(q):  # the kernel runs where q is, which need not be the current GPU
        forward_kernel[(B * H, tiles)](q, k, v, y, lse, penalty, bias, seed, *numbers, **options,
                                       LINEAR=linear_penalty)
    return y, penalty.sum(1), lse


def backward(dy, dpenalty, q, k, v, bias, seed, y, lse, temperature, linear_penalty, tile=None):
    """dy as y, dpenalty (B H), the rest as in `forward`. Returns dq, dk, dv (B, H, T, D)."""
    (q, k, v, bias, seed), numbers, options = ready(q, k, v, bias, seed)
    B, H, T, D = q.shape
    dy, dpenalty, delta = dy.contiguous(), dpenalty.contiguous(), torch.empty_like(lse)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    options |= {"TEMPERATURE": temperature, "LINEAR": linear_penalty}
    of_dq, of_dkdv = (options | launch(kernel, D, q.dtype, tile) for kernel in (dq_kernel, dkdv_kernel))
    shared = lse, delta, dpenalty, bias, seed, *numbers
    with torch.cuda.device_of(q):
        dq_kernel[(B * H, triton.cdiv(T, of_dq["ROWS"]))](q, k, v, y, dy, dq, *shared, **of_dq)
        dkdv_kernel[(B * H, triton.cdiv(T, of_dkdv["COLUMNS"]))](q, k, v, dy, dk, dv, *shared, **of_dkdv)
    return [dq, dk, dv]
