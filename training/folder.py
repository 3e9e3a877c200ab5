"""A run that cannot be lost: whose folder it is, where it goes on, how it is stopped.

A run's folder out/<run>/ holds config.json, metrics.jsonl, steps.csv, best.pt or closest.pt, last.pt,
report.json and figures. Its rules:

- The same command goes on where the run stands. If the run is finished there is nothing to do.
- Other settings are refused: two runs never mix in one folder. `--init_from=resume` says that the change is
  meant.
- Files are written under a temporary name and renamed, config.json first, then last.pt, then best.pt;
  metrics.jsonl grows line by line. After the last step best.pt.next is written first, and takes its place
  after last.pt: a run that is killed in between still needs the best.pt of before. So a `kill -9` at any
  moment leaves a folder from which the run goes on: whatever came after last.pt is done again.
- Ctrl-C and SIGTERM finish the step, save, and say how to go on. Further SIGTERMs change nothing: torchrun
  and a scheduler may both send one.

Which settings may differ when a run goes on is written in config.py.
"""

import contextlib
import json
import os
import re
import shutil
import signal
from dataclasses import asdict

import torch

from models.checkpoint import (
    checkpoint_of,
    copy_into,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    state_to_save,
)
from storage.files import UserError, locked
from training import parallel
from training.config import FIXED, FREE, GATED_ONLY, SETTINGS, SHAPE, Config
from training.steps import averaged


def claim_folder(config, given):
    """Find out what config.out_dir holds; return the checkpoint to go on from, or None to start at step 0.

    config  changed in place: what was not given is taken over from the run in the folder, 'resume' gives way
            to the run's own init_from
    given   names of the settings that were set
    Raises UserError rather than mixing two runs in one folder.
    """
    last = os.path.join(config.out_dir, "last.pt")
    resume = config.init_from == "resume"
    if not os.path.exists(last):
        require_new(config.out_dir, resume)
        return None  # new, or killed before its first checkpoint: nothing to lose
    before = settings_of(config.out_dir)
    # out_dir: a folder may have been moved
    taken_over = [key for key in SETTINGS if key != "out_dir"] if resume else SHAPE
    for key in taken_over:
        if key not in given or key == "init_from":
            setattr(config, key, before[key])
    may_differ = FREE if config.gated else (*FREE, *GATED_ONLY)
    now = asdict(config)
    changed = [key for key in now if key not in may_differ and now[key] != before[key]]
    words = ", ".join(f"{key} {before[key]!r} there, {now[key]!r} here" for key in changed)
    if set(changed) & set(FIXED):
        raise UserError(f"{config.out_dir} holds a run with another model or target ({words}): it cannot go "
                        "on as this one. Start a new run with --out_dir=out/NEW")
    if changed and not resume:
        raise UserError(
            f"{config.out_dir} holds a run with other settings ({words}). Start a new one with "
            "--out_dir=out/NEW, or go on with that one, settings changed, with --init_from=resume"
        )
    if changed:
        parallel.say(f"going on with changed settings: {words}")
    return read_checkpoint(last)


def require_new(folder, resume):
    """Raise UserError if a folder without last.pt is no place for a new run."""
    if resume:
        raise UserError(
            f"there is no last.pt in {folder} to resume. Leave --init_from=resume away to start a run"
        )
    files = os.listdir(folder) if os.path.isdir(folder) else []
    others = [name for name in files if name.endswith((".py", ".md"))]
    if others:
        raise UserError(f"out_dir={folder} is no run's folder: {others[0]} is in it. "
                        "Choose --out_dir=out/NEW")
    if os.path.exists(os.path.join(folder, "best.pt")):
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


def settle(folder, step=None):
    """What the end of a run left as best.pt.next or closest.pt.next takes its place, for last.pt is at the
    end, too. With a step, that of a last.pt which may not be: only if it has come as far; else it goes, for
    the end will come again.
    """
    for name in ("best.pt", "closest.pt"):
        waiting = os.path.join(folder, name + ".next")
        if not os.path.exists(waiting):
            continue
        if step is None or read_checkpoint(waiting)["step"] <= step:
            os.replace(waiting, os.path.join(folder, name))
            if name == "best.pt":
                forget_closest(folder)
        else:
            os.remove(waiting)


