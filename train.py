"""Train a GPT, dense or gated: one loop, readable from top to bottom.

    python train.py config/addition.py                  train, or go on with, the run that this file describes
    python train.py config/addition.py --seed=2         any setting can be changed on the command line
    python train.py --help                              every setting, its default and its meaning

    dense:   minimise  loss                                            an ordinary nanoGPT run
    gated:   minimise  density  subject to  loss <= target             geco.py; the paper's post-training

The gated run starts from a dense one (`init_from`), measures the dense model's loss, and then shuts edges as long as the
loss stays there. Three losses take part, and all of them are in the log:
- the gradient is that of the mean loss of a training batch under sampled gates: without their noise a gate has no gradient;
- lambda is moved by the loss of the same batch under the deterministic gates that count in the end, or under the sampled
  ones, as in the paper (`constraint_gates`). Its target is the dense model's loss on training batches + loss_slack;
- the run is judged on the held-out set under deterministic gates, by `meets_target`.

Notable:
- best.pt is the checkpoint with the FEWEST open edges among the evaluations that pass that judgement, not the last one.
- Every step seeds its own randomness from (seed, step). A run that is killed and started again (on the same CPU, with as many
  threads) does bit for bit what it would have done, and no generator's state has to be saved.
- The same command continues an unfinished run. A run's folder is never overwritten by a run with other settings.
"""

import inspect
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from configure import ConfigError, parse_command_line, read_config_file
from evaluate import evaluate_splits
from geco import GECO
from model import GPT, CheckpointError, GPTConfig, checkpoint_of, load_checkpoint, model_of, save_checkpoint
from resume import MetricsLog, RunError, StopRequest, claim_folder


@dataclass
class Config:
    """Every setting: default, unit, meaning. A config file's lines `name = value` win over it, the command line over both."""

    # where a run starts, what it reads, where it ends up
    init_from: str = "scratch"  # 'scratch'; 'resume'; a run's folder; or a config file, whose run is trained first if need be
    out_dir: str = ""  # folder of the run; '' is out/<name of the config file>, with -seed<N> behind it unless N is 1
    dataset: str = "addition"  # data/<dataset>, made by prepare_data.py
    seed: int = 1  # of initialisation, data order and gates; passed on to a parent that is trained first
    device: str = "auto"  # 'auto' is cuda, else mps (which nobody has tried yet), else cpu
    compile: str = "auto"  # torch.compile: 'on', 'off', or 'auto', which is on for cuda only
    # the model; a run that starts from another run takes these from there
    n_layer: int = 4
    n_head: int = 1
    n_embd: int = 64  # C, width of the residual stream
    block_size: int = 11  # tokens of context
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm layers
    tied: bool = True  # input and output embedding are one matrix
    # the gates, and the constraint that shuts them
    gated: bool = False  # False is an ordinary dense run; it ignores this block
    gate_bias: float = 3.0  # b in sigmoid(a + b); above 0 the edges start open
    gate_temperature: float = 1.0  # of the straight-through gradient
    linear_penalty_steps: int = 3000  # first steps, under the penalty that pulls at wide-open edges too (gate.py); 0 is the paper's
    density_weight: float = 1.0  # in L = density_weight * density + lambda (loss - target)
    loss_slack: float = 0.001  # nats above the dense loss that count as equal
    constraint_gates: str = "deterministic"  # gates under which the constraint's loss is taken; 'sampled' is the paper's
    constraint_interval: int = 4  # steps between two measurements of the constraint
    constraint_scale: float = 0.001  # nats; a violation of this size moves lambda at full speed; no larger than loss_slack, see geco.py
    lambda_rate: float = 0.03  # largest relative change of lambda per measurement
    lambda_average: float = 0.9  # memory of the moving average of the violation
    lambda_init: float = 4.0  # at the cap: the loss jumps when the gates begin to sample
    lambda_min: float = 0.2  # the floor: a low lambda cuts edges faster than the constraint can tell which were needed
    lambda_max: float = 4.0  # the cap: a high lambda lets nothing be shut for a long time after an error is gone
    # optimisation
    batch_size: int = 128  # sequences per step
    max_steps: int = 4500
    learning_rate: float = 1e-3  # peak
    min_lr: float = 0.0  # at the end of the cosine
    warmup_steps: int = 100
    weight_decay: float = 0.0  # on matrices; it pulls q and k, and with them the gates, towards 0
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is off
    # evaluation, on both splits
    eval_interval: int = 100  # steps
    eval_batch_size: int = 1000  # sequences
    eval_batches: int = 0  # batches of each split; 0 is all of it


