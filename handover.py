"""Hand a dense model over to the gates without a shock: a shift that the softmax does not feel, folded into the weights.

A dense model has never been asked how high its scores lie, for softmax does not care: softmax_j(a_ij + d_i) = softmax_j(a_ij),
whatever d_i. The gate does care: s_ij = a_ij + b is compared with 0. So at the switch some heads are wide open and others shut
at random: on text, b = 4 costs 0.7 nats with 74 % of the edges open (README, "What we tried").

There is a direction in the weights that moves the gates and nothing else. A constant c added to every key of a head gives

    q_i . (k_j + c) / sqrt(D) = a_ij + q_i . c / sqrt(D)                 the same shift for all keys j of query i

and the keys' bias is such a constant. We choose it so that the gate starts as a threshold on the attention weight p_ij:

    a_ij + q_i . c / sqrt(D) + b  ~  log(p_ij / p0) = a_ij - logsumexp_j(a_i.) - log p0       open where p_ij > p0
    c = argmin mean_i (q_i . c / sqrt(D) - w_i)^2 + ridge |c|^2         w_i = -logsumexp_j(a_i.) - log p0 - b

Notable: this is least squares with D unknowns per head, solved once from a few thousand queries; no parameter is added, the dense
function stays what it was (a test proves it), and training moves the shift on from there. `open_above = 0` leaves it out: one
constant bias and nothing else, the paper's form. OLMo and models with bias=False have no key bias to fold into.
"""

import math

import torch


class HandoverError(Exception):
    """A model that has nowhere to fold the shift into. The message says what to type instead."""


@torch.no_grad()
def fold_shift(model, idx, open_above, ridge=1e-2):
    """Change the key biases of `model` (a GPT, changed in place) so that edges with p_ij > open_above start open.

    idx         (B, T) tokens of the training set to fit the shift on; some thousands in all
    open_above  p0, an attention weight between 0 and 1; smaller is gentler and starts denser
    ridge       of the least squares, as a share of the mean of the diagonal: keeps c short where queries hardly vary

    Raises HandoverError if the model has no biases.
    """
    if not model.config.bias:
        raise HandoverError("open_above needs key biases to fold the shift into, and this model has bias=False. Use --open_above=0 and choose gate_bias")
    B, T = idx.shape
    H, C = model.config.n_head, model.config.n_embd
    D = C // H
    projected = []  # q, k, v side by side, per layer: (B, T, 3 C), from one dense pass before anything is changed
    hooks = [block.attn.c_attn.register_forward_hook(lambda module, inputs, output: projected.append(output)) for block in model.transformer.h]
    was = model.config.gated, model.training
    model.config.gated = False
    model.eval()(idx)
    model.config.gated, _ = was
    model.train(was[1])
    for hook in hooks:
        hook.remove()

    causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    for block, qkv in zip(model.transformer.h, projected):
        q, k, _ = (part.view(B, T, H, D).transpose(1, 2).float() for part in qkv.split(C, dim=2))  # (B, H, T, D)
        q = q / math.sqrt(D)
        scores = (q @ k.transpose(-2, -1)).masked_fill(~causal, -math.inf)  # a_ij (B, H, T, T)
        wanted = -scores.logsumexp(dim=-1) - math.log(open_above) - model.config.gate_bias  # w_i (B, H, T)
        q, wanted = q.transpose(0, 1).reshape(H, B * T, D), wanted.transpose(0, 1).reshape(H, B * T, 1)
        gram = q.transpose(-2, -1) @ q  # (H, D, D)
        gram += ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(D, device=q.device)
        shift = torch.linalg.solve(gram, q.transpose(-2, -1) @ wanted)  # c (H, D, 1)
        block.attn.c_attn.bias[C:2 * C] += shift.flatten()  # rows C to 2C of c_attn make the keys
