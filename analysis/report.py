"""A run's report: its numbers, computed again from its checkpoint by the code that judged it, its pictures,
and what to make of them.

Everything is computed by evaluate.py, from the checkpoint that the run is known by: best.pt, or, where no
evaluation met the target, closest.pt.
"""

import json
import os
import re

import numpy as np
import torch

import prepare_data
from analysis import explain, figures
from models import lora
from models.checkpoint import (
    config_for,
    folder_of_answers,
    kept_checkpoint,
    load_checkpoint,
    model_of,
    read_checkpoint,
)
from storage import text
from storage.addition import ADDITION_TOKENS, addition_rows, addition_task
from storage.files import UserError, write_json
from training import flow, hardware, verdict
from training.evaluate import evaluate_splits
from training.folder import read_metrics

# The paper's three kinds of sum. Of each number a d-digit model gets the last d digits: 53+21, 36+28, 43+59
SUMS = [(6253, 1421, "no carry"),
        (4136, 3528, "carry out of the units"),
        (5743, 8659, "carry into the {highest}")]


COUNTED = ("open", "total", "fraction", "per_head", "by_distance")  # of the edges: see evaluate.py


def read_json(path):
    if not os.path.exists(path):
        folder, name = os.path.split(path)
        raise UserError(f"{folder or '.'} is no run's folder: it has no {name}. "
                        f"Train one first: python train.py {config_for(path)}")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def model_judged(checkpoint, path):
    """The model as its run judged it: adapters beside the frozen weights, and those in the run's precision.
    """
    def prepare(model):
        if "lora" not in checkpoint:
            return model
        return lora.freeze_in(model, getattr(torch, checkpoint["config"]["base_dtype"]))

    return model_of(checkpoint, path, hardware.pick_device("auto"), prepare, merged=False)


def report(run):
    """Write report.json and figures of a run, its folder or a checkpoint in it; return the report, a dict:

    run, seed, step (of the checkpoint), meets_target
    headline, advice  what became of the run, and what to do about it (verdict.py): a sentence, and a list of
                      them
    dense, sparse   the model whose loss is to be kept (target_from, else the parent), and the run's:
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
    config = read_json(os.path.join(folder, "config.json"))
    checkpoint = read_checkpoint(path)
    model = model_judged(checkpoint, path)
    metrics = read_metrics(os.path.join(folder, "metrics.jsonl"))
    data = prepare_data.load(config["dataset"])
    data.require_same(checkpoint["data"]["sha256"], run)
    judged = evaluate_splits(model, data, config["eval_batch_size"], config["eval_batches"])

    gated, parent = model.config.gated, None
    seconds = {"dense": metrics[-1]["seconds"], "sparse": None}
    if gated:
        seconds = {"dense": None, "sparse": metrics[-1]["seconds"]}
        folder = os.path.dirname(checkpoint["parent"])
        if os.path.exists(os.path.join(folder, "metrics.jsonl")):
            parent = read_metrics(os.path.join(folder, "metrics.jsonl")), folder
            seconds["dense"] = parent[0][-1]["seconds"]
    result = {
        "run": run,
        "seed": config["seed"],
        "step": checkpoint["step"],
        "meets_target": not gated or has_met(checkpoint, path, judged),
        "dense": summary(checkpoint["dense"] if gated else judged),
        "sparse": summary(judged) if gated else None,
        "target_loss": checkpoint["target_loss"],
        "parent": checkpoint["parent"] if gated else None,
        "closest": None,
        "ready": bool(checkpoint.get("ready")) if config["ready_loss"] and not gated else None,
        "still_learning": None if gated else verdict.still_learning(metrics),
        "edges": {key: judged["val"][key] for key in COUNTED},
        "heads_off": sum(fraction == 0 for layer in judged["val"]["per_head"] for fraction in layer),
        "seconds": seconds,
    }
    if not result["meets_target"]:
        dense, target = checkpoint["dense"], checkpoint["target_loss"]
        held_out, nats, training = verdict.distance_from_target(judged, dense, target)
        result["closest"] = {"answers_lost": held_out + training, "nats_too_many": nats}
    result["headline"] = verdict.headline(result, config, metrics)
    if parent and read_json(os.path.join(parent[1], "config.json")).get("ready_loss"):
        parent = None  # else no child would have been let in: it was ready, and had no need to settle
    result["advice"] = verdict.advice(result, config, metrics, parent)
    write_json(os.path.join(folder_of_answers(run), "report.json"), result)
    draw(result, config, metrics, checkpoint, model, data)
    return result


def has_met(checkpoint, path, judged):
    """Does a gated run's checkpoint meet its target? Those kept for it say so by their name."""
    if checkpoint["step"] == 0:
        return False  # nobody's result is the untrained start
    by_name = {"best.pt": True, "closest.pt": False}.get(os.path.basename(path))
    if by_name is None:
        return verdict.meets_target(judged, checkpoint["dense"], checkpoint["target_loss"])
    return by_name


