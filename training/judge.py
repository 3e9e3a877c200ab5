"""What happens every eval_interval steps: the run is evaluated, judged, written down and kept.

    last.pt      the run itself, to go on from
    best.pt      of a gated run the evaluation with the FEWEST open edges among those that meet the target,
                 not the last one; of a dense run the one with the lowest held-out loss, or, with a
                 ready_loss, the one found ready
    closest.pt   of a run in which none has met the target: the one that came closest. Never the untrained
                 start

Notable:
- last.pt is written first: a run that is killed in between evaluates again, and writes best.pt then. At a
  run's end it is the other way round (`folder.settle`), for a run whose last.pt is at its end never evaluates
  again.
- With cycle_steps a run whose repair has failed returns to best.pt, optimizer and all. Lambda stays as high
  as it is.
"""

import math
import os
import sys
import time
from dataclasses import asdict

from models.checkpoint import checkpoint_of, load_weights, read_checkpoint, save_checkpoint, state_to_save
from storage.addition import addition_task
from storage.files import UserError, typed, write_json
from training import hardware, sharding
from training.evaluate import evaluate_splits
from training.flow import FlowLog
from training.folder import MetricsLog, forget_closest, settle
from training.run import smaller_step
from training.settings import forward_passes
from training.steplog import StepLog, Wandb
from training.verdict import distance_from_target, is_ready, meets_target


