"""The same run with many seeds: a fair answer to "does it work?", which no single seed gives.

    python analyze.py seeds config/addition.py --seeds=21-40             twenty runs, one table
    python analyze.py seeds config/addition.py --seeds=1,5,9 --jobs=2    two at a time
    python analyze.py seeds config/addition.py --seeds=1-3 --loss_slack=0.01 --n_head=2
    python analyze.py seeds config/addition.py --seeds=1-3 --changes     what is each part of the method good
                                                                         for? One change at a time

Every seed is `python train.py CONFIG --seed=N` in a process of its own, so it is the very run that a person
would start. Finished runs are skipped, unfinished ones go on. --threads (1) for each process: other numbers
of threads sum in another order, and training is chaotic. Any other --key=value goes to train.py:

- It stands in the name of the run's folder, out/addition-loss_slack=0.01-seed3: plain runs are left alone.
- The model's shape and the dataset are the parent's business. With such a setting the parent is a run of its
  own, out/addition_dense-n_head=2-seed3, trained first.

A seed that misses its target, or fails, stays in the table: leaving it out would be a lie. Output of a run:
out/<run>.log. The table, as numbers: out/<name>-seeds.json.

With --changes what is on in the config file is switched off, what is off is switched on (`changes`); some of
them: --changes="fixed penalty,no distillation". A change that makes no difference to a config file is left
out. Lowest, median and highest of the seeds, as numbers: out/<name>-ablations.json.
"""

import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from analysis.verdict import distance_in_words
from models.checkpoint import read_checkpoint
from models.sources import from_here
from storage.files import REPOSITORY, UserError, read_json, write_json
from training.config import FREE, PASSED_ON, SHAPE, Config, check_together, make_config, parse_command_line
from training.folder import read_metrics, settings_of
from training.judge import MISSED, is_at_end

OF_PARENT = (*SHAPE, "dataset")  # settings that a child takes from its parent, or shares with it


def changes(c):
    """{name: {setting: value}}: what is changed in the settings c, one at a time."""
    return {
        "as it is": {},
        # lambda stays where it begins, as in an ordinary L0 penalty
        "fixed penalty": {"lambda_min": c.lambda_init, "lambda_max": c.lambda_init},
        # it is measured on samples only while training draws them
        "sampled constraint": {"constraint_gates": "sampled", "noise_free_steps": 0},
        "no averaged weights": {"average_decay": 0.0},
        "no distillation": {"distill_weight": 0.0},
        "distillation": {"distill_weight": 1.0},
        "temperature 1": {"gate_temperature": 1.0},
        "temperature 3": {"gate_temperature": 3.0},
        "gate bias 1": {"gate_bias": 1.0},
        "gate bias 6": {"gate_bias": 6.0},
        "no hand-over": {"open_above": 0.0},
        "no peak slack": {"peak_slack": 0.0},
        "no linear penalty": {"linear_penalty_steps": 0},
        "noise to the end": {"noise_free_steps": 0},
    }


def parse_seeds(words):
    """`21-23,5` -> [21, 22, 23, 5]. Raises UserError."""
    found = []
    for part in words.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        some = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not some or set(some) & set(found):
            raise UserError(f"--seeds={words}: write numbers and ranges, each seed once, such as "
                            "--seeds=21-40 or --seeds=1,5,9")
        found += some
    return found


def read_settings(path, flags):
    """['--key=value', ...] -> {setting: value} for train.py, checked. path: the config file."""
    other, settings = parse_command_line(flags)
    if other:
        raise UserError(f"seeds takes one config file, not both {path} and {other}")
    for key in ("seed", "out_dir"):
        if key in settings:
            raise UserError(f"seeds sets --{key} itself: leave it away, and name seeds with --seeds=21-40")
    return settings


def chosen_changes(path, settings, only):
    """{name: {setting: value}} of the changes that make a difference, with the settings that hold for all.

    only: names, or [] for all. Raises UserError.
    """
    c, _ = make_config(path, settings)
    if not c.gated:
        raise UserError(f"{path} is a dense run: there is no part of the method to leave out")
    found = {}
    for name, change in changes(c).items():
        new = {key: value for key, value in change.items() if getattr(c, key) != value}
        if name == "as it is" or new and (not only or name in only):
            found[name] = settings | new
    unknown = [name for name in only if name not in changes(c)]
    if unknown:
        raise UserError(f"there is no change {unknown[0]!r}. There are {', '.join(changes(c))}")
    return found


