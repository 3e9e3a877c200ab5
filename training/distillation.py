"""What the dense model teaches the gated one: to be as sure as it, of every token, and not only to be right.

    L_teach = distill_weight * KL(dense || gated)      nats, mean over the positions where something is asked

A target says which token came next; the dense model's distribution says how likely all others were (Hinton et
al. 2015). Not the paper's: distill_weight = 0 is. It is added to the loss that is trained on, and lambda
multiplies it; the constraint and the judgement see the loss alone.
"""

from torch.nn import functional as F


def divergence(logits, teacher_logits, targets):
    """KL(teacher || student), mean over the positions where something is asked, nats.

    logits, teacher_logits (B, T, V); targets (B, T), -1 where nothing is asked.
    """
    asked = targets != -1
    student = logits[asked].float().log_softmax(-1)  # (asked, V)
    teacher = teacher_logits[asked].float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