def forget_closest(folder):
    """The target has been met: what came closest before is not wanted any more."""
    closest = os.path.join(folder, "closest.pt")
    if os.path.exists(closest):
        os.remove(closest)


@contextlib.contextmanager
def alone_in(folder):
    """`with alone_in(folder):` no other run trains there; process 0 sees to it.

    The folder is made if there is none. Raises UserError.
    """
    with contextlib.ExitStack() as stack:
        try:
            if parallel.rank() == 0:
                stack.enter_context(locked(folder, wait=False))
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {folder}. Wait until it has ended, then the same command "
                "goes on from there; or choose another --out_dir"
            ) from error
        yield


def read_metrics(path):
    """The evaluations in a metrics.jsonl, a list of dicts; a line that a kill cut off in the middle is left
    out. Raises OSError if there is no file.
    """
    found = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


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


def save(name, step, seconds, c, model, ema, optimizer, geco, origin, state, is_over):
    """Write a checkpoint of a run: 'last.pt', to go on from, or one that holds the judged model alone.

    step, seconds: where the run stands; state: train.py's State, stored beside; is_over: it is at its end.
    All processes call it; process 0 writes, of a sharded run every process its part.
    """
    sharded, is_last, parts = parallel.is_sharded(c.parallel), name == "last.pt", {}
    parts["optimizer"] = optimizer.state_dict() if is_last and not sharded else None
    if is_last:
        state.shards = folder_for(step, state.shards) if sharded else None
    if sharded:
        from training import sharding  # here: nobody else waits a second for its imports

        if is_last:
            sharding.save(os.path.join(c.out_dir, state.shards), state_to_save(model), model, optimizer)
        is_whole = not is_last or is_over
        parts["model"] = sharding.whole_state(state_to_save(model)) if is_whole else None
    if c.average_decay and is_last:
        parts["trained"] = state_to_save(model)
    if parallel.rank() > 0:
        return
    stands = asdict(state) | {"step": step, "seconds": seconds}
    checkpoint = checkpoint_of(ema, geco=geco and geco.state_dict(), config=asdict(c), **origin, **stands)
    save_checkpoint(os.path.join(c.out_dir, name), {**checkpoint, **parts})
    if name == "best.pt":
        forget_closest(c.out_dir)
    if is_last:
        remove_old(c.out_dir, keep=state.shards)


def restore(saved, c, model, optimizer, geco, state):
    """Put a run back where its last.pt, `saved`, left it: optimizer, lambda, state, weights. Returns ema."""
    if saved.get("shards"):
        from training import sharding

        folder = os.path.join(c.out_dir, os.path.basename(saved["shards"]))
        sharding.load(folder, state_to_save(model), model, optimizer)
        # --init_from=resume may change them
        for group, decay in zip(optimizer.param_groups, (c.weight_decay, 0.0), strict=True):
            group.update(weight_decay=decay, betas=(c.beta1, c.beta2))
    else:
        load_optimizer(optimizer, saved["optimizer"])
    for key in vars(state):
        setattr(state, key, saved.get(key, getattr(state, key)))
    if geco:
        geco.load_state_dict(saved["geco"])
    ema = averaged(model, c.average_decay)
    if c.average_decay:
        load_weights(model, saved["trained"], names=state_to_save(model))
    for large in {"model", "optimizer", "trained"} & set(saved):
        del saved[large]
    return ema


def folder_for(step, named):
    """Name of a folder for the checkpoint of a step, never the one that last.pt names now: that stays whole
    until last.pt names another.
    """
    return f"shards-{step}" + ("-again" if named == f"shards-{step}" else "")


def load_optimizer(optimizer, saved):
    """Put an optimizer's state dict of whole tensors into one whose parameters may be cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved["state"].items():
        for name, tensor in moments.items():
            if hasattr(parameters[index], "device_mesh") and tensor.shape == parameters[index].shape:
                moments[name] = torch.zeros_like(parameters[index])
                copy_into(moments[name], tensor)
    # moments are the checkpoint's, settings this run's: --init_from=resume may have changed them
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def remove_old(out_dir, keep=None):
    """Delete the folders shards-<step> that last.pt does not name any more."""
    for name in os.listdir(out_dir):
        if re.fullmatch(r"shards-\d+(-again)?", name) and name != keep:
            shutil.rmtree(os.path.join(out_dir, name))