def folder_for(path, settings, seed=1):
    """`out/addition-n_head=2-seed3`: where the runs of a config file and some settings go."""
    name = os.path.splitext(os.path.basename(path))[0]
    words = [f"-{key}={str(value).replace(os.sep, '_')}" for key, value in sorted(settings.items())]
    ending = f"-seed{seed}" if seed != 1 else ""  # as in make_config
    return f"out/{name}{''.join(words)}{ending}"


def runs_for(path, settings, seed):
    """The runs that one seed takes, the child last: [(config file, {setting: value})].

    One, unless a parent must be told of its shape. Raises UserError where settings contradict each other.
    """
    def some(names):
        return {key: value for key, value in settings.items() if key in names}

    config, _ = make_config(path, settings)
    check_together(config)
    child, runs, of_parent = settings, [], some(OF_PARENT)
    if of_parent and config.init_from.endswith(".py"):
        parent = folder_for(config.init_from, of_parent, seed)
        runs.append((config.init_from, of_parent | some(PASSED_ON) | {"seed": seed, "out_dir": parent}))
        child = some(settings.keys() - SHAPE) | {"init_from": parent}
    return [*runs, (path, child | {"seed": seed, "out_dir": folder_for(path, settings, seed)})]


def is_finished(path, settings):
    """Is this run, with these very settings, at its end, and reported?

    When in doubt it is not: train.py looks again.
    """
    config, names = make_config(path, settings)
    try:
        before = settings_of(config.out_dir)
        read_json(os.path.join(config.out_dir, "report.json"))
        last = read_checkpoint(os.path.join(config.out_dir, "last.pt"))
    except (OSError, UserError):
        return False
    inherited = [key for key in SHAPE if key not in names]
    now = {key: value for key, value in vars(config).items() if key not in (*FREE, *inherited)}
    return all(before.get(key) == value for key, value in now.items()) and is_at_end(last, config)


# ------------------------------------------------------------------------------------------------------------
# Running it


def train_all(path, settings, seeds, options):
    """Train with every seed, options.jobs at a time. Returns their rows (`row_of`), and keeps them in
    out/<name>-seeds.json as they come, beside those of other seeds.
    """
    place, rows = folder_for(path, settings) + "-seeds.json", {}
    known = {row["seed"]: row for row in read_json(place)["rows"]} if os.path.exists(place) else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(train_seed, path, settings, seed, options) for seed in seeds]
        try:
            for done in as_completed(waiting):
                row = done.result()
                rows[row["seed"]] = known[row["seed"]] = row
                of_all = [known[seed] for seed in sorted(known)]
                write_json(place, {"config": path, "settings": settings, "threads": options.threads,
                                   "rows": of_all})
                print(f"seed {'  '.join(cells(row))}  ({len(rows)} of {len(seeds)})", file=sys.stderr,
                      flush=True)
        except KeyboardInterrupt:  # it reaches the runs as well, and they save themselves
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped. The same command goes on where the runs stand")
    return [rows[seed] for seed in seeds]


