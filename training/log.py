"""What a run writes down and shows while it trains.

    metrics.jsonl   a line for every evaluation
    edges.jsonl     of gated sums: which edges are open, in what share of the held-out sums
    steps.csv       a row for every step: pandas.read_csv("out/addition/steps.csv").plot("step", "lambda")
    the progress line

To follow a quantity of your own, add it to the call of `log.stepped` in train.py's loop: it becomes a column.

Notable:
- The progress line knows all parts of the job: how many there are, and how long they still take. A terminal
  gets a bar (tqdm). A file or a pipe gets one plain line an evaluation, without carriage returns.
- Rows are written at every evaluation, just before last.pt, and when a run ends, whatever ends it. What a
  killed run did after last.pt is done again, and its rows with it.
"""

import csv
import io
import os
import sys
import time
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from storage.addition import addition_task
from storage.files import UserError, json_of, write_json, write_whole
from training import parallel
from training.config import forward_passes
from training.folder import read_metrics


class Logs:
    """`with Logs(...) as log:` all files and the progress line of a run, runs[place] of a command's.

    Process 0 writes; what a killed run wrote after last.pt is dropped.

    state: train.py's State, where the run goes on; data, model, T: what is trained on, what is trained, and
    its context.
    """

    def __init__(self, runs, place, state, data, model, T, device):
        c, start = runs[place], state.step
        self.progress = Progress(runs, place, start)
        cost = forward_passes(c) - c.recompute_activations
        flops = model.flops_per_token(T) / 3 * cost  # a forward pass is a third of a dense step
        self.speed = parallel.Speed(c.batch_size * T, flops, device, start)
        self.metrics = self.edges = self.steps = None
        if parallel.rank() > 0:
            return
        write_json(os.path.join(c.out_dir, "config.json"), asdict(c))
        self.metrics = JsonLines(os.path.join(c.out_dir, "metrics.jsonl"), state.evaluated)
        self.steps = StepLog(os.path.join(c.out_dir, "steps.csv"), start)
        if c.gated and addition_task(data.meta):
            self.edges = JsonLines(os.path.join(c.out_dir, "edges.jsonl"), state.evaluated)

    def __enter__(self):
        self.progress.__enter__()
        return self

    def __exit__(self, *exception):
        self.progress.__exit__(*exception)
        self.flush()  # also of a run that has left the numbers

    def stepped(self, step, geco, **measured):
        """A step has been made: what was measured goes into steps.csv."""
        self.progress.step()
        if geco:
            measured |= {"lambda": geco.lam, "violation": geco.violation}
        if self.steps:
            self.steps.write(step, **measured)

    def evaluated(self, evaluation, passes, kept, state, geco):
        """An evaluation: a line of metrics.jsonl and, of sums, of edges.jsonl; steps.csv up to here.

        evaluation: {split: what `evaluate` returns}; kept: name of the file that keeps it, or None.
        """
        self.progress.evaluated(evaluation, state, geco)
        speed = self.speed.read(state.step)
        if not self.metrics:
            return
        val, train = evaluation["val"], evaluation.get("train")
        line = {
            "step": state.step,
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
            "seconds": state.seconds,
            **speed,
        }
        if geco:
            line |= {"constraint_target": geco.target, "constraint_loss": state.constraint_loss,
                     "violation": geco.violation, "lambda": geco.lam}
        self.metrics.write(line)
        if self.edges:
            self.edges.write({
                "step": state.step,
                "open": val["open"],
                "total": val["total"],
                "correct": sum(f["correct"] for f in evaluation.values()),
                "examples": sum(f["examples"] for f in evaluation.values()),
                "lambda": geco.lam,
                "passes": passes,
                "held_out_only": train is None,
                "kept": kept.removesuffix(".pt") if kept else None,
                "edges": edge_list(val["by_edge"]),
            })
        self.flush()

    def flush(self):
        """Rows of steps.csv that wait are written: before last.pt, behind which a run goes on."""
        if self.steps:
            self.steps.flush()


def edge_list(by_edge):
    """by_edge (n_layer, H, T, T), shares -> [[layer, head, query, key, share], ...] of the edges that open in
    any sum.
    """
    shares = np.asarray(by_edge)
    return [[*at, round(float(shares[tuple(at)]), 4)] for at in np.argwhere(shares > 0).tolist()]


def append(path, text):
    """Add text to a file, and see that it is on the disk. Raises UserError."""
    try:
        with open(path, "a", encoding="utf-8", newline="") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}. The checkpoints are untouched: free some space, and "
                        "the same command goes on") from error


class JsonLines:
    """A file with a line of JSON per evaluation.

    Lines of steps after `evaluated`, the last of last.pt, which a killed run wrote, are dropped.
    """

    def __init__(self, path, evaluated):
        self.path = path
        before = read_metrics(path) if os.path.exists(path) else []
        kept = [json_of(line, path) + "\n" for line in before if line["step"] <= evaluated]
        write_whole(path, "".join(kept).encode())

    def write(self, values):
        append(self.path, json_of(values, self.path) + "\n")


