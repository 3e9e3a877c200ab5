"""How a run is judged: thresholds, fixed data, a count of the open edges, and what is kept.

    loss       mean cross-entropy over all targets of the split, nats
    accuracy   share of rows of which every target is right (a sum is right when all five digits are); None
               for text, see prepare_data.py
    open       mean number of open edges per sequence, out of n_layer * n_head * T (T + 1) / 2 causal pairs

    a gated run meets its target    held-out loss <= the dense model's + loss_slack, no fewer answers right
    best.pt     of a gated run the evaluation with the FEWEST open edges among those that meet the target, not
                the last one; of a dense run the one with the lowest held-out loss, or, with a ready_loss, the
                one that is ready
    closest.pt  of a run in which none has met the target: the one that came closest. Never the start

Notable: the dense model that a target is taken from and the sparse model that must meet it go through one
function, on the same examples, in the same order, in float32 whatever they were trained in, frozen weights
under LoRA in base_dtype (the paper compares both at equal loss). So does report.json. Several processes share
the examples and all get the same result.
"""

from functools import partial

import torch

from storage.files import UserError, typed
from training import parallel

MISSED = 2  # the exit status of train.py where a run at its end is not what it was to become


class EdgeCount:
    """Open edges, summed over the sequences that a model has seen: model(..., record=count) calls it.

    of_every_edge: count every edge of every head, too; it must mean the same in all sequences.
    """

    def __init__(self, config, T, device, of_every_edge):
        self.gated, self.T, self.device = config.gated, T, device
        place = "cpu" if device.type == "mps" else device  # mps has no float64
        zeros = partial(torch.zeros, dtype=torch.float64, device=place)
        self.by_head = zeros(config.n_layer, config.n_head)
        self.reads = zeros(T, T)  # query by key, summed over layers and heads
        self.by_edge = zeros(config.n_layer, config.n_head, T, T) if of_every_edge and config.gated else None

    def __call__(self, layer, gates):
        opened = gates.open.sum(dim=0).to(self.reads)  # (H, T, T)
        self.by_head[layer] += opened.sum(dim=(1, 2))
        self.reads += opened.sum(dim=0)
        if self.by_edge is not None:
            self.by_edge[layer] += opened

    def shares(self, sequences):
        """The counts of all processes as shares of the edges there are: see `evaluate`, from `open` on.

        sequences: how many were seen, by all processes together.
        """
        heads, T, by_edge = self.by_head.numel(), self.T, None
        pairs = T * (T + 1) // 2
        per_head, by_distance = torch.ones(self.by_head.shape), [1.0] * T
        if self.gated:
            reach = torch.stack([self.reads.diagonal(-distance).sum() for distance in range(T)])
            per_head = self.summed(self.by_head) / sequences / pairs
            by_distance = (self.summed(reach) / sequences / heads / torch.arange(T, 0, -1)).tolist()
        if self.by_edge is not None:
            by_edge = (self.summed(self.by_edge).float() / sequences).tolist()
        return {"open": per_head.sum().item() * pairs, "total": heads * pairs,
                "fraction": per_head.mean().item(), "per_head": per_head.tolist(),
                "by_distance": by_distance, "by_edge": by_edge}

    def summed(self, counts):
        """Of all processes, on the CPU."""
        values = parallel.all_reduce_sum(counts.flatten().tolist(), self.device)
        return torch.tensor(values, dtype=torch.float64).view(counts.shape)


@torch.no_grad()
def evaluate(model, data, split, batch_size=1000, max_batches=0):
    """Judge `model` (a GPT, an OLMo, or a lora.Base) on a split of `data` (a dataset.Dataset).

    Every example once, or max_batches batches, spread evenly over the split, because its first documents need
    not be like the others. Rows are taken as they are, a stream is cut into windows of block_size that do not
    overlap. Leaves the model in the mode in which it was. Returns a dict of plain numbers:

    loss               nats a target
    accuracy           None for a stream
    correct, examples  numbers of rows
    open, total        edges a sequence
    fraction           of edges that are open
    per_head           [n_layer][H] the same by head
    by_distance        [T] the same of the edges that reach 0, 1, 2, ... positions back
    by_edge            [n_layer][H][T][T] the share of rows in which an edge is open, query by key; None for a
                       stream, where positions mean nothing, and for a dense model
    """
    config, device = model.config, next(model.parameters()).device
    rows = data.meta["kind"] == "rows"
    T = data.train.shape[2] if rows else config.block_size
    indices = examples_of(data, split, T, batch_size, max_batches)
    count = EdgeCount(config, T, device, of_every_edge=rows)
    was_training = model.training
    model.eval()
    loss_sum = targets_seen = correct = 0
    for first in range(0, len(indices), parallel.world() * batch_size):
        share = indices[first + parallel.rank() * batch_size:][:batch_size]  # this process's
        x, y = (torch.from_numpy(a).to(device) for a in data.batch(split, share or indices[:1], T))
        with parallel.uncompiled(model):  # what `record` shows would break a compiled graph at every layer
            logits, loss, _ = model(x, y, record=count if config.gated and share else None)
        if not share:  # nothing left for this process; it took part because a sharded model needs all of them
            continue
        asked = y != -1
        loss_sum += loss.item() * asked.sum().item()
        targets_seen += asked.sum().item()
        correct += ((logits.argmax(-1) == y) | ~asked).all(dim=1).sum().item()
    model.train(was_training)
    loss_sum, targets_seen, correct = parallel.all_reduce_sum([loss_sum, targets_seen, correct], device)
    if not targets_seen:
        raise UserError(f"data/{data.name}: none of the {len(indices)} {split} examples that are judged asks "
                        "anything. Let --eval_batches=0 judge all of them")
    return {
        "loss": loss_sum / targets_seen,
        "accuracy": correct / len(indices) if rows else None,
        "correct": int(correct),
        "examples": len(indices),
    } | count.shares(len(indices))


