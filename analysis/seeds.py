"""The same run with many seeds: a fair answer to "does it work?", which no single seed gives.

    python analyze.py seeds config/addition.py --seeds=21-40             twenty runs, one table
    python analyze.py seeds config/addition.py --seeds=1,5,9 --jobs=2    two at a time
    python analyze.py seeds config/addition.py --seeds=1-3 --loss_slack=0.01 --n_head=2 --explain

Every seed is `python train.py CONFIG --seed=N` in a process of its own, so it is the very run that a person
would start. Finished runs are skipped, unfinished ones go on. --threads (1) for each process: other numbers
of threads sum in another order, and training is chaotic. --explain says of every run what algorithm its
circuit is (explain.py). Any other --key=value goes to train.py:

- It stands in the name of the run's folder, out/addition-loss_slack=0.01-seed3: plain runs are left alone.
- The model's shape and the dataset are the parent's business. With such a setting the parent is a run of its
  own, out/addition_dense-n_head=2-seed3, trained first.

A seed that misses its target, or fails, stays in the table: leaving it out would be a lie. Output of a run:
out/<run>.log. The table, as numbers: out/<name>-seeds.json.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from analysis.seeds_table import cells, in_words, summary, table
from analysis.verdict import distance_in_words
from models.checkpoint import read_checkpoint
from models.sources import from_here
from storage.files import REPOSITORY, UserError, read_json, write_json
from training.config import FREE, PASSED_ON, SHAPE, check_together, make_config, parse_command_line
from training.folder import read_metrics, settings_of
from training.judge import MISSED, is_at_end

OF_PARENT = (*SHAPE, "dataset")  # settings that a child takes from its parent, or shares with it


def parse_seeds(words):
    """`21-23,5` -> [21, 22, 23, 5]. Raises UserError."""
    found = []
    for part in words.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or dash and not last.isdecimal():
            raise UserError(
                f"--seeds={words}: write numbers and ranges, such as --seeds=21-40 or --seeds=1,5,9"
            )
        if int(last or first) > 1_000_000:
            raise UserError(f"--seeds={words}: a seed is a number up to a million")
        if dash and int(last) < int(first):
            raise UserError(f"--seeds={words}: write a range upwards, such as --seeds=21-40")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) < len(found):
        raise UserError(f"--seeds={words} names a seed twice")
    return found


def read_settings(path, flags):
    """['--key=value', ...] -> {setting: value} for train.py, checked. path: the config file.

    Raises UserError.
    """
    other, settings = parse_command_line(flags)
    if other:
        raise UserError(f"seeds takes one config file, not both {path} and {other}")
    for key in ("seed", "out_dir"):
        if key in settings:
            raise UserError(f"seeds sets --{key} itself: leave it away, and name seeds with --seeds=21-40")
    return settings


# ------------------------------------------------------------------------------------------------------------
# What has to be run


def folder_for(path, settings, seed=None):
    """`out/addition-n_head=2-seed3`: where the runs of a config file and some settings go; without a seed the
    beginning of it.
    """
    name = os.path.splitext(os.path.basename(path))[0]
    words = [f"-{key}={str(value).replace(os.sep, '_')}" for key, value in sorted(settings.items())]
    ending = f"-seed{seed}" if seed not in (None, 1) else ""  # as in settings.make_config
    return f"out/{name}{''.join(words)}{ending}"


def runs_for(path, settings, seed):
    """The runs that one seed takes, the child last: [(config file, {setting: value})].

    One, unless a parent must be told of its shape.
    """
    config, _ = make_config(path, settings)
    check_together(config)
    ours = dict(settings)
    runs = []
    of_parent = {key: value for key, value in settings.items() if key in OF_PARENT}
    if of_parent and config.init_from.endswith(".py"):
        parent = folder_for(config.init_from, of_parent, seed)
        passed_on = {key: value for key, value in settings.items() if key in PASSED_ON}
        runs.append((config.init_from, of_parent | passed_on | {"seed": seed, "out_dir": parent}))
        ours = {key: value for key, value in settings.items() if key not in SHAPE} | {"init_from": parent}
    runs.append((path, ours | {"seed": seed, "out_dir": folder_for(path, settings, seed)}))
    return runs


def command_for(path, settings):
    """The command that trains a run."""
    return [
        sys.executable,
        os.path.join(REPOSITORY, "train.py"),
        path,
        *(f"--{key}={value}" for key, value in settings.items()),
    ]


def is_finished(path, settings):
    """Is this run, with these very settings, at its end, and reported?

    When in doubt it is not: train.py looks again.
    """
    config, names = make_config(path, settings)
    try:
        before = settings_of(config.out_dir)
        report = read_json(os.path.join(config.out_dir, "report.json"))
        last = read_checkpoint(os.path.join(config.out_dir, "last.pt"))
    except (OSError, UserError):
        return False
    inherited = [key for key in SHAPE if key not in names]
    now = {key: value for key, value in vars(config).items() if key not in (*FREE, *inherited)}
    is_same = all(before.get(key) == value for key, value in now.items())
    is_reported = "headline" in report  # and not by an older report.py
    return is_same and is_at_end(last, config) and is_reported


def train_seed(path, settings, seed, options):
    """Train what one seed takes, and say what became of it: a row of the table, see `row_of`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    began, ran = time.time(), False
    for file, given in runs_for(path, settings, seed):
        folder = given["out_dir"]
        if is_finished(file, given):
            continue
        ran = True
        os.makedirs("out", exist_ok=True)
        with open(folder + ".log", "a", encoding="utf-8") as log:
            status = subprocess.run(
                command_for(file, given), stdout=log, stderr=log, env=environment
            ).returncode
        if status not in (0, MISSED):
            return {
                "seed": seed,
                "run": folder,
                "met": False,
                "failed": last_line(folder + ".log"),
                "wall_seconds": time.time() - began,
            }
    row = row_of(folder, seed) | {"wall_seconds": time.time() - began if ran else None}
    if options.explain:
        row["algorithm"] = algorithm_of(folder, environment)
    return row


