"""Train a GPT, dense or gated: one loop, readable from top to bottom.

    python train.py config/addition.py                  train, or go on with, the run that this file describes
    python train.py config/addition.py --seed=2         any setting can be changed on the command line
    torchrun --nproc_per_node=8 train.py config/gpt2.py                 eight GPUs; the same run as on one
    python train.py --help                              every setting, its default and its meaning

    dense:   minimise  loss                                            an ordinary nanoGPT run
    gated:   minimise  density  subject to  loss <= target             geco.py; the paper's post-training

The gated run starts from a dense one (`init_from`), measures the dense model's loss, and then shuts edges as
long as the loss stays there. Three losses take part, and all of them are in the log:
- the gradient is that of the mean loss of a training batch under sampled gates (in the last
  `noise_free_steps` under thresholds), straight-through; with `distill_weight` KL(dense, gated) is added,
  which no log has;
- lambda is moved, every `constraint_interval` steps, by the loss of the same batch under deterministic gates
  and averaged weights, as the run is judged, or under sampled gates, as in the paper (`constraint_gates`).
  Its target is the dense model's loss on training batches + loss_slack - constraint_margin; on text a
  peak_slack is added, which goes to 0 along the learning rate's cosine, and the dense model's luck with the
  batch is taken off (`constraint_paired`);
- the run is judged on the held-out set under deterministic gates (training/verdict.py).

Notable:
- best.pt is not the last evaluation but, of those that meet the target, the one with the fewest open edges.
- A step's examples and its micro-batches' noise hang on (seed, step) alone (training/batches.py): a run that
  is killed and started again does on a CPU bit for bit what it would have done (GPUs sum in an order of their
  own), and one process does what many do, if micro-batches are of one size.
- The same command continues an unfinished run. A folder is never overwritten by a run with other settings.
- Exit status: 0, the run is what it was to become; 2, it is at its end and is not (a target missed, a parent
  not ready); 1, an error, or stopped; also of a finished run whose numbers cannot be reported (a picture that
  cannot be drawn is named, and changes no status). torchrun makes every status but 0 a 1.

What stands around the loop: settings and their meaning, training/settings.py; where a run comes from,
parents.py; models, optimizer and devices, run.py; evaluation and checkpoints, judge.py; how dense becomes
gated without a shock, handover.py.
"""

import gc
import os
import subprocess
import sys

import torch

import prepare_data
from geco import is_cutting
from storage.files import UserError, take_every_sign, typed
from training import hardware
from training.configure import described, parse_command_line
from training.folder import StopRequest, alone_in, claim_folder, settle
from training.judge import Judge
from training.parents import lineage_of
from training.progress import Job, Progress
from training.run import Run, get_lr, pays_on_cpu
from training.settings import Config, check_together, limits, make_config
from training.verdict import MISSED, cap_of, has_succeeded, is_at_end


def loop(run, judge, progress, stop):
    """Train run (training/run.py) from where it stands to its end."""
    c, geco, state = run.config, run.geco, run.state
    for step in range(state.step, c.max_steps + 1):
        if step % c.eval_interval == 0 or step == c.max_steps:
            judge(step)  # evaluate, log, best.pt, last.pt
            if judge.is_over:
                break
        learning_rate = get_lr(step, c)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        noisy = step < c.max_steps - c.noise_free_steps  # else gates are thresholds, as when they are judged
        noise = None if noisy else 0.0  # None: gate.py draws it
        cutting = is_cutting(step, c.linear_penalty_steps, c.cycle_steps)

        # --- 1. lambda: up if the loss is above its target, else down ---------------------------------------
        if c.gated and step % c.constraint_interval == 0:  # from lambda_init on, and at step 0 already
            geco.lambda_max = getattr(c, cap_of(vars(c), step))  # one while cutting, another while repairing
            geco.target = run.constraint_target(step)
            geco.update(run.constraint(step, noisy))

        # --- 2. gradients: of  density_weight * density + lambda (loss - target) ----------------------------
        seen = []
        for x, y, weight in run.parts(step):  # weight: its share of the step's targets, as batches.py says
            with run.autocast():
                logits, loss, density = run.network(x, y, linear_penalty=cutting, noise=noise)
                objective = loss = weight * loss
                if c.gated:
                    taught = loss + weight * run.distillation_loss(x, y, logits)
                    objective = geco.objective(taught, density, c.density_weight)
            (objective / len(run.batches.ours)).backward()  # DDP and FSDP average over the processes
            seen.append((loss.detach(), density.detach(), objective.detach()))

        # --- 3. step ----------------------------------------------------------------------------------------
        norm = run.clip_gradient()
        sums = [sum(number.item() for number in numbers) for numbers in zip(*seen)]
        # all processes see the same, and decide alike
        *sums, stopping = hardware.all_reduce_sum([*sums, stop.asked], run.device)
        batch_loss, density, objective = (number / run.micro_batches for number in sums)
        judge.note(step, loss=batch_loss, density=density, gradient_norm=norm, learning_rate=learning_rate)
        run.require_finite(step, batch_loss, objective, norm)
        run.update_weights()
        judge.speed.step()
        progress.step()
        if stopping and step + 1 < c.max_steps:  # after the last step only the evaluation is left
            judge.save_and_exit(step + 1)


