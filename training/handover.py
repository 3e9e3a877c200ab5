"""Hand a dense model over to the gates without a shock: a shift that the softmax does not feel, folded into
the weights.

A dense model has never been asked how high its scores lie, for softmax does not care: softmax_j(a_ij + d_i) =
softmax_j(a_ij), whatever d_i. The gate does care: s_ij = a_ij + b is compared with 0. So at the switch some
heads are wide open and others shut at random: on text, one constant bias costs 0.8 nats with 66 % of the
edges open (docs/text.md, "The hand-over").

There is a direction in the weights that moves the gates and nothing else. A constant c added to every key of
a head gives

    q_i . (k_j + c) / sqrt(D) = a_ij + q_i . c / sqrt(D)         the same shift for all keys j of query i

and the keys' bias is such a constant. We choose it so that the gate starts as a threshold on the attention
weight p_ij:

    a_ij + q_i . c / sqrt(D) + b  ~  log(p_ij / p0)              open where p_ij > p0
                                  =  a_ij - logsumexp_j(a_i.) - log p0
    c = argmin mean_i weight_i (q_i . c / sqrt(D) - w_i)^2 + ridge |c|^2
    w_i = -logsumexp_j(a_i.) - log p0 - b

The shift is linear in q_i and the wish w_i is not, so it cannot be met everywhere, least of all in narrow
heads. But errors cost unlike: too low shuts edges that are needed, and the loss jumps; too high leaves edges
open that training shuts soon. So weight_i is 1 where the shift is above the wish and 100 where it is below
(Newey & Powell's expectile regression: least squares, solved again with new weights until it settles).

Where there is no key bias to fold into (OLMo, bias=False), or weights are not to be touched (LoRA), one
number for each head takes the place of q_i . c / sqrt(D): the same regression with one unknown, and
`gate_bias` becomes a list [layer][head].

Notable: D unknowns per head, solved once from the first batch's queries, at most 8,192; no parameter is
added, the dense function stays what it was (a test proves it), and training moves the shift on from there.
`open_above = 0` leaves it out: one constant bias and nothing else, the paper's form.
"""

import math

import torch
from torch.nn import functional as F

from gate import shared_among_heads
from models.checkpoint import copy_into
from training import parallel


@torch.no_grad()
def fold_shift(model, idx, open_above, fold=True, ridge=1e-2, too_low=100.0):
    """Shift the gates of `model` (changed in place) so that edges with p_ij > open_above start open.

    idx         (B, T) tokens of the training set to fit the shift on
    open_above  p0, an attention weight between 0 and 1; smaller is gentler and starts denser
    fold        into the key biases, where the model has some; else, and with False, one number per head into
                config.gate_bias
    ridge       of the least squares, as a share of the mean of the diagonal: keeps c short where queries
                hardly vary
    too_low     how much worse it is to shut too much than to open too much; 1 is plain least squares
    """
    fold = fold and getattr(model.config, "bias", False)
    shifts = []  # per layer, from one dense pass; changed is nothing before its end

    def watching(attend):
        def watched(q, k, v, **options):  # q and k as the gate gets them
            bias = model.config.gate_bias
            shifts.append(shift_of(q.float(), k.float(), open_above, bias, fold, ridge, too_low))
            return attend(q, k, v, **options)
        return watched

    for attention in model.attentions:
        attention.attend = watching(attention.attend)
    was_gated, was_training = model.config.gated, model.training
    model.config.gated = False
    with parallel.uncompiled(model):  # once, with a new function in every layer: not worth compiling
        model.eval()(idx)
    model.config.gated = was_gated
    model.train(was_training)
    for attention in model.attentions:
        del attention.attend  # and the class's own is seen again
    # rounding may differ: process 0's for all. (n_layer, C), or (n_layer, H) without fold
    shifts = parallel.broadcast(torch.stack(shifts).flatten(1).cpu())
    if not fold:
        model.config.gate_bias = (model.config.gate_bias + shifts).tolist()
        return
    for attention, shift in zip(model.attentions, shifts):
        C = shift.numel()
        bias = parallel.whole(attention.c_attn.bias).clone()  # of which this process may hold a part
        bias[C:2 * C] += shift.to(bias.device)  # rows C to 2C of c_attn make the keys
        copy_into(attention.c_attn.bias, bias)


