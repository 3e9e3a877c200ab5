"""Gated attention as one operator of torch, for the two ways of computing it that keep no T x T matrix
(tiled.py, kernels.py).

torch must be told four things of a computation that it does not see into:

    what it computes      sparse_attention::forward
    what comes out        a fake of it, shapes and types alone: torch.compile plans with it
    its gradient          sparse_attention::backward, an operator with a fake of its own
    what to keep for it   q, k, v, y, and one number per query

Notable: so a compiled model has no graph break here, checkpointing and DDP see an ordinary function, and
there is one place where "tiled" and "triton" are told apart. Biases are constants: no gradient.
"""

import torch

from fast import tiled


def computed_by(impl):
    """The module whose `forward` and `backward` compute, and options for them.

    impl: 'tiled', 'tiled compiled' or 'triton', which is not installed everywhere.
    """
    if impl == "triton":
        from fast import kernels

        return kernels, {}
    return tiled, {"fuse": impl == "tiled compiled"}


@torch.library.custom_op("sparse_attention::forward", mutates_args=())
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    temperature: float,
    linear_penalty: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty(B * H, dtype=exact),
        q.new_empty(B, H, T, dtype=exact),
    )


@torch.library.custom_op("sparse_attention::backward", mutates_args=())
def backward(
    dy: torch.Tensor,
    dpenalty: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    linear_penalty: bool,
    impl: str,
) -> list[torch.Tensor]:
    """The gradients of `forward`'s y and penalty. Returns dq, dk, dv."""
    module, options = computed_by(impl)
    with torch.autocast(q.device.type, enabled=False):
        return module.backward(
            dy, dpenalty, q, k, v, bias, seed, y, lse, temperature, linear_penalty, **options
        )


@backward.register_fake
def _(dy, dpenalty, q, k, v, *rest):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]


def keep(ctx, inputs, output):
    q, k, v, bias, seed, *ctx.options = inputs
    y, _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, bias, seed, y, lse)


def gradient(ctx, dy, dpenalty, dlse):
    return *backward(dy, dpenalty, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


forward.register_autograd(gradient, setup_context=keep)