def examples_of(data, split, T, batch_size, max_batches):
    """Indices of what is judged, a list: rows, or the first positions of windows of T tokens."""
    step = 1 if data.meta["kind"] == "rows" else T
    indices = list(range(0, data.starts(split, T), step))
    if max_batches:
        wanted = min(len(indices), max_batches * batch_size)
        indices = [indices[i * len(indices) // wanted] for i in range(wanted)]
    return indices


def evaluate_splits(model, data, batch_size, max_batches, worthwhile=None):
    """{split: what `evaluate` returns}. A run is judged while it trains, and reported, by this.

    Rows are judged on both splits, "val" and "train", for whether all answers are right; a text on "val"
    alone.
    worthwhile  called with what "val" gave: False leaves "train" out, four fifths of the work, where nothing
                hangs on it any more
    """
    evaluation = {"val": evaluate(model, data, "val", batch_size, max_batches)}
    if data.meta["kind"] == "rows" and (worthwhile is None or worthwhile(evaluation["val"])):
        evaluation["train"] = evaluate(model, data, "train", batch_size, max_batches)
    return evaluation


# ------------------------------------------------------------------------------------------------------------
# The verdict


def meets_target(evaluation, dense, target_loss):
    """Is the gated model as good as the dense one? evaluation, dense: {split: what `evaluate` returns}."""
    return not any(distance_from_target(evaluation, dense, target_loss))


def distance_from_target(evaluation, dense, target_loss):
    """How far a gated model is from what `meets_target` asks for: (held-out answers lost, nats too many,
    training answers lost). Zeros meet it.

    In the order in which it is counted: training rows are counted only where the first two are 0.
    """
    lost = {"val": 0, "train": 0}
    for split in evaluation:
        if evaluation[split]["accuracy"] is not None:
            lost[split] = max(0, dense[split]["correct"] - evaluation[split]["correct"])
    return lost["val"], max(0.0, evaluation["val"]["loss"] - target_loss), lost["train"]


def is_ready(evaluation, ready_loss):
    """Is a dense model ready to be a parent?

    All its answers are right, where they are right or wrong, and its held-out loss is at most ready_loss
    (nats).
    """
    val = evaluation["val"]
    answers = [f for f in evaluation.values() if f["accuracy"] is not None]
    return val["loss"] <= ready_loss and all(f["correct"] == f["examples"] for f in answers)


def has_succeeded(config, state):
    """Has a run at its end become what it was to become? A gated one has met its target; a dense one is
    ready, if it was to be (ready_loss).

    state: a checkpoint, or what goes into one.
    """
    if config.gated:
        return bool(state.get("best"))
    return not config.ready_loss or bool(state.get("ready"))


def is_at_end(checkpoint, config):
    """Is a run at its end, and judged there? checkpoint: its last.pt; config: its settings now, a Config."""
    is_ready = checkpoint.get("ready") and checkpoint["config"]["ready_loss"] == config.ready_loss
    # runs of earlier versions do not say at which step they were judged
    step = checkpoint.get("evaluated", checkpoint["step"])
    stalled = has_stalled(config, step, checkpoint.get("best_step"))
    return bool(is_ready or stalled or step >= config.max_steps)


def has_stalled(c, step, best_step):
    """Has a gated run that has met its target not won an edge for `patience` steps? best_step: of best.pt."""
    return bool(c.gated and c.patience and best_step is not None and step - best_step >= c.patience)


def can_be_best(c, state, val):
    """Can this become the best evaluation, after what the held-out rows say? Else the others are not counted.

    c, state: the run's Config and State; val: what `evaluate` says of the held-out rows.
    """
    if not c.gated:
        return val["correct"] == val["examples"] and (not c.ready_loss or val["loss"] <= c.ready_loss)
    fewer = state.best is None or val["open"] <= state.best[0]
    return fewer and meets_target({"val": val}, state.dense, state.target_loss)


def name_to_keep(c, state, step, evaluation, passes):
    """'best.pt', 'closest.pt' or None: under which name, beside last.pt, this evaluation's model is kept.

    Changes state.best or state.closest.
    """
    if state.ready:
        state.best = [evaluation["val"]["open"], evaluation["val"]["loss"]]
        return "best.pt"
    if (c.gated and step == 0) or (state.best and not passes):
        return None
    if passes:
        # a dense run's edges are all open
        which, score = "best", [evaluation["val"]["open"], evaluation["val"]["loss"]]
    else:
        which, score = "closest", list(distance_from_target(evaluation, state.dense, state.target_loss))
    before = getattr(state, which)
    if before and score > before:
        return None
    setattr(state, which, score)
    if which == "best":
        state.best_step = step
    return f"{which}.pt"


def train_on(folder, steps=None):
    """The command with which the run of a folder goes on, up to `steps`."""
    more = [f"--max_steps={steps}"] if steps else []
    return typed("python", "train.py", "--init_from=resume", f"--out_dir={folder}", *more)
