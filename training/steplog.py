"""What a run measures at every step: steps.csv, which pandas reads, and Weights & Biases if it is asked for.

    import pandas
    pandas.read_csv("out/addition/steps.csv").plot("step", "lambda")

Evaluations are rarer and say more: metrics.jsonl. To follow a quantity of your own, add it to the call of
`judge.note` in train.py's loop: it becomes a column.

Notable:
- Rows are written at every evaluation, just before last.pt, and when a run ends, whatever ends it. What a
  killed run did after last.pt is done again, and its rows with it.
- --wandb=PROJECT needs `pip install wandb`, imported only then. WANDB_MODE=offline keeps all of it in the
  run's folder.
"""

import csv
import io
import os
import secrets

from storage.files import UserError, write_whole


class StepLog:
    """`write(step, name=value, ...)` notes a step, `flush()` writes what was noted.

    path: of steps.csv; rows of steps from `start` on, which a killed run wrote, are dropped.
    """

    def __init__(self, path, start):
        self.path, self.columns, self.waiting = path, [], []
        if not os.path.exists(path):
            return
        with open(path, encoding="utf-8", newline="") as f:
            rows = [row for row in csv.DictReader(f) if (row["step"] or "").isdecimal()]
        kept = [row for row in rows if int(row["step"]) < start and None not in row.values()]
        self.rewrite(kept, list(rows[0]) if rows else [])

    def rewrite(self, rows, columns):
        """The whole file anew: rows, dicts, under these columns."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        if columns:
            writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue().encode())
        self.columns = columns

    def write(self, step, **values):
        self.waiting.append({"step": step, **values})

    def flush(self):
        """Append what waits. Raises UserError if the disk is full."""
        if not self.waiting:
            return
        columns = list(self.waiting[0])
        try:
            if columns != self.columns:  # a new file, or a quantity more than before
                before = []
                if self.columns:
                    with open(self.path, encoding="utf-8", newline="") as f:
                        before = list(csv.DictReader(f))
                self.rewrite(before, [*columns, *(name for name in self.columns if name not in columns)])
            with open(self.path, "a", encoding="utf-8", newline="") as f:
                csv.DictWriter(f, self.columns, restval="").writerows(self.waiting)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}. The checkpoints are untouched: free some "
                            "space, and the same command goes on") from error
        self.waiting = []


class Wandb:
    """The same for Weights & Biases. project: its name; settings: the run's, a dict."""

    def __init__(self, project, settings):
        try:
            import wandb
        except ImportError as error:
            missing = f"--wandb={project} needs a package that is not installed: pip install wandb"
            raise UserError(missing) from error
        folder = settings["out_dir"]
        place = os.path.join(folder, "wandb.id")  # a run that goes on is one run there, too
        if not os.path.exists(place):
            write_whole(place, secrets.token_hex(4).encode())
        with open(place, encoding="utf-8") as f:
            number = f.read()
        self.run = wandb.init(project=project, name=os.path.basename(folder), id=number, resume="allow",
                              dir=folder, config=settings)

    def write(self, step, **values):
        self.run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def finish(self):
        """What waits is written or sent."""
        self.run.finish()
