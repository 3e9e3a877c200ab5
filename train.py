"""Train a GPT, dense or gated: one loop, readable from top to bottom.

    python train.py config/addition.py                  train, or go on with, the run that this file describes
    python train.py config/addition.py --seed=2         any setting can be changed on the command line
    torchrun --nproc_per_node=8 train.py config/gpt2.py                 eight GPUs; the same run as on one
    python train.py --help                              every setting, its default and its meaning

    dense:   minimise  loss                                            an ordinary nanoGPT run
    gated:   minimise  density  subject to  loss <= target             geco.py; the paper's post-training

The gated run starts from a dense one (`init_from`), measures the dense model's loss, and then shuts edges as long as the
loss stays there. Three losses take part, and all of them are in the log:
- the gradient is that of the mean loss of a training batch under sampled gates (in the last `noise_free_steps` under thresholds), straight-through;
- lambda is moved by the loss of the same batch under the deterministic gates that count in the end, or under the sampled
  ones, as in the paper (`constraint_gates`). Its target is the dense model's loss on training batches + loss_slack;
- the run is judged on the held-out set under deterministic gates, by `meets_target`.

Notable:
- best.pt is the checkpoint with the FEWEST open edges among the evaluations that pass that judgement, not the last one, nor the untrained start.
  A run in which none passes keeps the one that came closest, closest.pt, and says so first in its report (verdict.py).
- With average_decay it is a moving average of the weights that is judged and kept; with cycle_steps a run whose repair fails goes back to best.pt.
- A step's examples and noise hang on (seed, step) alone (batches.py): a run that is killed and started again does on a CPU bit for bit what it would
  have done (GPUs sum in an order of their own), and one process that accumulates gradients does what many processes do (hardware.py).
- The same command continues an unfinished run. A run's folder is never overwritten by a run with other settings.
- Every setting, with default, unit and meaning, is in settings.py.
- Where a run comes from, its parent and its target: training/parents.py.
- What a person sees meanwhile: the progress line (progress.py); for addition flow.png, the open edges of the last evaluation (flow.py).
- Exit status: 0, the run is what it was to become; 2, it is at its end and is not (a target missed, a parent not ready); 1, an error, or stopped.
- How a dense model is handed to the gates without a shock: handover.py. What the dense model teaches its child: `distill_weight`.
"""

import gc
import inspect
import math
import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch
import torch._inductor.config
from torch.nn import functional as F

import prepare_data
from fast.dispatch import choose_impl
from geco import GECO, is_cutting
from models import lora
from models.checkpoint import checkpoint_of, load_weights, read_checkpoint, save_checkpoint, state_to_save
from storage.addition import addition_task
from storage.files import UserError, write_json
from training import hardware, sharding
from training.average import follow, judged_model
from training.batches import Batches
from training.configure import parse_command_line
from training.evaluate import evaluate_splits
from training.flow import FlowLog
from training.folder import MetricsLog, StopRequest, alone_in, claim_folder, settle
from training.handover import fold_shift
from training.parents import models_of
from training.progress import Job, Progress
from training.settings import (
    FIXED,
    FREE,
    GATED_ONLY,
    SHAPE,
    Config,
    check_together,
    forward_passes,
    limits,
    make_config,
)
from training.verdict import MISSED, cap_of, distance_from_target, has_succeeded, is_ready, meets_target


