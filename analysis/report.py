"""A run's report: its numbers, computed again from its checkpoint by the code that judged it, its pictures,
and what to make of them.

Everything is computed by evaluate.py, from the checkpoint that the run is known by: best.pt, or, where no
evaluation met the target, closest.pt.
"""

import os
import re

import torch

import prepare_data
from analysis import verdict
from analysis.report_figures import draw
from models import lora
from models.checkpoint import model_of, read_checkpoint
from models.sources import config_for, folder_of_answers, kept_checkpoint
from storage.files import UserError, typed, write_json
from training import parallel
from training.folder import read_metrics, settings_of
from training.judge import distance_from_target, evaluate_splits, meets_target

COUNTED = ("open", "total", "fraction", "per_head", "by_distance")  # of the edges: see evaluate.py


def require_run(folder):
    """Raise UserError if a folder holds no run."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{folder or '.'} is no run's folder: it has no config.json. "
                        f"Train one first: python train.py {config_for(path)}")


def model_judged(checkpoint, path, device="auto"):
    """The model as its run judged it: adapters beside the frozen weights, and those in the run's precision.
    """
    def prepare(model):
        if "lora" not in checkpoint:
            return model
        return lora.freeze_in(model, getattr(torch, checkpoint["config"]["base_dtype"]))

    return model_of(checkpoint, path, parallel.pick_device(device), prepare, merged=False)


def report(run):
    """Write report.json and figures of a run, its folder or a checkpoint in it; return the report, a dict:

    run, seed, step (of the checkpoint), meets_target
    text            which text it saw, in words; null for rows
    headline, advice  what became of the run, and what to do about it (verdict.py): a sentence, and a list of
                      them
    dense, sparse   the model whose loss is to be kept, the parent, and the run's:
                    {val_loss (nats, held out), accuracy (share of held-out rows right, null for text),
                    correct, examples (both splits)}
    target_loss     nats; what the sparse val_loss had to stay at or below
    parent          of a gated run: the checkpoint that it started from
    closest         of a gated run that missed its target: {answers_lost, nats_too_many} of the checkpoint,
                    else null
    ready, still_learning   of a dense run: may a child start from it (null without ready_loss); had its loss
                            not settled when it ended
    edges           {open (mean per held-out sequence), total (causal pairs of all heads and layers),
                    fraction, per_head [layer][head], by_distance [positions back]}
    heads_off       number of heads without any open edge
    seconds         {dense, sparse} of training, the parent's and the run's; in the figures the dense model is
                    the parent, too
    A dense run has sparse, target_loss and seconds.sparse null.
    """
    folder, path = run, kept_checkpoint(run) or os.path.join(run, "last.pt")
    if os.path.isfile(run):
        folder, path = os.path.dirname(run), run
    require_run(folder)
    config = settings_of(folder)
    checkpoint = read_checkpoint(path)
    # a run that was kept off the GPU is reported without it, too
    model = model_judged(checkpoint, path, "cpu" if config["device"] == "cpu" else "auto")
    metrics = read_metrics(os.path.join(folder, "metrics.jsonl"))
    data = prepare_data.load(config["dataset"])
    data.require_same(checkpoint["data"]["sha256"], run)
    judged = evaluate_splits(model, data, config["eval_batch_size"], config["eval_batches"])

    gated, took = model.config.gated, metrics[-1]["seconds"]
    parent = parent_of(checkpoint) if gated else None
    result = {
        "run": run, "seed": config["seed"], "step": checkpoint["step"],
        "text": text_seen(config["dataset"], data.meta),
        "meets_target": not gated or has_met(checkpoint, path, judged),
        "dense": summary(checkpoint["dense"] if gated else judged),
        "sparse": summary(judged) if gated else None,
        "target_loss": checkpoint["target_loss"],
        "parent": checkpoint["parent"] if gated else None,
        "closest": None,
        "ready": bool(checkpoint.get("ready")) if config["ready_loss"] and not gated else None,
        "still_learning": None if gated else verdict.still_learning(metrics, config),
        "edges": {key: judged["val"][key] for key in COUNTED},
        "heads_off": sum(fraction == 0 for layer in judged["val"]["per_head"] for fraction in layer),
        "seconds": {"dense": (parent and parent.metrics[-1]["seconds"]) if gated else took,
                    "sparse": took if gated else None},
    }
    if not result["meets_target"]:
        dense, target = checkpoint["dense"], checkpoint["target_loss"]
        held_out, nats, training = distance_from_target(judged, dense, target)
        result["closest"] = {"answers_lost": held_out + training, "nats_too_many": nats}
    result["headline"] = verdict.headline(result, config, metrics)
    if parent and parent.config.get("ready_loss"):
        parent = None  # else no child would have been let in: it was ready, and had no need to settle
    result["advice"] = verdict.advice(result, config, metrics, parent)
    write_json(os.path.join(folder_of_answers(run), "report.json"), result)
    draw(result, config, metrics, checkpoint, model, data)
    return result


def parent_of(checkpoint):
    """The verdict.Parent of a gated run; None where it started from a model that is no run."""
    folder = os.path.dirname(checkpoint["parent"])
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(path):
        return None
    return verdict.Parent(folder, settings_of(folder), read_metrics(path))


def text_seen(name, meta):
    """Which text a run saw, in words; None if it saw rows. meta: the dataset's meta.json."""
    if meta["kind"] != "stream":
        return None
    python = f", Python {meta['python']}" if "python" in meta else ""
    return name + python + (f", {len(meta['packages'])} packages" if "packages" in meta else "")


