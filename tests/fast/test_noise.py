"""The counter-based noise: does it look like independent uniform numbers, whichever way one cuts it?

Thresholds are 5 standard deviations.
"""

import numpy as np
import pytest
import torch

from fast.attention import attention
from fast.noise import edge_codes, edge_noise, mix, new_seed, uniform
from training.steps import Batches

HEADS, T = 8, 512


@pytest.fixture(scope="module")
def u():
    rows, columns = edge_codes(torch.tensor([900450186, 894289455]), HEADS, T)
    return uniform(rows[:, :, None], columns[:, None, :]).double()  # (HEADS, T, T)


def standard_deviations(x, y):
    """How far the correlation of two arrays is from 0, in standard deviations of what chance does.

    Centred for uniform numbers, whose variance is 1/12.
    """
    x, y = x - 0.5, y - 0.5
    return abs((x * y).mean().item()) * 12 * x.numel() ** 0.5


def test_mix_is_a_permutation_in_which_every_input_bit_moves_every_output_bit_half_of_the_time():
    x = torch.randint(-2**31, 2**31, (200_000,)).to(torch.int32)
    assert len(mix(x.unique()).unique()) == len(x.unique())
    for bit in range(32):
        flipped = mix(x) ^ mix(x ^ torch.tensor(1 << bit if bit < 31 else -2**31, dtype=torch.int32))
        for other in range(32):
            assert 0.48 < ((flipped >> other) & 1).float().mean().item() < 0.52, (bit, other)


def test_mean_variance_and_range(u):
    n = u.numel()
    assert abs(u.mean().item() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var().item() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert 2**-17 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() <= 1 - 2**-17


def test_every_value_is_equally_likely_and_every_bit_fair(u):
    values = (u * 65536).long().flatten()
    expected = len(values) / 65536
    chi_squared = ((torch.bincount(values, minlength=65536) - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - 65535) < 5 * (2 * 65535) ** 0.5
    for bit in range(16):
        assert abs(((values >> bit) & 1).double().mean().item() - 0.5) < 5 * 0.5 / len(values) ** 0.5, bit


def test_neighbours_along_rows_columns_and_diagonals_are_independent(u):
    for down, right in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 64), (64, 0), (128, 128), (256, 0)):
        assert standard_deviations(u[:, down:, right:], u[:, :T - down, :T - right]) < 5, (down, right)


def test_corners_of_rectangles_are_independent(u):
    """rows xor columns of four corners cancel out; what is made of them must not."""
    corners = [(u[:, a::2, b::2] - 0.5) * 12**0.5 for a in (0, 1) for b in (0, 1)]
    product = corners[0] * corners[1] * corners[2] * corners[3]
    assert abs(product.mean().item()) * product.numel() ** 0.5 < 5


def test_a_row_is_not_its_mirror_or_its_column(u):
    assert standard_deviations(u, u.flip(2)) < 5
    above = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert standard_deviations(u[:, above], u.transpose(1, 2)[:, above]) < 5


def test_heads_are_independent_and_so_are_neighbouring_seeds(u):
    for other in range(1, HEADS):
        assert standard_deviations(u[:HEADS - other], u[other:]) < 5
    for step in ([1, 0], [0, 1], [1, 1], [2, 0]):
        rows, columns = edge_codes(torch.tensor([900450186, 894289455]) + torch.tensor(step), HEADS, T)
        assert standard_deviations(u, uniform(rows[:, :, None], columns[:, None, :]).double()) < 5


def test_layers_steps_and_processes_draw_different_seeds():
    """A layer's seed comes from torch's generator, which train.py seeds for every step and micro-batch; these
    are dealt out to processes.
    """

    class Data:
        def starts(self, split, context):
            return 1000

        def batch(self, split, indices, context):
            return np.zeros((len(indices), 2)), np.zeros((len(indices), 2))

    batches = Batches(Data(), 2, 4, 2, seed=1, child=True, device="cpu")
    # one process computes both micro-batches
    seeds = [tuple(new_seed().tolist()) for step in range(50) for _ in batches.at(step) for layer in range(4)]
    assert len(set(seeds)) == 50 * 2 * 4
    # and again, if the step is asked for again
    assert seeds[:8] == [tuple(new_seed().tolist()) for _ in batches.at(0) for layer in range(4)]


def test_gates_open_as_often_as_their_probability_says():
    for s in (-6.0, -2.0, 0.0, 1.0, 5.0):
        noise = edge_noise(new_seed(), 2, 8, 256)
        opened, p, n = (s + noise > 0).double().mean().item(), torch.tensor(s).sigmoid().item(), noise.numel()
        assert abs(opened - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-17, s
    assert not (-11.8 + noise > 0).any()


def test_no_edge_is_drawn_twice_alike_when_attention_is_called_twice():
    q, k, v = torch.randn(3, 1, 2, 96, 8).unbind(0)
    first, second = (attention(q, k, v, 0.0, gates="sample", impl="tiled")[0] for _ in range(2))
    assert (first != second).any()
    torch.manual_seed(5)
    first = attention(q, k, v, 0.0, gates="sample", impl="tiled")[0]
    torch.manual_seed(5)
    assert torch.equal(first, attention(q, k, v, 0.0, gates="sample", impl="tiled")[0])
