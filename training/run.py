"""A run while it trains: its models, its data, its optimizer, and where it stands.

    model         is trained
    judged        is measured, judged and kept: the model itself, or the moving average of its weights
                  (average.py)
    dense_model   of a gated run: sets the target, is compared with on the same batch, and teaches

Each has a form in which it is called, compiled where that pays: `called`, `called_judged`, `called_dense`;
`network` is `called`, in DDP where there are several processes.

Notable:
- `State` is what a checkpoint remembers beside weights, optimizer and lambda.
- Whether a run is compiled, sharded, adapted (LoRA) or shared among processes is decided here, and nowhere in
  the loop.
"""

import math
import os
from dataclasses import asdict, dataclass

import torch

import prepare_data
from geco import GECO
from models import lora
from models.checkpoint import load_weights, state_to_save
from storage.files import UserError, write_json
from training import hardware, sharding
from training.average import follow, judged_model
from training.batches import Batches
from training.distillation import divergence
from training.evaluate import evaluate_splits
from training.handover import fold_shift
from training.parents import models_of
from training.settings import check_together, micro_batches_of

MEASURED = 50  # batches of the dense loss on training data: a good mean


@dataclass
class State:
    """Where a run stands."""

    step: int = 0  # where this command began, and so is `seconds`; a checkpoint has its own
    seconds: float = 0.0  # of training
    best: list | None = None  # [open edges, loss] of best.pt
    closest: list | None = None  # how far closest.pt is from the target
    ready: bool | None = None  # of a dense run with a ready_loss
    dense: dict | None = None  # of a gated run: {split: what `evaluate` says of the dense model}
    target_loss: float | None = None  # held out, nats
    dense_on_training: float | None = None  # nats
    batch_loss: float | None = None  # moving average, nats
    density: float | None = None  # of the last step
    constraint_loss: float | None = None  # of the last measurement, nats


