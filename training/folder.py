"""Where a run starts and goes on: a folder that cannot be lost, and the models of its parent.

A run's folder out/<run>/ holds config.json, metrics.jsonl, steps.csv, best.pt or closest.pt, last.pt,
report.json and figures. Its rules:

- The same command goes on where the run stands. If the run is finished there is nothing to do.
- Other settings are refused: two runs never mix in one folder. `--init_from=resume` says that the change is
  meant.
- Files are written under a temporary name and renamed, last.pt after all others; metrics.jsonl grows line by
  line. So a `kill -9` at any moment leaves a folder from which the run goes on: what came after last.pt is
  done again, with the same result. best.pt knows its own score, for it may be newer than last.pt.
- Ctrl-C and SIGTERM finish the step, save, and say how to go on. Further SIGTERMs change nothing: torchrun
  and a scheduler may both send one.

Which settings may differ when a run goes on is written in config.py.

A gated run keeps the loss of its parent, run dense. What every checkpoint of the run says about its parent is
written down: name, fingerprint, data. So a run that goes on later knows whether it is still what it was, and
refuses if not. With adapters (lora.py) the dense model is the run's own, adapters and gates switched off: no
second copy. A model is prepared while it is empty: cut into parts (parallel.py), given adapters, told to
recompute. Then weights are read, tensor by tensor.
"""

import contextlib
import json
import os
import signal
from dataclasses import asdict, fields
from functools import partial

import torch
import torch.utils.checkpoint

from gate import GateConfig
from model import PRETRAINED
from models import lora
from models.checkpoint import (
    checkpoint_of,
    copy_into,
    fingerprint,
    is_of,
    load_weights,
    model_of,
    new_model,
    read_checkpoint,
    require_tokenizer,
    save_checkpoint,
    shape_of,
    state_to_save,
)
from models.sources import is_elsewhere, kept_checkpoint, to_keep
from storage.files import UserError, locked, typed
from training import parallel
from training.config import (
    FIXED,
    FREE,
    GATED_ONLY,
    SETTINGS,
    SHAPE,
    Config,
    parent_run,
    refuse_same_folder,
)
from training.judge import train_on
from training.steps import averaged


def claim_folder(config, given):
    """Find out what config.out_dir holds; return the checkpoint to go on from, or None to start at step 0.

    config  changed in place: what was not given is taken over from the run in the folder, 'resume' gives way
            to the run's own init_from
    given   names of the settings that were set
    Raises UserError rather than mixing two runs in one folder.
    """
    folder, resume = config.out_dir, config.init_from == "resume"
    if not os.path.exists(os.path.join(folder, "last.pt")):
        require_new(folder, resume)
        return None  # new, or killed before its first checkpoint: nothing to lose
    before = settings_of(folder)
    for key in SETTINGS if resume else SHAPE:
        if (key not in given or key == "init_from") and key != "out_dir":  # a folder may have been moved
            setattr(config, key, before[key])
    may_differ = FREE if config.gated else (*FREE, *GATED_ONLY)
    now = asdict(config)
    changed = [key for key in now if key not in may_differ and now[key] != before[key]]
    words = ", ".join(f"{key} {before[key]!r} there, {now[key]!r} here" for key in changed)
    if set(changed) & set(FIXED):
        raise UserError(f"{folder} holds a run with another model or target ({words}): it cannot go on as "
                        "this one. Start a new run with --out_dir=out/NEW")
    if changed and not resume:
        raise UserError(f"{folder} holds a run with other settings ({words}). Start a new one with "
                        "--out_dir=out/NEW, or go on with that one, settings changed, with "
                        "--init_from=resume")
    saved = read_checkpoint(os.path.join(folder, "last.pt"))
    if saved["step"] > config.max_steps:
        raise UserError(f"{folder} has made {saved['step']} steps: max_steps={config.max_steps} is less")
    if changed:
        parallel.say(f"going on with changed settings: {words}")
    return saved


