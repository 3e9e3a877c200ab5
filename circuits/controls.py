"""Is a circuit faithful? What small circuits are worth is told by what else would look like one.

    random         edges of the same number, drawn at random: they should carry next to nothing
    another task   the edges that rank best for another task: likewise
    completeness   the circuit alone is cut, all else kept: next to nothing should be left
    nonsense       labels that no rule gives, drawn at random. Circuits found by pruning can "solve" these
                   (Drori 2026), so what a ranking finds must be compared with what it finds here
    untrained      random weights: a task that nobody learned

Shares are those of the effect that the circuit itself is measured by: of attention edges, per prompt, between
all edges cut and all kept (attention_edges.py); of component edges between the corrupted and the clean run
(attribution.py).

Notable: another task's attention edges are transferred by position, aligned at the last token.
"""

import bisect
import random

import torch

from circuits.attention_edges import curves, integrated_scores, metrics_of, prepared
from circuits.attribution import effects, graph_of, ranks, score_edges
from circuits.tasks import Vocabulary, fitting, make_pairs
from storage.files import UserError


def nonsense(pairs, seed=0):
    """The pairs with labels drawn at random among all tokens of the prompts, neither right nor the wrong
    answer that the task names. What counts against them is the right answer.
    """
    draw = random.Random(f"nonsense {seed}")
    tokens = sorted({token for pair in pairs for token in pair.clean})

    def label(right, wrong):
        return [draw.choice([token for token in tokens if token not in (*right, *wrong)])]

    return [pair._replace(right=list(map(label, pair.right, pair.wrong)), wrong=pair.right) for pair in pairs]


def untrained(model, seed=0):
    """A model of the same shape with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    return fresh.to(next(model.parameters()).device).eval()


def pairs_of_another(task, n, seed, tokens: Vocabulary, room, is_known):
    """(name, pairs, metric) of another task that the vocabulary and the context (`room` tokens) fit, and that
    is_known(pairs, metric); None if there is none.
    """
    for name in fitting(tokens.name):
        if name == task:
            continue
        try:
            pairs, metric = make_pairs(name, n, seed, tokens)
        except UserError:
            continue
        if max(len(pair.clean) for pair in pairs) <= room and is_known(pairs, metric):
            return name, pairs, metric
    return None


# ------------------------------------------------------------------------------------------------------------
# Attention edges


def aligned(scores, T):
    """Scores (n_layer, H, S, S) of another prompt, of S tokens, on one of T tokens: the last tokens meet."""
    more = T - scores.shape[-1]
    return torch.nn.functional.pad(scores, (more, 0, more, 0))  # below 0 it cuts off


def scores_of_another(model, pairs, metric, ablation):
    """Absolute integrated scores of another task's pairs, one (n_layer, H, S, S) each."""
    found = []
    for batch in prepared(model, pairs, ablation):
        found += integrated_scores(model, batch, metric).abs().unbind(1)
    return found


def metrics_of_controls(model, batch, metric, scores, sizes, others, draw):
    """{control: metrics, one for every pair} of circuits of known size.

    scores: of the batch; sizes: edges of every pair's circuit; others: what `scores_of_another` found; draw:
    a torch.Generator
    """
    masks = {"random edges": [], "circuit alone is cut": []}
    if others:
        masks["another task's circuit"] = []
    for pair, (present, size) in enumerate(zip(batch.present.unbind(1), sizes)):
        chance = torch.rand(present.shape, generator=draw).to(present.device)
        masks["random edges"].append(ranks(chance, present) < size)
        masks["circuit alone is cut"].append(present & (ranks(scores[:, pair], present) >= size))
        if others:
            other = aligned(others[pair % len(others)], batch.tokens.shape[1])
            masks["another task's circuit"].append((other > 0) & (ranks(other, present) < size))
    return {name: metrics_of(model, batch, metric, enumerate(keeps)) for name, keeps in masks.items()}


def nonsense_reached(model, pairs, metric, ablation, circuits):
    """In what share of pairs do no more edges than the pair's circuit has say a nonsense label as firmly as
    the whole model says the right answer (90 % of its lead)? By the signed ranking, made for just that.

    circuits: {Pair.key: its Curve's (metric with all edges, edges of its circuit)}.
    """
    reached = []
    for batch in prepared(model, nonsense(pairs), ablation):
        scores = integrated_scores(model, batch, metric)
        for pair, curve in zip(batch.pairs, curves(model, batch, metric, scores)):
            lead, size = circuits[pair.key]
            leads = [curve.none + part * (curve.all - curve.none) for part in curve.share]
            reached.append(any(value >= 0.9 * lead for k, value in zip(curve.kept, leads) if k <= size))
    return sum(reached) / len(reached)


# ------------------------------------------------------------------------------------------------------------
# Component edges


def of_size(graph, scores, edges, n):
    """The best edges by `scores`, so many that n of them lie on paths from embedding to output, (W, R)."""
    places = ranks(scores, edges)
    enough = range(n, int(edges.sum()))
    first = bisect.bisect_left(enough, n, key=lambda best: graph.on_paths(places < best).sum())
    return graph.on_paths(places < n + first)


def component_controls(model, to_score, to_test, metric, edges, circuit, steps, another):
    """{control: share of the effect}: what other component edges carry, as many as `circuit` (W, R) bool has.

    edges (W, R) bool: all that there are; another: what `pairs_of_another` found.
    """
    graph, n = graph_of(model), int(circuit.sum())
    chance = torch.rand(edges.shape, generator=torch.Generator().manual_seed(0))
    circuits = {"random edges": of_size(graph, chance, edges, n), "circuit alone is cut": edges & ~circuit}
    if another:
        _, pairs, other_metric = another
        scores = score_edges(model, pairs, other_metric, edges, steps)
        circuits["another task's circuit"] = of_size(graph, scores.abs(), edges, n)
    clean, corrupted, values = effects(model, to_test, metric, list(circuits.values()))
    effect = (clean - corrupted).mean()
    found = dict(zip(circuits, ((values - corrupted).mean(1) / effect).tolist()))
    # scores are what the metric gains by a cut: edges that speak for nonsense have the lowest. Measured on
    # the very pairs that they were ranked on: the most that they can do
    labelled = nonsense(to_score)
    pushing = of_size(graph, -score_edges(model, labelled, metric, edges, steps), edges, n)
    _, corrupted, values = effects(model, labelled, metric, [pushing])
    found["nonsense labels"] = ((values[0] - corrupted).mean() / effect).item()
    return found