class Run:
    """See above. checkpoint: the run's own last.pt, which is emptied of its tensors, or None of a new run."""

    def __init__(self, config, given, checkpoint):
        c = self.config = config
        self.device = hardware.pick_device(c.device)
        check_together(c, hardware.world())
        self.micro_batches = micro_batches_of(c, hardware.world())
        with hardware.first_alone():
            self.data = prepare_data.load(c.dataset)
        self.model, self.dense_model, self.origin = models_of(c, given, self.data, self.device, checkpoint)
        self.context = self.data.train.shape[2] if self.data.meta["kind"] == "rows" else c.block_size
        is_child = self.origin["parent"] is not None
        self.batches = Batches(
            self.data, self.context, c.batch_size, self.micro_batches, c.seed, is_child, self.device
        )
        self.state, self.shards = State(), None
        self.choose_how_to_compute()
        self.make_optimizer()
        self.geco = None
        if c.gated:  # the target is measured below
            self.geco = GECO(target=0.0, scale=c.constraint_scale, rate=c.lambda_rate, alpha=c.lambda_average,
                             lambda_init=c.lambda_init, lambda_min=c.lambda_min, lambda_max=c.lambda_max)
        if checkpoint:
            self.go_on_from(checkpoint)
        else:
            self.start()
        self.called_judged = self.called
        if self.judged is not self.model:
            self.called_judged = torch.compile(self.judged) if self.compiled else self.judged
        self.network = self.called
        if hardware.world() > 1 and not self.sharded:
            self.network = torch.nn.parallel.DistributedDataParallel(self.called)
        # samples the gates, drops out; loading and evaluating leave models in evaluation mode
        self.model.train()

    # --- how it computes ------------------------------------------------------------------------------------

    def choose_how_to_compute(self):
        """Precision, attention, compilation: `autocast`, `impl`, `compiled`, `called`, `called_dense`."""
        c, config = self.config, self.model.config
        self.sharded = sharding.applies(c.parallel)
        keeps_copies = not (self.sharded or c.recompute_activations)
        self.autocast, self.dtype = hardware.precision(c.dtype, self.device, cache=keeps_copies)
        self.model.attention_impl = c.attention_impl
        self.impl = "dense"
        if c.gated:
            width, dtype = config.n_embd // config.n_head, getattr(torch, self.dtype)
            asked = "plain" if config.plain_only else c.attention_impl
            self.impl = hardware.attention(asked, self.device, config.block_size, width, dtype)

        # here: a mistake in the settings is answered before the compiler's two seconds of importing
        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        # one model, many ways to run it: dense, gated, sampled, judged, taught; at 8 torch would give up
        # compiling
        dynamo.recompile_limit = 64
        # compiled code draws from torch's own generator: the same noise as without compiling
        inductor.fallback_random = True
        pays_dense, pays = pays_on_cpu(c, c.architecture, self.context)
        self.compiled = hardware.compiles(c.compile, self.device, pays)
        self.called = self.model
        if self.compiled and not self.sharded:
            self.called = torch.compile(self.model)
        self.called_dense = self.dense_model
        if c.gated and not self.sharded and hardware.compiles(c.compile, self.device, pays_dense):
            if isinstance(self.dense_model, lora.Base):
                self.called_dense = lora.Base(self.model, torch.compile(self.model))
            else:
                self.called_dense = torch.compile(self.dense_model)

    def make_optimizer(self):
        """AdamW over what is trained."""
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.trained, self.config)

    # --- where it stands ------------------------------------------------------------------------------------

    def start(self):
        """A new run: what the dense model can do, and with it the target; then its weights are handed to the
        gates.
        """
        if self.config.gated:
            self.measure_dense()
            if self.config.open_above:
                self.hand_over()
        self.judged = judged_model(self.model, self.config.average_decay)

    def measure_dense(self):
        """The target of the judgement, on held-out data, and that of the constraint, on training batches."""
        c, state = self.config, self.state
        state.dense = evaluate_splits(self.dense_model, self.data, c.eval_batch_size, c.eval_batches)
        state.target_loss = state.dense["val"]["loss"] + c.loss_slack
        # like with like: the measure and the stream of batches that the constraint sees
        losses = [self.batches.mean_loss(step, self.called_dense, self.autocast) for step in range(MEASURED)]
        state.dense_on_training = sum(losses) / MEASURED
        self.geco.target = self.constraint_target(c.max_steps)
        hardware.say(
            f"dense model: held-out loss {state.dense['val']['loss']:.4f}, target {state.target_loss:.4f}; "
            f"on training batches {state.dense_on_training:.4f}, the constraint's target "
            f"{self.geco.target:.4f}"
        )

    def hand_over(self):
        """Shift the gates so that edges with some attention start open (handover.py)."""
        c = self.config
        rows = self.batches.indices(0)[:max(1, 8192 // self.context)]
        x, _ = self.data.batch("train", rows, self.context)
        # once, with a new function in every layer: not worth compiling
        with torch.compiler.set_stance("force_eager"):
            fold_shift(self.model, torch.from_numpy(x).to(self.device), c.open_above,
                       fold=not c.lora_rank)
        # DDP does the same for key biases
        self.model.config.gate_bias = hardware.broadcast(self.model.config.gate_bias)

    def go_on_from(self, checkpoint):
        """A run that has begun: optimizer, lambda, state and weights as they were."""
        c = self.config
        self.shards = checkpoint.get("shards")
        if self.shards:
            folder = os.path.join(c.out_dir, os.path.basename(self.shards))
            sharding.load(folder, state_to_save(self.model), self.model, self.optimizer)
            # --init_from=resume may change them
            for group, decay in zip(self.optimizer.param_groups, (c.weight_decay, 0.0), strict=True):
                group.update(weight_decay=decay, betas=(c.beta1, c.beta2))
        else:
            sharding.load_optimizer(self.optimizer, checkpoint["optimizer"])
        self.state = State(**{key: checkpoint.get(key, value) for key, value in asdict(State()).items()})
        if self.geco:
            self.geco.load_state_dict(checkpoint["geco"])
        self.judged = judged_model(self.model, c.average_decay)
        if c.average_decay:
            load_weights(self.model, checkpoint["trained"], names=state_to_save(self.model))
        for large in {"model", "optimizer", "trained"} & set(checkpoint):
            del checkpoint[large]

    # --- what the loop asks for -----------------------------------------------------------------------------

    def constraint_target(self, step):
        """What the constraint's loss is to be at a step, nats: it comes down with the learning rate."""
        c = self.config
        return (self.state.dense_on_training + c.loss_slack - c.constraint_margin
                + c.peak_slack * cosine(step, c))

    def constraint(self, step, noisy):
        """Lambda's measurement: the loss of a step's batch under the gates that count, nats.

        noisy: does training sample them?
        """
        c = self.config
        if noisy and c.constraint_gates == "sampled":
            measured = self.batches.mean_loss(step, self.called, self.autocast, sampled=True)
        else:
            measured = self.batches.mean_loss(step, self.called_judged, self.autocast)
        if c.constraint_paired:  # the dense model's luck with this batch, taken off; on average it is 0
            dense = self.batches.mean_loss(step, self.called_dense, self.autocast)
            measured -= dense - self.state.dense_on_training
        self.state.constraint_loss = measured
        if not math.isfinite(measured):
            self.left_the_numbers(step, f"the constraint is {measured}")
        return measured

    def parts(self, step):
        """This process's micro-batches of a step, as `Batches.at` yields them.

        DDP averages gradients after the last alone.
        """
        last = len(self.batches.ours) - 1
        for i, batch in enumerate(self.batches.at(step)):
            if self.network is not self.called:
                self.network.require_backward_grad_sync = i == last
            yield batch

    def distillation_loss(self, x, y, logits):
        """What the dense model adds to the loss of a gated run: distillation.py. 0 where it does not teach.
        """
        weight = self.config.distill_weight
        if not weight:
            return 0.0
        with torch.no_grad():
            teacher_logits = self.called_dense(x)[0]
        return weight * divergence(logits, teacher_logits, y)

    def clip_gradient(self):
        """Shorten the gradient to grad_clip; its norm before."""
        limit = self.config.grad_clip or math.inf
        return sharding.whole(torch.nn.utils.clip_grad_norm_(self.trained, limit)).item()

    def update_weights(self):
        """The optimizer's step, and the moving average's."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.average_decay:
            follow(self.judged, self.model, self.config.average_decay)

    def require_finite(self, step, batch_loss, objective, norm):
        """Raise UserError if training has left the numbers."""
        if not math.isfinite(objective + norm):
            self.left_the_numbers(step, f"the loss is {batch_loss}, the gradient's norm {norm}")

    def left_the_numbers(self, step, what):
        """Leave the batch's indices behind, and raise UserError. what: is no finite number."""
        c = self.config
        if hardware.rank() == 0:
            offending = {"step": step, "dataset": c.dataset, "indices": self.batches.indices(step).tolist()}
            write_json(os.path.join(c.out_dir, "offending_batch.json"), offending)
        raise UserError(f"{what} at step {step}; {c.out_dir}/last.pt still holds an earlier step, "
                        f"offending_batch.json the indices of the batch. {smaller_step(c)}")

    def outlook(self):
        """A line about what is going to be trained, and how."""
        c, parameters = self.config, sum(p.numel() for p in self.model.parameters())
        words = ["gated" if c.gated else "dense", f"{parameters:,} parameters"]
        if c.lora_rank:
            words[-1] += f", {sum(p.numel() for p in self.trained):,} of them trained"
        words += [f"{hardware.world()} x {self.device}", self.dtype, f"attention {self.impl}"]
        words.append(
            "compiled (the first step takes half a minute, or more)" if self.compiled else "not compiled"
        )
        words.append(
            f"{self.micro_batches} micro-batch(es) of {c.batch_size // self.micro_batches} x {self.context} "
            "tokens"
        )
        words.append(f"from step {self.state.step} to {c.max_steps}")
        return ", ".join(words)


def pays_on_cpu(c, architecture, context):
    """Is compiled code faster on a CPU? (the dense model's, the run's own). c: the run's settings."""
    long = context >= 64 and not sharding.applies(c.parallel)
    # OLMo's norms and rotations; a dense GPT is no faster
    dense = long and architecture != "gpt2"
    return dense, dense or c.gated and long


def adamw(parameters, c):
    """AdamW with the settings c, weight decay on matrices alone."""
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    is_fused = parameters[0].device.type != "mps"
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=is_fused)


def cosine(step, c):
    """1 until the warm-up is over, then half a cosine down to 0."""
    done = max(0, step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return (1 + math.cos(math.pi * min(1, done))) / 2


def get_lr(step, c):
    """Linear warm-up, then a cosine from learning_rate to min_lr."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    return c.min_lr + (c.learning_rate - c.min_lr) * cosine(step, c)


def smaller_step(c):
    """Advice for a run that has left the numbers."""
    smaller = f"--learning_rate={c.learning_rate / 3:.1g}"
    return f"Start again with a smaller step, for instance {smaller} --out_dir=out/NEW"
