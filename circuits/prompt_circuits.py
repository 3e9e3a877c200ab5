"""How many attention edges does a task need, prompt by prompt? One model measured, its controls beside it.

    size of a prompt's circuit      attention_edges.py
    of a task                       mean and median over prompts, with a 95 % band of the mean (bootstrap)
    the ranking                     that of RANKINGS with the smallest circuits in the mean on some prompts;
                                    measured on others. Each model may have its own

Notable:
- A prompt counts if both models know it: its effect is above MARGIN of the model's mean effect. Near 0 a
  share of the effect means nothing.
- "exact" takes a run for every edge: left out where there are more than EXACT on the average prompt.
"""

from typing import NamedTuple

import numpy as np
import torch

from circuits.attention_edges import (
    KINDS,
    LEVELS,
    Curve,
    curves,
    metrics_of,
    prepared,
    ranks,
    scores_by,
    signed_scores,
)
from circuits.controls import (
    MOST_PAIRS,
    nonsense_reached,
    scores_of_another,
    shares_of_controls,
    untrained,
)

EXACT = 400  # edges of a prompt
MARGIN = 0.1  # of the mean effect
CHOOSING = 16  # pairs on which the ranking is chosen
LEVEL = "0.9"  # the one by which rankings are compared and controls are cut
GRID = 60  # points of the mean curve


def effects_of(model, pairs, metric, ablation):
    """{clean prompt: (metric with all edges, with all cut)}."""
    found = {}
    for batch in prepared(model, pairs, ablation):
        everyone = list(range(len(batch.pairs)))
        with_all = metrics_of(model, batch, metric, everyone, batch.present.unbind(1))
        without = metrics_of(model, batch, metric, everyone, torch.zeros_like(batch.present).unbind(1))
        for pair, one, other in zip(batch.pairs, with_all.tolist(), without.tolist()):
            found[tuple(pair.clean)] = one, other
    return found


def known_to(models, pairs, metric, ablation):
    """The pairs whose effect is above MARGIN of the mean effect in each of the models."""
    kept = list(pairs)
    for model in models:
        found = effects_of(model, pairs, metric, ablation)
        effect = {prompt: one - other for prompt, (one, other) in found.items()}
        least = MARGIN * max(0.0, np.mean(list(effect.values())))
        kept = [pair for pair in kept if effect[tuple(pair.clean)] > least]
    return kept


class Measured(NamedTuple):
    """Pairs by one ranking."""

    curves: list  # a Curve for every pair
    controls: dict  # {control: shares, one for every pair}


def measure_by(ranking, model, pairs, metric, ablation, others=None):
    """Measured. others: scores of another task (controls.py); None leaves the controls out."""
    found, controls = [], {}
    for batch in prepared(model, pairs, ablation):
        scores = scores_by(ranking, model, batch, metric)
        own = curves(model, batch, metric, scores)
        found += own
        if others is not None:
            sizes = [round(curve.within[LEVEL] or curve.edges) for curve in own]
            shares = shares_of_controls(model, batch, metric, scores, own, sizes, others)
            for name, values in shares.items():
                controls[name] = controls.get(name, []) + values
    return Measured(found, controls)


def sizes_at(found, kind, level):
    """Edges needed, one number for every Curve; all of its edges where it does not get there."""
    return [getattr(curve, kind)[level] or curve.edges for curve in found]


def best_ranking(model, pairs, metric, ablation):
    """(the ranking with the smallest circuits within 10 %, {ranking: {'within', 'reaches'}: mean sizes})."""
    ready = list(prepared(model, pairs, ablation))
    edges = sum(batch.present.sum().item() for batch in ready) / len(pairs)
    found = {}
    for kind in KINDS[:None if edges <= EXACT else -1]:
        for batch in ready:
            scores = signed_scores(kind, model, batch, metric)
            for ranking, ranked in ((kind, scores), (f"|{kind}|", scores.abs())):
                found[ranking] = found.get(ranking, []) + curves(model, batch, metric, ranked)
    tried = {}
    for ranking, of_pairs in found.items():
        tried[ranking] = {size: float(np.mean(sizes_at(of_pairs, size, LEVEL)))
                          for size in ("within", "reaches")}
    return min(tried, key=lambda ranking: tried[ranking]["within"]), tried


