"""What a waiting person sees: one line that knows the whole job, not only the run that trains right now.

    part 2 of 2, out/addition  61%|######    | 2750/9000, 00:58 left, loss 0.0021 (target 0.0014), 9,998 of
                               10,000 right, 12.4 of 264 edges open, ...

A *job* is what one command trains: a gated run whose parent is a config file makes two parts, with a control
as target three. The time left is that of all parts:

    seconds left = work left * seconds / work done
    work of a part = steps * sequences a step * forward passes a step

so the child's share is a guess while its parent trains, and a parent that may stop early (`ready_loss`) makes
it an upper bound.

Notable:
- A terminal gets a bar that is redrawn in place (tqdm). A file or a pipe gets one plain line an evaluation,
  without carriage returns.
- What counts is shown: the held-out loss against its target, answers right, open edges, the best so far.
  metrics.jsonl has the rest.
- Process 0 prints, the others are silent.
"""

import os
import sys
import time
from typing import NamedTuple

from tqdm import tqdm

from training import hardware
from training.settings import forward_passes


class Part(NamedTuple):
    """One run of a job."""

    folder: str
    work: float  # in forward passes of one sequence; only ratios matter
    may_stop_early: bool


class Job:
    """All runs that one command trains, in their order.

    configs: a Config each. finished: folders of parents that were trained by an earlier command, and are not
    looked at again.
    """

    def __init__(self, configs, finished=()):
        self.finished = list(finished)
        done = [Part(folder, 0, False) for folder in finished]
        self.parts = done + [Part(c.out_dir, work_of(c), bool(c.ready_loss) and not c.gated) for c in configs]

    @classmethod
    def of_begun(cls, config, checkpoint):
        """The job of a run that goes on from its checkpoint: the parents that were trained for it are
        finished.
        """
        trained = []
        for source, path in (
            (config.init_from, checkpoint["parent"]),
            (config.target_from, checkpoint["reference"]),
        ):
            folder = os.path.dirname(path or "")
            if source.endswith(".py") and folder not in trained:
                trained.append(folder)
        return cls([config], finished=trained)

    def place(self, folder):
        """The number of the part that trains in this folder, from 0."""
        return [part.folder for part in self.parts].index(folder)

    def name(self, folder):
        """`part 1 of 2, out/dense`, or the folder alone where there is one part."""
        if len(self.parts) == 1:
            return folder
        return f"part {self.place(folder) + 1} of {len(self.parts)}, {folder}"

    def outlook(self, folder):
        """The name, and what lies before and behind: `part 1 of 2, out/dense (then out/sparse)`."""
        behind = [part.folder for part in self.parts[self.place(folder) + 1:]]
        others = [f"{name} is finished" for name in self.finished] + [f"then {name}" for name in behind]
        return self.name(folder) + (f" ({'; '.join(others)})" if others else "")


def work_of(c):
    """What the whole run costs, in forward passes of one sequence."""
    return c.max_steps * c.batch_size * forward_passes(c)


class Progress:
    """`with Progress(job, config, start) as progress:` the line of one part. start: the step it goes on from;
    stream: stderr.

    Call `evaluated` after every evaluation and `step` after every training step.
    """

    def __init__(self, job, config, start, stream=None):
        self.job, self.config, self.now, self.start = job, config, start, start
        self.stream = stream or sys.stderr
        self.silent = hardware.rank() > 0
        self.is_terminal = self.stream.isatty()
        self.results = []

    def __enter__(self):
        self.began = time.perf_counter()
        self.bar = tqdm(total=self.config.max_steps, initial=self.start,
                        desc=self.job.name(self.config.out_dir), file=self.stream, dynamic_ncols=True,
                        disable=self.silent or not self.is_terminal,
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

    def evaluated(self, found, target=None, best=None, lam=None):
        """Show an evaluation.

        found: {split: what `evaluate` returns}; best: [open edges, loss] of what would be kept now, or None;
        target (nats) and lam: of a gated run.
        """
        if self.now == self.start:
            # an evaluation before the first step tells nothing about the speed
            self.began = time.perf_counter()
        self.results = results(self.config, found, target, best, lam)
        words = ", ".join([self.left(), *self.results])
        if self.is_terminal:
            self.bar.set_postfix_str(words)
        elif not self.silent:
            name, steps = self.job.name(self.config.out_dir), self.config.max_steps
            print(f"{name}: step {self.now} of {steps}, {words}", file=self.stream, flush=True)

    def left(self):
        """The time that all parts still take, in words: `00:58 left`."""
        c, place = self.config, self.job.place(self.config.out_dir)
        waiting = self.job.parts[place + 1:]
        a_step = c.batch_size * forward_passes(c)
        work = (c.max_steps - self.now) * a_step + sum(part.work for part in waiting)
        if self.now == self.start:
            return "time left unknown" if work else "done"
        seconds = work * (time.perf_counter() - self.began) / ((self.now - self.start) * a_step)
        early = any(part.may_stop_early for part in self.job.parts[place:])
        return f"{'at most ' if early else ''}{tqdm.format_interval(round(seconds))} left"


def results(c, found, target, best, lam):
    """What an evaluation found, in words, the most important first; see `Progress.evaluated`."""
    val = found["val"]
    words = [f"loss {val['loss']:.4f}"]
    if c.gated:
        words[0] += f" (target {target:.4f})"
    elif c.ready_loss:
        words[0] += f" (ready at {c.ready_loss:g})"
    if val["accuracy"] is not None:
        correct, examples = (sum(split[key] for split in found.values()) for key in ("correct", "examples"))
        # the others are not counted where these say enough
        held_out = "" if "train" in found else "held-out "
        words.append(f"{correct:,} of {examples:,} {held_out}right")
    if not c.gated:
        return [*words, f"best {best[1]:.4f}"] if best else words
    words.append(f"{val['open']:.1f} of {val['total']} edges open")
    words.append(f"best {best[0]:.1f}" if best else "none met the target yet")
    return [*words, f"lambda {lam:.3f}"]
