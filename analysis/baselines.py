"""Other ways to cut attention edges, at as many edges, from the same parent, beside the gated run.

    python analyze.py baselines out/python                                cut, and nothing trained
    python analyze.py baselines out/python --rules=top-k --steps=6000     cut, then trained on like the run

A rule says which weights of a head are cut. What is left of a row sums to 1 again, as is usual for these:

    top-k       each query keeps its k largest weights
    threshold   each head keeps the weights above a number of its own: on average a query keeps k
    shared      the same with one number for all heads of a layer: some may keep more than others
    window      each query keeps the k - 1 latest positions and the first one, the sink (Xiao et al.)
    entmax      1.5-entmax of the scores times a number of the head's own, chosen likewise, in place of
                softmax (Peters et al. 2019; the package `entmax`)
    random      edges drawn once, the same for every text: what any choice is worth

k, edges per head and token, is the budget; `entmax` cannot always get there. The gated run's own k stands in
the table as well, and no rule but `threshold`, `shared` and `random` goes below 1.

Training on is the run's own: its batches, learning rates, number of steps, averaged weights, and the KL to
the dense parent (`distill_weight`), without a penalty. The last step is judged; what a head's number is, is
chosen anew with every measurement of the run's constraint (`constraint_interval`). Loss and edges are judged
as every run's (training/evaluate.py).

The table goes into the run's folder, as baselines.json or baselines-<steps>.json, and what was trained on
into the folder baselines-<steps>/. Other commands add to them, and train nothing again.

Notable: a rule (rules.py) shows its gates as the gate does, so edges are counted by evaluate.py, and
`--tasks=quote` measures circuits through the same door.
"""

import contextlib
import importlib.util
import math
import os
from dataclasses import replace

import torch
from tqdm import tqdm

import prepare_data
from analysis.rules import RULES, RuleAttention
from circuits import prompt_circuits
from circuits.attention_edges import attending
from circuits.compare import prompts
from circuits.tasks import vocabulary
from models.checkpoint import (
    checkpoint_of,
    load_checkpoint,
    load_parent,
    read_checkpoint,
    save_checkpoint,
    tokenizer_of,
)
from models.sources import checkpoint_named, folder_of_answers
from storage.files import UserError, locked, read_json, write_json
from training.config import SETTINGS, Config
from training.handover import divergence
from training.judge import evaluate, examples_of
from training.parallel import pick_device, precision
from training.steps import Batches, adamw, averaged, get_lr, update_average

FITTED_ON = 16  # windows, or rows, on which a head's number is chosen


def fit(model, cut, data):
    """Choose the levels on training text, and keep them."""
    T = model.config.block_size
    x, _ = data.batch("train", examples_of(data, "train", T, FITTED_ON, 1), T)
    cut.fitting = True
    with attending(model, cut), torch.no_grad():
        model.eval()(torch.from_numpy(x).to(next(model.parameters()).device))
    cut.fitting = False


def train_on(model, teacher, cut, data, c, progress):
    """Train a model that is cut for c.max_steps steps, as the run of the settings c was trained. Returns the
    model that is to be judged: the average of its weights, if c has one.
    """
    device = next(model.parameters()).device
    batches = Batches(data, model.config.block_size, c.batch_size, 1, c.seed, True, device)
    autocast, _ = precision(c.dtype, device.type, model.config.n_embd)
    average = averaged(model, c.average_decay)
    optimizer = adamw(list(model.parameters()), c)
    with attending(model, cut):
        model.train()
        for step in range(c.max_steps):
            cut.fitting = step % c.constraint_interval == 0  # weights change, and what a level keeps
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, c)
            [(x, y, _)] = batches.at(step)
            with autocast():
                logits, loss, _ = model(x, y)
                with torch.no_grad():
                    taught = teacher(x)[0]
                loss = loss + c.distill_weight * divergence(logits, taught, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, model, c.average_decay)
            progress.update()
    if not loss.isfinite():
        raise UserError(f"the loss is {loss.item()} after training on. Leave this rule or budget away: "
                        "--rules=..., --budgets=...")
    return average.eval()