def require_new(folder, resume):
    """Raise UserError if a folder without last.pt is no place for a new run."""
    if resume:
        raise UserError(f"there is no last.pt in {folder} to resume. Leave --init_from=resume away to start "
                        "a run")
    best = os.path.join(folder, "best.pt")
    if os.path.exists(best) and read_checkpoint(best)["step"]:  # 0: the run was killed before its last.pt
        raise UserError(f"{folder} holds a best.pt but no last.pt to go on from. Move the folder away, "
                        "or start a new run with --out_dir=out/NEW")


def settings_of(folder):
    """The settings of the run in a folder, as a dict; those that it does not name have their defaults.

    Raises UserError.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            return asdict(Config()) | json.load(f)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged, so nobody knows what run is in {folder}. "
                        "Start a new one with --out_dir=out/NEW") from error


@contextlib.contextmanager
def alone_in(folder):
    """`with alone_in(folder):` no other run trains there; process 0 sees to it.

    The folder is made if there is none. Raises UserError.
    """
    if parallel.rank() > 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError as error:
            raise UserError(f"another process is training in {folder}. Wait until it has ended, then the "
                            "same command goes on from there; or choose another --out_dir") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a run that was refused leaves no empty folder
                os.rmdir(folder)


def read_metrics(path):
    """The evaluations in a metrics.jsonl, a list of dicts; a line that a kill cut off in the middle is left
    out. Raises OSError if there is no file.
    """
    lines = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


class StopRequest:
    """`with StopRequest() as stop:` Ctrl-C and SIGTERM set stop.asked, for the loop to see; a second Ctrl-C
    stops at once.
    """

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints of a run


def save(name, c, model, ema, optimizer, geco, origin, state):
    """Write a checkpoint of a run: 'last.pt', to go on from, or one that holds the judged model alone.

    state: train.py's State, stored beside. All processes call it: of a model that is cut into parts (FSDP)
    every tensor is put together, one after the other, and process 0 writes them.
    """
    checkpoint = checkpoint_of(ema, geco=geco and geco.state_dict(), config=asdict(c), optimizer=None,
                               **origin, **asdict(state))
    if name == "last.pt":
        checkpoint["optimizer"] = optimizer.state_dict()
        if c.average_decay:
            checkpoint["trained"] = state_to_save(model)
    if parallel.is_sharded(c.parallel):
        checkpoint = parallel.put_together(checkpoint)
    if parallel.rank() > 0:
        return
    save_checkpoint(os.path.join(c.out_dir, name), checkpoint)
    closest = os.path.join(c.out_dir, "closest.pt")
    if name == "best.pt" and os.path.exists(closest):
        os.remove(closest)  # the target has been met


def restore(saved, c, model, optimizer, geco, state):
    """Put a run back where its last.pt, `saved`, left it: optimizer, lambda, state, weights. Returns ema."""
    load_optimizer(optimizer, saved["optimizer"])
    for key in vars(state):
        setattr(state, key, saved.get(key, getattr(state, key)))
    state.evaluated = saved.get("evaluated", saved["step"] - 1)
    for which in "best", "closest":
        path = os.path.join(c.out_dir, f"{which}.pt")
        setattr(state, which, read_checkpoint(path).get(which) if os.path.exists(path) else None)
    if geco:
        geco.load_state_dict(saved["geco"])
    ema = averaged(model, c.average_decay)
    if c.average_decay:
        load_weights(model, saved["trained"], names=state_to_save(model))
    saved.clear()  # its tensors are large
    return ema


def load_optimizer(optimizer, saved):
    """Put an optimizer's state dict of whole tensors into one whose parameters may be cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved["state"].items():
        for name, tensor in moments.items():
            if hasattr(parameters[index], "device_mesh") and tensor.shape == parameters[index].shape:
                moments[name] = torch.zeros_like(parameters[index])
                copy_into(moments[name], tensor)
    # moments are the checkpoint's, settings this run's: --init_from=resume may have changed them
    now = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": now})


