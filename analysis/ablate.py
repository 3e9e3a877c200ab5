"""What is each part of the method good for? A run again and again, with one change at a time.

    python analyze.py ablate config/addition.py --seeds=1-3               all changes, one table
    python analyze.py ablate config/python.py --seeds=1-3 --jobs=2 --only="fixed penalty,no distillation"
    python analyze.py ablate config/addition.py --max_steps=3000          other settings hold for all

`CHANGES` has the changes: what is on in the config file is switched off, what is off is switched on. A change
that makes no difference to a config file is left out. Everything is trained as by `analyze.py seeds`, which
names the folders: finished runs are not trained again. What fails stays in the table: it is a result.

    met          how many seeds met their target
    open         open edges of the checkpoint that each run is known by: lowest, median, highest
    above        held-out loss above the parent's, nats, likewise
"""

import os
import sys

from analysis.seeds import add_shared_arguments, folder_for, read_shared, runs_for, train_all
from analysis.seeds_table import aligned, spread
from storage.files import UserError, read_json, write_json
from training.config import make_config


def fixed_penalty(c):
    """Lambda stays where it begins, as in an ordinary L0 penalty."""
    return {"lambda_min": c.lambda_init, "lambda_max": c.lambda_init}


CHANGES = {  # name: {setting: value} of a Config, the change
    "as it is": lambda c: {},
    "fixed penalty": fixed_penalty,
    # it is measured on samples only while training draws them
    "sampled constraint": lambda c: {"constraint_gates": "sampled", "noise_free_steps": 0},
    "no averaged weights": lambda c: {"average_decay": 0.0},
    "no distillation": lambda c: {"distill_weight": 0.0},
    "distillation": lambda c: {"distill_weight": 1.0},
    "temperature 1": lambda c: {"gate_temperature": 1.0},
    "temperature 3": lambda c: {"gate_temperature": 3.0},
    "gate bias 1": lambda c: {"gate_bias": 1.0},
    "gate bias 6": lambda c: {"gate_bias": 6.0},
    "no hand-over": lambda c: {"open_above": 0.0},
    "no peak slack": lambda c: {"peak_slack": 0.0},
    "no linear penalty": lambda c: {"linear_penalty_steps": 0},
    "noise to the end": lambda c: {"noise_free_steps": 0},
}


def changes_of(path, settings, only):
    """{name: {setting: value}} of the changes that make a difference. only: names, or [] for all.

    Raises UserError.
    """
    unknown = [name for name in only if name not in CHANGES]
    if unknown:
        raise UserError(f"there is no change {unknown[0]!r}. There are {', '.join(CHANGES)}")
    c, _ = make_config(path, settings)
    if not c.gated:
        raise UserError(f"{path} is a dense run: there is no part of the method to leave out")
    found = {}
    for name, change in CHANGES.items():
        new = {key: value for key, value in change(c).items() if getattr(c, key) != value}
        if (new or name == "as it is") and (not only or name in ["as it is", *only]):
            found[name] = settings | new
    return found


def line_of(name, settings, rows):
    """What the seeds of one change became, a dict of plain numbers."""
    ended = [row for row in rows if not row["failed"]]
    return {
        "change": name,
        "settings": settings,
        "seeds": [row["seed"] for row in rows],
        "met": sum(row["met"] for row in rows),
        "of": len(rows),
        "failed": [row["failed"] for row in rows if row["failed"]],
        "open": sorted(row["open"] for row in ended),
        "total": ended[0]["total"] if ended else None,
        "above": sorted(row["loss"] - row["parent_loss"] for row in ended),
    }


def in_words(values, form):
    """`low, median, high`, or `-` of nothing."""
    return ", ".join(f"{value:{form}}" for value in (spread(values) or {}).values()) or "-"


def table(lines):
    """The lines as text."""
    rows = [["change", "met", "open edges", "nats above the parent"]]
    for line in lines:
        rows.append([line["change"], f"{line['met']} of {line['of']}", in_words(line["open"], ".1f"),
                     in_words(line["above"], "+.4f")])
    return aligned(rows)


def add_arguments(parser):
    add_shared_arguments(parser)
    parser.add_argument("--only", default="", help="some changes, with commas: " + ", ".join(CHANGES))


def run(options, settings):
    """`analyze.py ablate`."""
    path, settings, seeds = read_shared(options, settings)
    changes = changes_of(path, settings, [name for name in options.only.split(",") if name])
    for changed in changes.values():
        runs_for(path, changed, seeds[0])  # a mistake is found before anything is trained
    place, lines = folder_for(path, settings) + "-ablations.json", []
    others = read_json(place) if os.path.exists(place) else []  # of earlier commands, with other changes
    others = [line for line in others if line["change"] not in changes]
    for name, changed in changes.items():
        rows = list(train_all(path, changed, seeds, options))
        lines.append(line_of(name, changed, rows))
        write_json(place, lines + others)
        print(f"{name}: {table(lines[-1:]).splitlines()[1]}", file=sys.stderr, flush=True)
    print(table(lines))
    print(f"the same as numbers: {place}")
