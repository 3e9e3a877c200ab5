"""What the page of `view` shows of one prompt in one model, as plain numbers: edges, gates, cuts, circuits.

For every edge (layer, head, query i, key j) that the page can draw:

    weight   A_ij p_ij                   what it multiplies the value with that it brings
    a        q_i . k_j / sqrt(D)         the attention score
    s        a + b                       the gate's margin: above 0 the edge is open. A dense model has none
    score    M - M without this edge     what the answer loses when the others alone are kept
    rank     its place by |score|        the k best edges are those of rank 0 to k - 1

M, on the page the lead, is the sum over the answer's positions of (logit of the model's own first choice -
logit of its second): any prompt will do, be the model right or wrong. A circuit keeps the k best edges:

    share(k) = (M(k best) - M(none)) / (M(all) - M(none))

Notable:
- Up to FEW edges are cut one by one, and the score is exact. With more of them the score is the integrated
  gradient, one backward pass for all edges, and only the best are cut one by one.
- A dense model reads every causal pair. The page gets the heaviest, to be seen, and the best, for the slider.
- Scores, ranks and shares are those of circuits/attention_edges.py: what was shut stays shut. The button
  `cut` is an intervention, as in `explain --shut`: later gates decide anew, and one that was shut
  may open instead. So an edge's score and its cut can differ, and the page says what opened and what shut.
"""

import itertools
import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from circuits.attention_edges import (
    ROOM,
    Batch,
    attending,
    curve_of,
    integrated_scores,
    opened_in,
    ranks,
    run_cut,
    terms_of,
    without,
)
from circuits.attribution import sizes
from circuits.tasks import LOGIT, Pair, metric_of
from gate import shared_among_heads

FEW = 300  # edges: up to so many are cut one by one
DRAWN_DENSE = 400  # heaviest edges that are drawn of a dense model, and as many best ones for the slider
DRAWN_SPARSE = 1500  # of a sparse one, so that a page of a run that is not sparse yet stays small
TOP = 3  # predictions that are shown at every position of the answer
NAMED = 2  # edges that opened because of a cut: the page says which
# an edge's row on the page; cut: its number among the cuts, or -1
EDGE = ("layer", "head", "query", "key", "weight", "a", "s", "score", "rank", "cut")


class Outcome(NamedTuple):
    """What a model answers with some edges cut."""

    metric: float  # M
    top: list  # for every position of the answer: TOP pairs [token id, probability], the likeliest first
    opened: list  # edges that were shut with all kept and are open now, NAMED at most
    shut: list  # edges that were open and not cut, and are shut now


# ------------------------------------------------------------------------------------------------------------
# runs


@torch.no_grad()
def scores_of(model, tokens):
    """a_ij of every head, (n_layer, H, T, T), as gate.py computes them. tokens (1, T)."""
    found = []

    def attend(layer, original, q, k, v, **options):
        exact = torch.promote_types(q.dtype, torch.float32)
        keys = shared_among_heads(k, q).to(exact)
        found.append(q.to(exact) @ keys.transpose(-2, -1) / math.sqrt(q.shape[-1]))
        return original(q, k, v, **options)

    with attending(model, attend):
        model(tokens)
    return torch.cat(found)


@torch.no_grad()
def own_choice(model, question, vocab_size):
    """The Pair whose metric is the model's first choice against its second. vocab_size: ids from there on are
    padding.
    """
    tokens = torch.tensor([question.ids], device=next(model.parameters()).device)
    logits = model(tokens)[0][0, question.positions, :vocab_size]
    first, second = logits.topk(2).indices.T.tolist()
    return Pair(question.ids, question.ids, question.positions, [[i] for i in first], [[i] for i in second])


def prepared_for(model, pair):
    """The Batch of one pair, to be cut, and the edges' weights, (n_layer, H, T, T)."""
    tokens = torch.tensor([pair.clean], device=next(model.parameters()).device)
    terms = terms_of(model, tokens)
    return (Batch(tokens, [pair], opened_in(terms), None),
            torch.stack([layer.weights for layer in terms])[:, 0])