# ------------------------------------------------------------------------------------------------------------
# The models that a run starts from


def find_parent(config, given):
    """The checkpoint that init_from names, or None of a run from scratch.

    A config file's run has been trained before. Raises UserError.
    """
    source = config.init_from
    if source == "scratch":
        return None
    is_config = source.endswith(".py")
    if is_elsewhere(source) or os.path.isfile(source) and not is_config:
        return source
    folder = parent_run(config, given)[0].out_dir if is_config else source
    refuse_same_folder(folder, config)
    path = kept_checkpoint(folder)
    if path is None:
        raise UserError(
            f"init_from={source}: there is no best.pt or last.pt in {folder}. It takes the folder of a run, "
            f"a config file, a checkpoint of nanoGPT or transformers, one of {', '.join(PRETRAINED)}, "
            "'scratch' or 'resume'"
        )
    return path


def models_of(c, given, data, device, saved):
    """(model, dense, origin) of the run that the settings c describe.

    given    names of the settings that were set: a parent's shape is taken over where they say nothing
    saved    the run's own last.pt, or None of a new run
    model    in evaluation mode, on its device, perhaps cut into parts
    dense    of a gated run: its parent, frozen. It sets the target, is compared with on the same batch, and
             teaches; else None
    origin   what every checkpoint of the run says of its parent, the parent's weights, data and adapters
    Changes the shape in c to that of the model. Raises UserError and what the loaders raise.
    """
    path = saved["parent"] if saved else find_parent(c, given)
    if saved and c.gated and not is_elsewhere(path) and not os.path.exists(path):
        raise UserError(f"{c.out_dir} is to keep the loss of {path}, which is gone. Put it back, or train it "
                        "again with the command that made it")
    with parallel.first_alone():  # who downloads, if need be
        parent = read_checkpoint(path) if path and (c.gated or not saved) else {}
    origin = {"parent": to_keep(path, c.out_dir),
              "data": {"dataset": c.dataset, "tokenizer": data.meta.get("tokenizer", c.dataset),
                       "sha256": data.meta["sha256"]}}
    check_parent(c, path, parent, origin["data"], saved)
    printed = saved["reference_fingerprint"] if saved else fingerprint(parent) if c.gated else None
    origin["reference_fingerprint"] = printed
    if c.lora_rank:
        adapters = {"rank": c.lora_rank, "alpha": c.lora_alpha, "targets": c.lora_targets}
        origin |= {"base": origin["parent"], "lora": saved["lora"] if saved else adapters,
                   "base_fingerprint": saved["base_fingerprint"] if saved else fingerprint(parent)}
    torch.manual_seed(c.seed)
    model = model_to_train(c, given, data, device, saved, path, parent)
    check_data_fits(c, data, model)
    if not c.gated:
        return model, None, origin
    if c.lora_rank:
        return model, lora.Base(model), origin
    cut = partial(parallel.shard, device=device, setting=c.parallel)
    # an OLMo's positions are no weights: its context may be shorter
    context = {"block_size": c.block_size} if "architecture" in parent["model_args"] else {}
    return model, model_of(parent, path, device, cut, **context), origin


