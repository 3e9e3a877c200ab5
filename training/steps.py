"""What a training step is made of: examples, noise, learning rate, optimizer, and the average of the weights.

    step -> batch_size examples -> micro-batches, dealt out to the processes in turn -> noise, dropout of each
    step -> learning rate

Batches and noise depend only on (seed, step). So a run that was killed does bit for bit what it would have
done (on the same CPU; GPUs add in an order of their own), and no generator's state has to be saved. A step is
the same for one process that accumulates the gradients of two micro-batches as for two processes with one
each. And the constraint can be measured on the very batch that training is about to use, with its noise.

A step's loss is one mean, over all targets that it asks. Where micro-batches ask unequally many, a mean of
their means is another number: so each comes with a weight, 1 where all ask alike.

Notable: the average of the weights (Polyak and Juditsky 1992) is what is judged and kept:

    ema <- decay ema + (1 - decay) model          after every step, weight by weight

Training with sampled gates jumps about a minimum; the average lies in it. A decay of 0.99 remembers about 100
steps. The paper judges the trained weights themselves: average_decay = 0.
"""

import copy
import functools
import math

import numpy as np
import torch

from training import parallel


class Batches:
    """The training batches of a run.

    data           a dataset.Dataset
    context        T, tokens of an example
    batch_size     examples per step, of all processes together
    micro_batches  into how many equal parts a step is cut; a multiple of the number of processes
    seed, child    a run that starts from another has another order than one from scratch with the same seed
    """

    def __init__(self, data, context, batch_size, micro_batches, seed, child, device):
        self.data, self.context, self.device = data, context, device
        self.batch_size, self.micro_batches, self.seed, self.child = batch_size, micro_batches, seed, child
        # this process's micro-batches
        self.dealt = range(parallel.rank(), micro_batches, parallel.world())

    def indices(self, step):
        """Which examples a step trains on: (batch_size,) rows, or first positions of windows of a stream."""
        return np.random.default_rng((self.seed, self.child, step)).integers(
            0, self.data.starts("train", self.context), self.batch_size
        )

    @functools.lru_cache(maxsize=1)  # the constraint is measured on what is trained on next
    def examples(self, step):
        """Inputs and targets of the whole step, lists of (B, T) by micro-batch, and how many targets each
        asks: a process knows what the others ask without hearing from them.
        """
        x, y = (np.split(tokens, self.micro_batches)
                for tokens in self.data.batch("train", self.indices(step), self.context))
        return x, y, [int((targets != -1).sum()) for targets in y]

    def at(self, step):
        """Yield this process's micro-batches of a step: inputs and targets, (B, T) each, and the weight of
        its loss; before each, torch's generator is seeded for it alone.

        The mean of weight * loss over all micro-batches is the mean over all targets of the step.
        """
        x, y, asked = self.examples(step)
        for micro in self.dealt:
            weight = asked[micro] * self.micro_batches / max(1, sum(asked))
            # 2^32 / golden ratio: no two steps or micro-batches meet
            torch.manual_seed(self.seed * 1_000_003 + step + 2_654_435_769 * micro)
            yield *(torch.from_numpy(part[micro]).to(self.device) for part in (x, y)), weight

    @torch.no_grad()
    def mean_loss(self, step, model, autocast, sampled=False):
        """Mean loss of a step's targets over all processes, nats: of a dense model, or under thresholds, or
        under the gates that training will draw.
        """
        was_training = model.training
        model.train(sampled)
        with autocast():
            losses = [weight * model(x, y)[1].item() for x, y, weight in self.at(step)]
        model.train(was_training)
        return parallel.all_reduce_sum([sum(losses)], self.device)[0] / self.micro_batches


def cosine(step, c):
    """1 until the warm-up is over, then half a cosine down to 0."""
    done = max(0, step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return (1 + math.cos(math.pi * min(1, done))) / 2


def get_lr(step, c):
    """Linear warm-up, then a cosine from learning_rate to min_lr."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    return c.min_lr + (c.learning_rate - c.min_lr) * cosine(step, c)


def adamw(parameters, c):
    """AdamW with the settings c, weight decay on matrices alone."""
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    is_fused = parameters[0].device.type != "mps"
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=is_fused)


def averaged(model, decay):
    """The model that is judged: a copy for `update_average` to keep up, or with decay 0 the model itself.

    Frozen weights (lora.py) are their own average, and are shared.
    """
    if not decay:
        return model
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, shared).eval()


def update_average(ema, model, decay):
    """One step of the equation above, in place. Both models have the same parameters."""
    if ema is model:
        return
    with torch.no_grad():
        for kept, now in zip(ema.parameters(), model.parameters(), strict=True):
            if now.requires_grad:
                kept.lerp_(now, 1 - decay)
