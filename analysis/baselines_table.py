"""The table of baselines.py: a row for every way to cut edges, in a file, so that a command that was stopped
goes on and others add to it, side by side if they like.

A row is {'rule', 'budget', 'loss': nats, 'edges': open, per head and token, 'above_parent': nats, and for
each task the edges of its circuit}. Beside the file lie the models that were trained on.
"""

import math
import os

from tqdm import tqdm

from storage.files import UserError, locked, read_json, write_json

NOISE = 1e-4  # by which one model's loss differs from machine to machine, at most: a share


class Table:
    """parent: path; loss: its, held out, nats; tasks: names; steps: how many were trained on.

    Raises UserError.
    """

    def __init__(self, folder, parent, loss, steps, tasks):
        self.place, self.tasks = place_of(folder, steps), tasks
        self.content = {"parent": parent, "parent_loss": loss, "steps": steps, "rows": []}
        if not os.path.exists(self.place):
            return
        found = read_json(self.place)
        if found["parent"] != parent or not math.isclose(found["parent_loss"], loss, rel_tol=NOISE):
            raise UserError(f"{self.place} is of another parent: {found['parent']}, held-out loss "
                            f"{found['parent_loss']:.4f}, now {parent}, {loss:.4f}. Move it away, and "
                            "the folder of that name")
        self.content = found

    def has(self, rule, budget, **same):
        """Is that row there, with all tasks, and is the rest the same? Then it is printed."""
        wanted = {"rule": rule, "budget": budget, **same}
        for row in self.content["rows"]:
            if all(row.get(key) == value for key, value in wanted.items()) and set(self.tasks) <= set(row):
                tqdm.write(line_of(row, self.tasks))
                return True
        return False

    def add(self, row):
        """Print a row, and keep it in place of an earlier one of its name, of which other tasks stay."""
        row["above_parent"] = row["loss"] - self.content["parent_loss"]
        with locked(os.path.dirname(self.place)):  # another command may add rows, side by side
            if os.path.exists(self.place):
                self.content = read_json(self.place)
            rows = {(other["rule"], other["budget"]): other for other in self.content["rows"]}
            earlier = rows.pop((row["rule"], row["budget"]), {})
            if earlier.get("step") != row.get("step"):  # the run has been trained on since
                earlier = {}
            self.content["rows"] = [*rows.values(), earlier | row]
            write_json(self.place, self.content)
        tqdm.write(line_of(row, self.tasks))

    def model_path(self, rule, budget):
        """Where the model of a row is kept."""
        folder = os.path.splitext(self.place)[0]
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f"{rule}-{budget:g}.pt")


def place_of(folder, steps):
    """Where the table of a run's folder is. steps: how many were trained on."""
    return os.path.join(folder, f"baselines-{steps}.json" if steps else "baselines.json")


def heading(tasks):
    circuits = "".join(f"  {task:>9}" for task in tasks)
    return f"{'rule':10} {'budget':>7}  {'edges per head and token':>24}  {'nats above parent':>17}{circuits}"


def line_of(row, tasks):
    """A row as text."""
    budget = "" if row["budget"] is None else f"{row['budget']:g}"
    sizes = "".join("          -" if row[task] is None else f"  {row[task]:9.1f}" for task in tasks)
    return f"{row['rule']:10} {budget:>7}  {row['edges']:24.2f}  {row['above_parent']:17.4f}{sizes}"