def judged(model, cut, data, c):
    """{'loss': nats, held out; 'edges': open, per head and token}. cut: a RuleAttention, or None for
    the model's own gates.
    """
    with standing_in(model, cut):
        found = evaluate(model, data, "val", c.eval_batch_size, c.eval_batches)
    heads, tokens = len(found["per_head"]) * len(found["per_head"][0]), len(found["by_distance"])
    return {"loss": found["loss"], "edges": found["open"] / heads / tokens}


@contextlib.contextmanager
def standing_in(model, cut):
    """`attending(model, cut)`, and the model is called gated, so that its edges are counted. Nothing of None.
    """
    was, model.config.gated = model.config.gated, model.config.gated or cut is not None
    try:
        with attending(model, cut) if cut else contextlib.nullcontext():
            yield
    finally:
        model.config.gated = was


def size_of_circuits(model, cut, pairs, metric):
    """Attention edges within 10 % of the effect, all others cut to zero, mean over the prompts that it knows;
    None where there is none.
    """
    with standing_in(model, cut):
        known = prompt_circuits.known_to([model], pairs, metric, "zero")
        if not known:
            return None
        kinds = ("gradient", "integrated")
        ranking, _ = prompt_circuits.best_ranking(model, known[::2], metric, "zero", kinds)
        found = prompt_circuits.measure_by(ranking, model, known[1::2] or known, metric, "zero").curves
    sizes = prompt_circuits.sizes_at(found, "within", prompt_circuits.LEVEL)
    return sum(sizes) / len(sizes)


# ------------------------------------------------------------------------------------------------------------
# The table: {'parent', 'parent_loss': nats, 'steps', 'rows'}. A row is {'rule', 'budget', 'loss': nats,
# 'edges': open, per head and token, 'above_parent': nats, and for each task the edges of its circuit}


def place_of(folder, steps):
    """Where the table of a run's folder is. steps: how many were trained on."""
    return os.path.join(folder, f"baselines-{steps}.json" if steps else "baselines.json")


def read_rows(place):
    """{(rule, budget): row} of what earlier commands have left."""
    rows = read_json(place)["rows"] if os.path.exists(place) else []
    return {(row["rule"], row["budget"]): row for row in rows}


def keep(place, about, row):
    """Put a row into the table, in the place of an earlier one of its name."""
    with locked(os.path.dirname(place)):  # another command may add rows, side by side
        rows = read_rows(place) | {(row["rule"], row["budget"]): row}
        write_json(place, about | {"rows": list(rows.values())})


def line_of(row, tasks):
    """A row as text."""
    budget = "" if row["budget"] is None else f"{row['budget']:g}"
    sizes = "".join("          -" if row[task] is None else f"  {row[task]:9.1f}" for task in tasks)
    return f"{row['rule']:10} {budget:>7}  {row['edges']:24.2f}  {row['above_parent']:17.4f}{sizes}"


def add_arguments(parser):
    parser.add_argument("run", metavar="RUN", help="a gated run's folder")
    parser.add_argument("--rules", default=",".join(RULES), help="some of " + ", ".join(RULES))
    parser.add_argument("--budgets", default="1,2,4", help="k, edges per head and token, as many as you like")
    parser.add_argument("--steps", type=int, default=0, help="train on for so many; 0 only cuts")
    parser.add_argument("--tasks", default="", help="measure circuits too: bracket,quote")