def draw(result, config, metrics, checkpoint, model, data):
    """The figures of a report, into its run's folder.

    result: the report; model: that of the checkpoint, which is drawn.
    """
    run, edges = folder_of_answers(result["run"]), result["edges"]
    bounds = ()
    if config["gated"]:
        bounds = config["lambda_min"], max(config["lambda_max"], config.get("repair_lambda_max", 0))
    figures.training(os.path.join(run, "training.png"), metrics, checkpoint["step"], bounds)
    if not model.config.gated or not checkpoint["step"]:
        return  # all edges are open
    figures.open_by_head(os.path.join(run, "gates.png"), edges["per_head"])
    figures.open_by_distance(os.path.join(run, "distance.png"), edges["by_distance"], edges["open"])
    if checkpoint.get("base") == checkpoint["parent"]:
        dense_model = lora.Base(model)
    else:
        dense_model = parent_of(checkpoint["parent"], run)
    label = "sparse" if result["meets_target"] else f"target missed,\nclosest: step {checkpoint['step']}"
    task = addition_task(data.meta)
    if task:
        attention_flow(run, model.cpu(), dense_model, task, label)
        flow.film(run, task, model.config, config["max_steps"])
    elif data.meta["kind"] == "stream":
        gallery(run, model.cpu(), dense_model, data, edges["per_head"], label)


def summary(judged):
    """One model's side of a report.

    `correct` counts the rows of both splits, `accuracy` is that of the held-out ones alone.
    """
    splits = judged.values()
    rows = judged["val"]["accuracy"] is not None
    return {
        "val_loss": judged["val"]["loss"],
        "accuracy": judged["val"]["accuracy"],
        "correct": sum(s["correct"] for s in splits) if rows else None,
        "examples": sum(s["examples"] for s in splits),
    }


