"""Attention-edge circuits: which reads, (layer, head, query, key), does one answer need?

An attention edge carries the term A_ij p_ij v_j into its query's output. A mask m over the edges of a prompt
keeps (1) or cuts (0) each:

    y_i = sum_j  m_ij A_ij p_ij v_j + (1 - m_ij) z_ij

    zero           z_ij = 0                      the edge is gone, as if its gate were shut
    interchange    z_ij = A'_ij p'_ij v'_j       the edge carries what it carries on the corrupted prompt

Everything else is computed anew in a run that is cut: scores, softmax, and the gates of edges that are
kept. With `zero`, an edge that was shut with nothing cut stays shut. M(m) is the metric of the pair
(attribution.metric_of). What does M lose when edge e is cut?

    exact          M(1) - M(1 without e)                      a run for every edge
    gradient       dM/dm_e at m = 1                           first order, all edges in one backward pass
    integrated     the mean of dM/dm_e on the way m = a, the same for all edges, a from 0 to 1

A circuit of one prompt keeps its k best edges, by one of these rankings, signed (those first that speak for
the answer most) or by absolute value. How much of the effect it carries, and how many edges it takes:

    share(k) = (M(k best) - M(0)) / (M(1) - M(0))             0 with all edges cut, 1 with all kept
    size at 90 %     = the smallest k with share >= 0.9 there and at all larger k
    size within 10 % = the smallest k with |share - 1| <= 0.1 there and at all larger k

Some 40 values of k are run.

The paper's section on circuits counts such edges, as far as we can tell (arXiv 2512.05865).

Notable:
- A few edges that all speak for the answer push it further than the whole model does: share(k) is far above
  1. Such a circuit reaches 90 % and is not what the model does. So the second size.
- Edges are those of one prompt: a dense model has all causal pairs, a sparse one those that open (with
  interchange: on the clean or on the corrupted prompt).
- Gradients go straight through the gates, as in attribution.py, which counts edges between *components*.
- Works on every model with `attentions`, GPT or OLMo: it stands in for their `attend` while a run lasts.
"""

import contextlib
import itertools
from functools import partial
from typing import NamedTuple

import torch

from circuits.attribution import ranks, settles, sizes
from circuits.tasks import batches, metric_of
from gate import shared_among_heads

LEVELS = (0.8, 0.9, 0.95)
ABLATIONS = ("zero", "interchange")
KINDS = ("gradient", "integrated", "exact")  # of scores
ROOM = 2**25  # numbers in the largest (rows, L, H, T, T) that is run at once


# ------------------------------------------------------------------------------------------------------------
# Runs with edges cut


class Terms(NamedTuple):
    """What the edges of one layer carried in a run."""

    opened: torch.Tensor  # A_ij (B, H, T, T), 1.0 where the edge is open
    weights: torch.Tensor  # A_ij p_ij (B, H, T, T)
    v: torch.Tensor  # values (B, H, T, D)


@contextlib.contextmanager
def attending(model, attend):
    """While this lasts, attend(layer, original, q, k, v, **options) is called in place of every attention's
    `attend`, which is `original`. One may lie in another.
    """
    before = [vars(attention).get("attend") for attention in model.attentions]
    for layer, attention in enumerate(model.attentions):
        attention.attend = partial(attend, layer, attention.attend)
    try:
        yield
    finally:
        for attention, outer in zip(model.attentions, before):
            del attention.attend  # the class's own is seen again
            if outer is not None:
                attention.attend = outer


@torch.no_grad()
def terms_of(model, tokens):
    """What all edges carry: a list of n_layer Terms. tokens (B, T)."""
    found = []

    def attend(layer, original, q, k, v, **options):
        y, density, gates = original(q, k, v, **options | {"return_gates": True})
        found.append(Terms(gates.open, gates.weights, shared_among_heads(v, q)))
        return y, density, gates

    with attending(model, attend):
        model(tokens)
    return found


def run_cut(model, tokens, keep, instead=None, **options):
    """Logits (B, T, V) with edges cut.

    tokens (B, T); keep (n_layer, B, H, T, T), 1 keeps an edge and 0 cuts it; instead: what cut edges carry, a
    list of Terms, or None for nothing. options: of the model's forward.
    """
    if instead is None:
        return model(tokens, keep=keep, **options)[0]

    def attend(layer, original, q, k, v, **given):
        y, density, gates = original(q, k, v, **given)
        others = (1 - keep[layer].to(y.dtype)) * instead[layer].weights
        return y + others.to(y.dtype) @ instead[layer].v, density, gates

    with attending(model, attend):
        return model(tokens, keep=keep, **options)[0]


class Batch(NamedTuple):
    """Pairs of one length, ready to be cut."""

    tokens: torch.Tensor  # (B, T), clean
    pairs: list
    present: torch.Tensor  # which edges there are, (n_layer, B, H, T, T) bool
    instead: list | None  # what they carry once they are cut, Terms of every layer


def prepared(model, pairs, ablation, size=16):
    """Yield Batches of pairs."""
    for clean, corrupted, group in batches(pairs, size, next(model.parameters()).device):
        present, instead = opened_in(terms_of(model, clean)), None
        if ablation == "interchange":
            instead = terms_of(model, corrupted)
            present = present | opened_in(instead)
        yield Batch(clean, group, present, instead)