def get_lr(step, c):
    """Linear warm-up, then a cosine from learning_rate to min_lr."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.min_lr + (c.learning_rate - c.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


def divergence(logits, teacher_logits, targets):
    """KL(teacher || student), the mean over the positions where something is asked, nats. Logits (B, T, V), targets (B, T), -1 where nothing is."""
    student, teacher = (x[targets != -1].float().log_softmax(-1) for x in (logits, teacher_logits))  # (asked, V)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def train(config, given=frozenset(), job=None):
    """Train the run that config describes, from where its folder stands to the end. given: the settings that were set; job: of which this run is
    a part, for the progress line; left out, the run's own.

    Leaves config.json, metrics.jsonl, best.pt or closest.pt, and last.pt in config.out_dir. Returns whether the run is what it was to become
    (verdict.py). Raises UserError, UserError, UserError, UserError,
    UserError or UserError with a message for people; SystemExit after Ctrl-C, the run saved.
    """
    c = config
    takes_over = asdict(c) if c.init_from == "resume" else SHAPE
    checkpoint = claim_folder(c, inherit=[key for key in takes_over if key not in given], fixed=FIXED,
                              free=lambda c: FREE if c.gated else (*FREE, *GATED_ONLY))
    device, micro_batches = hardware.pick_device(c.device), check_together(c, hardware.world())
    hardware.wait_for_all()  # nobody writes into the folder before everybody has read it
    job = job or Job.of(c, given, checkpoint)
    if checkpoint and (checkpoint["step"] >= c.max_steps or checkpoint.get("ready")):
        if hardware.rank() == 0:
            settle(c.out_dir, finished=True)
        hardware.say(f"{job.name(c.out_dir)} is finished ({checkpoint['step']} steps)")
        return has_succeeded(c, checkpoint)
    with hardware.first_alone():
        data = prepare_data.load(c.dataset)
    model, dense_model, facts = models_of(c, given, data, device, checkpoint, partial(train, job=job))

    # --- how it computes ----------------------------------------------------------------------------------------------
    # model: trained    fast: the same, compiled    network: the same, in DDP
    # judged: judged, saved: the model, or the moving average of its weights    fast_judged: the same, compiled: measured
    # dense_model: judged    fast_dense: the same, compiled: measured, teaches
    model.attention_impl = c.attention_impl
    sharded = sharding.applies(c.parallel)
    autocast, dtype = hardware.precision(c.dtype, device, cache=not (sharded or c.recompute_activations))
    try:
        impl = choose_impl(c.attention_impl, device.split(":")[0], model.config.block_size, model.config.n_embd // model.config.n_head, getattr(torch, dtype)) if c.gated else "dense"
    except ValueError as error:
        raise UserError(str(error)) from error
    torch._dynamo.config.recompile_limit = 64  # one model, many ways to run it: dense, gated, sampled, judged, taught; at 8 torch would give up compiling
    torch._inductor.config.fallback_random = True  # compiled code draws from torch's own generator: the same noise as without compiling, however the graph is cut
    context = data.train.shape[2] if data.meta["kind"] == "rows" else c.block_size
    long = context >= 64 and not sharded
    pays_dense = long and c.architecture != "gpt2"  # on a CPU: it fuses OLMo's norms and rotations; a dense GPT is no faster
    compiled = hardware.compiles(c.compile, device, pays_on_cpu=pays_dense or c.gated and long)  # and the gates
    fast = torch.compile(model) if compiled and not sharded else model
    fast_dense = dense_model
    if c.gated and not sharded and hardware.compiles(c.compile, device, pays_on_cpu=pays_dense):
        fast_dense = lora.Base(model, torch.compile(model)) if isinstance(dense_model, lora.Base) else torch.compile(dense_model)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}],
                                  lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=device != "mps")
    batches = Batches(data, context, c.batch_size, micro_batches, c.seed, facts["parent"] is not None, device)

    # --- where the run stands: what the dense model can do, lambda, the best checkpoint so far ------------------------
    state = {"step": 0, "seconds": 0.0, "best": None, "closest": None, "ready": None, "dense": None, "target_loss": None, "dense_on_training": None, "batch_loss": None, "density": None, "constraint_loss": None}
    shards = checkpoint.get("shards") if checkpoint else None
    geco = GECO(target=0.0, scale=c.constraint_scale, rate=c.lambda_rate, alpha=c.lambda_average,  # the target is measured below
                lambda_init=c.lambda_init, lambda_min=c.lambda_min, lambda_max=c.lambda_max) if c.gated else None
    if checkpoint:
        if shards:
            sharding.load(os.path.join(c.out_dir, os.path.basename(shards)), state_to_save(model), model, optimizer)
        else:
            sharding.load_optimizer(optimizer, checkpoint["optimizer"])
        for group, decay in zip(optimizer.param_groups, (c.weight_decay, 0.0)):  # which --init_from=resume may change
            group.update(weight_decay=decay, betas=(c.beta1, c.beta2))
        state = {key: checkpoint.get(key, value) for key, value in state.items()}
        if geco:
            geco.load_state_dict(checkpoint["geco"])
        judged = judged_model(model, c.average_decay)
        if c.average_decay:
            load_weights(model, checkpoint["trained"])
        for large in {"model", "optimizer", "trained"} & set(checkpoint):
            del checkpoint[large]
    elif c.gated:
        dense = state["dense"] = evaluate_splits(dense_model, data, c.eval_batch_size, c.eval_batches)
        state["target_loss"] = dense["val"]["loss"] + c.loss_slack
        # Like with like: the measure and the stream of batches that the constraint below sees; 50 of them make a good mean.
        state["dense_on_training"] = sum(batches.mean_loss(step, fast_dense, autocast) for step in range(50)) / 50
        geco.target = state["dense_on_training"] + c.loss_slack - c.constraint_margin
        hardware.say(f"dense model: held-out loss {dense['val']['loss']:.4f}, target {state['target_loss']:.4f}; "
                     f"on training batches {state['dense_on_training']:.4f}, the constraint's target {geco.target:.4f}")
        if c.open_above:
            x, _ = data.batch("train", batches.indices(0)[:max(1, 8192 // context)], context)  # some thousand queries are plenty
            with torch.compiler.set_stance("force_eager"):  # it happens once, with a new function in every layer: not worth compiling
                fold_shift(model, torch.from_numpy(x).to(device), c.open_above, fold=not c.lora_rank and not sharded)
            model.config.gate_bias = hardware.of_first(model.config.gate_bias)  # DDP does the same for the key biases
    if not checkpoint:
        judged = judged_model(model, c.average_decay)
    fast_judged = fast
    if judged is not model:
        fast_judged = torch.compile(judged) if compiled else judged
    start = state["step"]
    network = torch.nn.parallel.DistributedDataParallel(fast) if hardware.world() > 1 and not sharded else fast
    model.train()  # samples the gates, drops out; load_checkpoint and evaluate leave models in evaluation mode

    hardware.say(f"{job.outlook(c.out_dir)}: {'gated' if c.gated else 'dense'}, {sum(p.numel() for p in model.parameters()):,} parameters{f', {sum(p.numel() for p in trained):,} of them trained' if c.lora_rank else ''}, {hardware.world()} x {device}, {dtype}, attention {impl}, "
                 f"{'compiled (the first step takes half a minute, or more)' if compiled else 'not compiled'}, "
                 f"{micro_batches} micro-batch(es) of {c.batch_size // micro_batches} x {context} tokens, from step {start} to {c.max_steps}")

    def save(name, step):
        nonlocal shards
        at = {**state, "step": step, "seconds": state["seconds"] + time.time() - began}
        parts = {"optimizer": None if sharded else optimizer.state_dict()}
        if sharded and name == "last.pt":
            shards = parts["shards"] = sharding.folder_for(step, shards)
            sharding.save(os.path.join(c.out_dir, shards), state_to_save(model), model, optimizer)
        if sharded:
            parts["model"] = sharding.whole_state(state_to_save(model)) if name != "last.pt" or step == c.max_steps else None
        if c.average_decay and name == "last.pt":
            parts["trained"] = model.state_dict()
        if hardware.rank() == 0:
            save_checkpoint(os.path.join(c.out_dir, name), {**checkpoint_of(
                judged, geco=geco and geco.state_dict(), config=asdict(c), **facts, **at), **parts})
            if name == "last.pt":
                sharding.remove_old(c.out_dir, keep=parts.get("shards"))

    def worthwhile(val):
        """Can this become the best evaluation, after what the held-out rows say? Else the others need not be counted."""
        if not c.gated:
            return val["correct"] == val["examples"]
        fewer = not state["best"] or val["open"] <= state["best"][0] * (1 + 1e-6)  # equal: a run that goes on judges its best again
        return fewer and meets_target({"val": val}, state["dense"], state["target_loss"])

    def names_to_keep(step, found, passes):
        """Under which names, beside last.pt, this evaluation's model is kept: best.pt, closest.pt or none. Remembers the scores."""
        val = found["val"]
        score, which = [val["open"], val["loss"]], "best"  # the fewest edges; of a dense run, whose edges are all open, the lowest loss
        if state["ready"]:
            return ["best.pt"]  # a parent is the one that was found ready
        if c.gated and step == 0:
            return []  # the untrained start is nobody's result
        if not passes:
            score, which = list(distance_from_target(found, state["dense"], state["target_loss"])), "closest"
            if state["best"]:
                return []
        before = state[which]
        # at step start of a run that goes on it was judged before; another device or number of processes rounds otherwise
        again = step == start and before and all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(score, before))
        if before and score > before and not again:
            return []
        state[which] = score
        return [f"{which}.pt"]

    def describe(step, found, passes):
        """A line of metrics.jsonl."""
        val = found["val"]
        judged_all = "train" in found
        line = dict(step=step, val_loss=val["loss"], accuracy=val["accuracy"], val_correct=val["correct"],
                    correct=sum(f["correct"] for f in found.values()) if judged_all else None,
                    train_loss=found["train"]["loss"] if judged_all else None, batch_loss=state["batch_loss"],
                    density=state["density"], open=val["open"], fraction=val["fraction"], passes=passes, target_loss=state["target_loss"],
                    seconds=state["seconds"] + time.time() - began, **speed.read())
        if geco:
            line |= {"constraint_target": geco.target, "constraint_loss": state["constraint_loss"], "violation": geco.violation, "lambda": geco.lam}
        return line

    def go_back():
        """A cycle ended without a repair: return to best.pt, the last state that met the target, optimizer and all. Lambda stays as high as it has become."""
        hardware.wait_for_all()  # process 0 has written it
        best = read_checkpoint(os.path.join(c.out_dir, "best.pt"))
        for weights in {model, judged}:
            load_weights(weights, best["model"])
        sharding.load_optimizer(optimizer, best["optimizer"])
        geco.violation = 0.0

    advice = f"Start again with a smaller step, for instance --learning_rate={c.learning_rate / 3:.1g} --out_dir=out/NEW"

    # --- the loop -----------------------------------------------------------------------------------------------------
    began, speed = time.time(), hardware.Speed(c.batch_size * context, model.flops_per_token(context) / 3 * (forward_passes(c) - c.recompute_activations), device)
    with alone_in(c.out_dir), StopRequest() as stop, Progress(job, c, start) as progress:
        log = flow = None
        if hardware.rank() == 0:
            settle(c.out_dir, finished=False)
            write_json(os.path.join(c.out_dir, "config.json"), asdict(c))
            evaluates_at_start = start % c.eval_interval == 0 or start == c.max_steps
            log = MetricsLog(os.path.join(c.out_dir, "metrics.jsonl"), keep_until=start - evaluates_at_start)
            if c.gated and addition_task(data.meta):
                flow = FlowLog(c.out_dir, addition_task(data.meta), model.config, c.max_steps, keep_until=start - evaluates_at_start)
        for step in range(start, c.max_steps + 1):
            if step % c.eval_interval == 0 or step == c.max_steps:
                speed.pause()
                found = evaluate_splits(judged, data, c.eval_batch_size, c.eval_batches, worthwhile)
                val = found["val"]
                if not math.isfinite(val["loss"]):
                    raise UserError(f"the held-out loss is {val['loss']} at step {step}{f'; {c.out_dir}/last.pt still holds an earlier step' if step else ''}. {advice}")
                passes = not c.gated or meets_target(found, state["dense"], state["target_loss"])
                state["ready"] = is_ready(found, c.ready_loss) if c.ready_loss and not c.gated else None
                kept = names_to_keep(step, found, passes)
                progress.evaluated(found, state["target_loss"], state["best"], geco and geco.lam)
                at_end = step == c.max_steps or bool(state["ready"])
                ends_cycle = c.gated and c.cycle_steps and step % c.cycle_steps == 0
                lost = bool(ends_cycle and state["best"] and not passes and not at_end)
                if log:
                    log.write(**describe(step, found, passes), goes_back=lost)
                if flow:
                    flow.write(step, found, kept, passes, geco.lam)
                # last.pt first: a run that is killed in between evaluates again and writes best.pt then. A run whose last.pt is at its end never will
                for name in [f"{name}.next" for name in kept] + ["last.pt"] if at_end else ["last.pt", *kept]:
                    save(name, step)
                if at_end:
                    if hardware.rank() == 0:
                        settle(c.out_dir, finished=True)
                    break
                if lost:
                    go_back()
                speed.go_on()

            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, c)
            noisy = step < c.max_steps - c.noise_free_steps
            cutting = is_cutting(step, c.linear_penalty_steps, c.cycle_steps)
            if c.gated and step % c.constraint_interval == 0:
                sampled = noisy and c.constraint_gates == "sampled"
                measured = batches.mean_loss(step, fast if sampled else fast_judged, autocast, sampled)
                if c.constraint_paired:  # the dense model's luck with this batch, taken off; on average it is 0
                    measured -= batches.mean_loss(step, fast_dense, autocast) - state["dense_on_training"]
                state["constraint_loss"] = measured
                geco.lambda_max = getattr(c, cap_of(vars(c), step))
                geco.update(measured)
            sums = [0.0, 0.0, 0.0]
            for i, (x, y) in enumerate(batches.at(step)):
                with nullcontext() if i == len(batches.ours) - 1 or network is fast else network.no_sync(), autocast():
                    logits, loss, density = network(x, y, linear_penalty=cutting, noise=None if noisy else 0.0)
                    fidelity = loss
                    if c.gated and c.distill_weight:
                        with torch.no_grad():
                            taught = fast_dense(x)[0]
                        fidelity = loss + c.distill_weight * divergence(logits, taught, y)
                    objective = geco.objective(fidelity, density, c.density_weight) if c.gated else loss
                    (objective / len(batches.ours)).backward()
                sums = [before + now.item() for before, now in zip(sums, (loss, density, objective))]
            norm = sharding.whole(torch.nn.utils.clip_grad_norm_(trained, c.grad_clip or math.inf)).item()
            *sums, stopping = hardware.total([*sums, stop.asked], device)  # so that all processes see the same and decide alike
            batch_loss, state["density"], objective = (number / micro_batches for number in sums)
            if not math.isfinite(objective + norm + (state["constraint_loss"] or 0.0)):
                if hardware.rank() == 0:
                    write_json(os.path.join(c.out_dir, "offending_batch.json"), {"step": step, "dataset": c.dataset, "indices": batches.indices(step).tolist()})
                raise UserError(f"the loss is {batch_loss}, the gradient's norm {norm}{', the constraint ' + str(state['constraint_loss']) if c.gated else ''} at step {step}; {c.out_dir}/last.pt still holds an earlier step, "
                               f"offending_batch.json the indices of the batch. {advice}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if c.average_decay:
                follow(judged, model, c.average_decay)
            speed.step()

            state["batch_loss"] = batch_loss if state["batch_loss"] is None else 0.95 * state["batch_loss"] + 0.05 * batch_loss
            progress.step()
            if stopping and step + 1 < c.max_steps:  # after the last step only the evaluation is left
                save("last.pt", step + 1)
                hardware.wait_for_all()  # torchrun ends all processes as soon as one has ended
                program = f"torchrun --nproc_per_node={hardware.world()}" if hardware.world() > 1 else "python"
                sys.exit(f"stopped and saved after {step + 1} steps. To go on: {program} train.py {shlex.join(sys.argv[1:])}" if hardware.rank() == 0 else 1)
    hardware.wait_for_all()  # a child that starts now finds the files whole
    return has_succeeded(c, state)


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(__doc__ + "\n" + inspect.getsource(Config))
        return
    if not arguments:
        sys.exit("error: no config file and no settings. Try: python train.py config/addition.py")
    try:
        path, given = parse_command_line(arguments, Config, limits())
        config, names = make_config(path, given)
        hardware.start_processes(hardware.pick_device(config.device))
        succeeded = train(config, names)
        writes = hardware.rank() == 0
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory: {str(error).splitlines()[0]} Try a smaller --micro_batch_size (the same batches, other noise), or, for a new run, --eval_batch_size")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped. The same command goes on from the last checkpoint")
    finally:
        hardware.stop_processes()
    if torch.cuda.is_initialized():
        gc.collect()  # what wraps a model refers to itself
        torch.cuda.empty_cache()  # the report needs the memory
    if writes:  # A process of its own: the loop needs no matplotlib, and a failing picture cannot harm a finished run.
        here = os.path.dirname(os.path.abspath(__file__))
        reported = subprocess.run([sys.executable, os.path.join(here, "analyze.py"), "report", config.out_dir])
        sys.exit(reported.returncode or (0 if succeeded else MISSED))


if __name__ == "__main__":
    main(sys.argv[1:])
