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

Which settings may differ when a run goes on is written in settings.py.
"""

import contextlib
import json
import os
import signal
from dataclasses import asdict

from models.checkpoint import read_checkpoint
from storage.files import UserError, json_of, locked, write_whole
from training import hardware
from training.settings import FIXED, FREE, GATED_ONLY, SETTINGS, SHAPE, Config


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
        hardware.say(f"going on with changed settings: {words}")
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
            if hardware.rank() == 0:
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


class MetricsLog:
    """metrics.jsonl, one line per evaluation.

    Lines of steps after keep_until, which a killed run wrote, are dropped.
    """

    def __init__(self, path, keep_until):
        kept = [
            json_of(m, path) + "\n"
            for m in (read_metrics(path) if os.path.exists(path) else [])
            if m["step"] <= keep_until
        ]
        write_whole(path, "".join(kept).encode())
        self.path = path

    def write(self, **values):
        line = json_of(values, self.path) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(line)
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error}. The checkpoints are untouched: free some space, and "
                "the same command goes on"
            ) from error


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
