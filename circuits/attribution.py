"""Circuits: which components, and which edges between them, carry a task.

A model is a graph: heads and MLPs write to the residual stream, and read what others wrote (graph.py). What
does an edge of it carry? On a pair of prompts (tasks.py) the writer's activation is d = corrupted - clean
away from its twin's. Cutting the edge replaces, for this reader alone, the one by the other (interchange):

    exact                       metric(edge cut) - metric(clean), below 0 where the edge speaks for the answer
                                (attention_edges.py has it the other way round: what the metric loses)
                                a run for every edge: `cut_edges`; for components: `patch_components`
    attribution (EAP)           d . grad of the metric by what the reader reads
                                a first-order guess, all edges at once
    with integrated gradients   the mean of that gradient over `steps` inputs between corrupted and clean
                                (EAP-IG), where the first order misleads

A circuit keeps the n edges (or components) with the largest |score| and cuts all others. How much of the task
it explains:

    explained effect = (metric(circuit) - metric(corrupted)) / (metric(clean) - metric(corrupted))
                       1 the whole model, 0 nothing

Notable:
- Gates are computed from the patched q and k in every run: to cut an edge between components may open or shut
  attention edges.
- A gate is a threshold, and its derivative 0: an edge that acts only by opening one would score 0, and such
  edges are what these models are made of. So attribution takes the gradient of training, straight through the
  gate (gate.py). Where a graph is small the exact scores are better still.
- Edges that lie on no path from the embedding to the output are dropped before a circuit is counted or run.
- Heads without an open edge on the task's prompts write a constant: they and their edges are out of the graph
  from the start (`dead_heads`).
- Scores come from one set of prompts, explained effects from another. Sources: attribution patching, Nanda
  2022; EAP, Syed et al. 2023; EAP-IG, Hanna et al. 2024 (their definitions, by their public package); the
  paper's section on circuits (arXiv 2512.05865). Works on every model that patching.py runs.
"""

import math

import numpy as np
import torch

from circuits.graph import CircuitRun, ComponentGraph, Gradients, Replace, Watch
from circuits.patching import patched
from circuits.tasks import PROBABILITY

# ------------------------------------------------------------------------------------------------------------
# Metrics


def metric_of(logits, pairs, metric):
    """(B,): how well each pair's answer is known, by tasks.py's definition, the mean over its positions.

    logits (B, T, V).
    """
    values = []
    for row, pair in zip(logits, pairs):
        row = row[pair.positions]  # (answers, V)
        if metric == PROBABILITY:
            row = row.softmax(-1)
            found = [
                row[i, right].sum() - row[i, wrong].sum()
                for i, (right, wrong) in enumerate(zip(pair.right, pair.wrong))
            ]
        else:
            found = [
                row[i, right].mean() - row[i, wrong].mean()
                for i, (right, wrong) in enumerate(zip(pair.right, pair.wrong))
            ]
        values.append(torch.stack(found).mean())
    return torch.stack(values)


def batches(pairs, size, device="cpu"):
    """Yield (clean (b, T), corrupted (b, T), pairs), at most `size` pairs of one length: prompts of different
    lengths cannot share a batch.
    """
    groups = {}
    for pair in pairs:
        groups.setdefault(len(pair.clean), []).append(pair)
    for group in groups.values():
        for part in (group[i:i + size] for i in range(0, len(group), size)):
            yield (
                torch.tensor([p.clean for p in part], device=device),
                torch.tensor([p.corrupted for p in part], device=device),
                part,
            )


def run(model, tokens, hooks=None):
    """Logits, watched and changed by hooks if there are any."""
    return model(tokens)[0] if hooks is None else patched(model, tokens, hooks)


# ------------------------------------------------------------------------------------------------------------
# Scores


def gradient_runs(model, pairs, metric, steps, batch_size):
    """Yield, for every batch and every step on the way from the corrupted to the clean input: by how much all
    writes differ between the two runs (corrupted - clean, (B, W, T, C)), the `Gradients` of the step's run,
    and its metric, summed over the batch.
    """
    graph = ComponentGraph(model.config.n_layer, model.config.n_head)
    for clean, corrupted, group in batches(pairs, batch_size, next(model.parameters()).device):
        with torch.no_grad():
            watch_clean, watch_corrupted = Watch(graph), Watch(graph)
            run(model, clean, watch_clean), run(model, corrupted, watch_corrupted)
            before, after = watch_clean.writes, watch_corrupted.writes
        for k in range(steps):
            way = 1.0 if steps == 1 else k / steps
            hooks = Gradients(graph, (after[:, 0] + way * (before[:, 0] - after[:, 0])).requires_grad_())
            logits = patched(model, clean, hooks)
            yield after - before, hooks, metric_of(logits, group, metric).sum()


def attribute_edges(model, pairs, metric, steps=1, batch_size=16):
    """Scores (W, R) of all edges: what the metric changes by, to first order, if the edge is cut. 0 where
    there is no edge.

    steps=1: EAP, gradients at the clean prompt. More: EAP-IG along the inputs, k / steps of the way from
    corrupted to clean, k from 0.
    """
    graph = ComponentGraph(model.config.n_layer, model.config.n_head)
    scores = torch.zeros(graph.W, graph.R)
    for difference, hooks, value in gradient_runs(model, pairs, metric, steps, batch_size):
        difference = difference.transpose(0, 1).flatten(1)  # (W, B T C)
        for (readers, first, _), gradient in zip(
            hooks.reads, torch.autograd.grad(value, [x for _, _, x in hooks.reads])
        ):
            # (readers, B T C)
            by_reader = (
                (gradient if gradient.dim() == 4 else gradient.unsqueeze(1)).transpose(0, 1).flatten(1)
            )
            scores[:first, readers] += (difference[:first] @ by_reader.T).cpu() / steps / len(pairs)
    return scores


