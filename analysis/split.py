"""Where the seconds of a small run go: every part of a training step of config/addition.py, timed on its own.

    python analyze.py bench --split

A part's share of the run is  (milliseconds of one call) x (calls in a run) / (sum over all parts).
Weights are random and gates mostly open: on a CPU the plain formula takes as long whatever is open. Parts
that wait for each other on a GPU are not told apart, so this is for CPUs.

Notable: with 11 tokens and 64 channels a third of the time is PyTorch on its way to its own kernels, some 700
of them a step.
"""

import statistics
import time

import torch

import prepare_data
from model import GPT, GPTConfig
from training.config import make_config
from training.judge import evaluate_splits
from training.parallel import precision
from training.steps import Batches, averaged, update_average

CONFIG = "config/addition.py"


def run_to_time(path=CONFIG):
    """Of the gated run that a config file describes: (config, model, moving average, dataset, batches).

    The model is gated and untrained.
    """
    c, _ = make_config(path, {})
    of_parent, _ = make_config(c.init_from, {})
    data = prepare_data.load(c.dataset)
    config = GPTConfig(vocab_size=data.meta["vocab_size"], block_size=of_parent.block_size,
                       n_layer=of_parent.n_layer, n_head=of_parent.n_head, n_embd=of_parent.n_embd,
                       gelu=of_parent.gelu,
                       gated=True, gate_bias=c.gate_bias, gate_temperature=c.gate_temperature)
    model = GPT(config).train()
    batches = Batches(data, config.block_size, c.batch_size, 1, c.seed, True, "cpu")
    return c, model, averaged(model, c.average_decay), data, batches


def parts(c, model, average, data, batches):
    """[(name, calls in a run, function)]: what a run does, in the order in which a step does it."""
    autocast, _ = precision("float32", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    state = {}

    def constraint():
        batches.mean_loss(0, average, autocast)

    def forward():
        x, y, _ = next(iter(batches.at(0)))
        _, loss, density = model(x, y)
        state["objective"] = density + loss

    def backward():
        state["objective"].backward()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()

    def average_follows():
        update_average(average, model, c.average_decay)

    def held_out():
        evaluate_splits(average, data, c.eval_batch_size, 0, lambda val: False)

    def all_sums():
        evaluate_splits(average, data, c.eval_batch_size, 0)

    steps, evaluations = c.max_steps, c.max_steps // c.eval_interval
    return [("constraint, on the average's thresholds", steps // c.constraint_interval, constraint),
            ("forward", steps, forward),
            ("backward", steps, backward),
            ("clip, AdamW", steps, update),
            ("the average follows", steps, average_follows),
            ("evaluation, held-out sums only", evaluations // 2, held_out),
            ("evaluation, all sums", evaluations - evaluations // 2, all_sums)]


def split(repeats=30):
    """[(name, ms of a call, calls in a run)] of `parts`: medians of so many calls; of evaluations a fifth."""
    measured = parts(*run_to_time())
    forward = next(part for name, _, part in measured if name == "forward")
    found = []
    for name, calls, part in measured:
        times = []
        rounds = max(2, repeats // 5) if "evaluation" in name else repeats
        for _ in range(rounds):
            if name == "backward":  # needs a graph of its own each time
                forward()
            began = time.perf_counter()
            part()
            times.append(1000 * (time.perf_counter() - began))
        found.append((name, statistics.median(times), calls))
    return found


def show_split(found):
    """The table of `split`."""
    whole = sum(ms * calls for _, ms, calls in found)
    print(f"| part of {CONFIG} | ms a call | calls in a run | seconds in a run | share |")
    print("|---|---|---|---|---|")
    for name, ms, calls in found:
        share = 100 * ms * calls / whole
        print(f"| {name} | {ms:.2f} | {calls:,} | {ms * calls / 1000:.0f} | {share:.0f} % |")
    print(f"\n{whole / 1000:.0f} seconds, half of the evaluations taken for passing ones; "
          "the parent and the pictures come on top")
