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

Training on is the run's own: its batches, learning rates, number of steps, and the KL to the dense parent
(`distill_weight`), without a penalty; what a head's number is, is chosen anew with every measurement of the
run's constraint (`constraint_interval`). Loss and edges are judged as every run's (training/evaluate.py).
The table goes into the run's folder, as baselines.json or baselines-<steps>.json; what stands there already
is not trained again, so a command that was stopped goes on, and others add to it.

Notable: a rule (rules.py) shows its gates as the gate does, so edges are counted by evaluate.py, and
`--tasks=quote` measures circuits through the same door.
"""

import contextlib
import math
import os

import torch
from tqdm import tqdm

import prepare_data
from analysis.report import read_json
from analysis.rules import RULES, Cut
from circuits import prompt_circuits
from circuits.attention_edges import attending
from circuits.compare import prompts, vocabulary_of
from models.checkpoint import checkpoint_named, folder_of_answers, load_checkpoint, read_checkpoint
from storage.files import UserError, write_json
from training import hardware
from training.batches import Batches
from training.distillation import divergence
from training.evaluate import evaluate, examples_of
from training.settings import Config

FITTED_ON = 16  # windows, or rows, on which a head's number is chosen


# ------------------------------------------------------------------------------------------------------------
# Training on, and judging


def fit(model, cut, data):
    """Choose the levels on training text, and keep them."""
    T = model.config.block_size
    x, _ = data.batch("train", examples_of(data, "train", T, FITTED_ON, 1), T)
    cut.fitting = True
    with attending(model, cut), torch.no_grad():
        model.eval()(torch.from_numpy(x).to(next(model.parameters()).device))
    cut.fitting = False


def train_on(model, teacher, cut, data, c, steps, progress):
    """Train a model that is cut for `steps` steps, as the run of the settings c was trained."""
    device = next(model.parameters()).device
    batches = Batches(data, model.config.block_size, c.batch_size, 1, c.seed, True, device)
    autocast, _ = hardware.precision(c.dtype, device.type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2),
                                  weight_decay=c.weight_decay)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / c.warmup_steps, total_iters=c.warmup_steps)
    cool = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - c.warmup_steps), c.min_lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cool], [c.warmup_steps])
    with attending(model, cut):
        model.train()
        for step in range(steps):
            cut.fitting = step % c.constraint_interval == 0  # weights change, and what a level keeps
            [(x, y)] = batches.at(step)
            with autocast():
                logits, loss, _ = model(x, y)
                with torch.no_grad():
                    taught = teacher(x)[0]
                loss = loss + c.distill_weight * divergence(logits, taught, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update()
    fit(model, cut, data)


def judged(model, cut, data, c):
    """{'loss': nats, held out; 'edges': open, per head and token}. cut: a Cut, or None for the model's own
    gates.
    """
    with standing_in(model, cut):
        found = evaluate(model, data, "val", c.eval_batch_size, c.eval_batches)
    heads, tokens = len(found["per_head"]) * len(found["per_head"][0]), len(found["by_distance"])
    return {"loss": found["loss"], "edges": found["open"] / heads / tokens}


@contextlib.contextmanager
def standing_in(model, cut):
    """`attending(model, cut)`, and the model is called gated, so that its edges are counted. Nothing of None.
    """
    if cut is None:
        yield
        return
    was, model.config.gated = model.config.gated, True
    try:
        with attending(model, cut):
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
# The command


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
    if "entmax" in rules:
        try:
            import entmax  # noqa: F401
        except ImportError as error:
            others = ",".join(rule for rule in rules if rule != "entmax")
            raise UserError(f"the rule entmax needs: pip install entmax. Or leave it away: --rules={others}"
                            ) from error
    try:
        budgets = [float(word) for word in options.budgets.split(",")]
    except ValueError:
        budgets = [0.0]
    if min(budgets) <= 0 or options.steps < 0:
        raise UserError("--budgets are numbers above 0, such as 1,2,4; --steps is 0 or more")
    return rules, budgets, [task for task in options.tasks.split(",") if task]


def models_and_data(folder, tasks):
    """(path of the parent, gated model, its Config, data, {task: (pairs, metric)}) of a gated run."""
    path = checkpoint_named(folder)
    checkpoint = read_checkpoint(path)
    if not checkpoint["model_args"].get("gated") or "lora" in checkpoint:
        raise UserError(f"{folder} is no gated run whose weights are all trained: baselines start from the "
                        "parent of one")
    c = Config(**checkpoint["config"])
    vocabulary = vocabulary_of(checkpoint["data"]["tokenizer"], checkpoint["model_args"]["vocab_size"])
    room = checkpoint["model_args"]["block_size"]
    posed = {}
    for task in tasks:
        _, pairs, metric = prompts(task, 64, 1, vocabulary, room)
        posed[task] = pairs, metric
    data = prepare_data.load(c.dataset)
    return checkpoint["reference"], load_checkpoint(path), c, data, posed


def run(options, settings):
    """`analyze.py baselines`."""
    rules, budgets, tasks = chosen(options)
    folder = options.run.rstrip("/")
    parent, gated, c, data, posed = models_and_data(folder, tasks)
    dense, device = load_checkpoint(parent), hardware.pick_device("auto")
    dense, gated = dense.to(device).eval(), gated.to(device).eval()
    whole = judged(dense, None, data, c)
    loss = whole["loss"]
    posed = {task: (prompt_circuits.known_to([dense], pairs, metric, "zero"), metric)
             for task, (pairs, metric) in posed.items()}
    place = place_of(folder_of_answers(folder), options.steps)
    rows = known_rows(place, parent, loss)

    def is_there(name, k):
        """Print the row that an earlier command has left, if it is complete."""
        row = rows.get((name, k))
        if row is None or not set(tasks) <= set(row):
            return False
        tqdm.write(line_of(row, tasks))
        return True

    def add(name, k, numbers, model, cut):
        """numbers: what `judged` returns."""
        found = {"rule": name, "budget": k, **numbers}
        found["above_parent"] = found["loss"] - loss
        for task, (pairs, metric) in posed.items():
            found[task] = size_of_circuits(model, cut, pairs, metric)
        rows[name, k] = found
        write_json(place, {"parent": parent, "parent_loss": loss, "steps": options.steps,
                           "rows": list(rows.values())})
        tqdm.write(line_of(found, tasks))

    print(f"{folder}: the parent's held-out loss is {loss:.4f}\n{heading(tasks)}", flush=True)
    if not is_there("the parent", None):
        add("the parent", None, whole, dense, None)
    if not is_there("the gate", None):
        add("the gate", None, judged(gated, None, data, c), gated, None)
    with tqdm(total=len(rules) * len(budgets) * max(1, options.steps), leave=False, disable=None) as progress:
        for rule in rules:
            for k in budgets:
                if is_there(rule, k):
                    continue
                model, cut = load_checkpoint(parent).to(device).eval(), Cut(rule, k)
                fit(model, cut, data)
                if options.steps:
                    train_on(model, dense, cut, data, c, options.steps, progress)
                else:
                    progress.update()
                model.eval()
                add(rule, k, judged(model, cut, data, c), model, cut)
    print(f"the same as numbers: {place}")


def place_of(folder, steps):
    """Where the table of a run's folder is. steps: how many were trained on."""
    return os.path.join(folder, f"baselines-{steps}.json" if steps else "baselines.json")


def known_rows(place, parent, loss):
    """{(rule, budget): row} of an earlier command's file; none if it is of another parent."""
    if not os.path.exists(place):
        return {}
    found = read_json(place)
    if (found["parent"], found["parent_loss"]) != (parent, loss):
        return {}
    return {(row["rule"], row["budget"]): row for row in found["rows"]}


def heading(tasks):
    circuits = "".join(f"  {task:>9}" for task in tasks)
    return f"{'rule':10} {'budget':>7}  {'edges per head and token':>24}  {'nats above parent':>17}{circuits}"


def line_of(row, tasks):
    """A row of the table, as text."""
    budget = "" if row["budget"] is None else f"{row['budget']:g}"
    sizes = "".join("          -" if row[task] is None else f"  {row[task]:9.1f}" for task in tasks)
    return f"{row['rule']:10} {budget:>7}  {row['edges']:24.2f}  {row['above_parent']:17.4f}{sizes}"
