"""How many attention edges does a task need, prompt by prompt? One model measured, its controls beside it.

    size of a prompt's circuit      attention_edges.py
    of a task                       mean and median over prompts, with a 95 % band of the mean (bootstrap)
    the ranking                     that with the smallest circuits in the mean on some prompts;
                                    measured on others. Each model may have its own

Notable:
- A prompt counts if both models know it: the answer leads, and the effect is above MARGIN of the model's mean
  effect. Near 0 a share of the effect means nothing.
- "exact" takes a run for every edge: left out, for both models, where one of them has more than EXACT on the
  average prompt. So both choose among the same rankings.
- Of controls the share is that of all prompts together, sum over sum: no prompt with a small effect rules.
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from circuits.attention_edges import KINDS, LEVELS, curves, metrics_of, prepared, scores_by, scores_of
from circuits.attribution import ranks
from circuits.controls import metrics_of_controls, nonsense_reached, scores_of_another, untrained

EXACT = 400  # edges of a prompt
MARGIN = 0.1  # of the mean effect
CHOOSING = 16  # pairs on which the ranking is chosen
LEVEL = "0.9"  # the one by which rankings are compared and controls are cut
MOST_PAIRS = 32  # for nonsense labels and the untrained model
GRID = 60  # points of the mean curve


def known_to(models, pairs, metric, ablation):
    """The pairs that each of the models answers right, with an effect above MARGIN of its mean effect."""
    kept = list(pairs)
    for model in models:
        found = {}  # {pair: (metric with all edges, with all cut)}
        for batch in prepared(model, pairs, ablation):
            with_all = metrics_of(model, batch, metric, enumerate(batch.present.unbind(1)))
            without = metrics_of(model, batch, metric, enumerate(torch.zeros_like(batch.present).unbind(1)))
            found |= {pair.key: both for pair, *both in zip(batch.pairs, with_all, without)}
        least = MARGIN * max(0.0, np.mean([one - other for one, other in found.values()]))
        known = {key for key, (one, other) in found.items() if one > 0 and one - other > least}
        kept = [pair for pair in kept if pair.key in known]
    return kept


class Measured(NamedTuple):
    """Pairs by one ranking."""

    pairs: list  # in the order of their batches
    curves: list  # a Curve for every pair
    controls: dict  # {control: share of the effect, of all pairs together}


def measure_by(ranking, model, pairs, metric, ablation, others=None):
    """Measured. others: scores of another task (controls.py); None leaves the controls out."""
    measured, found, values, draw = [], [], {}, torch.Generator().manual_seed(0)
    for batch in prepared(model, pairs, ablation):
        scores = scores_by(ranking, model, batch, metric)
        new = curves(model, batch, metric, scores)
        measured += batch.pairs
        found += new
        if others is not None:
            sizes = sizes_at(new, "within", LEVEL)
            for name, some in metrics_of_controls(model, batch, metric, scores, sizes, others, draw).items():
                values[name] = values.get(name, []) + some
    effect = sum(curve.all - curve.none for curve in found)
    none = sum(curve.none for curve in found)
    controls = {name: (sum(some) - none) / effect for name, some in values.items()}
    return Measured(measured, found, controls)


def sizes_at(found, kind, level):
    """Edges needed, one number for every Curve. kind: 'within' or 'reaches'."""
    return [getattr(curve, kind)[level] for curve in found]


def kinds_for(models, pairs, ablation):
    """The kinds of scores that are tried, the same for all models."""
    most = max(sum(batch.present.sum().item() for batch in prepared(model, pairs, ablation)) / len(pairs)
               for model in models)
    return KINDS if most <= EXACT else KINDS[:-1]


def best_ranking(model, pairs, metric, ablation, kinds):
    """(the ranking with the smallest circuits within 10 %, {ranking: {'within', 'reaches'}: mean sizes})."""
    ready, found = list(prepared(model, pairs, ablation)), {}
    for kind in kinds:
        for batch in ready:
            scores = scores_of(kind, model, batch, metric)
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


def median_curve(found):
    """{kept, share, low, high}: the median share over prompts of the k best edges, and its quartiles."""
    most = max(curve.edges for curve in found)
    grid = np.unique(np.geomspace(1, max(most, 2), GRID).round()).astype(int)
    shares = np.array([np.interp(np.log(grid), np.log(np.maximum(curve.kept, 0.5)), curve.share)
                       for curve in found])
    low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75], axis=0).tolist()
    return {"kept": grid.tolist(), "share": middle, "low": low, "high": high}


def measure(model, to_choose, to_test, metric, ablation, another, kinds=KINDS):
    """One model's attention edges on a task: a dict of plain numbers, for circuit-<task>.json.

    to_choose, to_test: pairs that the models know; another: (name, pairs, metric) of another task, or None;
    kinds: of scores.
    """
    ranking, tried = best_ranking(model, to_choose[:CHOOSING], metric, ablation, kinds)
    others = []
    if another:
        others = scores_of_another(model, another[1][:CHOOSING], another[2], ablation)
    pairs, found, controls = measure_by(ranking, model, to_test, metric, ablation, others)
    circuits = {pair.key: (curve.all, curve.within[LEVEL]) for pair, curve in zip(pairs, found)}
    fresh = untrained(model)
    guessed = known_to([fresh], to_test[:MOST_PAIRS], metric, ablation)
    by_chance = measure_by(ranking, fresh, guessed, metric, ablation).curves
    return {
        "ranking": ranking, "rankings": tried, "pairs": len(found),
        "edges": float(np.mean([curve.edges for curve in found])),
        "effect": float(np.mean([curve.all - curve.none for curve in found])),
        "within": {str(level): spread(sizes_at(found, "within", str(level))) for level in LEVELS},
        "reaches": {str(level): spread(sizes_at(found, "reaches", str(level))) for level in LEVELS},
        "per_pair": sizes_at(found, "within", LEVEL),
        "curve": median_curve(found),
        "controls": controls,
        "nonsense": nonsense_reached(model, to_test[:MOST_PAIRS], metric, ablation, circuits),
        "untrained": float(np.mean(sizes_at(by_chance, "within", LEVEL))) if by_chance else None,
    }


def compare(models, to_choose, to_test, metric, ablation, another):
    """(result, the pairs of to_test that both models know). The result: {"pairs": [how many these are, of how
    many], 'dense': what `measure` found, 'sparse': likewise}.

    Without the models if there is no such pair. models: {'dense': model, 'sparse': model}.
    """
    choosing = known_to(models.values(), to_choose, metric, ablation)
    testing = known_to(models.values(), to_test, metric, ablation)
    result = {"pairs": [len(testing), len(to_test)]}
    if choosing and testing:
        kinds = kinds_for(models.values(), choosing[:CHOOSING], ablation)
        progress = tqdm(models.items(), desc=f"attention edges, {ablation}", leave=False, disable=None)
        for name, model in progress:
            result[name] = measure(model, choosing, testing, metric, ablation, another, kinds)
    return result, testing


def circuit_of(model, pair, metric, ablation, ranking):
    """The edges of one pair's circuit, (n_layer, H, T, T) bool: the fewest within 10 % of the effect."""
    [batch] = prepared(model, [pair], ablation)
    scores = scores_by(ranking, model, batch, metric)
    [size] = sizes_at(curves(model, batch, metric, scores), "within", LEVEL)
    return ranks(scores[:, 0], batch.present[:, 0]) < size