def has_met(checkpoint, path, judged):
    """Does a gated run's checkpoint meet its target? Those kept for it say so by their name."""
    name = os.path.basename(path)
    if checkpoint["step"] == 0 or name == "closest.pt":
        return False  # nobody's result is the untrained start
    return name == "best.pt" or meets_target(judged, checkpoint["dense"], checkpoint["target_loss"])


def summary(judged):
    """One model's side of a report.

    `correct` counts the rows of both splits, `accuracy` is that of the held-out ones alone.
    """
    splits = judged.values()
    rows = judged["val"]["accuracy"] is not None
    return {"val_loss": judged["val"]["loss"], "accuracy": judged["val"]["accuracy"],
            "correct": sum(s["correct"] for s in splits) if rows else None,
            "examples": sum(s["examples"] for s in splits)}


def cells(r):
    """{name of a line: what it says of one report}; "-" where there is nothing to say."""
    judged, edges = r["sparse"] or r["dense"], r["edges"]
    seconds = ["-" if s is None else f"{s:.0f}" for s in r["seconds"].values()]
    per_token, heads = edges["open"] / len(edges["by_distance"]), sum(map(len, edges["per_head"]))
    sparse = target = right = "-"
    if r["sparse"]:
        sparse = f"{r['sparse']['val_loss']:.4f}"
        target = f"{r['target_loss']:.4f}" + ("" if r["meets_target"] else " MISSED")
    if judged["correct"] is not None:
        right = f"{judged['correct']} of {judged['examples']}"
    return {
        "": r["run"],
        "text": r["text"] or "-",
        "held-out loss, dense": f"{r['dense']['val_loss']:.4f}",
        "held-out loss, sparse": sparse,
        "target": target,
        "rows right": right,
        "held-out open edges": f"{edges['open']:.2f} of {edges['total']} ({100 * edges['fraction']:.2f} %)",
        "open edges per token": f"{per_token:.2f}, {per_token / heads:.2f} a head",
        "heads off": f"{r['heads_off']} of {heads}",
        "checkpoint of step": str(r["step"]),
        "seconds, dense + sparse": " + ".join(seconds),
    }


def table(reports):
    """The reports as text, one column per run."""
    columns = [cells(r) for r in reports]
    widths = [max(map(len, column.values())) for column in columns]
    lines = []
    for name in columns[0]:
        said = [column[name] for column in columns]
        if set(said) != {"-"}:  # nothing to say in any of the runs
            lines.append("  ".join([f"{name:24}", *(cell.rjust(width) for cell, width in zip(said, widths))]))
    return "\n".join(lines)


def print_reports(reports):
    """What becomes of every run first, then the table, then what to do."""
    folders = ", ".join(folder_of_answers(r["run"]) for r in reports)
    print(*[r["headline"] for r in reports], table(reports), *advice_of(reports),
          f"report.json and figures are in {folders}", *pages_of(reports), sep="\n")


def pages_of(reports):
    """Where the page of every gated run is, or how to get it, a line each."""
    lines = []
    for r in reports:
        page = os.path.join(folder_of_answers(r["run"]) or r["run"], "view.html")
        if os.path.exists(page):
            lines.append(f"a page to look into {r['run']}, in any browser: {page}")
        elif r["sparse"]:
            lines.append("a page to look into it, in any browser: "
                         + typed("python", "analyze.py", "view", r["run"]))
    return lines


def advice_of(reports):
    """What to do, a line each. What a run of this very table has done already is not advised again."""
    there = {os.path.normpath(r["run"]) for r in reports}
    lines = []
    for r in reports:
        done = [re.escape(typed(f"--out_dir={run}")) for run in there - {os.path.normpath(r["run"])}]
        for sentence in r["advice"]:
            if not any(re.search(rf"{flag}(\s|$)", sentence) for flag in done):
                lines.append(f"{r['run']}: {sentence}")
    return lines


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, such as out/addition")


def run(options, settings):
    """`analyze.py report`."""
    print_reports([report(folder.rstrip("/")) for folder in options.runs])