@torch.no_grad()
def patch_components(model, pairs, metric, batch_size=64):
    """Exact scores (W,): metric with this one component's write replaced by the corrupted run's, minus the
    clean metric; the mean over pairs.
    """
    graph = ComponentGraph(model.config.n_layer, model.config.n_head)
    scores = torch.zeros(graph.W)
    for clean, corrupted, group in batches(pairs, batch_size, next(model.parameters()).device):
        watch = Watch(graph)
        run(model, corrupted, watch)
        base, writes = metric_of(run(model, clean), group, metric), watch.writes
        for writer in range(graph.W):
            replaced = torch.zeros(graph.W, dtype=torch.bool, device=clean.device)
            replaced[writer] = True
            patched_run = run(model, clean, Replace(graph, replaced, writes))
            scores[writer] += (metric_of(patched_run, group, metric) - base).sum().item() / len(pairs)
    return scores


@torch.no_grad()
def dead_heads(model, pairs, batch_size=64):
    """(L, H) bool: heads without an open edge on any of the prompts, clean or corrupted.

    A dense model has none.
    """
    opened = torch.zeros(model.config.n_layer, model.config.n_head)
    if not model.config.gated:
        return opened.bool()

    def look(layer, gates):
        opened[layer] += gates.open.sum((0, 2, 3)).cpu()

    for clean, corrupted, _ in batches(pairs, batch_size, next(model.parameters()).device):
        for tokens in (clean, corrupted):
            model(tokens, record=look)
    return opened == 0


# ------------------------------------------------------------------------------------------------------------
# Circuits and their curves


def without_dead_heads(graph, dead):
    """The graph's edges (W, R) bool, minus those from and to heads that never open. dead (L, H) bool."""
    alive = torch.ones(graph.W, dtype=torch.bool)
    for layer in range(graph.L):
        alive[graph.writer("heads", layer)] = ~dead[layer]
    return graph.of_components(alive)


def ranks(scores, edges):
    """The place of every edge among all, the best 0; what is no edge comes last. edges: bool."""
    order = torch.where(edges, scores, -torch.inf).flatten().argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return torch.where(edges, places.view(edges.shape), len(order))


def best_edges(scores, edges, n):
    """The n edges with the largest |score|, (W, R) bool."""
    return (ranks(scores.abs(), edges) < n) & edges


@torch.no_grad()
def effects(model, pairs, metric, circuits, batch_size=64):
    """Metrics of the clean run, the corrupted run (pairs,), and of every circuit (circuits, pairs); a circuit
    is (W, R) bool, the edges that are kept.
    """
    graph = ComponentGraph(model.config.n_layer, model.config.n_head)
    device = next(model.parameters()).device
    clean_values, corrupted_values, values = [], [], []
    for clean, corrupted, group in batches(pairs, batch_size, device):
        watch = Watch(graph)
        corrupted_values.append(metric_of(run(model, corrupted, watch), group, metric))
        clean_values.append(metric_of(run(model, clean), group, metric))
        writes = watch.writes
        hooks = (CircuitRun(graph, keep.to(device), writes) for keep in circuits)
        values.append(torch.stack([metric_of(run(model, clean, one), group, metric) for one in hooks]))
    return torch.cat(clean_values).cpu(), torch.cat(corrupted_values).cpu(), torch.cat(values, dim=1).cpu()


def cut_edges(model, pairs, metric, edges):
    """Exact scores (W, R): the metric with this one of `edges` (W, R) bool cut and all others kept, minus
    that with all kept; the mean over pairs.
    """
    which, scores = edges.nonzero().tolist(), torch.zeros(edges.shape)
    circuits = [edges]
    for writer, reader in which:
        circuits.append(edges.clone())
        circuits[-1][writer, reader] = False
    *_, values = effects(model, pairs, metric, circuits)
    scores[edges] = (values[1:] - values[0]).mean(dim=1).to(scores.dtype)  # in the order of nonzero()
    return scores


def explained(clean, corrupted, circuits, resamples=1000, seed=0):
    """Explained effect of every circuit and its 95 % band, a bootstrap over pairs: arrays (circuits,),
    (circuits,), (circuits,).
    """
    clean, corrupted, circuits = (np.asarray(x, dtype=np.float64) for x in (clean, corrupted, circuits))

    def ratio(which):
        return (circuits[:, which].mean(-1) - corrupted[which].mean(-1)) / (
            clean[which].mean(-1) - corrupted[which].mean(-1)
        )

    which = np.random.default_rng(seed).integers(0, len(clean), (resamples, len(clean)))
    low, high = np.quantile(ratio(which), [0.025, 0.975], axis=1)
    return ratio(np.arange(len(clean))), low, high


def sizes(most, points=30):
    """About `points` sizes from 1 to `most`, evenly spaced on a logarithmic axis, without doubles."""
    return sorted({round(most ** (i / (points - 1))) for i in range(points)})


def settles(shares, level):
    """Index of the share from which on all are at `level` or above; len(shares) if the last one is not.

    Curves are not monotone. To stop where one first touches the level would call a circuit enough that a
    larger one proves not to have been.
    """
    # nor is NaN a success
    return max((i + 1 for i, share in enumerate(shares) if not share >= level), default=0)


def needed(counts, shares, level):
    """The size from which on the explained effect stays at `level` or above, between two sizes interpolated
    on the logarithmic axis; None if it ends below.
    """
    first = settles(shares, level)
    if first in (0, len(shares)):
        return None if first else float(counts[0])
    part = (level - shares[first - 1]) / (shares[first] - shares[first - 1])
    return math.exp((1 - part) * math.log(counts[first - 1]) + part * math.log(counts[first]))
