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

The table goes into the run's folder, as baselines.json or baselines-<steps>.json, and what is trained on into
the folder baselines-<steps>/: a command that was stopped goes on, and others add to it (baselines_table.py).

Notable: a rule (rules.py) shows its gates as the gate does, so edges are counted by evaluate.py, and
`--tasks=quote` measures circuits through the same door.
"""

import contextlib
import math
import os
from dataclasses import replace

import torch
from tqdm import tqdm

import prepare_data
from analysis.baselines_table import Table, heading
from analysis.rules import RULES, RuleAttention
from circuits import prompt_circuits
from circuits.attention_edges import attending
from circuits.compare import prompts
from circuits.tasks import vocabulary
from models.checkpoint import (
    checkpoint_of,
    load_checkpoint,
    load_parent,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    tokenizer_of,
)
from models.sources import checkpoint_named, folder_of_answers
from storage.files import UserError
from training import parallel
from training.config import SETTINGS, Config
from training.handover import divergence
from training.judge import evaluate, examples_of
from training.steps import Batches, adamw, averaged, get_lr, update_average

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


def train_on(model, teacher, cut, data, c, path, progress):
    """Train a model that is cut for c.max_steps steps, as the run of the settings c was trained. Returns the
    model that is to be judged: the average of its weights (average.py), if c has one.

    path: both on disk, written every c.eval_interval steps; if they are there, training goes on from them.
    """
    device = next(model.parameters()).device
    batches = Batches(data, model.config.block_size, c.batch_size, 1, c.seed, True, device)
    autocast, _ = parallel.precision(c.dtype, device.type)
    average = averaged(model, c.average_decay)
    optimizer = adamw(list(model.parameters()), c)
    begun = go_on_from(path, model, average, optimizer)
    progress.update(begun)
    with attending(model, cut):
        model.train()
        for step in range(begun, c.max_steps):
            # weights change, and what a level keeps
            cut.fitting = step % c.constraint_interval == 0 or step == begun
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
            if c.average_decay:
                update_average(average, model, c.average_decay)
            progress.update()
            if (step + 1) % c.eval_interval == 0 or step + 1 == c.max_steps:
                if not loss.isfinite():
                    raise UserError(f"the loss is {loss.item()} at step {step} of {path}, which is left as "
                                    "it was. Leave this rule or budget away: --rules=..., --budgets=...")
                save_checkpoint(path, checkpoint_of(average, trained=model.state_dict(), step=step + 1,
                                                    optimizer=optimizer.state_dict()))
    average.eval()
    fit(average, cut, data)
    return average


def go_on_from(path, model, average, optimizer):
    """Load what an earlier command has left at path, if anything. Returns how many steps were done."""
    if not os.path.exists(path):
        return 0
    checkpoint = read_checkpoint(path)
    load_weights(average, checkpoint["model"], path)
    load_weights(model, checkpoint["trained"], path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"]


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
            without = f". Or leave it away: --rules={others}" if others else ""
            raise UserError(f"the rule entmax needs: pip install entmax{without}") from error
    try:
        budgets = [float(word) for word in options.budgets.split(",")]
    except ValueError:
        budgets = [0.0]
    if not all(0 < k < math.inf for k in budgets) or options.steps < 0:
        raise UserError("--budgets are numbers above 0, such as 1,2,4; --steps is 0 or more")
    return rules, budgets, [task for task in options.tasks.split(",") if task]


def models_and_data(folder, tasks):
    """(checkpoint, gated model, its Config, data, {task: (pairs, metric)}) of a gated run."""
    path = checkpoint_named(folder)
    checkpoint = read_checkpoint(path)
    if not checkpoint["model_args"].get("gated") or "lora" in checkpoint:
        raise UserError(f"{folder} is no gated run whose weights are all trained: baselines start from the "
                        "parent of one")
    c = Config(**{key: value for key, value in checkpoint["config"].items() if key in SETTINGS})
    tokens = vocabulary(tokenizer_of(checkpoint), checkpoint["model_args"]["vocab_size"])
    room = checkpoint["model_args"]["block_size"]
    posed = {}
    for task in tasks:
        _, pairs, metric = prompts(task, 64, 1, tokens, room)
        posed[task] = pairs, metric
    data = prepare_data.load(c.dataset)
    return checkpoint, load_checkpoint(path), c, data, posed


def run(options, settings):
    """`analyze.py baselines`."""
    rules, budgets, tasks = chosen(options)
    folder = options.run.rstrip("/")
    checkpoint, gated, c, data, posed = models_and_data(folder, tasks)
    c, parent = replace(c, max_steps=options.steps), checkpoint["parent"]
    device = parallel.pick_device("auto")
    dense, gated = load_parent(checkpoint).to(device).eval(), gated.to(device).eval()
    whole = judged(dense, None, data, c)
    table = Table(folder_of_answers(folder), parent, whole["loss"], options.steps, tasks)
    posed = {task: (prompt_circuits.known_to([dense], pairs, metric, "zero"), metric)
             for task, (pairs, metric) in posed.items()}

    def row_of(rule, k, model, cut, numbers):
        """numbers: what `judged` returns, and what else is to be kept."""
        circuits = {task: size_of_circuits(model, cut, *question) for task, question in posed.items()}
        return {"rule": rule, "budget": k, **numbers, **circuits}

    print(f"{folder}: the parent's held-out loss is {whole['loss']:.4f}\n{heading(tasks)}", flush=True)
    if not table.has("the parent", None):
        table.add(row_of("the parent", None, dense, None, whole))
    if not table.has("the gate", None, step=checkpoint["step"]):  # it may have been trained on since
        numbers = judged(gated, None, data, c) | {"step": checkpoint["step"]}
        table.add(row_of("the gate", None, gated, None, numbers))
    ways = [(rule, k) for rule in rules for k in budgets]
    with tqdm(total=len(ways) * options.steps, leave=False, disable=None) as progress:
        for rule, k in ways:
            if table.has(rule, k):
                progress.update(options.steps)
                continue
            model, cut = load_checkpoint(parent).to(device).eval(), RuleAttention(rule, k)
            fit(model, cut, data)
            if options.steps:
                model = train_on(model, dense, cut, data, c, table.model_path(rule, k), progress)
            table.add(row_of(rule, k, model, cut, judged(model, cut, data, c)))
    print(f"the same as numbers: {table.place}")