@torch.no_grad()
def outcomes(model, batch, keeps, total, what, vocab_size):
    """An Outcome for each of `total` masks (n_layer, H, T, T) bool, made one by one. what: for the progress
    bar.
    """
    pair = batch.pairs[0]
    L, _, H, T, _ = batch.present.shape
    at_once = max(1, ROOM // (T * (L * H * T + model.config.vocab_size)))
    keeps = iter(tqdm(keeps, total=total, desc=what, unit="run", leave=False, disable=None))
    found = []
    while rows := list(itertools.islice(keeps, at_once)):
        kept, gates = torch.stack(rows, dim=1), []
        logits = run_cut(model, batch.tokens.expand(len(rows), T), kept,
                         record=lambda layer, seen, gates=gates: gates.append(seen.open > 0))
        now = torch.stack(gates)
        opened, shut = now & ~batch.present, kept & batch.present & ~now
        metrics = len(pair.positions) * metric_of(logits, [pair] * len(rows), LOGIT)
        best = logits[:, pair.positions, :vocab_size].float().softmax(-1).topk(min(TOP, vocab_size))
        for row, metric in enumerate(metrics.tolist()):
            places = zip(best.indices[row].tolist(), best.values[row].tolist())
            top = [[[token, rounded(p, 3)] for token, p in zip(*place)] for place in places]
            found.append(Outcome(metric, top, edges_in(opened[:, row])[:NAMED], edges_in(shut[:, row])))
    return found


def cut_each(model, batch, kept, edges, vocab_size):
    """An Outcome for every edge (layer, head, query, key), cut from those kept, (n_layer, H, T, T) bool."""
    keeps = (without(kept, edge) for edge in edges)
    return outcomes(model, batch, keeps, len(edges), "cutting edge by edge", vocab_size)


# ------------------------------------------------------------------------------------------------------------
# one prompt in one model


def edges_in(chosen):
    """Edges as tuples (layer, head, query, key). chosen: (n_layer, H, T, T) bool."""
    return [tuple(edge) for edge in chosen.nonzero().tolist()]


def effects(model, batch, intact, vocab_size):
    """The score of every edge, (n_layer, H, T, T). intact: M with all edges."""
    present = batch.present[:, 0]
    edges = edges_in(present)
    if len(edges) > FEW:
        return integrated_scores(model, batch, LOGIT)[:, 0] * len(batch.pairs[0].positions)
    scores = torch.zeros(present.shape, device=present.device)  # as exact_scores, in less memory
    for edge, outcome in zip(edges, cut_each(model, batch, present, edges, vocab_size)):
        scores[edge] = intact - outcome.metric
    return scores


def biases_of(config):
    """b of every head, [layer][head]."""
    if isinstance(config.gate_bias, list):
        return config.gate_bias
    return [[config.gate_bias] * config.n_head] * config.n_layer


def rows_of(model, chosen, numbers, cuts):
    """The page's rows (EDGE) of the chosen edges. numbers: (weights, a, scores, ranks), each (n_layer, H, T,
    T); cuts: {edge: ...}.
    """
    biases, order = biases_of(model.config), {edge: i for i, edge in enumerate(cuts)}
    rows = []
    for edge in edges_in(chosen):
        weight, a, score, rank = (number[edge].item() for number in numbers)
        margin = a + biases[edge[0]][edge[1]] if model.config.gated else None
        # significant digits, not decimals: a margin just above 0 stays above 0
        rows.append([*edge, rounded(weight), rounded(a), rounded(margin), rounded(score), rank,
                     order.get(edge, -1)])
    return rows


def rounded(x, digits=4):
    """x to so many significant digits; None stays None."""
    return x if x is None else float(f"{x:.{digits}g}")


def counts(edges_of_models, points=30):
    """The slider's stops, the same for all models: k from 0 to the most edges that one of them has."""
    return sorted({0}.union(*(sizes(edges, points) for edges in edges_of_models if edges)))


def data_of(model, question, vocab_size, stops):
    """All that the page shows of a question in a model. stops: k, see `counts`."""
    pair = own_choice(model, question, vocab_size)
    batch, weights = prepared_for(model, pair)
    present = batch.present[:, 0]
    total = int(present.sum())
    intact = outcomes(model, batch, [present], 1, "intact", vocab_size)[0]
    scores = effects(model, batch, intact.metric, vocab_size)
    places = ranks(scores.abs(), present)
    best = edges_in(places < min(FEW, total))
    cuts = dict(zip(best, cut_each(model, batch, torch.ones_like(present), best, vocab_size)))
    most = DRAWN_SPARSE if model.config.gated else DRAWN_DENSE
    chosen = present & ((ranks(weights, present) < most) | (places < most))  # the heaviest and the best
    ks = sorted({0, total} | {k for k in stops if k <= total})
    keeps = (places < k for k in ks)
    circuits = outcomes(model, batch, keeps, len(ks), "keeping the k best", vocab_size)
    curve = curve_of(ks, [outcome.metric for outcome in circuits])
    row = {edge: number for number, edge in enumerate(edges_in(chosen))}
    return {
        "total": total,
        "exact": total <= FEW,
        "bias": [[rounded(b) for b in layer] for layer in biases_of(model.config)],
        "metric": rounded(intact.metric),
        "none": rounded(circuits[0].metric),  # M with all edges cut
        "top": intact.top,
        "edges": rows_of(model, chosen, (weights, scores_of(model, batch.tokens), scores, places), cuts),
        "cuts": [[rounded(cut.metric), cut.top, cut.opened, [row[edge] for edge in cut.shut if edge in row]]
                 for cut in cuts.values()],
        "circuits": [[k, rounded(share), outcome.top]
                     for k, share, outcome in zip(ks, curve.share, circuits)],
    }


def edges_open(model, question):
    """How many edges are open on a question."""
    tokens = torch.tensor([question.ids], device=next(model.parameters()).device)
    return int(sum(layer.opened.sum() for layer in terms_of(model, tokens)))
