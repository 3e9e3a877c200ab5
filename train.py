"""Train a GPT, dense or gated: the whole training script, readable from top to bottom.

    python train.py config/addition.py                  train, or go on with, the run that this file describes
    python train.py config/addition.py --seed=2         any setting can be changed on the command line
    torchrun --nproc_per_node=8 train.py config/gpt2.py                 eight GPUs; the same run as on one
    python train.py --help                              every setting, its default and its meaning

    dense:   minimise  loss                                            an ordinary nanoGPT run
    gated:   minimise  density  subject to  loss <= target             geco.py; the paper's post-training

Three models take part:
- `model` is trained;
- `ema`, the moving average of its weights, is measured, judged and kept; without average_decay it is `model`;
- `dense`, of a gated run, is the frozen parent: it sets the target and teaches.

And three losses, all of them in the log but the teacher's:
- the gradient is that of the mean loss of a training batch under sampled gates (in the last
  `noise_free_steps` under thresholds), straight-through; with `distill_weight` KL(dense, gated) is added;
- lambda is moved, every `constraint_interval` steps, by the loss of the same batch under thresholds and
  averaged weights, as the run is judged, or under sampled gates, as in the paper (`constraint_gates`). Its
  target is the dense model's loss on training batches + loss_slack; on text a peak_slack is added, which
  goes to 0 along the learning rate's cosine, and the dense model's luck with the batch is taken off
  (`constraint_paired`);
- the run is judged on the held-out set under thresholds (training/judge.py).

Notable:
- best.pt is not the last evaluation but, of those that meet the target, the one with the fewest open edges.
- The same command continues an unfinished run, on a CPU bit for bit. A folder is never overwritten by a run
  with other settings.
- Exit status: 0, the run is what it was to become; 2, it is at its end and is not (a target missed, a parent
  not ready); 1, an error, or stopped; also of a finished run whose numbers cannot be reported (a picture that
  cannot be drawn is named, and changes no status). torchrun makes every status but 0 a 1.

What stays outside has one reason each, in training/: settings and the runs of a command, config.py; where a
run starts, and its folder, folder.py; examples, noise, learning rate and average as functions of the step,
steps.py; evaluation and verdict, judge.py; how dense becomes gated without a shock, and the teacher,
handover.py; devices and processes, parallel.py; logs and the progress line, log.py.
"""

import gc
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

import prepare_data
from geco import GECO
from storage.files import UserError, take_every_sign, typed
from training import parallel
from training.config import (
    check_together,
    described,
    lineage_of,
    make_config,
    micro_batch_size,
    parse_command_line,
)
from training.folder import StopRequest, alone_in, claim_folder, models_of, restore, save
from training.handover import distillation, fold_shift
from training.judge import (
    MISSED,
    can_be_best,
    evaluate_splits,
    has_stalled,
    has_succeeded,
    is_at_end,
    is_ready,
    meets_target,
    name_to_keep,
)
from training.log import Logs, name_of_part
from training.steps import Batches, adamw, averaged, cosine, get_lr, update_average

MEASURED = 50  # batches of the dense loss on training data: a good mean


@dataclass
class State:
    """Where a run stands: what a checkpoint remembers beside weights, optimizer and lambda."""

    step: int = 0  # steps made
    seconds: float = 0.0  # of training and evaluation
    evaluated: int = -1  # the step of the last evaluation
    best: list | None = None  # [open edges, loss] of best.pt
    best_step: int | None = None
    closest: list | None = None  # how far closest.pt is from the target
    ready: bool | None = None  # of a dense run with a ready_loss
    dense: dict | None = None  # of a gated run: {split: what `evaluate` says of the dense model}
    target_loss: float | None = None  # held out, nats
    dense_on_training: float | None = None  # nats
    batch_loss: float | None = None  # moving average, nats
    density: float | None = None  # of the last step
    constraint_loss: float | None = None  # of the last measurement, nats