def shift_of(q, k, open_above, bias, fold, ridge, too_low):
    """The regression, for all heads of a layer: c (H, D), or (H, 1) without fold.

    q (B, H, T, D), k the same or with fewer heads, bias a number: the gate's.
    """
    B, H, T, D = q.shape
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    q = q / math.sqrt(D)
    # a_ij (B, H, T, T)
    scores = (q @ shared_among_heads(k, q).transpose(-2, -1)).masked_fill(~causal, -math.inf)
    wanted = -scores.logsumexp(dim=-1) - math.log(open_above) - bias  # w_i (B, H, T)
    q = q if fold else torch.ones_like(q[..., :1])  # one unknown: the same for all queries
    q, wanted = q.transpose(0, 1).reshape(H, B * T, -1), wanted.transpose(0, 1).reshape(H, B * T, 1)
    weight = torch.ones_like(wanted)
    for _ in range(12):
        weighted = (weight * q).transpose(-2, -1)  # (H, D, B T)
        gram = weighted @ q  # (H, D, D)
        if fold:
            size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            gram += ridge * size * torch.eye(q.shape[-1], device=q.device)
        shift = torch.linalg.solve(gram, weighted @ wanted)  # c (H, D, 1)
        weight = torch.where(q @ shift < wanted, too_low, 1.0)
    return shift.squeeze(-1)


# ------------------------------------------------------------------------------------------------------------
# The teacher


def distillation(weight, dense, x, y, logits):
    """What the dense model teaches the gated one: to be as sure as it of every token, not only to be right.

        weight * KL(dense || gated)      nats, mean over the positions where something is asked

    A target says which token came next; the dense model's distribution says how likely all others were
    (Hinton et al. 2015). Not the paper's: distill_weight = 0 is. It is added to the loss that is trained on,
    and lambda multiplies it; the constraint and the judgement see the loss alone. x, y (B, T); logits
    (B, T, V), the gated model's.
    """
    if not weight:
        return 0.0
    with torch.no_grad():
        teacher_logits = dense(x)[0]
    return weight * divergence(logits, teacher_logits, y)


def divergence(logits, teacher_logits, targets):
    """`divergence_formula`, values and gradients, in less memory and time."""
    return DivergenceInParts.apply(logits, teacher_logits, targets)


def divergence_formula(logits, teacher_logits, targets):
    """KL(teacher || student), mean over the positions where something is asked (0 if nothing is), nats.

    logits, teacher_logits (B, T, V); targets (B, T), -1 where nothing is asked.
    """
    student, teacher = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    divergences = (teacher.exp() * (teacher - student)).sum(-1)  # (B, T)
    asked = targets != -1
    return (divergences * asked).sum() / asked.sum().clamp(min=1)


class DivergenceInParts(torch.autograd.Function):
    """`divergence_formula`, some rows at a time. Its gradient by a row of logits is known at once,

        (softmax(logits) - softmax(teacher_logits)) / number of rows where something is asked

    so it is all that is kept for the backward pass: autograd would keep three more arrays as large as the
    logits, (B T, V), in float32.
    """

    ELEMENTS = 2**22  # of a part

    @staticmethod
    def forward(ctx, logits, teacher_logits, targets):
        V = logits.shape[-1]
        asked = targets.flatten() != -1
        weights = asked / asked.sum().clamp(min=1)  # (B T)
        gradient, total = torch.empty_like(logits, memory_format=torch.contiguous_format), 0.0
        rows = gradient.view(-1, V), logits.reshape(-1, V), teacher_logits.reshape(-1, V), weights
        parts = (x.split(max(1, DivergenceInParts.ELEMENTS // V)) for x in rows)
        for here, student, teacher, weight in zip(*parts):
            student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
            total += F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) @ weight
            here.copy_(student.exp_().sub_(teacher.exp_()).mul_(weight[:, None]))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, factor):
        (gradient,) = ctx.saved_tensors
        return gradient * factor, None, None
