"""GECO: a constraint instead of a schedule. The paper's training objective.

    minimise  density    subject to    loss <= target

    L = density + lambda (loss - target)         lambda > 0, found by dual ascent:
    C <- alpha C + (1 - alpha) clip((loss - target) / scale, -1, 10)      the smoothed violation
    lambda <- clip(lambda exp(rate min(C, 1)), lambda_min, lambda_max)

Read it as a thermostat. While the loss is above target lambda rises and training repairs the model; while it
is below, lambda falls and training shuts edges; C delays both. Nobody tunes how sparse the model gets: that
is found out.

Notable, all but the fourth against *windup*, an integrator that stays far away long after an error is gone:
- lambda is capped above. When the gates first sample, the loss jumps by nats and an uncapped lambda climbs to
  thousands; the density then has no say until lambda has come all the way down again.
- lambda is bounded below too: one that has run down to nothing lets edges be cut by the dozen before the
  constraint has a say again, and an edge that is shut for good gets no gradient to come back with.
- The violation is clipped before it is smoothed: a loss can lie nats above a target, but never more than the
  target itself below it. (Where the target is nearly 0, as in addition, let `scale` be no larger than the
  slack in it; on text the loss can lie far enough below, and `scale` is what a measurement's noise makes
  worth reacting to.) lambda falls as fast as it rises, for C moves it by one unit at most.
- But up to ten units, not one: C is to be a mean and no majority vote. Where one sum in a hundred is wrong,
  three batches of 32 in four hold none of these and lie below the target; with a clip at 1 lambda would fall
  while the mean loss is ten times the target.
- A target that cannot be met yet is no target: at a high learning rate even a model without gates is worse
  than it was, and lambda climbs for thousands of steps. So on text the target comes down with the learning
  rate (`peak_slack` in train.py), lambda holds the loss at it all along, and no cap has to.
- The clip acts on lambda itself: no sum behind it has to unwind. What C remembers is gone in
  some twenty updates.

Source: Rezende & Viola 2018, "Taming VAEs".
This file imports no other file of ours.
"""

import math


class GECO:
    """The controller of lambda: `update(loss)` after a measurement; `objective(...)` is what to minimise.

    target       nats; the loss to stay at or below
    scale        nats; a violation of this size or more moves lambda at full speed
    rate         largest change of log lambda per update: 0.01 is 1 %
    alpha        memory of the moving average of the violation, in [0, 1): about 1 / (1 - alpha) updates long
    lambda_init, lambda_min, lambda_max    where lambda starts, and the clip that keeps it from winding up
    """

    def __init__(self, target, scale, rate, alpha=0.9, lambda_init=1.0, lambda_min=1e-3, lambda_max=10.0):
        if not (scale > 0 and rate > 0 and 0 <= alpha < 1 and 0 < lambda_min <= lambda_init <= lambda_max):
            raise ValueError(
                "GECO needs scale > 0, rate > 0, 0 <= alpha < 1 and "
                "0 < lambda_min <= lambda_init <= lambda_max; got "
                f"scale={scale} rate={rate} alpha={alpha} "
                f"lambda={lambda_min} <= {lambda_init} <= {lambda_max}"
            )
        self.target, self.scale, self.rate, self.alpha = target, scale, rate, alpha
        self.lambda_min, self.lambda_max = lambda_min, lambda_max
        self.lam = lambda_init  # `lambda` is a keyword of Python
        self.violation = 0.0  # C, the smoothed violation, between -1 and 10

    def update(self, loss):
        """Dual ascent on a measured loss (a float, nats). Returns the new lambda; ValueError if loss is NaN.
        """
        if math.isnan(loss):  # would count as satisfied
            raise ValueError("the measured loss is NaN")
        now = min(10.0, max(-1.0, (loss - self.target) / self.scale))
        self.violation = self.alpha * self.violation + (1 - self.alpha) * now
        lam = self.lam * math.exp(self.rate * min(self.violation, 1.0))
        self.lam = min(self.lambda_max, max(self.lambda_min, lam))
        return self.lam

    def objective(self, loss, density):
        """L = density + lambda (loss - target). Tensors in, tensor out."""
        return density + self.lam * (loss - self.target)

    def state_dict(self):
        """What `update` changes and what it aims at: plain floats, safe to save."""
        return {"lam": self.lam, "violation": self.violation, "target": self.target}

    def load_state_dict(self, state):
        self.lam, self.violation, self.target = state["lam"], state["violation"], state["target"]