class Judge:
    """`judge(step)` evaluates; `is_over` says whether that was the end. run: a `Run`; progress: a `Progress`.
    """

    def __init__(self, run, progress):
        self.run, self.progress, self.config, self.state = run, progress, run.config, run.state
        self.start, self.is_over = run.state.step, False
        c, model = self.config, run.model
        cost = forward_passes(c) - c.recompute_activations
        flops = model.flops_per_token(run.context) / 3 * cost  # a forward pass is a third of a dense step
        self.began = time.time()
        self.speed = hardware.Speed(c.batch_size * run.context, flops, run.device)
        self.log = self.flow = self.steps = self.wandb = None
        if hardware.rank() == 0:
            self.open_logs()

    def open_logs(self):
        """config.json, metrics.jsonl, steps.csv, Weights & Biases if asked for and, for sums, edges.jsonl.

        What a killed run wrote after last.pt is dropped.
        """
        c = self.config
        settle(c.out_dir, self.start)
        write_json(os.path.join(c.out_dir, "config.json"), asdict(c))
        evaluates_at_start = self.start % c.eval_interval == 0 or self.start == c.max_steps
        keep_until = self.start - evaluates_at_start
        self.log = MetricsLog(os.path.join(c.out_dir, "metrics.jsonl"), keep_until)
        self.steps = StepLog(os.path.join(c.out_dir, "steps.csv"), self.start)
        if c.wandb:
            self.wandb = Wandb(c.wandb, asdict(c))
        task = addition_task(self.run.data.meta)
        if c.gated and task:
            self.flow = FlowLog(c.out_dir, task, self.run.model.config, c.max_steps, keep_until)

    def __call__(self, step):
        """Evaluate the run as it stands before a step; keep what is to be kept."""
        c, state, geco = self.config, self.state, self.run.geco
        self.speed.pause()
        found = evaluate_splits(
            self.run.judged, self.run.data, c.eval_batch_size, c.eval_batches, self.is_promising
        )
        self.require_finite(step, found["val"]["loss"])
        passes = not c.gated or meets_target(found, state.dense, state.target_loss)
        state.ready = is_ready(found, c.ready_loss) if c.ready_loss and not c.gated else None
        kept = self.names_to_keep(step, found, passes)
        self.progress.evaluated(found, state.target_loss, state.best, geco and geco.lam)
        self.is_over = step == c.max_steps or bool(state.ready)
        goes_back = self.has_failed_to_repair(step, passes)
        if self.log:
            line = self.line(step, found, passes) | {"goes_back": goes_back}
            self.log.write(**line)
            if self.wandb:
                self.wandb.write(**line)
        if self.flow:
            self.flow.write(step, found, kept, passes, geco.lam)
        self.save_all(step, kept)
        if goes_back:
            self.go_back()
        self.speed.go_on()

    def note(self, step, **measured):
        """A step has been made: what was measured goes into steps.csv; see steplog.py."""
        before, loss = self.state.batch_loss, measured["loss"]
        self.state.batch_loss = loss if before is None else 0.95 * before + 0.05 * loss
        self.state.density = measured["density"]
        if not self.steps:
            return
        if self.run.geco:
            measured |= {"lambda": self.run.geco.lam, "violation": self.run.geco.violation}
        self.steps.write(step, **measured)
        if self.wandb:
            self.wandb.write(step, **{f"step/{name}": value for name, value in measured.items()})

    def close_logs(self):
        """What waits is written or sent, also of a run that has left the numbers."""
        if self.steps:
            self.steps.flush()
        if self.wandb:
            self.wandb.finish()
            self.wandb = None

    def require_finite(self, step, loss):
        """Raise UserError if the held-out loss is no number."""
        if math.isfinite(loss):
            return
        earlier = f"; {self.config.out_dir}/last.pt still holds an earlier step" if step else ""
        raise UserError(f"the held-out loss is {loss} at step {step}{earlier}. {smaller_step(self.config)}")

    # --- judging --------------------------------------------------------------------------------------------

    def is_promising(self, val):
        """Can this become the best evaluation, after what the held-out rows say?

        Else the others need not be counted.
        """
        if not self.config.gated:
            return val["correct"] == val["examples"]
        best = self.state.best
        # equal: a run that goes on judges its best again
        fewer = best is None or val["open"] <= best[0] * (1 + 1e-6)
        return fewer and meets_target({"val": val}, self.state.dense, self.state.target_loss)

    def names_to_keep(self, step, found, passes):
        """['best.pt'], ['closest.pt'] or []: under which name, beside last.pt, this evaluation's model is
        kept.
        """
        state = self.state
        if state.ready:
            state.best = [found["val"]["open"], found["val"]["loss"]]
            return ["best.pt"]
        if self.config.gated and step == 0:
            return []
        if not passes and state.best:
            return []
        if passes:
            # a dense run's edges are all open
            which, score = "best", [found["val"]["open"], found["val"]["loss"]]
        else:
            which, score = "closest", list(distance_from_target(found, state.dense, state.target_loss))
        before = getattr(state, which)
        if before and score > before and not self.was_judged_before(step, score, before):
            return []
        setattr(state, which, score)
        return [f"{which}.pt"]

    def was_judged_before(self, step, score, before):
        """Is this the evaluation from which a run goes on?

        Another device or number of processes may round otherwise.
        """
        return step == self.start and all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(score, before))

    def has_failed_to_repair(self, step, passes):
        """Has a cycle of cutting and repairing ended without meeting the target, though an earlier one did?

        Where best.pt has fewer edges, held-out rows alone say so (`is_promising`).
        """
        c = self.config
        ends_cycle = c.gated and c.cycle_steps and step % c.cycle_steps == 0
        return bool(ends_cycle and self.state.best and not passes and not self.is_over)

    def line(self, step, found, passes):
        """A line of metrics.jsonl."""
        val, train, state, geco = found["val"], found.get("train"), self.state, self.run.geco
        line = {
            "step": step,
            "val_loss": val["loss"],
            "accuracy": val["accuracy"],
            "val_correct": val["correct"],
            "correct": val["correct"] + train["correct"] if train else None,
            "train_loss": train["loss"] if train else None,
            "batch_loss": state.batch_loss,
            "density": state.density,
            "open": val["open"],
            "fraction": val["fraction"],
            "passes": passes,
            "target_loss": state.target_loss,
            "seconds": self.seconds(),
            **self.speed.read(),
        }
        if geco:
            line |= {"constraint_target": geco.target, "constraint_loss": state.constraint_loss,
                     "violation": geco.violation, "lambda": geco.lam}
        return line

    def seconds(self):
        """Of training, in this and earlier commands."""
        return self.state.seconds + time.time() - self.began

    # --- keeping --------------------------------------------------------------------------------------------

    def save_all(self, step, kept):
        """last.pt, and this evaluation under the names in kept; see the docstring above for the order."""
        if not self.is_over:
            for name in ["last.pt", *kept]:
                self.save(name, step)
            return
        for name in [f"{name}.next" for name in kept] + ["last.pt"]:
            self.save(name, step)
        if hardware.rank() == 0:
            settle(self.config.out_dir)

    def save(self, name, step):
        """Write a checkpoint.

        All processes call it; process 0 writes, of a sharded run every process its part.
        """
        run, c, is_last = self.run, self.config, name == "last.pt"
        if is_last and self.steps:  # a run goes on behind the rows that are there
            self.steps.flush()
        state = asdict(self.state) | {"step": step, "seconds": self.seconds()}
        goes_on_from_it = is_last or c.cycle_steps  # `go_back`; else best.pt is a third as large without
        parts = {"optimizer": run.optimizer.state_dict() if goes_on_from_it and not run.sharded else None}
        if run.sharded and is_last:
            run.shards = parts["shards"] = sharding.folder_for(step, run.shards)
            sharding.save(
                os.path.join(c.out_dir, run.shards), state_to_save(run.model), run.model, run.optimizer
            )
        if run.sharded:
            is_whole = not is_last or self.is_over
            parts["model"] = sharding.whole_state(state_to_save(run.model)) if is_whole else None
        if c.average_decay and is_last:
            parts["trained"] = state_to_save(run.model)
        if hardware.rank() > 0:
            return
        geco = run.geco and run.geco.state_dict()
        checkpoint = checkpoint_of(run.judged, geco=geco, config=asdict(c), **run.origin, **state)
        save_checkpoint(os.path.join(c.out_dir, name), {**checkpoint, **parts})
        if name == "best.pt":
            forget_closest(c.out_dir)
        if is_last:
            sharding.remove_old(c.out_dir, keep=parts.get("shards"))

    def go_back(self):
        """Return to best.pt, the state with the fewest edges of those that met the target."""
        run = self.run
        hardware.wait_for_all()  # process 0 has written it
        best = read_checkpoint(os.path.join(self.config.out_dir, "best.pt"))
        for weights in {run.model, run.judged}:
            load_weights(weights, best["model"])
        if best["optimizer"]:  # not of a time without cycles
            sharding.load_optimizer(run.optimizer, best["optimizer"])
        run.geco.violation = 0.0

    def save_and_exit(self, step):
        """After Ctrl-C or SIGTERM: keep the run and say how to go on."""
        self.save("last.pt", step)
        self.close_logs()  # may wait for a network, so after the checkpoint
        hardware.wait_for_all()  # torchrun ends all processes as soon as one has ended
        if hardware.rank() > 0:
            sys.exit(1)
        sys.exit(f"stopped and saved after {step} steps. To go on: {hardware.program()} "
                 + typed("train.py", *sys.argv[1:]))