def chosen(options):
    """([rule], [budget], [task]) of the command line. Raises UserError."""
    rules = options.rules.split(",")
    for rule in rules:
        if rule not in RULES:
            raise UserError(f"there is no rule {rule!r}. There are {', '.join(RULES)}")
    if "entmax" in rules and not importlib.util.find_spec("entmax"):
        raise UserError("the rule entmax needs: pip install entmax. Or name others: --rules=top-k,threshold")
    try:
        budgets = [float(word) for word in options.budgets.split(",")]
    except ValueError:
        budgets = [0.0]
    if not all(0 < k < math.inf for k in budgets) or options.steps < 0:
        raise UserError("--budgets are numbers above 0, such as 1,2,4; --steps is 0 or more")
    return rules, budgets, [task for task in options.tasks.split(",") if task]


def questions(task, checkpoint, dense):
    """(the prompts that the parent knows, metric) of a task."""
    shape = checkpoint["model_args"]
    tokens = vocabulary(tokenizer_of(checkpoint), shape["vocab_size"])
    _, pairs, metric = prompts(task, 64, 1, tokens, shape["block_size"])
    return prompt_circuits.known_to([dense], pairs, metric, "zero"), metric


def run(options, settings):
    """`analyze.py baselines`."""
    rules, budgets, tasks = chosen(options)
    folder = options.run.rstrip("/")
    path = checkpoint_named(folder)
    checkpoint = read_checkpoint(path)
    if not checkpoint["model_args"].get("gated") or "lora" in checkpoint:
        raise UserError(f"{folder} is no gated run whose weights are all trained: baselines start from the "
                        "parent of one")
    c = Config(**{key: value for key, value in checkpoint["config"].items() if key in SETTINGS})
    c, data, device = replace(c, max_steps=options.steps), prepare_data.load(c.dataset), pick_device("auto")
    dense = load_parent(checkpoint, device).eval()
    posed = {task: questions(task, checkpoint, dense) for task in tasks}
    whole = judged(dense, None, data, c)
    place = place_of(folder_of_answers(folder), options.steps)
    about = {"parent": checkpoint["parent"], "parent_loss": whole["loss"], "steps": options.steps}
    rows, trained = read_rows(place), os.path.splitext(place)[0]
    ways = [("the parent", None), ("the gate", None), *((rule, k) for rule in rules for k in budgets)]

    def model_of(rule, k):
        """(model, RuleAttention, or None for the model's own gates), trained on, if it is to be."""
        if k is None:
            return (dense if rule == "the parent" else load_checkpoint(path, device).eval()), None
        kept = os.path.join(trained, f"{rule}-{k:g}.pt")
        is_kept, cut = options.steps and os.path.exists(kept), RuleAttention(rule, k)
        model = (load_checkpoint(kept, device) if is_kept else load_parent(checkpoint, device)).eval()
        if options.steps and not is_kept:
            model = train_on(model, dense, cut, data, c, progress)
            os.makedirs(trained, exist_ok=True)
            save_checkpoint(kept, checkpoint_of(model))
        fit(model, cut, data)
        return model, cut

    print(f"{folder}: the parent's held-out loss is {whole['loss']:.4f}\n{'rule':10} {'budget':>7}  "
          f"{'edges per head and token':>24}  {'nats above parent':>17}"
          + "".join(f"  {task:>9}" for task in tasks), flush=True)
    with tqdm(total=len(rules) * len(budgets) * options.steps, leave=False, disable=None) as progress:
        for rule, k in ways:
            row = rows.get((rule, k), {})
            if rule == "the gate" and row.get("step") != checkpoint["step"]:
                row = {}  # the run has been trained on since
            missing = [task for task in tasks if task not in row]
            if not row or missing:
                model, cut = model_of(rule, k)
                row = row or {"rule": rule, "budget": k} | judged(model, cut, data, c)
                row["above_parent"] = row["loss"] - whole["loss"]
                if rule == "the gate":
                    row["step"] = checkpoint["step"]
                row |= {task: size_of_circuits(model, cut, *posed[task]) for task in missing}
                keep(place, about, row)
            tqdm.write(line_of(row, tasks))
    print(f"the same as numbers: {place}")
