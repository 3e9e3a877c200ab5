"""Is a circuit faithful? What small circuits are worth is told by what else would look like one.

    random         edges of the same number, drawn at random: they should carry next to nothing
    another task   the edges that rank best for another task: likewise
    completeness   the circuit alone is cut, all else kept: next to nothing should be left
    nonsense       labels that no rule gives. Circuits found by pruning can "solve" these (Drori 2026), so
                   what a ranking finds must be compared with what it finds here
    untrained      random weights: a task that nobody learned

Shares are those of the effect that the circuit itself is measured by: of attention edges, per prompt, between
all edges cut and all kept (attention_edges.py); of component edges between the corrupted and the clean run
(attribution.py).

Notable: the circuit of another task is taken to a prompt by position: of attention edges, aligned at the last
token.
"""

import random

import numpy as np
import torch

from circuits.attention_edges import integrated_scores, metrics_of, prepared, ranks
from circuits.attribution import attribute_edges, best_edges, cut_edges, effects
from circuits.tasks import Vocabulary, fitting, make_pairs
from storage.files import UserError

MOST_PAIRS = 32  # on which controls are computed


def nonsense(pairs, seed=0):
    """The pairs with labels drawn at random among all right answers of the task, never the pair's own. What
    counts against them is the right answer.
    """
    draw = random.Random(f"nonsense {seed}")
    answers = [right for pair in pairs for right in pair.right]
    found = []
    for pair in pairs:
        labels = []
        for right in pair.right:
            others = [answer for answer in answers if not set(answer) & set(right)]
            labels.append(draw.choice(others) if others else pair.wrong[len(labels)])
        found.append(pair._replace(right=labels, wrong=pair.right))
    return found


def untrained(model, seed=0):
    """A model of the same shape with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    return fresh.to(next(model.parameters()).device).eval()


def pairs_of_another(task, n, seed, tokens: Vocabulary, room):
    """(name, pairs, metric) of another task that the vocabulary and the context (`room` tokens) fit; None if
    there is none.
    """
    for name in fitting(tokens.name):
        if name == task:
            continue
        try:
            pairs, metric = make_pairs(name, n, seed, tokens)
        except UserError:
            continue
        if max(len(pair.clean) for pair in pairs) <= room:
            return name, pairs, metric
    return None


# ------------------------------------------------------------------------------------------------------------
# Attention edges


def aligned(scores, T):
    """Scores (n_layer, H, S, S) of another prompt, of S tokens, on one of T tokens: the last tokens meet."""
    found = scores.new_zeros(*scores.shape[:2], T, T)
    shared = min(T, scores.shape[-1])
    found[:, :, T - shared:, T - shared:] = scores[:, :, scores.shape[-1] - shared:,
                                                   scores.shape[-1] - shared:]
    return found


def scores_of_another(model, pairs, metric, ablation):
    """Absolute integrated scores of another task's pairs, one (n_layer, H, S, S) each."""
    found = []
    for batch in prepared(model, pairs, ablation):
        found += integrated_scores(model, batch, metric).abs().unbind(1)
    return found


def shares_of_controls(model, batch, metric, scores, curves, sizes, others):
    """{control: shares of the effect, one for every pair} of circuits of known size.

    scores, curves: of the batch; sizes: edges of every pair's circuit; others: what `scores_of_another` found
    """
    T, draw = batch.tokens.shape[1], torch.Generator().manual_seed(0)
    masks = {"random edges": [], "circuit alone is cut": []}
    if others:
        masks["another task's circuit"] = []
    for pair, size in enumerate(sizes):
        present = batch.present[:, pair]
        chance = torch.rand(present.shape, generator=draw).to(present.device)
        masks["random edges"].append(ranks(chance, present) < size)
        masks["circuit alone is cut"].append(present & (ranks(scores[:, pair], present) >= size))
        if others:
            own = aligned(others[pair % len(others)], T)
            masks["another task's circuit"].append(present & (ranks(own, present) < size))
    found = {}
    for name, keeps in masks.items():
        values = metrics_of(model, batch, metric, list(range(len(sizes))), keeps).tolist()
        found[name] = [(value - c.none) / (c.all - c.none) for value, c in zip(values, curves)]
    return found


def nonsense_reached(model, pairs, metric, ablation, effect_of, curves_of):
    """In what share of pairs do the best k edges for a nonsense label move the metric as far as the whole
    model moves it for the right one (90 %), for some k? By the signed ranking, which looks for just that.

    effect_of: {clean prompt: effect of the right answer}; curves_of: attention_edges.curves.
    Returns (share of pairs, median of the smallest such k or None).
    """
    sizes = []
    for batch in prepared(model, nonsense(pairs), ablation):
        scores = integrated_scores(model, batch, metric)
        for pair, curve in zip(batch.pairs, curves_of(model, batch, metric, scores)):
            enough = curve.none + 0.9 * effect_of[tuple(pair.clean)]
            moved = [curve.none + part * (curve.all - curve.none) for part in curve.share]
            sizes.append(next((k for k, value in zip(curve.kept, moved) if value >= enough), None))
    reached = [size for size in sizes if size is not None]
    return len(reached) / len(sizes), float(np.median(reached)) if reached else None


# ------------------------------------------------------------------------------------------------------------
# Component edges


def component_controls(model, to_score, to_test, metric, edges, circuit, steps, exact, another):
    """{control: share of the effect}: what other component edges carry, as many as `circuit` (W, R) bool has.

    edges (W, R) bool: all that there are; exact: rank by cutting each, else by EAP-IG; another: what
    `pairs_of_another` found.
    """
    def scores(pairs, of_metric):
        if exact:
            return cut_edges(model, pairs, of_metric, edges)
        return attribute_edges(model, pairs, of_metric, steps)

    n, chance = int(circuit.sum()), torch.rand(edges.shape, generator=torch.Generator().manual_seed(0))
    circuits = {"random edges": best_edges(chance, edges, n), "circuit alone is cut": edges & ~circuit}
    if another:
        _, pairs, other_metric = another
        circuits["another task's circuit"] = best_edges(scores(pairs, other_metric), edges, n)
    clean, corrupted, values = effects(model, to_test, metric, list(circuits.values()))
    effect = (clean - corrupted).mean()
    found = dict(zip(circuits, ((values - corrupted).mean(1) / effect).tolist()))
    labelled, asked = nonsense(to_score, 0), nonsense(to_test, 1)
    pushing = best_edges(scores(labelled, metric), edges, n)
    _, corrupted, values = effects(model, asked, metric, [pushing])
    found["nonsense labels"] = ((values[0] - corrupted).mean() / effect).item()
    return found