def limits():
    """{setting: (words, test)}: what a value must be beside its type."""
    at_least_1 = "n_layer n_head n_embd block_size constraint_interval batch_size max_steps eval_interval eval_batch_size"
    positive = "gate_temperature density_weight constraint_scale lambda_rate lambda_init lambda_min lambda_max learning_rate"
    not_negative = "loss_slack linear_penalty_steps min_lr warmup_steps weight_decay grad_clip eval_batches"
    fractions = "dropout lambda_average beta1 beta2"
    return {
        **{key: ("at least 1", lambda v: v >= 1) for key in at_least_1.split()},
        **{key: ("above 0", lambda v: 0 < v < math.inf) for key in positive.split()},
        **{key: ("0 or more", lambda v: 0 <= v < math.inf) for key in not_negative.split()},
        **{key: ("from 0 up to, not including, 1", lambda v: 0 <= v < 1) for key in fractions.split()},
        "gate_bias": ("finite", math.isfinite),
        "constraint_gates": ("'deterministic' or 'sampled'", lambda v: v in ("deterministic", "sampled")),
        "compile": ("'auto', 'on' or 'off'", lambda v: v in ("auto", "on", "off")),
        "device": ("'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'", lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v) is not None),
        "seed": ("from 0 to a million", lambda v: 0 <= v <= 1_000_000),
    }


SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias", "tied")  # what a run takes over from its parent
GATE = ("gated", "gate_bias", "gate_temperature")
FIXED = (*SHAPE, *GATE, "dataset", "loss_slack", "eval_batches", "eval_batch_size")  # model and target: what no run may change on its way
FREE = ("out_dir", "device", "compile")  # what may differ when a run goes on
SETTINGS = list(Config.__annotations__)
GATED_ONLY = SETTINGS[SETTINGS.index("gate_bias"):SETTINGS.index("lambda_max") + 1]  # the block that a dense run ignores


def make_config(path, given):
    """Config of a config file (or None) and a dict of settings that win over it; and the names of all that were set."""
    values = (read_config_file(path, Config, limits()) if path else {}) | given
    config = Config(**values)
    if not config.out_dir:
        name = os.path.splitext(os.path.basename(path))[0] if path else "run"
        config.out_dir = f"out/{name}" + (f"-seed{config.seed}" if config.seed != 1 else "")
    config.out_dir = os.path.normpath(config.out_dir)
    return config, set(values)


def check_together(config):
    """Raise ConfigError if settings contradict each other."""
    if config.n_embd % config.n_head:
        raise ConfigError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}: the heads share the width")
    if config.gated and config.init_from == "scratch":
        raise ConfigError("a gated run needs a dense model whose loss it is to keep: set init_from to the run folder or the config file of one")
    if not config.lambda_min <= config.lambda_init <= config.lambda_max:
        raise ConfigError(f"lambda_init={config.lambda_init} must lie between lambda_min={config.lambda_min} and lambda_max={config.lambda_max}")


def find_parent(config):
    """The checkpoint file that config.init_from names. A config file's run is trained first if it is not finished."""
    folder = config.init_from
    if folder.endswith(".py"):
        parent, given = make_config(folder, {key: getattr(config, key) for key in ("seed", "device", "compile")})
        if config.gated and parent.gated:
            raise RunError(f"init_from={folder} is a gated run. Start from a dense one: its loss is the target")
        folder = parent.out_dir
    if os.path.realpath(folder) == os.path.realpath(config.out_dir):
        raise RunError(f"{folder} is the run's own folder and its parent's as well. Give it another with --out_dir=out/NEW")
    if config.init_from.endswith(".py"):
        try:
            train(parent, given)
        except RunError as error:
            raise RunError(f"the parent, {config.init_from}: {error} (flags for the parent go with its own command)") from error
    for name in ("best.pt", "last.pt"):
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise RunError(f"init_from={config.init_from}: there is no best.pt or last.pt in {folder}. "
                   "init_from takes 'scratch', 'resume', the folder of a run, or a config file")


def pick_device(name):
    """The torch device for a setting, as a string. Raises RunError if this machine has none such."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count() or name == "mps" and not torch.backends.mps.is_available():
        raise RunError(f"device={name}: this machine or this build of torch has none. Leave --device away, or use --device=cpu")
    return name


def get_lr(step, c):
    """Linear warm-up, then a cosine from learning_rate to min_lr."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.min_lr + (c.learning_rate - c.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


def meets_target(found, dense, target_loss):
    """Is the gated model as good as the dense one? Its held-out loss is at most the target and, where answers are right or
    wrong (rows), on both splits no fewer of them are right. found, dense: {split: what `evaluate` returns}."""
    return found["val"]["loss"] <= target_loss and all(
        found[split]["correct"] >= dense[split]["correct"] for split in found if found[split]["accuracy"] is not None)


