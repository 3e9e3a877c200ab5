"""The fast forms of gated attention against the plain formula in float64: the same noise, values and
gradients; and as citizens of torch.

tiled runs here as it does for users, triton in its interpreter unless there is a GPU. What holds for both is
tested here on both.
"""

import itertools
import math
import os
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch.utils.checkpoint import checkpoint

from conftest import REPOSITORY
from fast import attention as op
from fast.attention import attention, choose_impl
from fast.noise import edge_noise, new_seed
from gate import gated_attention
from model import GPT, GPTConfig

kernels = pytest.importorskip("fast.kernels", reason="the triton package is not installed")
GPU = torch.cuda.is_available()
DEVICE = {"tiled": "cpu", "tiled compiled": "cpu", "triton": "cuda" if GPU else "cpu"}
# noise, temperature, linear_penalty
OPTIONS = list(itertools.product((True, False), (1.0, 0.7), (False, True)))


def make(B, H, T, D, dtype=torch.float64, scale=1.0):
    return [(scale * torch.randn(B, H, T, D, dtype=torch.float64)).to(dtype) for _ in range(4)]  # q, k, v, dy


def plain(q, k, v, dy, bias, seed, temperature, linear, dpenalty=7.0):
    """y, density, dq, dk, dv of the formula in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    gates, noise = "threshold", None
    if seed is not None:
        gates, noise = "sample", edge_noise(seed, *q.shape[:3]).double()
    y, density, _ = gated_attention(q, k, v, bias.double()[:, None, None], temperature, gates, noise=noise,
                                    linear_penalty=linear)
    return y, density, *torch.autograd.grad((y * dy.double()).sum() + dpenalty * density, (q, k, v))


def fast(impl, q, k, v, dy, bias, seed, temperature, linear, dpenalty=7.0):
    to = DEVICE[impl]
    q, k, v = (x.to(to).requires_grad_() for x in (q, k, v))
    (B, H, T, _), seed = q.shape, None if seed is None else seed.to(to)
    y, penalty, _ = op.forward(q, k, v, bias.to(to), seed, temperature, linear, impl)
    density = penalty.sum() / (B * H * T * (T + 1) / 2)
    gradients = torch.autograd.grad((y * dy.to(to)).sum() + dpenalty * density, (q, k, v))
    return [x.cpu() for x in (y, density, *gradients)]


def agree(ours, theirs, tolerance):
    for name, a, b in zip(("y", "density", "dq", "dk", "dv"), ours, theirs):
        assert a.shape == b.shape and torch.isfinite(a).all(), name
        torch.testing.assert_close(a.double(), b, atol=tolerance * max(1.0, b.abs().max().item()), rtol=0,
                                   msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("noise, temperature, linear", OPTIONS)
@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_values_and_gradients_agree_with_the_plain_formula(impl, noise, temperature, linear):
    bias = torch.tensor([-2.0, 0.5, 3.0])
    seed = new_seed() if noise else None
    inputs = make(2, 3, 70, 32, torch.float32)
    agree(fast(impl, *inputs, bias, seed, temperature, linear),
          plain(*inputs, bias, seed, temperature, linear), 1e-5)


@pytest.mark.parametrize("T, D", [(1, 64), (16, 128), (129, 32), (100, 72)])
@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_widths_and_lengths(impl, T, D):
    inputs, bias, seed = make(1, 2, T, D, torch.float32), torch.tensor([1.0, -1.0]), new_seed()
    agree(fast(impl, *inputs, bias, seed, 1.0, False), plain(*inputs, bias, seed, 1.0, False), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["tiled", "triton"])
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(B=strategies.integers(1, 3), H=strategies.integers(1, 4), T=strategies.integers(1, 100),
                  D=strategies.integers(1, 72), option=strategies.sampled_from(OPTIONS),
                  bias=strategies.floats(-8, 8))
def test_any_shape(impl, B, H, T, D, option, bias):
    noise, temperature, linear = option
    inputs, bias = make(B, H, T, D, torch.float32), torch.full((H,), bias)
    seed = new_seed() if noise else None
    agree(fast(impl, *inputs, bias, seed, temperature, linear),
          plain(*inputs, bias, seed, temperature, linear), 3e-5)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_heads_without_an_open_edge_rows_with_one_and_scores_that_are_huge(impl):
    """Head 0: all shut. Head 1: every query reads itself alone, in a tile otherwise shut.

    Head 2: scores of 100 and more.
    """
    T, D = 80, 64
    q, k, v, dy = make(1, 3, T, D, torch.float32)
    position = torch.eye(T)
    q[:, 1], k[:, 1] = 30 * position[:, :D], 30 * position[:, :D]  # the last 16 queries see nothing at all
    q[:, 2], k[:, 2] = 12 * q[:, 2], 8 * k[:, 2]
    bias = torch.tensor([-60.0, -40.0, -50.0])
    y, *rest = fast(impl, q, k, v, dy, bias, None, 1.0, False)
    # float32 has 5 digits behind the point of a score of 100
    agree((y, *rest), plain(q, k, v, dy, bias, None, 1.0, False), 1e-4)
    assert (y[:, 0] == 0).all() and (y[:, 1, D:] == 0).all() and (y[:, 1, :D] != 0).any(-1).all()


@pytest.mark.parametrize("impl, dtype", [
    ("tiled", torch.bfloat16), ("tiled", torch.float16), ("triton", torch.float16),
    *[("triton", torch.bfloat16)] * GPU,  # Triton's interpreter is numpy, which has no bfloat16
])
@pytest.mark.parametrize("bias", [2.0, -4.0])
def test_half_precision_stays_within_its_rounding(impl, dtype, bias):
    """Against the formula in float64 on the same rounded inputs: no gate may flip, and errors are those of
    rounding what goes into the products.
    """
    inputs, bias, seed = make(1, 2, 96, 64, dtype), torch.full((2,), bias), new_seed()
    agree(fast(impl, *inputs, bias, seed, 1.0, False, dpenalty=7 * 96 * 97),
          plain(*inputs, bias, seed, 1.0, False, dpenalty=7 * 96 * 97), 2e-2)


def test_half_precision_does_not_lose_what_many_small_weights_say_together():
    """An attention sink: key 0 takes nearly all of the weight and its value is 0, so that all there is to
    learn lies in weights of e^-11.
    """
    q, k, v, dy = make(1, 1, 256, 32, torch.float16)
    q[..., 0], k[..., 0], k[:, :, 0, 0], v[:, :, 0] = 6.0, 0.0, 11.5 * 32**0.5 / 6, 0.0
    bias = torch.full((1,), 40.0)
    ours = fast("triton", q, k, v, dy, bias, None, 1.0, False, 0.0)
    theirs = plain(q, k, v, dy, bias, None, 1.0, False, 0.0)
    for a, b in zip(ours[2:], theirs[2:]):
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_autocast_does_not_reach_inside(impl):
    """Scores in bfloat16 would flip gates. The operator is called as an eager model calls it."""
    device = DEVICE[impl]
    q, k, v, dy = (3 * x.to(device) for x in make(2, 2, 80, 32, torch.float32))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    bias, found = torch.zeros(2, device=device), []
    for enabled in (True, False):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            y, penalty, _ = op.forward(q, k, v, bias, None, 1.0, False, impl)
            found.append((y, penalty, *torch.autograd.grad((y * dy).sum() + penalty.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_tiles_of_any_size_give_the_same():
    q, k, v, dy = (x.to(DEVICE["triton"]) for x in make(1, 2, 100, 32, torch.float32))
    bias, seed, g = torch.zeros(2, device=q.device), new_seed(q.device), torch.ones(2, device=q.device)
    y, penalty, lse = kernels.forward(q, k, v, bias, seed, 1.0, False, tile=(128, 128))
    gradients = kernels.backward(dy, g, q, k, v, bias, seed, y, lse, 1.0, False, tile=(128, 128))
    for tile in ((16, 64), (64, 16), (32, 32)):
        others = kernels.forward(q, k, v, bias, seed, 1.0, False, tile=tile)
        others_gradients = kernels.backward(dy, g, q, k, v, bias, seed, y, lse, 1.0, False, tile=tile)
        for a, b in zip((y, penalty, lse, *gradients), (*others, *others_gradients)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_two_runs_give_the_same_bits():
    """Nothing races: every sum is one program's. On a GPU this would show an atomic addition."""
    for impl in ("tiled", "triton"):
        inputs, seed = make(1, 2, 100, 16, torch.float32), new_seed()
        first, second = (fast(impl, *inputs, torch.zeros(2), seed, 1.0, False) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second)), impl


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_torch_accepts_the_operators_on_views_of_a_projection_as_in_model_py(impl, B):
    """Schema, fakes (strides too), autograd registration, and tracing with symbolic shapes, by torch's own
    examination; then the values.
    """
    joint = torch.randn(B, 40, 3 * 2 * 16, device=DEVICE[impl], requires_grad=True)
    q, k, v = (part.view(B, 40, 2, 16).transpose(1, 2) for part in joint.split(32, dim=2))
    bias, seed = torch.zeros(2, device=DEVICE[impl]), new_seed(DEVICE[impl])
    torch.library.opcheck(op.forward, (q, k, v, bias, seed, 1.0, False, impl))
    dy = torch.randn(B, 40, 2, 16).transpose(1, 2)
    seed = seed.cpu()
    strided = fast(impl, q.detach(), k.detach(), v.detach(), dy, bias.cpu(), seed, 1.0, False)
    agree(strided,
          plain(q.detach().cpu(), k.detach().cpu(), v.detach().cpu(), dy, bias.cpu(), seed, 1.0, False),
          1e-5)