def opened_in(terms):
    return torch.stack([layer.opened for layer in terms]) > 0


@torch.no_grad()
def metrics_of(model, batch, metric, runs):
    """The metric of every run, a list of floats.

    runs: (number of a pair of the batch, which of its edges are kept, (n_layer, H, T, T) bool) of each, made
    one by one (an iterable).
    """
    L, _, H, T, _ = batch.present.shape
    at_once, runs, values = max(1, ROOM // (L * H * T * T)), iter(runs), []
    while some := list(itertools.islice(runs, at_once)):
        rows, keeps = [pair for pair, _ in some], torch.stack([keep for _, keep in some], dim=1)
        instead = batch.instead
        if instead is not None:
            instead = [Terms(*(part[rows] for part in layer)) for layer in instead]
        logits = run_cut(model, batch.tokens[rows], keeps, instead)
        values += metric_of(logits, [batch.pairs[row] for row in rows], metric).tolist()
    return values


# ------------------------------------------------------------------------------------------------------------
# Scores: what the metric loses when an edge is cut


def integrated_scores(model, batch, metric, steps=5):
    """(n_layer, B, H, T, T): the mean gradient of the metric by the mask, on the way from all edges cut to
    all kept, at the middles of `steps` equal parts. steps=1 is the gradient at the end of it, m = 1.
    """
    scores = torch.zeros(batch.present.shape, device=batch.tokens.device)
    for step in range(steps):
        way = 1.0 if steps == 1 else (step + 0.5) / steps
        keep = (way * batch.present).requires_grad_()
        logits = run_cut(model, batch.tokens, keep, batch.instead)
        value = metric_of(logits, batch.pairs, metric).sum()
        scores += torch.autograd.grad(value, keep)[0] / steps
    return scores.masked_fill(~batch.present, 0)


def exact_scores(model, batch, metric):
    """(n_layer, B, H, T, T): the metric with all edges minus that with this one cut; a run for every edge."""
    scores = torch.zeros(batch.present.shape, device=batch.tokens.device)
    intact = metrics_of(model, batch, metric, enumerate(batch.present.unbind(1)))
    for pair, present in enumerate(batch.present.unbind(1)):
        edges = present.nonzero().tolist()
        values = metrics_of(model, batch, metric, ((pair, without(present, edge)) for edge in edges))
        for (layer, head, query, key), value in zip(edges, values):
            scores[layer, pair, head, query, key] = intact[pair] - value
    return scores


def without(kept, edge):
    """The edges that are kept, (n_layer, H, T, T) bool, but for this one, (layer, head, query, key)."""
    kept = kept.clone()
    kept[tuple(edge)] = False
    return kept


def scores_of(kind, model, batch, metric):
    """Scores (n_layer, B, H, T, T) of a kind, one of KINDS: positive where an edge speaks for the answer."""
    if kind == "exact":
        return exact_scores(model, batch, metric)
    return integrated_scores(model, batch, metric, steps=1 if kind == "gradient" else 5)


def scores_by(ranking, model, batch, metric):
    """Scores (n_layer, B, H, T, T), the largest for the best edges. ranking: a kind, '|kind|' by size."""
    scores = scores_of(ranking.strip("|"), model, batch, metric)
    return scores.abs() if ranking.startswith("|") else scores


# ------------------------------------------------------------------------------------------------------------
# Circuits and their curves


class Curve(NamedTuple):
    """One pair: how much of the effect its k best edges carry."""

    edges: int  # present
    all: float  # the metric with all edges, M(1)
    none: float  # with all cut, M(0)
    kept: list  # k, from 0 to all
    share: list  # of the effect, for every k
    reaches: dict  # {level: edges from which on the share is at least this}
    within: dict  # {level: edges from which on it is at least this, and as little above 1 as below}


def curves(model, batch, metric, scores, points=40):
    """A Curve for every pair of the batch. points: how many k, evenly spaced on a logarithmic axis."""
    found = []
    for pair, present in enumerate(batch.present.unbind(1)):
        order, edges = ranks(scores[:, pair], present), int(present.sum())
        ks = [0, *sizes(edges, points)] if edges else [0]
        found.append(curve_of(ks, metrics_of(model, batch, metric, ((pair, order < k) for k in ks))))
    return found


def size_at(level, ks, shares):
    """The k from which on all shares are at least `level`; all edges where the last is not."""
    return ks[min(settles(shares, level), len(ks) - 1)]


def curve_of(ks, values):
    """The Curve of one pair from its metrics with the k best edges kept, k from 0 to all."""
    effect = values[-1] - values[0]
    share = [(value - values[0]) / effect if effect else 0.0 for value in values]
    closeness = [1 - abs(1 - part) for part in share]
    reaches = {str(level): size_at(level, ks, share) for level in LEVELS}
    within = {str(level): size_at(level, ks, closeness) for level in LEVELS}
    return Curve(ks[-1], values[-1], values[0], ks, share, reaches, within)