def train(config, given=frozenset()):
    """Train the run that config describes, from where its folder stands to the end. given: the settings that were set.

    Leaves config.json, metrics.jsonl, best.pt and last.pt in config.out_dir. Raises RunError, ConfigError, CheckpointError or
    DataError with a message for people; SystemExit after Ctrl-C, the run saved.
    """
    c, device = config, pick_device(config.device)
    takes_over = asdict(c) if c.init_from == "resume" else SHAPE
    checkpoint = claim_folder(c, inherit=[key for key in takes_over if key not in given], fixed=FIXED,
                              free=lambda c: FREE if c.gated else (*FREE, *GATED_ONLY))
    check_together(c)
    if checkpoint and checkpoint["step"] >= c.max_steps:
        print(f"{c.out_dir} is finished ({checkpoint['step']} steps)")
        return
    data = prepare_data.load(c.dataset)

    # --- the model: new, the parent's weights, or the run's own -------------------------------------------------------
    parent = checkpoint["parent"] if checkpoint else None if c.init_from == "scratch" else find_parent(c)
    torch.manual_seed(c.seed)
    gate_settings = {key: getattr(c, key) for key in GATE}
    if checkpoint:
        model = model_of(checkpoint, f"{c.out_dir}/last.pt", device)
    elif parent:
        model = load_checkpoint(parent, device, **gate_settings)
        for key in SHAPE:
            if key in given and getattr(c, key) != getattr(model.config, key):
                raise RunError(f"{key}={getattr(c, key)!r}, but {parent} has {key}={getattr(model.config, key)!r}: "
                               f"a run that starts from another keeps its shape. Leave {key} away")
            setattr(c, key, getattr(model.config, key))
    else:
        model = GPT(GPTConfig(vocab_size=data.meta["vocab_size"], **{key: getattr(c, key) for key in SHAPE}, **gate_settings)).to(device)
    if model.config.vocab_size < data.meta["vocab_size"]:
        raise RunError(f"the model knows {model.config.vocab_size} tokens, data/{c.dataset} has {data.meta['vocab_size']}: they do not belong together")
    if data.meta["kind"] == "rows" and model.config.block_size < data.train.shape[2]:
        raise RunError(f"a row of data/{c.dataset} has {data.train.shape[2]} tokens, the model's block_size is {model.config.block_size}: make it larger")
    model.train()  # samples the gates, drops out; load_checkpoint and evaluate leave models in evaluation mode
    compiled = torch.compile(model) if c.compile == "on" or c.compile == "auto" and device.startswith("cuda") else model
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}],
                                  lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=device != "mps")

    def batch_at(step):
        """The training batch of a step, the same whenever it is asked for; a gated run has another order than its parent."""
        draws = np.random.default_rng((c.seed, c.gated, step)).integers(0, data.starts("train", c.block_size), c.batch_size)
        return tuple(torch.from_numpy(a).to(device) for a in data.batch("train", draws, c.block_size))

    @torch.no_grad()
    def deterministic_loss(model, x, y):
        """Mean loss of a batch, nats, under deterministic gates (or, in a dense model, under none)."""
        was_training = model.training
        loss = model.eval()(x, y)[1].item()
        model.train(was_training)
        return loss

    # --- where the run stands: what the dense model can do, lambda, the best checkpoint so far ------------------------
    geco = dense = target_loss = best = smoothed_loss = constraint_loss = None
    start, seconds = 0, 0.0
    if c.gated:
        geco = GECO(0.0, c.constraint_scale, c.lambda_rate, c.lambda_average, c.lambda_init, c.lambda_min, c.lambda_max)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, decay in zip(optimizer.param_groups, (c.weight_decay, 0.0)):  # which --init_from=resume may change
            group.update(weight_decay=decay, betas=(c.beta1, c.beta2))
        dense, target_loss, best, smoothed_loss, constraint_loss, start, seconds = (
            checkpoint[key] for key in ("dense", "target_loss", "best", "smoothed_loss", "constraint_loss", "step", "seconds"))
        if geco:
            geco.load_state_dict(checkpoint["geco"])
    elif c.gated:
        reference = load_checkpoint(parent, device)
        if reference.config.gated:
            raise RunError(f"init_from={c.init_from} is a gated run. Start from a dense one: its loss is the target")
        dense = evaluate_splits(reference, data, c.eval_batch_size, c.eval_batches)
        target_loss = dense["val"]["loss"] + c.loss_slack
        # Like with like: the measure and the stream of batches that the constraint below sees; 50 of them make a good mean.
        dense_on_training = float(np.mean([deterministic_loss(reference, *batch_at(step)) for step in range(50)]))
        geco.target = dense_on_training + c.loss_slack
        print(f"dense model: held-out loss {dense['val']['loss']:.4f}, target {target_loss:.4f}; "
              f"on training batches {dense_on_training:.4f}, the constraint's target {geco.target:.4f}")

    os.makedirs(c.out_dir, exist_ok=True)
    prepare_data.write_json(os.path.join(c.out_dir, "config.json"), asdict(c))
    evaluates_at_start = start % c.eval_interval == 0 or start == c.max_steps
    log = MetricsLog(os.path.join(c.out_dir, "metrics.jsonl"), keep_until=start - evaluates_at_start)
    print(f"{c.out_dir}: {'gated' if c.gated else 'dense'}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{device}, {'compiled' if compiled is not model else 'not compiled'}, from step {start} to {c.max_steps}")

    def save(name, step):
        save_checkpoint(os.path.join(c.out_dir, name), checkpoint_of(
            model, optimizer=optimizer.state_dict(), geco=geco and geco.state_dict(), step=step, best=best, dense=dense,
            target_loss=target_loss, parent=parent, seconds=seconds + time.time() - began, smoothed_loss=smoothed_loss, constraint_loss=constraint_loss, config=asdict(c)))

    # --- the loop -----------------------------------------------------------------------------------------------------
    began, open_edges = time.time(), "not counted yet"
    with StopRequest() as stop, tqdm(total=c.max_steps, initial=start, desc=c.out_dir, unit="step", dynamic_ncols=True) as bar:
        for step in range(start, c.max_steps + 1):
            if step % c.eval_interval == 0 or step == c.max_steps:
                found = evaluate_splits(model, data, c.eval_batch_size, c.eval_batches)
                val = found["val"]
                open_edges = f"{val['open']:.1f} of {val['total']}"
                passes = math.isfinite(val["loss"]) and (not c.gated or meets_target(found, dense, target_loss))
                log.write(step=step, val_loss=val["loss"], accuracy=val["accuracy"], correct=val["correct"] + found["train"]["correct"],
                         train_loss=found["train"]["loss"], batch_loss=smoothed_loss, open=val["open"], fraction=val["fraction"], passes=passes,
                         target_loss=target_loss, seconds=seconds + time.time() - began,
                         **({"constraint_target": geco.target, "constraint_loss": constraint_loss, "violation": geco.violation, "lambda": geco.lam} if geco else {}))
                score = [val["open"], val["loss"]]  # the fewest edges; of a dense run, whose edges are all open, the lowest loss
                is_best = passes and (best is None or score <= best)
                best = score if is_best else best
                save("last.pt", step)  # first: a run that is killed in between evaluates again and writes best.pt then
                if is_best:
                    save("best.pt", step)
            if step == c.max_steps:
                break

            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, c)
            torch.manual_seed(c.seed * 1_000_003 + step)  # gate noise and dropout of this step, whatever came before
            x, y = batch_at(step)
            _, loss, density = compiled(x, y, linear_penalty=step < c.linear_penalty_steps)
            if c.gated and step % c.constraint_interval == 0:
                constraint_loss = loss.item() if c.constraint_gates == "sampled" else deterministic_loss(model, x, y)
                geco.update(constraint_loss)
            objective = geco.objective(loss, density, c.density_weight) if c.gated else loss
            objective.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
            if not math.isfinite(objective.item() + norm.item()):
                raise RunError(f"the loss is {loss.item()}, the gradient's norm {norm.item()} at step {step}; {c.out_dir}/last.pt still holds an earlier step. "
                               f"Start again with a smaller step, for instance --learning_rate={c.learning_rate / 3:.1g} --out_dir=out/NEW")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            smoothed_loss = loss.item() if smoothed_loss is None else 0.95 * smoothed_loss + 0.05 * loss.item()
            bar.update()
            bar.set_postfix_str(f"loss {smoothed_loss:.4f}" + (f", open {open_edges}, lambda {geco.lam:.2f}" if c.gated else ""), refresh=False)
            if stop.asked and step + 1 < c.max_steps:  # after the last step only the evaluation is left
                save("last.pt", step + 1)
                sys.exit(f"stopped and saved after {step + 1} steps. To go on: python train.py {shlex.join(sys.argv[1:])}")


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(__doc__ + "\n" + inspect.getsource(Config))
        return
    try:
        path, given = parse_command_line(arguments, Config, limits())
        config, names = make_config(path, given)
        train(config, names)
    except (ConfigError, RunError, CheckpointError, prepare_data.DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped. The same command goes on from the last checkpoint")
    # A process of its own: the loop needs no matplotlib, and a failing picture cannot harm a finished run.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.exit(subprocess.run([sys.executable, os.path.join(here, "analyze.py"), "report", config.out_dir]).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
