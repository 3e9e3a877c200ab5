"""Circuits: which components, and which edges between them, carry a task.

A model is a graph: heads and MLPs write to the residual stream, and read what others wrote (graph.py). What
does an edge of it carry? On a pair of prompts (tasks.py) the writer's activation is d = corrupted - clean
away from its twin's. Cutting the edge replaces, for this reader alone, the one by the other (interchange):

    exact                       metric(edge cut) - metric(clean), below 0 where the edge speaks for the answer
                                (attention_edges.py has it the other way round: what the metric loses)
                                a run for every edge: `cut_edges`; a component is patched by
                                cutting all edges from it: `cut_writers`
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

from circuits.graph import CircuitRun, ComponentGraph, Gradients, Watch
from circuits.patching import patched
from circuits.tasks import batches, metric_of

EXACT = 200  # edges: in a graph of so many or fewer every one is cut by itself

# ------------------------------------------------------------------------------------------------------------
# Scores


def graph_of(model):
    return ComponentGraph(model.config.n_layer, model.config.n_head)


def writes_of(model, tokens):
    """What every component writes, (B, W, T, C), and the logits (B, T, V)."""
    watch = Watch(graph_of(model))
    logits = patched(model, tokens, watch)
    return watch.writes, logits


def attribute_edges(model, pairs, metric, steps=1, batch_size=16):
    """Scores (W, R) of all edges: what the metric changes by, to first order, if the edge is cut. 0 where
    there is no edge.

    steps=1: EAP, gradients at the clean prompt. More: EAP-IG along the inputs, k / steps of the way from
    corrupted to clean, k from 0.
    """
    graph = graph_of(model)
    scores = torch.zeros(graph.W, graph.R)
    for clean, corrupted, group in batches(pairs, batch_size, next(model.parameters()).device):
        with torch.no_grad():
            before, after = writes_of(model, clean)[0], writes_of(model, corrupted)[0]
        difference = (after - before).transpose(0, 1).flatten(1)  # (W, B T C)
        for k in range(steps):
            way = 1.0 if steps == 1 else k / steps
            embed = after[:, :1] + way * (before[:, :1] - after[:, :1])
            hooks = Gradients(graph, embed.requires_grad_())
            value = metric_of(patched(model, clean, hooks), group, metric).sum()
            gradients = torch.autograd.grad(value, [x for _, _, x in hooks.reads])
            for (readers, first, _), gradient in zip(hooks.reads, gradients):
                by_reader = gradient.transpose(0, 1).flatten(1)  # (readers, B T C)
                scores[:first, readers] += (difference[:first] @ by_reader.T).cpu() / steps / len(pairs)
    return scores


@torch.no_grad()
def effects(model, pairs, metric, circuits, batch_size=64):
    """Metrics of the clean run, the corrupted run (pairs,), and of every circuit (circuits, pairs); a circuit
    is (W, R) bool, the edges that are kept.
    """
    graph, device = graph_of(model), next(model.parameters()).device
    clean_values, corrupted_values, values = [], [], []
    for clean, corrupted, group in batches(pairs, batch_size, device):
        writes, logits = writes_of(model, corrupted)
        corrupted_values.append(metric_of(logits, group, metric))
        clean_values.append(metric_of(model(clean)[0], group, metric))
        runs = (patched(model, clean, CircuitRun(graph, keep.to(device), writes)) for keep in circuits)
        values.append(torch.stack([metric_of(logits, group, metric) for logits in runs]))
    return torch.cat(clean_values).cpu(), torch.cat(corrupted_values).cpu(), torch.cat(values, dim=1).cpu()


def exact_scores(model, pairs, metric, edges, cuts):
    """(cuts,): the metric with these of `edges` cut and all others kept, minus that with all kept; the mean
    over pairs. edges and every cut (W, R) bool.
    """
    *_, values = effects(model, pairs, metric, [edges, *(edges & ~cut for cut in cuts)])
    return (values[1:] - values[0]).mean(dim=1).float()


def cut_edges(model, pairs, metric, edges):
    """Exact scores (W, R) of each of `edges` (W, R) bool, cut alone; 0 of all others."""
    each = torch.zeros(int(edges.sum()), *edges.shape, dtype=torch.bool)
    each[:, edges] = torch.eye(len(each), dtype=torch.bool)  # in the order of the next line
    scores = torch.zeros(edges.shape)
    scores[edges] = exact_scores(model, pairs, metric, edges, each)
    return scores


def cut_writers(model, pairs, metric, edges):
    """Exact scores (W,) of components, all edges from one cut: it is patched with the corrupted run's."""
    rows = torch.eye(len(edges), dtype=torch.bool)[:, :, None].expand(-1, *edges.shape)
    return exact_scores(model, pairs, metric, edges, rows)


def score_edges(model, pairs, metric, edges, steps):
    """Scores (W, R): by cutting each of `edges` in a graph of at most EXACT, by EAP-IG in a larger one."""
    if is_small(model):
        return cut_edges(model, pairs, metric, edges)
    return attribute_edges(model, pairs, metric, steps)


def score_writers(model, pairs, metric, edges, scores):
    """Scores (W,) of components, likewise. scores: those of their edges."""
    if is_small(model):
        return cut_writers(model, pairs, metric, edges)
    # what a component writes reaches everything through its edges, and the derivative of a sum is the sum
    return scores.sum(dim=1)


def is_small(model):
    return graph_of(model).edges.sum() <= EXACT


@torch.no_grad()
def dead_heads(model, pairs, batch_size=64):
    """(L, H) bool: heads without an open edge on any of the prompts, clean or corrupted.

    A dense model has none.
    """
    opened = torch.zeros(model.config.n_layer, model.config.n_head)

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
        alive[graph.writer["heads", layer]] = ~dead[layer]
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


def explained(clean, corrupted, circuits, resamples=1000, seed=0):
    """Explained effect of every circuit and its 95 % band, a bootstrap over pairs: arrays (circuits,),
    (circuits,), (circuits,).
    """
    clean, corrupted, circuits = (np.asarray(x, dtype=np.float64) for x in (clean, corrupted, circuits))

    def ratio(which):
        none = corrupted[which].mean(-1)
        return (circuits[:, which].mean(-1) - none) / (clean[which].mean(-1) - none)

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
