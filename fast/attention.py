"""Who computes gated attention: the plain formula, or a form that keeps no T x T matrix.

    plain     gate.py, everywhere, whatever is asked
    tiled     tiled.py, on CPUs
    triton    kernels.py, on GPUs
    dense     torch's own attention, where there are no gates

`auto` takes the fastest that fits: from a context of 64 on, triton on a GPU and tiled on a CPU.

Notable:
- The fast forms know no `keep`, no `return_gates` and no bias that varies inside a head. What asks for one of
  these gets the plain formula, and nobody else in the project has to know.
- A fast form is an operator of torch, sparse_attention::forward, with a gradient of its own and a fake that
  knows shapes alone: so a compiled model has no graph break here, and checkpointing and DDP see an ordinary
  function. Biases are constants: no gradient.
"""

import importlib.util
import os

import torch
from torch import Tensor
from torch.nn import functional as F

from gate import GATES, gated_attention, shared_among_heads

SHORT = 64  # tokens; below, the plain formula is as fast as any
WIDEST = 128  # head that the Triton kernels take
LARGE = 1e30  # a gate bias that decides by itself

HAS_TRITON = importlib.util.find_spec("triton") is not None


def attention(q, k, v, bias=3.0, temperature=1.0, gates="threshold", *, dense=False, linear_penalty=False,
              keep=None, return_gates=False, impl="auto"):
    """`gate.gated_attention` by the fastest form that knows all that is asked; takes and returns the same.

    impl: 'plain', 'tiled', 'triton' or 'auto'.
    """
    if gates not in GATES:
        raise ValueError(f"gates is 'sample' or 'threshold', not {gates!r}")
    if k.shape[1] < q.shape[1]:
        k, v = shared_among_heads(k, q), shared_among_heads(v, q)
    (B, H, T, D), shown = q.shape, keep is not None or return_gates
    if dense and not shown:
        return *dense_attention(q, k, v), None
    impl = "plain" if dense else choose_impl(impl, q.device.type, T, D, q.dtype)
    head_bias = bias_of_heads(bias, H, q.device, torch.promote_types(q.dtype, torch.float32))
    is_fast = impl != "plain" and head_bias is not None and q.numel()
    seed = noise = None
    if is_fast:
        from fast.noise import edge_noise, new_seed  # here: who runs the formula alone needs none of it

        seed = new_seed(q.device) if gates == "sample" else None
    if not is_fast or shown:
        if seed is not None:  # the noise that the fast form would have made: to look changes nothing
            noise = edge_noise(seed, B, H, T)
        return gated_attention(q, k, v, bias, temperature, gates, dense=dense, linear_penalty=linear_penalty,
                               keep=keep, noise=noise, return_gates=return_gates)
    if impl == "tiled" and torch.compiler.is_compiling():
        impl = "tiled compiled"
    y, penalty, _ = forward(q, k, v, head_bias, seed, temperature, linear_penalty, impl)
    return y, penalty.sum() / (B * H * T * (T + 1) / 2), None


def dense_attention(q, k, v):
    """Ordinary causal attention, by torch; its density is 1. q, k, v (B, H, T, D). Returns (y, density)."""
    dtype = v.dtype
    if q.device.type == "cpu":  # where the backward pass in bfloat16 is eight times slower than in float32
        exact = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(exact), k.to(exact), v.to(exact)
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.to(dtype), q.new_ones(())


def choose_impl(name, device, T, D, dtype=torch.float32):
    """'plain', 'tiled' or 'triton', for a setting that names one or says 'auto'.

    device: 'cpu', 'cuda', ...; T tokens of context; D the width of a head. TRITON_INTERPRET=1 lets 'triton',
    asked for by name, run on a CPU, slowly. Raises ValueError if name is none of these, or cannot run here.
    """
    if name not in ("auto", "plain", "tiled", "triton"):
        raise ValueError(f"attention_impl is 'auto', 'plain', 'tiled' or 'triton', not {name!r}")
    on_gpu = device.startswith("cuda")
    triton_fits = HAS_TRITON and D <= WIDEST and dtype != torch.float64
    if name == "auto":
        if T < SHORT:
            return "plain"
        if on_gpu and triton_fits:
            return "triton"
        return "tiled" if device == "cpu" else "plain"
    if name == "tiled" and device != "cpu":
        raise ValueError(f"attention_impl='tiled' is for CPUs; on {device} use 'auto'")
    # its interpreter computes bfloat16 wrongly
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype != torch.bfloat16
    if name == "triton" and not (triton_fits and (on_gpu or interpreted)):
        raise ValueError("attention_impl='triton' needs a GPU, the triton package and heads up to "
                         f"{WIDEST} wide; here: {device}, width {D}, {dtype}. Use 'auto'")
    return name


def bias_of_heads(bias, H, device, dtype):
    """bias as a tensor (H,), or None if it varies inside a head or wants a gradient.

    An infinite one is large instead: the fast forms add it to the -inf of the future.
    """
    if not torch.is_tensor(bias):
        bias = torch.full((1,), float(bias), device=device)
    if bias.requires_grad:
        return None
    if bias.numel() == 1:
        bias = bias.reshape(1).expand(H)
    elif bias.numel() != H or bias.shape[-3:] != (H, 1, 1):
        return None
    return bias.reshape(H).to(device, dtype).clamp(-LARGE, LARGE)


# ------------------------------------------------------------------------------------------------------------
# The operator


def computed_by(impl):
    """The module whose `forward` and `backward` compute, and options for them.

    impl: 'tiled', 'tiled compiled' or 'triton', which is not installed everywhere.
    """
    if impl == "triton":
        from fast import kernels

        return kernels, {}
    from fast import tiled

    return tiled, {"fuse": impl == "tiled compiled"}


@torch.library.custom_op("sparse_attention::forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seed: Tensor | None, temperature: float,
            linear_penalty: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, D); bias (H,).

    Returns y (B, H, T, D); the penalty's sum over the causal pairs of every head (B H); lse (B, H, T).
    """
    module, options = computed_by(impl)
    # an operator does not leave autocast by itself, and half precision is too coarse for gates
    with torch.autocast(q.device.type, enabled=False):
        return module.forward(q, k, v, bias, seed, temperature, linear_penalty, **options)


@forward.register_fake
def _(q, k, v, bias, seed, temperature, linear_penalty, impl):
    B, H, T, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    return (torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(B * H, dtype=exact),
            q.new_empty(B, H, T, dtype=exact))


@torch.library.custom_op("sparse_attention::backward", mutates_args=())
def backward(dy: Tensor, dpenalty: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor,
             seed: Tensor | None, y: Tensor, lse: Tensor, temperature: float, linear_penalty: bool,
             impl: str) -> list[Tensor]:
    """The gradients of `forward`'s y and penalty. Returns dq, dk, dv."""
    module, options = computed_by(impl)
    with torch.autocast(q.device.type, enabled=False):
        return module.backward(dy, dpenalty, q, k, v, bias, seed, y, lse, temperature, linear_penalty,
                               **options)


@backward.register_fake
def _(dy, dpenalty, q, k, v, *rest):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]


def keep_for_backward(ctx, inputs, output):
    q, k, v, bias, seed, *ctx.options = inputs
    y, _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, bias, seed, y, lse)


def gradient(ctx, dy, dpenalty, dlse):
    return *backward(dy, dpenalty, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


forward.register_autograd(gradient, setup_context=keep_for_backward)