def train_seed(path, settings, seed, options):
    """Train what one seed takes, and say what became of it: a row of the table, see `row_of`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    os.makedirs("out", exist_ok=True)
    for file, given in runs_for(path, settings, seed):
        folder = given["out_dir"]
        if is_finished(file, given):
            continue
        command = [sys.executable, os.path.join(REPOSITORY, "train.py"), file,
                   *(f"--{key}={value}" for key, value in given.items())]
        with open(folder + ".log", "a", encoding="utf-8") as log:
            status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        if status not in (0, MISSED):
            with open(folder + ".log", encoding="utf-8", errors="replace") as log:
                said = log.read().split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            return {"seed": seed, "run": folder, "met": False, "failed": last}
    return row_of(folder, seed)


def row_of(run, seed):
    """What a finished run's report says, a dict:

    seed, run, met; open, total (edges); correct, examples (answers of both splits, null for text); seconds
    {dense, sparse} of training; loss, parent_loss (nats), parent_steps (null if the parent's folder is gone);
    closest: what a missed run lacks, in words, else null; failed: null
    """
    report = read_json(os.path.join(run, "report.json"))
    judged = report["sparse"] or report["dense"]
    parent = from_here(report["parent"], run, report["run"]) if report["parent"] else ""
    parents = os.path.join(os.path.dirname(parent), "metrics.jsonl")
    return {
        "seed": seed, "run": run, "met": report["meets_target"] and report["ready"] is not False,
        "failed": None, "loss": judged["val_loss"],
        "parent_loss": report["dense"]["val_loss"] if report["sparse"] else None,
        "parent_steps": read_metrics(parents)[-1]["step"] if os.path.exists(parents) else None,
        "open": report["edges"]["open"], "total": report["edges"]["total"],
        "correct": judged["correct"], "examples": judged["examples"], "seconds": report["seconds"],
        "closest": f"step {report['step']}: {distance_in_words(report)}" if report["closest"] else None,
    }


# ------------------------------------------------------------------------------------------------------------
# Tables


def aligned(lines):
    """Lists of cells as lines of text, column by column."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def spread(values, form):
    """Lowest, median and highest of some numbers in words, or `-` of none."""
    numbers = (min(values), statistics.median(values), max(values)) if values else ()
    return ", ".join(f"{number:{form}}" for number in numbers) or "-"


def cells(row):
    """A seed's row of the table, as words."""
    if row["failed"]:
        return [str(row["seed"]), "FAILED", "-", "-", "-", "-", "-", row["failed"][:100]]
    parent = "-" if row["parent_loss"] is None else f"{row['parent_loss']:.4f}"
    if row["parent_steps"] is not None:
        parent += f" ({row['parent_steps']} steps)"
    correct = "-" if row["correct"] is None else f"{row['correct']:,} of {row['examples']:,}"
    seconds = ["-" if value is None else f"{value:.0f}" for value in row["seconds"].values()]
    return [str(row["seed"]), "met" if row["met"] else "MISSED", parent,
            f"{row['open']:.2f} of {row['total']}", correct, *seconds, row["closest"] or ""]


def table(rows):
    """The rows as text, one line a seed, and what all say together."""
    heading = ["seed", "target", "parent's loss", "open edges", "right", "s dense", "s sparse", "closest"]
    ended = [row for row in rows if not row["failed"]]
    met = [row["open"] for row in ended if row["met"]]
    seconds = [sum(value or 0 for value in row["seconds"].values()) for row in ended]
    return "\n".join([
        aligned([heading, *map(cells, rows)]),
        f"met {len(met)} of {len(rows)}; lowest, median, highest: {spread(met, '.2f')} open edges of those, "
        f"{spread(seconds, '.0f')} seconds of training",
    ])


def line_of(name, settings, rows):
    """What the seeds of one change became: how many met their target; open edges of the checkpoint that each
    run is known by, and held-out loss above the parent's (nats), each sorted.
    """
    ended = [row for row in rows if not row["failed"]]
    return {"change": name, "settings": settings, "met": sum(row["met"] for row in rows), "of": len(rows),
            "open": sorted(row["open"] for row in ended),
            "above": sorted(row["loss"] - row["parent_loss"] for row in ended)}


def table_of_changes(lines):
    """The lines as text."""
    return aligned([["change", "met", "open edges", "nats above the parent"],
                    *[[line["change"], f"{line['met']} of {line['of']}", spread(line["open"], ".1f"),
                       spread(line["above"], "+.4f")] for line in lines]])


def add_arguments(parser):
    parser.add_argument("config", metavar="CONFIG",
                        help="a config file; behind it any setting of train.py, --key=value")
    parser.add_argument("--seeds", default="1-3", help="numbers and ranges: 21-40 or 1,5,9")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--changes", nargs="?", const="", metavar="SOME",
                        help="one change at a time: all, or of these: " + ", ".join(changes(Config())))


def run(options, settings):
    """`analyze.py seeds`: train, print and write the table.

    Returns the exit status: 0 if every seed met its target, else 1; with --changes 0.
    """
    if options.threads < 1 or options.jobs < 1:
        raise UserError("--threads and --jobs must be at least 1")
    path, seeds = options.config, parse_seeds(options.seeds)
    settings = read_settings(path, settings)
    runs_for(path, settings, seeds[0])  # a mistake is found before anything is trained
    if options.changes is not None:
        return train_changes(path, settings, seeds, options)
    rows = train_all(path, settings, seeds, options)
    print(table(rows))
    print(f"the same as numbers: {folder_for(path, settings)}-seeds.json")
    return 0 if all(row["met"] for row in rows) else 1


def train_changes(path, settings, seeds, options):
    """`analyze.py seeds --changes`: train with one change at a time, print and write the table."""
    chosen = chosen_changes(path, settings, [name for name in options.changes.split(",") if name])
    place = folder_for(path, settings) + "-ablations.json"
    others = read_json(place) if os.path.exists(place) else []  # of earlier commands, with other changes
    others, lines = [line for line in others if line["change"] not in chosen], []
    for name, changed in chosen.items():
        lines.append(line_of(name, changed, train_all(path, changed, seeds, options)))
        write_json(place, lines + others)
        print(table_of_changes(lines[-1:]).splitlines()[1], file=sys.stderr, flush=True)
    print(table_of_changes(lines))
    print(f"the same as numbers: {place}")