def train_one(c, given, runs, place):  # noqa: C901, the script as a whole, from top to bottom
    """Train one run, whose parents have been trained, from where its folder stands to its end. As `train`.

    c: its Config; given: names of the settings that were set; runs: the Configs of all runs of this command,
    of which this is runs[place].
    """
    saved = claim_folder(c, given)  # its last.pt, if it has begun
    parallel.wait_for_all()  # nobody writes into the folder before everybody has read it
    if saved and is_at_end(saved, c):
        parallel.say(f"{name_of_part(runs, place)} is finished ({saved['step']} steps)")
        return has_succeeded(c, saved)

    # --- data and models ------------------------------------------------------------------------------------
    device, world = parallel.pick_device(c.device), parallel.world()
    check_together(c, world)
    micro_batches = c.batch_size // micro_batch_size(c, world)
    with parallel.first_alone():
        data = prepare_data.load(c.dataset)
    model, dense, origin = models_of(c, given, data, device, saved)
    T = data.train.shape[2] if data.meta["kind"] == "rows" else c.block_size
    is_child = origin["parent"] is not None
    batches = Batches(data, T, c.batch_size, micro_batches, c.seed, is_child, device)
    autocast, compiled, how = how_to_compute(c, model, dense, T, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, geco, state = adamw(trained, c), None, State()
    if c.gated:  # the target is measured below
        geco = GECO(target=0.0, scale=c.constraint_scale, rate=c.lambda_rate, lambda_init=c.lambda_init,
                    lambda_min=c.lambda_min, lambda_max=c.lambda_max)

    def constraint_target(step):
        """What the constraint's loss is to be, nats: it comes down with the learning rate."""
        slack = c.target_loss - state.dense["val"]["loss"] if c.target_loss else c.loss_slack
        return state.dense_on_training + slack + c.peak_slack * cosine(step, c)

    # --- where it stands: a new run measures its target; one that goes on is put back -----------------------
    if saved:
        ema = restore(saved, c, model, optimizer, geco, state)
    else:
        if c.gated:
            state.dense = evaluate_splits(dense, data, c.eval_batch_size, c.eval_batches)
            state.target_loss = c.target_loss or state.dense["val"]["loss"] + c.loss_slack
            # like with like: the measure and the stream of batches that the constraint sees
            losses = [batches.mean_loss(step, dense, autocast) for step in range(MEASURED)]
            state.dense_on_training = sum(losses) / MEASURED
            geco.target = constraint_target(c.max_steps)
            parallel.say(f"dense model: held-out loss {state.dense['val']['loss']:.4f}, target "
                         f"{state.target_loss:.4f}; on training batches {state.dense_on_training:.4f}, the "
                         f"constraint's target {geco.target:.4f}")
            if c.open_above:  # edges with some attention start open
                rows = batches.indices(0)[:max(1, 8192 // T)]
                fold_shift(model, torch.from_numpy(data.batch("train", rows, T)[0]).to(device), c.open_above,
                           fold=not c.lora_rank)
        ema = averaged(model, c.average_decay)
    if compiled and ema is not model:
        ema.compile()
    start, began, is_over = state.step, time.time() - state.seconds, False
    network = model
    if world > 1 and not parallel.is_sharded(c.parallel):
        network = torch.nn.parallel.DistributedDataParallel(model)
    model.train()  # samples the gates, drops out; loading and evaluating leave models in evaluation mode

    # --- the loop -------------------------------------------------------------------------------------------
    behind = ", ".join(f"then {later.out_dir}" for later in runs[place + 1:])
    parallel.say(f"{name_of_part(runs, place)}{behind and f' ({behind})'}: "
                 f"{'gated' if c.gated else 'dense'}, {sum(p.numel() for p in trained):,} weights to train, "
                 f"{world} x {device}, {how}, {micro_batches} micro-batch(es) of "
                 f"{c.batch_size // micro_batches} x {T} tokens, from step {start} to {c.max_steps}")
    with StopRequest() as stop, Logs(runs, place, state, data, model, T, device) as log:
        for step in range(start, c.max_steps + 1):

            # --- once in a while: evaluate, log, keep -------------------------------------------------------
            if (step % c.eval_interval == 0 or step == c.max_steps) and step != state.evaluated:
                log.speed.pause()
                evaluation = evaluate_splits(ema, data, c.eval_batch_size, c.eval_batches,
                                         partial(can_be_best, c, state))
                loss = evaluation["val"]["loss"]
                require_finite(loss, f"the held-out loss is {loss}", step, c)
                passes = not c.gated or meets_target(evaluation, state.dense, state.target_loss)
                state.ready = is_ready(evaluation, c.ready_loss) if c.ready_loss and not c.gated else None
                kept = name_to_keep(c, state, step, evaluation, passes)
                is_over = step == c.max_steps or bool(state.ready) or has_stalled(c, step, state.best_step)
                state.step, state.evaluated, state.seconds = step, step, time.time() - began
                log.evaluated(evaluation, passes, kept, state, geco)
                for name in [kept, "last.pt"] if kept else ["last.pt"]:
                    save(name, c, model, ema, optimizer, geco, origin, state)
                if is_over:
                    break
                log.speed.go_on()
            learning_rate = get_lr(step, c)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            gates = "sample" if step < c.max_steps - c.noise_free_steps else "threshold"

            # --- 1. lambda: up if the loss is above its target, else down -----------------------------------
            if c.gated and step % c.constraint_interval == 0:
                sampled = gates == "sample" and c.constraint_gates == "sampled"
                loss = batches.mean_loss(step, model if sampled else ema, autocast, sampled)
                if c.constraint_paired:  # the dense model's luck with this batch; on average it is 0
                    loss -= batches.mean_loss(step, dense, autocast) - state.dense_on_training
                require_finite(loss, f"the constraint is {loss}", step, c)
                state.constraint_loss, geco.target = loss, constraint_target(step)
                geco.lambda_max = c.lambda_init if step < c.linear_penalty_steps else c.lambda_max
                geco.update(loss)

            # --- 2. gradients: of  density + lambda (loss - target) -----------------------------------------
            measured = []
            for i, (x, y, weight) in enumerate(batches.at(step)):
                if network is not model:  # DDP averages gradients after the last micro-batch alone
                    network.require_backward_grad_sync = i == len(batches.dealt) - 1
                with autocast():
                    logits, loss, density = network(x, y, gates=gates,
                                                    linear_penalty=step < c.linear_penalty_steps)
                    loss = weight * loss  # its share of the step's targets
                    objective = loss
                    if c.gated:
                        teaching = weight * distillation(c.distill_weight, dense, x, y, logits)
                        objective = geco.objective(loss + teaching, density)
                (objective / len(batches.dealt)).backward()  # DDP and FSDP average over the processes
                measured.append(torch.stack([loss, density, objective]).detach().float())

            # --- 3. step ------------------------------------------------------------------------------------
            norm = torch.nn.utils.clip_grad_norm_(trained, c.grad_clip)
            norm = parallel.whole(norm).item()
            # all processes see the same, and decide alike
            sums = torch.stack(measured).cpu().double().sum(dim=0).tolist()
            *sums, stopping = parallel.all_reduce_sum([*sums, stop.asked], device)
            batch_loss, state.density, objective = (number / micro_batches for number in sums)
            state.batch_loss = (batch_loss if state.batch_loss is None
                                else 0.95 * state.batch_loss + 0.05 * batch_loss)
            log.stepped(step, geco, loss=batch_loss, density=state.density, gradient_norm=norm,
                        learning_rate=learning_rate)
            what = f"the loss is {batch_loss}, the gradient's norm {norm}"
            require_finite(objective + norm, what, step, c)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_average(ema, model, c.average_decay)
            if stopping and step + 1 < c.max_steps:  # after the last step only the evaluation is left
                log.flush()  # a run goes on behind the rows that are there
                state.step, state.seconds = step + 1, time.time() - began
                save("last.pt", c, model, ema, optimizer, geco, origin, state)
                parallel.wait_for_all()  # torchrun ends all processes as soon as one has ended
                stopped = f"stopped and saved after {step + 1} steps. The same command goes on from there"
                sys.exit(stopped if parallel.rank() == 0 else 1)
    parallel.wait_for_all()  # a child that starts now finds the files whole
    if place + 1 < len(runs) and parallel.all_reduce_sum([stop.asked], device)[0]:
        raise KeyboardInterrupt  # asked for in its last step or evaluation: no child starts
    return has_succeeded(c, vars(state))


def how_to_compute(c, model, dense, T, device):
    """Precision, threads, attention, compilation: (a function that returns the autocast context, is the model
    compiled?, all of it in words). Compiles model and dense, in place, where that pays.
    """
    sharded, config = parallel.is_sharded(c.parallel), model.config
    autocast, dtype = parallel.precision(c.dtype, device, config.n_embd,
                                         cache=not (sharded or c.recompute_activations))
    parallel.set_threads(device, config.n_embd, micro_batch_size(c, parallel.world()) * T)
    model.attention_impl = c.attention_impl
    impl = "dense"
    if c.gated:
        width = config.n_embd // config.n_head
        impl = parallel.attention(c.attention_impl, device, config.block_size, width, getattr(torch, dtype))

    # on a CPU: of a dense model OLMo's norms and rotations; a dense GPT is no faster
    long = T >= 64 and not sharded
    pays_dense = long and c.architecture != "gpt2"
    compiled = parallel.compiles(c.compile, device, pays_dense or long and c.gated)
    if compiled:
        from torch._dynamo import config as dynamo  # here: nobody else waits two seconds for the compiler
        from torch._inductor import config as inductor

        # one model, many ways to run it: dense, gated, sampled, judged; at 8 torch would give up compiling
        dynamo.recompile_limit = 64
        inductor.fallback_random = True  # noise from torch's own generator: the same as without compiling
    if compiled and not sharded:
        model.compile()
        if dense and parallel.compiles(c.compile, device, pays_dense):
            dense.compile()
    return autocast, compiled, f"{dtype}, attention {impl}, {'' if compiled else 'not '}compiled"


def require_finite(number, what, step, c):
    """Raise UserError, with advice, if a run has left the numbers."""
    if not math.isfinite(number):
        raise UserError(f"{what} at step {step}; {c.out_dir}/last.pt, if it is there, holds an earlier one. "
                        "Start again with a lower learning rate, for instance "
                        f"--learning_rate={c.learning_rate / 3:.1g} --out_dir=out/NEW")


def train(config, given=frozenset()):
    """Train the run that config describes, and before it the runs of the config files that it starts from.

    Leaves config.json, metrics.jsonl, best.pt or closest.pt, and last.pt in config.out_dir. Returns whether
    the run is what it was to become. Raises UserError with a message for people; SystemExit after Ctrl-C, the
    run saved.
    """
    lineage = lineage_of(config, given)
    runs = [c for c, _ in lineage]
    if len(runs) > 1:
        # a mistake in the last run's settings, and a compiler that does not work, are found before the first
        # one trains
        claim_folder(config, given)
        prepare_data.require(config.dataset)
        check_together(config, parallel.world())
        device = parallel.pick_device(config.device)
        parallel.attention(config.attention_impl, device)
        parallel.compiles(config.compile, device, pays_on_cpu=False)
    for place, (c, names) in enumerate(lineage):
        try:
            with alone_in(c.out_dir):
                succeeded = train_one(c, names, runs, place)
        except UserError as error:
            if c is config:
                raise
            source = runs[place + 1].init_from
            raise UserError(f"the parent, {source}: {error} (flags for the parent go with its own command; "
                            "another parent is named with --init_from=out/OTHER)") from error
    return succeeded


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nSettings and their defaults:\n\n{described()}")
        return
    if not arguments:
        sys.exit("error: no config file and no settings. Try: python train.py config/addition.py")
    try:
        path, given = parse_command_line(arguments)
        config, names = make_config(path, given)
        parallel.start_processes(parallel.pick_device(config.device))
        succeeded = train(config, names)
        writes = parallel.rank() == 0
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory: {str(error).splitlines()[0]} Try a smaller --micro_batch_size (the "
                 "same batches, other noise), or, for a new run, --eval_batch_size")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not parallel.lost_another(error):
            raise
        sys.exit("stopped, because another process has: its message says why")
    except KeyboardInterrupt:
        sys.exit("stopped. The same command goes on from the last checkpoint")
    finally:
        parallel.stop_processes()
    if writes:
        sys.exit(report(config.out_dir) or (0 if succeeded else MISSED))


def report(folder):
    """Print what a run became, and draw it, in a process of its own: the loop needs no matplotlib, and a
    picture that fails cannot harm a finished run. Returns the exit status.
    """
    if torch.cuda.is_initialized():
        gc.collect()  # what wraps a model refers to itself
        torch.cuda.empty_cache()  # the report needs the memory
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, os.path.join(here, "analyze.py"), "report", folder]
    try:
        return subprocess.run(command).returncode
    except KeyboardInterrupt:
        again = typed("python", "analyze.py", "report", folder)
        sys.exit(f"stopped. The run is finished; its report: {again}")


if __name__ == "__main__":
    take_every_sign()
    main(sys.argv[1:])
