"""What a training step gets to see: its examples, its micro-batches, its noise. All are functions of (seed,
step), of nothing else.

    step -> batch_size examples -> micro-batches, dealt out to the processes in turn -> noise, dropout of each

So a run that was killed does bit for bit what it would have done (on the same CPU; GPUs add in an order of
their own), and no generator's state has to be saved; and a step is the same for one process that accumulates
the gradients of two micro-batches as for two processes with one each.

Notable:
- The same step can be asked for again, by the measurement of the constraint, which wants the very batch, and
  even the very noise, that training is about to use.
- A step's loss is one mean, over all targets that it asks. Where micro-batches ask unequally many, a mean of
  their means is another number: so each comes with a weight, 1 where all ask alike.
"""

import numpy as np
import torch

from training import hardware


class Batches:
    """The training batches of a run.

    data           a dataset.Dataset
    context        tokens of an example
    batch_size     examples per step, of all processes together
    micro_batches  into how many equal parts a step is cut; a multiple of the number of processes
    seed, child    a run that starts from another has another order than one from scratch with the same seed
    """

    def __init__(self, data, context, batch_size, micro_batches, seed, child, device):
        self.data, self.context, self.batch_size, self.micro_batches = (
            data,
            context,
            batch_size,
            micro_batches,
        )
        self.seed, self.child, self.device = seed, child, device
        # the micro-batches that are this process's
        self.ours = range(hardware.rank(), micro_batches, hardware.world())

    def indices(self, step):
        """Which examples a step trains on: (batch_size,) rows, or first positions of windows of a stream."""
        return np.random.default_rng((self.seed, self.child, step)).integers(
            0, self.data.starts("train", self.context), self.batch_size
        )

    def at(self, step):
        """Yield this process's micro-batches of a step: inputs and targets, (B, T) each, and the weight of
        its loss; before each, torch's generator is seeded for it alone.

        The mean of weight * loss over all micro-batches is the mean over all targets of the step.
        """
        # the whole step: a process knows what the others ask without hearing from them
        x, y = (np.split(tokens, self.micro_batches)
                for tokens in self.data.batch("train", self.indices(step), self.context))
        asked = [int((targets != -1).sum()) for targets in y]
        for micro in self.ours:
            weight = asked[micro] * self.micro_batches / max(1, sum(asked))
            # 2^32 / golden ratio: no two steps or micro-batches meet
            torch.manual_seed(self.seed * 1_000_003 + step + 2_654_435_769 * micro)
            yield *(torch.from_numpy(part[micro]).to(self.device) for part in (x, y)), weight

    @torch.no_grad()
    def mean_loss(self, step, model, autocast, sampled=False):
        """Mean loss of a step's targets over all processes, nats: of a dense model, or under deterministic
        gates, or under those that training will draw.
        """
        was_training = model.training
        model.train(sampled)
        with autocast():
            losses = [weight * model(x, y)[1].item() for x, y, weight in self.at(step)]
        model.train(was_training)
        return hardware.all_reduce_sum([sum(losses)], self.device)[0] / self.micro_batches
