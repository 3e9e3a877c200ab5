"""Gate noise that is recomputed, never stored: a counter-based generator for a whole T x T matrix.

Sampled gates need a uniform number u_ij for every edge, the same in the forward and in the backward pass. A
fused kernel has no place to keep T x T numbers, and no order in which to draw them: its tiles run at once. So
u is a function of where it stands,

    row_i = mix(mix(mix(seed_0) + head) + i)           one call per query: T of them
    col_j = mix(mix(mix(seed_1) + head) + j)           one call per key:   T of them
    u_ij  = top 16 bits of scramble(row_i xor col_j)   two multiplications per edge: T x T of them

What is expensive is paid once per row and column; an edge pays a few cheap integer operations (Philox, what
torch uses on GPUs, takes ten rounds of two wide multiplications for four numbers). Head means b H + h: every
head of every example has noise of its own, every layer and step a new seed, two numbers from torch's
generator.

Notable:
- u is a multiple of 1/65536, plus half a step: never 0 or 1, its logit at most 11.8. An edge with s < -11.8
  can therefore not open by luck; Bernoulli(sigmoid(s)) would open one in 130,000 of them.
- No logarithm is needed to draw a gate: s + logit(u) > 0 is u > sigmoid(-s).
- `mix` is a mixer from Chris Wellons' "hash prospector" (lowbias32), a permutation of all 32-bit numbers in
  which every input bit moves every output bit half of the time. `scramble` is the same without its last step,
  which only changes bits that are cut off.
- torch computes with signed integers, whose shift to the right copies the sign: so a mask behind each shift.
  Products wrap around, as they should.
- tests/fast/test_noise.py: mean, variance, every bit, correlation along rows, columns, diagonals, rectangles,
  heads, seeds.

This file imports no other file of ours. kernels.py says the same once more, in Triton.
"""

import torch

MULTIPLY_1, MULTIPLY_2 = 0x7FEB352D, 0x846CA68B - 2**32  # lowbias32's, as signed numbers


def scramble(x):
    """Mix the bits of int32 x; good in the upper 16 bits."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MULTIPLY_1
    return (x ^ ((x >> 15) & 0x1FFFF)) * MULTIPLY_2


def mix(x):
    """Mix the bits of int32 x, good in all of them."""
    x = scramble(x)
    return x ^ ((x >> 16) & 0xFFFF)


def new_seed(device=None):
    """A seed for one call of attention, drawn from torch's own generator, so that `torch.manual_seed` decides
    it: int64 (2,), each from 0 to 2^31 - 2.
    """
    return torch.randint(2**31 - 1, (2,), device=device)


def edge_codes(seed, heads, length):
    """The two codes whose xor is scrambled into u: rows and columns, int32, each (heads, length).

    seed (2,); heads: B times H.
    """
    head = torch.arange(heads, dtype=torch.int32, device=seed.device)[:, None]
    position = torch.arange(length, dtype=torch.int32, device=seed.device)
    return [mix(mix(mix(half.to(torch.int32)) + head) + position) for half in seed.unbind()]


def uniform(rows, columns):
    """u from codes that broadcast against each other, in float32: (2 k + 1) / 131072, k from 0 to 65535."""
    return (((scramble(rows ^ columns) >> 16) & 0xFFFF) + 0.5) * (1 / 65536)


def edge_noise(seed, B, H, T):
    """The whole matrix at once, for the plain formula and for tests: n = logit(u), float32 (B, H, T, T)."""
    rows, columns = edge_codes(seed, B * H, T)
    return uniform(rows[:, :, None], columns[:, None, :]).logit().view(B, H, T, T)