def last_line(path):
    """The last line of a log that says something."""
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f if line.strip()]
    return lines[-1] if lines else "it said nothing"


def row_of(run, seed):
    """What a finished run's report says, a dict:

    seed, run, met; open, total (edges); correct, examples (answers of both splits, null for text); seconds
    {dense, sparse} of training; loss, parent_loss (nats), parent_steps (null if the parent's folder is gone);
    closest: what a missed run lacks, in words, else null
    """
    report = read_json(os.path.join(run, "report.json"))
    judged = report["sparse"] or report["dense"]
    parent = from_here(report["parent"], run, report["run"]) if report["parent"] else ""
    parents = os.path.join(os.path.dirname(parent), "metrics.jsonl")
    return {
        "seed": seed,
        "run": run,
        "met": report["meets_target"] and report["ready"] is not False,
        "failed": None,
        "loss": judged["val_loss"],
        "parent_loss": report["dense"]["val_loss"] if report["sparse"] else None,
        "parent_steps": read_metrics(parents)[-1]["step"] if os.path.exists(parents) else None,
        "open": report["edges"]["open"],
        "total": report["edges"]["total"],
        "correct": judged["correct"],
        "examples": judged["examples"],
        "seconds": report["seconds"],
        "closest": f"step {report['step']}: {distance_in_words(report)}" if report["closest"] else None,
    }


def algorithm_of(run, environment):
    """The name of a run's algorithm by explain.py, or why there is none."""
    command = [sys.executable, os.path.join(REPOSITORY, "analyze.py"), "explain", run]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["explain was killed"])[-1]
    return read_json(os.path.join(run, "explain.json"))["algorithm"]


# ------------------------------------------------------------------------------------------------------------
# The commands


def add_shared_arguments(parser):
    """Those of every command that trains a config file with many seeds."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a config file; behind it any setting of train.py, --key=value"
    )
    parser.add_argument("--seeds", default="1-3", help="numbers and ranges: 21-40 or 1,5,9")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")


def read_shared(options, settings):
    """(config file, {setting: value}, [seed]) of the command line, checked. Raises UserError."""
    if options.threads < 1 or options.jobs < 1:
        raise UserError("--threads and --jobs must be at least 1")
    return options.config, read_settings(options.config, settings), parse_seeds(options.seeds)


def add_arguments(parser):
    add_shared_arguments(parser)
    parser.add_argument("--explain", action="store_true", help="what algorithm is it? For addition")


def run(options, settings):
    """`analyze.py seeds`: train, print and write the table.

    Returns the exit status: 0 if every seed met its target, else 1.
    """
    path, settings, seeds = read_shared(options, settings)
    runs_for(path, settings, seeds[0])  # a mistake is found before anything is trained
    place = folder_for(path, settings) + "-seeds.json"
    known = read_rows(place)  # those of other seeds stay
    rows = []
    for row in train_all(path, settings, seeds, options):
        if row["wall_seconds"] is None:
            row["wall_seconds"] = known.get(row["seed"], {}).get("wall_seconds")
        rows = sorted([*rows, row], key=lambda row: seeds.index(row["seed"]))
        known[row["seed"]] = row
        of_all = [known[seed] for seed in sorted(known)]
        write_json(place, {"config": path, "settings": settings, "threads": options.threads,
                           "summary": summary(of_all), "rows": of_all})
        print(f"seed {'  '.join(cells(row))}  ({len(rows)} of {len(seeds)})", file=sys.stderr, flush=True)
    print(table(rows))
    print(in_words(summary(rows)))
    print(f"the same as numbers: {place}")
    return 0 if all(row["met"] for row in rows) else 1


def read_rows(place):
    """{seed: row} of an earlier table, or nothing."""
    if not os.path.exists(place):
        return {}
    return {row["seed"]: row for row in read_json(place)["rows"]}


def train_all(path, settings, seeds, options):
    """Yield the row of every seed as soon as there is one, options.jobs at a time.

    Ctrl-C reaches the runs as well, and they save themselves.
    """
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(train_seed, path, settings, seed, options) for seed in seeds]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped. The same command goes on where the runs stand")