def spread(values, resamples=1000, seed=0):
    """{mean, low, high, median} of one number a prompt; low and high: 95 % band of the mean (bootstrap)."""
    values = np.asarray(values, dtype=float)
    which = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[which].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high),
            "median": float(np.median(values))}


def mean_curve(found):
    """{kept, share, low, high}: the median share over prompts of the k best edges, and its quartiles."""
    most = max(curve.edges for curve in found)
    grid = np.unique(np.geomspace(1, max(most, 2), GRID).round()).astype(int)
    shares = np.array([np.interp(np.log(grid), np.log(np.maximum(curve.kept, 0.5)), curve.share)
                       for curve in found])
    low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75], axis=0).tolist()
    return {"kept": grid.tolist(), "share": middle, "low": low, "high": high}


def measure(model, to_choose, to_test, metric, ablation, another):
    """One model's attention edges on a task: a dict of plain numbers, for circuit-<task>.json.

    to_choose, to_test: pairs that the models know; another: (name, pairs, metric) of another task, or None.
    """
    ranking, tried = best_ranking(model, to_choose[:CHOOSING], metric, ablation)
    others = []
    if another:
        others = scores_of_another(model, another[1][:CHOOSING], another[2], ablation)
    measured = measure_by(ranking, model, to_test, metric, ablation, others)
    found = measured.curves
    effect = {prompt: one - other
              for prompt, (one, other) in effects_of(model, to_test, metric, ablation).items()}
    reached, k = nonsense_reached(model, to_test[:MOST_PAIRS], metric, ablation, effect, curves)
    fresh = untrained(model)
    guessed = known_to([fresh], to_test[:MOST_PAIRS], metric, ablation)
    by_chance = measure_by("|integrated|", fresh, guessed, metric, ablation).curves
    return {
        "ranking": ranking,
        "rankings": tried,
        "pairs": len(found),
        "edges": float(np.mean([curve.edges for curve in found])),
        "effect": float(np.mean([curve.all - curve.none for curve in found])),
        "within": {str(level): spread(sizes_at(found, "within", str(level))) for level in LEVELS},
        "reaches": {str(level): spread(sizes_at(found, "reaches", str(level))) for level in LEVELS},
        "per_pair": sizes_at(found, "within", LEVEL),
        "curve": mean_curve(found),
        "controls": {name: float(np.mean(values)) for name, values in measured.controls.items()},
        "nonsense": {"share of prompts": reached, "median edges": k},
        "untrained": size_by_chance(by_chance),
    }


def compare(models, to_choose, to_test, metric, ablation, another, progress):
    """{"pairs": [those of to_test that both models know, all], 'dense': what `measure` found, 'sparse': ...}.

    Without the models if there is no such pair. models: {'dense': model, 'sparse': model}; progress: a tqdm.
    """
    choosing = known_to(models.values(), to_choose, metric, ablation)
    testing = known_to(models.values(), to_test, metric, ablation)
    result = {"pairs": [len(testing), len(to_test)]}
    for name, model in models.items():
        if choosing and testing:
            result[name] = measure(model, choosing, testing, metric, ablation, another)
        progress.update()
    return result


def circuit_of(model, pair, metric, ablation, ranking):
    """The edges of one pair's circuit, (n_layer, H, T, T) bool: the fewest within 10 % of the effect."""
    [batch] = prepared(model, [pair], ablation)
    scores = scores_by(ranking, model, batch, metric)
    [size] = sizes_at(curves(model, batch, metric, scores), "within", LEVEL)
    return ranks(scores[:, 0], batch.present[:, 0]) < round(size)


def size_by_chance(found: list[Curve]):
    """{mean size, edges} of an untrained model's circuits; None if it has no effect at all."""
    if not found:
        return None
    return {"within": float(np.mean(sizes_at(found, "within", LEVEL))),
            "edges": float(np.mean([curve.edges for curve in found])), "pairs": len(found)}
