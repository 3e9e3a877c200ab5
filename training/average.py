"""The model that is judged: a moving average of the one that trains (Polyak and Juditsky 1992).

    average <- decay average + (1 - decay) model          after every step, weight by weight

Training with sampled gates jumps about a minimum; the average lies in it. A decay of 0.99 remembers about 100
steps. The paper judges the trained weights themselves: average_decay = 0. Frozen weights (lora.py) are their
own average, and are shared.
"""

import copy

import torch


def judged_model(model, decay):
    """Who is measured, judged and kept: the model itself, or where decay is above 0 a copy of it, for
    `follow` to keep up with it.
    """
    if not decay:
        return model
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, shared).eval()


def follow(average, model, decay):
    """One step of the equation above, in place. Both models have the same parameters."""
    with torch.no_grad():
        for kept, now in zip(average.parameters(), model.parameters(), strict=True):
            if now.requires_grad:
                kept.lerp_(now, 1 - decay)