def train_one(config, given, job=None):
    """Train one run, whose parents have been trained, from where its folder stands to its end. As `train`.

    given: names of the settings that were set; job: of which this run is a part, for the progress line.
    """
    c = config
    checkpoint = claim_folder(c, given)
    hardware.wait_for_all()  # nobody writes into the folder before everybody has read it
    if job is None:
        job = Job.of_begun(c, checkpoint) if checkpoint else Job([c])
    if checkpoint and is_at_end(checkpoint, c):
        if hardware.rank() == 0:
            settle(c.out_dir)
        hardware.say(f"{job.name(c.out_dir)} is finished ({checkpoint['step']} steps)")
        return has_succeeded(c, checkpoint)
    run = Run(c, given, checkpoint)
    hardware.say(f"{job.outlook(c.out_dir)}: {run.outlook()}")
    with alone_in(c.out_dir), StopRequest() as stop, Progress(job, c, run.state.step) as progress:
        judge = Judge(run, progress)
        try:
            loop(run, judge, progress, stop)
        finally:
            judge.close_logs()
    hardware.wait_for_all()  # a child that starts now finds the files whole
    if c.out_dir != job.parts[-1].folder and hardware.all_reduce_sum([stop.asked], run.device)[0]:
        raise KeyboardInterrupt  # asked for in its last step or evaluation: no child starts
    return has_succeeded(c, vars(run.state))


def train(config, given=frozenset()):
    """Train the run that config describes, and before it the runs of the config files that it starts from.

    Leaves config.json, metrics.jsonl, best.pt or closest.pt, and last.pt in config.out_dir. Returns whether
    the run is what it was to become. Raises UserError with a message for people; SystemExit after Ctrl-C, the
    run saved.
    """
    lineage = lineage_of(config, given)
    if len(lineage) == 1:
        return train_one(config, given)
    job = Job([planned.config for planned in lineage])
    # a mistake in the last run's settings, and a compiler that does not work, are found before the first one
    # trains
    claim_folder(config, given)
    prepare_data.require(config.dataset)
    check_together(config, hardware.world())
    hardware.attention(config.attention_impl, hardware.pick_device(config.device))
    first = lineage[0].config  # all have its shape
    for c, _, _ in lineage:
        _, pays = pays_on_cpu(c, first.architecture, first.block_size)
        hardware.compiles(c.compile, hardware.pick_device(c.device), pays)
    for run, names, source in lineage[:-1]:
        try:
            train_one(run, names, job)
        except UserError as error:
            raise UserError(f"the parent, {source}: {error} (flags for the parent go with its own command; "
                            "another parent is named with --init_from=out/OTHER)") from error
    return train_one(config, given, job)


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nSettings and their defaults:\n\n{described(Config)}")
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
        sys.exit(f"error: out of memory: {str(error).splitlines()[0]} Try a smaller --micro_batch_size (the "
                 "same batches, other noise), or, for a new run, --eval_batch_size")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not hardware.lost_another(error):
            raise
        sys.exit("stopped, because another process has: its message says why")
    except KeyboardInterrupt:
        sys.exit("stopped. The same command goes on from the last checkpoint")
    finally:
        hardware.stop_processes()
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