@pytest.mark.parametrize("impl", ["tiled", pytest.param("triton", marks=pytest.mark.slow)])
def test_inside_a_compiled_model_without_a_graph_break_under_autocast_and_checkpointing(impl):
    torch._dynamo.reset()
    device = DEVICE[impl]
    model = GPT(GPTConfig(block_size=70, vocab_size=20, n_layer=1, n_head=2, n_embd=32, gated=True,
                          gate_bias=0.5)).to(device)
    model.attention_impl = impl
    x = torch.randint(0, 20, (2, 70), device=device)

    def step(network):
        torch.manual_seed(1)
        model.zero_grad()
        # Triton's interpreter computes bfloat16 wrongly
        with torch.autocast(device, dtype=torch.bfloat16, enabled=impl == "tiled" or GPU):
            _, loss, density = network(x, x)
        (loss + density).backward()
        return [loss.detach(), density.detach(), *(p.grad.clone() for p in model.parameters())]

    eager = step(model)
    # computes the forward pass twice, with the same seeds
    again = step(lambda x, y: checkpoint(model, x, y, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(eager, again))
    with torch._inductor.config.patch(fallback_random=True):  # torch's own generator, as in train.py
        compiled = step(torch.compile(model, fullgraph=True))
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_what_the_fast_forms_keep_for_the_backward_pass_grows_with_T_not_with_its_square():
    def kept(T):
        sizes = []
        q, k, v = (torch.randn(1, 1, T, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            attention(q, k, v, gates="sample", impl="tiled")
        return sum(sizes)

    assert kept(512) < 2.1 * kept(256)


def test_the_strips_cover_every_pair_once():
    from fast import tiled

    for heads, T in ((1, 1), (6, 63), (5, 64), (24, 200), (7, 1000), (3, 4097)):
        seen = torch.zeros(heads, T)
        for h, i, j in tiled.strips(heads, T):
            assert j.start is None and i.stop <= j.stop <= T
            seen[h, i] += 1
        assert (seen == 1).all()
        shapes = {(h.stop - h.start, i.stop - i.start, j.stop) for h, i, j in tiled.strips(heads, T)}
        assert len(shapes) <= 5, shapes


@pytest.mark.parametrize("arguments, chosen", [
    (("auto", "cuda", 1024, 64, torch.bfloat16), "triton"),
    (("auto", "cuda", 1024, 64, torch.float64), "plain"),
    (("auto", "cuda", 1024, 256), "plain"),
    (("auto", "cuda", 11, 64), "plain"),
    (("auto", "cpu", 128, 8), "tiled"),
    (("auto", "cpu", 11, 16), "plain"),
    (("auto", "mps", 128, 8), "plain"),
    (("plain", "cuda", 1024, 64), "plain"),
    (("triton", "cpu", 128, 64), "needs a GPU"),
    (("tiled", "cuda", 1024, 64), "'tiled' is for CPUs; on cuda use 'auto'"),
    (("fast", "cpu", 128, 64), "not 'fast'"),
])
def test_the_choice_and_its_errors(monkeypatch, arguments, chosen):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if " " not in chosen:
        assert choose_impl(*arguments) == chosen
    else:
        with pytest.raises(ValueError, match=chosen):
            choose_impl(*arguments)


def test_what_the_fast_forms_cannot_do_is_done_by_the_formula():
    q, k, v, _ = make(1, 2, 80, 16)
    y, density, gates = attention(q, k, v, 0.0, return_gates=True, impl="tiled")
    assert gates.open.shape == (1, 2, 80, 80)
    torch.testing.assert_close(y, attention(q, k, v, 0.0, impl="tiled")[0])
    keep = torch.ones(80, 80).tril(-1).bool()
    torch.testing.assert_close(attention(q, k, v, 0.0, keep=keep, impl="tiled")[0],
                               attention(q, k, v, 0.0, keep=keep, impl="plain")[0])
    bias = torch.randn(2, 80, 80, dtype=torch.float64)  # varies inside a head
    torch.testing.assert_close(attention(q, k, v, bias, impl="tiled")[0],
                               attention(q, k, v, bias, impl="plain")[0])
    learned = torch.zeros(2, 1, 1, dtype=torch.float64, requires_grad=True)
    density = attention(q, k, v, learned, gates="sample", impl="tiled")[1]
    assert torch.autograd.grad(density, learned)[0].any()
    for bias in (torch.tensor(0.3), torch.tensor([0.3, -0.2])[:, None, None]):
        torch.testing.assert_close(attention(q, k, v, bias, impl="tiled")[0],
                                   attention(q, k, v, bias, impl="plain")[0])


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_a_shut_head_writes_nothing_and_still_hears_that_it_is_missed(impl):
    """Straight-through: dv is 0, yet q and k get a gradient by sigmoid'(s), though none of its edges is open.
    """
    q, k, v, dy = make(1, 1, 40, 16, torch.float32)
    y, _, dq, dk, dv = fast(impl, q, k, v, dy, torch.tensor([-12.0]), None, 1.0, False, dpenalty=0.0)
    assert (y == 0).all() and (dv == 0).all() and (dq != 0).any() and (dk != 0).any()


COMPILE = """
import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from fast import kernels

FLOATS, NUMBERS = {"lse", "penalty", "bias", "delta", "dpenalty"}, {"scale"}
# bytes of shared memory of a block: T4, A100, 3090, H100
LIMITS = {75: 65536, 80: 166912, 86: 101376, 90: 232448}
CASES = [  # capability, dtype, width, noise, linear
    (90, "bf16", 64, True, False),
    (90, "bf16", 128, True, False),
    (90, "fp32", 64, True, False),
    (86, "fp32", 128, True, True),
    (86, "fp16", 128, False, False),
    (86, "bf16", 64, True, False),
    (80, "bf16", 128, False, True),
    (75, "fp32", 128, True, False),
]


def type_of(name, constants, dtype):
    if name in constants:
        return "constexpr"
    if name == "seed":
        return "*i64"
    if name in FLOATS:
        return "*fp32"
    if name in NUMBERS:
        return "fp32"
    return "i32" if name in {"H", "T"} or name[1:2] == "_" else "*" + dtype


def check(kernel, capability, dtype, width, noise, linear):
    options = kernels.launch(kernel, width, torch.float32 if dtype == "fp32" else torch.bfloat16)
    constants = {"D": width, "WIDTH": width, "ROWS": options.pop("ROWS"), "COLUMNS": options.pop("COLUMNS")}
    constants |= {"NOISE": noise, "LINEAR": linear}
    if kernel is not kernels.forward_kernel:
        constants |= {"TEMPERATURE": 0.7 if linear else 1.0}
    names = kernel.arg_names
    types = {name: type_of(name, constants, dtype) for name in names}
    # pointers and strides are multiples of 16, as in a real call: that enables pipelining
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name[1:2] == "_"]
    source = triton.compiler.ASTSource(
        fn=kernel, signature=types, attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        constexprs={(names.index(name),): value for name, value in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(code.asm["cubin"]) > 0
    assert code.metadata.shared <= LIMITS[capability], (kernel, dtype, width, code.metadata.shared)
    if capability >= 90 and dtype != "fp32":
        assert "wgmma" in code.asm["ptx"], "an H100's matrix units are not used"


for kernel in (kernels.forward_kernel, kernels.dq_kernel, kernels.dkdv_kernel):
    for case in CASES:
        check(kernel, *case)
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_to_machine_code_and_fit_into_small_gpus(tmp_path):
    """The interpreter runs what a compiler may refuse. Triton brings its own compiler, which needs no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": REPOSITORY, "TRITON_CACHE_DIR": str(tmp_path)
    }
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("compiled\n"), done.stderr[-3000:]


@pytest.mark.parametrize("impl", ["plain", "tiled", "triton"])
@pytest.mark.parametrize("bias, density", [(math.inf, 1.0), (-math.inf, 0.0)])
def test_infinite_biases_open_or_shut_everything(impl, bias, density):
    q, k, v, _ = (x.to(DEVICE.get(impl, "cpu")) for x in make(1, 2, 70, 16, torch.float32))
    y, found, _ = attention(q, k, v, bias, gates="sample", impl=impl)
    dense = attention(q, k, v, dense=True)[0]
    assert found == density
    torch.testing.assert_close(y, dense * density)


@pytest.mark.parametrize("impl", ["plain", "tiled", "triton"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_is_seen(impl, which):
    inputs = make(1, 1, 70, 16, torch.float32)[:3]
    inputs[which][0, 0, 40, 3] = math.nan
    y, _, _ = attention(*(x.to(DEVICE.get(impl, "cpu")) for x in inputs), impl=impl)
    assert torch.isfinite(y[0, 0, :40]).all()
    assert y[0, 0, 40].isnan().all()


def test_an_empty_batch_has_an_empty_answer():
    q = torch.randn(0, 2, 70, 16)
    assert attention(q, q, q, impl="tiled")[0].shape == q.shape