def cells(r):
    """{name of a line: what it says of one report}; "-" where there is nothing to say."""
    judged, edges = r["sparse"] or r["dense"], r["edges"]
    seconds = ["-" if s is None else f"{s:.0f}" for s in r["seconds"].values()]
    sparse = target = right = "-"
    if r["sparse"]:
        sparse = f"{r['sparse']['val_loss']:.4f}"
        target = f"{r['target_loss']:.4f}" + ("" if r["meets_target"] else " MISSED")
    if judged["correct"] is not None:
        right = f"{judged['correct']} of {judged['examples']}"
    return {
        "": r["run"],
        "held-out loss, dense": f"{r['dense']['val_loss']:.4f}",
        "held-out loss, sparse": sparse,
        "target": target,
        "rows right": right,
        "open edges": f"{edges['open']:.2f} of {edges['total']} ({100 * edges['fraction']:.2f} %)",
        "open edges per token": f"{edges['open'] / len(edges['by_distance']):.2f}",
        "heads off": f"{r['heads_off']} of {sum(map(len, edges['per_head']))}",
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
    for r in reports:
        print(r["headline"])
    print(table(reports))
    for line in advice_of(reports):
        print(line)
    print(f"report.json and figures are in {', '.join(r['run'] for r in reports)}")
    for line in pages_of(reports):
        print(line)


def pages_of(reports):
    """Where the page of every gated run is, or how to get it, a line each."""
    lines = []
    for r in reports:
        page = os.path.join(folder_of_answers(r["run"]) or r["run"], "view.html")
        if os.path.exists(page):
            lines.append(f"a page to look into {r['run']}, in any browser: {page}")
        elif r["sparse"]:
            lines.append(f"a page to look into it, in any browser: python analyze.py view {r['run']}")
    return lines


def advice_of(reports):
    """What to do, a line each. What a run of this very table has done already is not advised again."""
    there = {os.path.normpath(r["run"]) for r in reports}
    lines = []
    for r in reports:
        for sentence in r["advice"]:
            named = re.search(r"--out_dir=(\S+)", sentence)
            if named and named[1] in there - {os.path.normpath(r["run"])}:
                continue
            lines.append(f"{r['run']}: {sentence}")
    return lines


def parent_of(parent, run):
    """The dense model that a run started from, or None, said aloud, if its file is gone."""
    try:
        return load_checkpoint(parent)
    except UserError:
        print(f"{parent} is gone: the figures in {run} show the sparse model only")
        return None


def example_sums(task):
    """The sums to draw, of the paper's three kinds: [(a, b, kind)]."""
    highest = explain.PLACES[task.digits]
    end = 10**task.digits
    return [(a % end, b % end, kind.format(highest=highest)) for a, b, kind in SUMS]


def weights_of(model, tokens):
    """What every edge carries for tokens (B, T): a list of n_layer arrays (B, H, T, T), 0 where shut."""
    layers = []
    model(torch.from_numpy(tokens),
          record=lambda layer, gates: layers.append((gates.open * gates.pattern).numpy()))
    return layers


@torch.no_grad()
def attention_flow(run, model, dense_model, task, label):
    """attention_flow.png: three sums through the dense parent (if it is still there) and the sparse model,
    whose row is called `label`.
    """
    sums = example_sums(task)
    a, b = np.array([(a, b) for a, b, _ in sums]).T
    questions = addition_rows(a, b, *task)[:, 0].astype(np.int64)
    titles = [f"{x} + {y} = {x + y}, {kind}" for x, y, kind in sums]
    columns = [(title, symbols(question)) for title, question in zip(titles, questions)]
    models = [(label, model)]
    if dense_model:
        models.insert(0, ("dense", dense_model))
    rows = []
    for name, net in models:
        answers = net(torch.from_numpy(questions))[0].argmax(-1).numpy()
        weights = np.stack(weights_of(net, questions), axis=1)  # (sums, n_layer, H, T, T)
        said = [[""] * task.first + symbols(answer[task.first:]) for answer in answers]
        rows.append((name, list(zip(weights, said))))
    figures.attention_flow(os.path.join(run, "attention_flow.png"), columns, rows)


@torch.no_grad()
def gallery(run, model, dense_model, data, per_head, label, heads=4, length=36):
    """gallery.png: what the busiest heads of the sparse model, called `label`, attend to on one held-out
    snippet, and what the same heads did before.
    """
    ids = np.asarray(data.val[len(data.val) // 2:][:1000]).astype(np.int64)  # the middle of the held-out text
    pieces = pieces_of(ids.tolist(), data.meta.get("tokenizer"))
    line_ends = [i for i, piece in enumerate(pieces[:900]) if piece.endswith("↵")]
    begin = line_ends[0] + 1 if line_ends else 0  # from the beginning of a line
    snippet = slice(begin, begin + min(length, model.config.block_size))
    fractions = np.array(per_head)
    busiest = sorted(np.ndindex(fractions.shape), key=lambda at: -fractions[at])
    busiest = busiest[:min(heads, (fractions > 0).sum())]
    rows = []
    for which, net in (("dense", dense_model), (label, model)):
        if net:
            weights = weights_of(net, ids[None, snippet])
            rows.append((which, [weights[layer][0, head] for layer, head in busiest]))
    titles = [f"layer {layer}, head {head}: {100 * fractions[layer, head]:.2g} % open"
              for layer, head in busiest]
    figures.gallery(os.path.join(run, "gallery.png"), titles, pieces[snippet], rows)


def pieces_of(tokens, name):
    """What each token says, in the words of the tokenizer `name`; its number where that cannot be had, said
    aloud.
    """
    if name not in text.TOKENIZERS:
        return [str(token) for token in tokens]
    try:
        return text.pieces(tokens, text.tokenizer(name))
    except UserError as error:  # no network: a report needs no vocabulary for anything else
        print(f"gallery.png shows the numbers of tokens, not their words: {error}")
        return [str(token) for token in tokens]


def symbols(tokens):
    """Token ids of addition as the signs that they stand for."""
    return [ADDITION_TOKENS[t] for t in tokens]


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, such as out/addition")


def run(options, settings):
    """`analyze.py report`."""
    print_reports([report(folder.rstrip("/")) for folder in options.runs])