class StepLog:
    """`write(step, name=value, ...)` notes a step, `flush()` writes what was noted.

    path: of steps.csv; rows of steps from `start` on, which a killed run wrote, are dropped.
    """

    def __init__(self, path, start):
        self.path, self.columns, self.waiting = path, [], []
        if os.path.exists(path):
            # where a kill cut a row off, its last columns are None
            rows = [row for row in self.rows() if None not in row.values() and int(row["step"]) < start]
            self.rewrite(rows)

    def rows(self):
        with open(self.path, encoding="utf-8", newline="") as f:
            return list(csv.DictReader(f))

    def text_of(self, rows, columns, header):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        if header and columns:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def rewrite(self, rows):
        """The whole file anew, with a column for everything that one of the rows has."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_whole(self.path, self.text_of(rows, columns, header=True).encode())
        self.columns = columns  # now, for a file that could not be written has none

    def write(self, step, **values):
        self.waiting.append({"step": step, **values})

    def flush(self):
        """Append what waits."""
        if not self.waiting:
            return
        if {name for row in self.waiting for name in row} <= set(self.columns):
            append(self.path, self.text_of(self.waiting, self.columns, header=False))
        else:  # a new file, or a quantity more than before
            self.rewrite((self.rows() if self.columns else []) + self.waiting)
        self.waiting = []


def name_of_part(runs, place):
    """`out/addition`, or `part 2 of 2, out/addition`."""
    part = f"part {place + 1} of {len(runs)}, " if len(runs) > 1 else ""
    return part + runs[place].out_dir


class Progress:
    """`with Progress(runs, place, start) as progress:` the line of runs[place], one of the runs (Configs)
    that a command trains one after the other. start: the step it goes on from; stream: stderr.

    Call `evaluated` after every evaluation and `step` after every training step.
    """

    def __init__(self, runs, place, start, stream=None):
        self.config, self.waiting, self.now, self.start = runs[place], runs[place + 1:], start, start
        self.name, self.stream, self.results = name_of_part(runs, place), stream or sys.stderr, []
        self.silent, self.is_terminal = parallel.rank() > 0, self.stream.isatty()

    def __enter__(self):
        self.began = time.perf_counter()
        self.bar = tqdm(total=self.config.max_steps, initial=self.start, desc=self.name, file=self.stream,
                        dynamic_ncols=True, disable=self.silent or not self.is_terminal,
                        bar_format="{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}")
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def step(self):
        """One more training step is done."""
        self.now += 1
        if self.is_terminal:
            self.bar.set_postfix_str(", ".join([self.left(), *self.results]), refresh=False)
            self.bar.update()

    def evaluated(self, evaluation, state, geco):
        """Show an evaluation.

        evaluation: {split: what `evaluate` returns}; state: train.py's State, its best up to date; geco: or
        None.
        """
        if self.now == self.start:
            # an evaluation before the first step tells nothing about the speed
            self.began = time.perf_counter()
        self.results = results(self.config, evaluation, state, geco)
        words = ", ".join([self.left(), *self.results])
        if self.is_terminal:
            self.bar.set_postfix_str(words)
        elif not self.silent:
            print(f"{self.name}: step {self.now} of {self.config.max_steps}, {words}", file=self.stream,
                  flush=True)

    def left(self):
        """The time that all parts still take, in words: `00:58 left`. A part's work is in forward passes."""
        done, *ahead = (steps * c.batch_size * forward_passes(c) for c, steps in [
            (self.config, self.now - self.start), (self.config, self.config.max_steps - self.now),
            *((later, later.max_steps) for later in self.waiting)])
        if not done:
            return "time left unknown" if sum(ahead) else "done"
        seconds = sum(ahead) * (time.perf_counter() - self.began) / done
        early = any(part.ready_loss and not part.gated for part in [self.config, *self.waiting])
        return f"{'at most ' if early else ''}{tqdm.format_interval(round(seconds))} left"


def results(c, evaluation, state, geco):
    """What an evaluation says, in words, the most important first; see `Progress.evaluated`."""
    val, best = evaluation["val"], state.best
    words = [f"loss {val['loss']:.4f}"]
    if c.gated:
        words[0] += f" (target {state.target_loss:.4f})"
    elif c.ready_loss:
        words[0] += f" (ready at {c.ready_loss:g})"
    if val["accuracy"] is not None:
        splits = evaluation.values()
        correct, examples = (sum(split[key] for split in splits) for key in ("correct", "examples"))
        # the others are not counted where these say enough
        held_out = "" if "train" in evaluation else "held-out "
        words.append(f"{correct:,} of {examples:,} {held_out}right")
    if not c.gated:
        return [*words, f"best {best[1]:.4f}"] if best else words
    words.append(f"{val['open']:.1f} of {val['total']} edges open")
    words.append(f"best {best[0]:.1f}" if best else "none met the target yet")
    return [*words, f"lambda {geco.lam:.3f}"]