def check_parent(c, path, parent, data, saved):
    """Raise UserError if a run cannot start from the parent's checkpoint, or was begun with another, or with
    other data.

    parent: {} of a run from scratch, or of a dense run that has begun; data: what origin says of them.
    """
    if parent:
        require_tokenizer(parent, path, data["tokenizer"])
    if c.gated:
        if parent["model_args"].get("gated"):
            raise UserError(f"init_from={c.init_from} is a gated run. Start from a dense one: its loss is "
                            "the target, its gates are not open or shut yet")
        require_ready(parent, path)
    if not saved:
        if c.lora_rank and "lora" in parent:
            merge = typed("python", "analyze.py", "export", path, "--to", "hf", "FOLDER")
            raise UserError(f"{path} holds adapters itself, and one model has one set of them. Merge them "
                            f"first ({merge}) and start from FOLDER")
        return
    if c.gated and not is_of(saved["reference_fingerprint"], parent):
        raise UserError(f"{path} holds other weights now than when {c.out_dir} was begun: the target is not "
                        "that model's any more. Put the old file back, or start a new run with "
                        "--out_dir=out/NEW")
    if saved["data"] != data:
        raise UserError(f"data/{c.dataset} is not the data that {c.out_dir} was begun with ({saved['data']} "
                        f"there, {data} here): it cannot go on exactly. Put the old data back, or start a "
                        "new run with --out_dir=out/NEW")


def require_ready(checkpoint, path):
    """Raise UserError if a dense run that was to be trained until it is ready (ready_loss) has not got there:
    what a child is to keep would be an unfinished model's loss.
    """
    ready_loss = checkpoint.get("config", {}).get("ready_loss")
    if ready_loss and not checkpoint.get("ready"):
        folder, steps = os.path.dirname(path), 2 * checkpoint["config"]["max_steps"]
        raise UserError(
            f"{path} is no parent yet: it still gets answers wrong, or its held-out loss is above its "
            f"ready_loss={ready_loss:g}. Train it on: {train_on(folder, steps)}; then the same command as "
            f"now with {typed(f'--init_from={folder}')}"
        )


def model_to_train(c, given, data, device, saved, path, parent):
    """The run's own model: of its checkpoint, of its parent's, or random."""
    prepared = partial(prepare, c, device)
    gate_settings = {f.name: getattr(c, f.name) for f in fields(GateConfig)}
    if saved:
        return model_of(saved, f"{c.out_dir}/last.pt", device, prepared, merged=False)
    if not path:
        return prepared(new_model(c, data.meta["vocab_size"], gate_settings).to(device))
    args = parent["model_args"]
    shorter = {}
    if "architecture" in args and "block_size" in given and c.block_size < args["block_size"]:
        shorter = {"block_size": c.block_size}
    model = model_of(parent, path, device, prepared, **gate_settings, **shorter)
    for key, value in shape_of(model.config).items():
        if key in given and getattr(c, key) != value:
            raise UserError(f"{key}={getattr(c, key)!r}, but {path} has {key}={value!r}: a run that starts "
                            f"from another keeps its shape. Leave {key} away")
        setattr(c, key, value)
    return model


def check_data_fits(c, data, model):
    """Raise UserError if model cannot read the dataset."""
    if model.config.vocab_size < data.meta["vocab_size"]:
        raise UserError(f"the model knows {model.config.vocab_size} tokens, data/{c.dataset} has "
                        f"{data.meta['vocab_size']}: they do not belong together")
    if data.meta["kind"] == "rows" and model.config.block_size < data.train.shape[2]:
        raise UserError(f"a row of data/{c.dataset} has {data.train.shape[2]} tokens, the model's block_size "
                        f"is {model.config.block_size}: make it larger")


def prepare(c, device, model):
    """What is done to the run's model while it is empty: adapters, precision, recomputation, parts.

    Returns model, changed in place.
    """
    if c.lora_rank:
        if not lora.adapters_of(model):  # a new run's
            lora.add(model, c.lora_rank, c.lora_alpha, c.lora_targets)
        lora.freeze_in(model, getattr(torch, c.base_dtype))
    for block in model.blocks:
        if parallel.is_sharded(c.parallel) and parallel.compiles(c.compile, device, pays_on_cpu=False):
            # by itself, because the graph of the whole would break wherever a block is put together
            block.forward = torch.compile(block.forward)
        if c.recompute_activations:
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    return parallel.shard(model, device, c.parallel)
