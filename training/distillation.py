"""What the dense model teaches the gated one: to be as sure as it, of every token, and not only to be right.

    L_teach = distill_weight * KL(dense || gated)      nats, mean over the positions where something is asked

A target says which token came next; the dense model's distribution says how likely all others were (Hinton et
al. 2015). Not the paper's: distill_weight = 0 is. It is added to the loss that is trained on, and lambda
multiplies it; the constraint and the judgement see the loss alone.
"""


def divergence(logits, teacher_logits, targets):
    """KL(teacher || student), mean over the positions where something is asked (0 if nothing is), nats.

    logits, teacher_logits (B, T, V); targets (B, T), -1 where nothing is asked.
    """
    student = logits.float().log_softmax(-1)
    teacher = teacher_logits.float().log_softmax(-1)
    divergences = (teacher.exp() * (teacher - student)).sum(-1)  # (B, T)
    asked = targets != -1  # a mask: logits[asked] would copy them
    return (divergences * asked).sum() / asked.sum().clamp(min=1)
