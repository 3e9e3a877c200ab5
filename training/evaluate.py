"""How a model is judged: deterministic gates, fixed data, and a count of the edges that are open.

    loss       mean cross-entropy over all targets of the split, nats
    accuracy   share of rows of which every target is right (a sum is right when all five digits are); None
               for text, see prepare_data.py
    open       mean number of open edges per sequence, out of n_layer * n_head * T (T + 1) / 2 causal pairs

Notable: the dense model that a target is taken from and the sparse model that must meet it go through this
one function, on the same examples, in the same order, in float32 whatever they were trained in, frozen
weights under LoRA in base_dtype (the paper compares both at equal loss). So does report.json. Several
processes share the examples and all get the same result.
"""

import torch

from training import hardware


@torch.no_grad()
def evaluate(model, data, split, batch_size=1000, max_batches=0):
    """Judge `model` (a GPT, an OLMo, or a lora.Base) on a split of `data` (a dataset.Dataset); every
    example once, or the first max_batches batches.

    Rows are taken as they are, a stream is cut into windows of block_size that do not overlap. With
    max_batches the examples are spread evenly over the split, because its first documents need not be like
    the others. Returns a dict of plain numbers: loss, accuracy (None for a stream), correct and examples
    (numbers of rows), open, total, fraction, per_head [n_layer][H] open fractions, by_distance [T] open
    fractions of the edges that reach 0, 1, 2, ... positions back, by_edge [n_layer][H][T][T] the share of
    rows in which an edge is open (query by key; None for a stream, where positions mean nothing, and for a
    dense model). Leaves the model in the mode in which it was.
    """
    config, device = model.config, next(model.parameters()).device
    rows = data.meta["kind"] == "rows"
    T = data.train.shape[2] if rows else config.block_size
    indices = list(range(0, data.starts(split, T), 1 if rows else T))
    if max_batches:
        wanted = min(len(indices), max_batches * batch_size)
        indices = [indices[i * len(indices) // wanted] for i in range(wanted)]
    pairs = T * (T + 1) // 2
    # mps has no float64
    counts_on = {"device": "cpu" if device.type == "mps" else device, "dtype": torch.float64}
    open_edges = torch.zeros(config.n_layer, config.n_head, **counts_on)  # summed over sequences
    reads = torch.zeros(T, T, **counts_on)  # query by key, summed over sequences, layers and heads
    # summed over rows
    by_edge = torch.zeros(config.n_layer, config.n_head, T, T, **counts_on) if rows and config.gated else None

    def count(layer, gates):
        by_head = gates.open.sum(dim=0).to(**counts_on)  # (H, T, T)
        open_edges[layer] += by_head.sum(dim=(1, 2))
        reads.add_(by_head.sum(dim=0))
        if by_edge is not None:
            by_edge[layer] += by_head

    was_training = model.training
    model.eval()
    loss_sum = targets_seen = correct = 0
    for first in range(0, len(indices), hardware.world() * batch_size):
        ours = indices[first + hardware.rank() * batch_size:][:batch_size]
        x, y = (torch.from_numpy(a).to(device) for a in data.batch(split, ours or indices[:1], T))
        logits, loss, _ = model(x, y, record=count if config.gated and ours else None)
        if not ours:  # nothing left for this process; it took part because a sharded model needs all of them
            continue
        asked = y != -1
        loss_sum += loss.item() * asked.sum().item()
        targets_seen += asked.sum().item()
        correct += ((logits.argmax(-1) == y) | ~asked).all(dim=1).sum().item()
    model.train(was_training)
    reach = [reads.diagonal(-distance).sum().item() for distance in range(T)]
    loss_sum, targets_seen, correct, *counted = hardware.total(
        [loss_sum, targets_seen, correct, *open_edges.flatten().tolist(), *reach], device
    )
    correct, heads = int(correct), config.n_layer * config.n_head
    open_edges = torch.tensor(counted[:heads], dtype=torch.float64).view(config.n_layer, config.n_head)

    per_head = (
        open_edges / len(indices) / pairs if config.gated else torch.ones(config.n_layer, config.n_head)
    )
    by_distance = [
        counted[heads + d] / len(indices) / heads / (T - d) if config.gated else 1.0 for d in range(T)
    ]
    total = heads * pairs
    if by_edge is not None:
        by_edge = torch.tensor(hardware.total(by_edge.flatten().tolist(), device)).view(by_edge.shape) / len(
            indices
        )
    return {
        "loss": loss_sum / targets_seen,
        "accuracy": correct / len(indices) if rows else None,
        "correct": correct,
        "examples": len(indices),
        "open": per_head.sum().item() * pairs,
        "total": total,
        "fraction": per_head.mean().item(),
        "per_head": per_head.tolist(),
        "by_distance": by_distance,
        "by_edge": None if by_edge is None else by_edge.tolist(),
    }


def evaluate_splits(model, data, batch_size, max_batches, worthwhile=None):
    """{split: what `evaluate` returns}. A run is judged while it trains, and reported, by this.

    Rows are judged on both splits, "val" and "train", for whether all answers are right; a text on "val"
    alone.
    worthwhile  called with what "val" gave: False leaves "train" out, four fifths of the work, where nothing
                hangs on it any more
    """
    found = {"val": evaluate(model, data, "val", batch_size, max_batches)}
    if data.meta["kind"] == "rows" and (worthwhile is None or worthwhile(found["val"])):
        found["train"] = evaluate(model, data, "train", batch_size, max_batches)
    return found
