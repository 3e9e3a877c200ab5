"""Dense against sparse: how small is the circuit of a task in each? Component edges and heads are measured
here, attention edges by prompt_circuits.py, controls beside both. The command: analysis/circuit.py.

The question of the paper's section on circuits: does sparse attention make the circuits of tasks small? For
both models alike, heads or edges are ranked by their score on one set of prompts (circuits/attribution.py:
exact in a small graph, EAP-IG in a larger one); the best n are kept, all others see the
corrupted prompt's activations; and the explained effect is measured on other prompts, for n from 1 to all.
The fewer are needed for 90 %, the smaller the circuit that this ranking finds; a smaller one may exist.

Notable: in the curve over heads embedding and MLPs are always kept, as in the paper; in the curve over edges
everything has to be earned. An edge counts only if it lies on a path from the embedding to the output. Heads
that never open on the task's prompts are out before anything is ranked.
"""

import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from circuits import prompt_circuits
from circuits.attention_edges import ABLATIONS, LEVELS
from circuits.attribution import (
    best_edges,
    dead_heads,
    effects,
    explained,
    graph_of,
    needed,
    score_edges,
    score_writers,
    settles,
    sizes,
    without_dead_heads,
)
from circuits.controls import component_controls, pairs_of_another, untrained
from circuits.tasks import Pair, make_pairs, vocabulary
from storage.files import UserError


class Components(NamedTuple):
    """What component edges carry a task in one model."""

    result: dict  # plain numbers, for circuit-<task>.json
    scores: torch.Tensor  # (W, R)
    edges: torch.Tensor  # (W, R) bool: all of heads that open
    circuit: torch.Tensor  # (W, R) bool: those that explain 90 %
    share: float  # what these explain


def components_of(model, to_score, to_test, metric, steps):
    """Components of a model, by pairs to rank on and others to test on. Raises UserError as `curve_of`."""
    graph, dead = graph_of(model), dead_heads(model, to_score + to_test)
    edges = without_dead_heads(graph, dead)
    scores = score_edges(model, to_score, metric, edges, steps)
    components = score_writers(model, to_score, metric, edges, scores)
    result = {"heads": int((~dead).sum()), "heads_off": int(dead.sum()), "edges": int(edges.sum())}
    circuits = circuits_of_heads(graph, components, dead)
    result["by_heads"], result["metric"] = curve_of(model, to_test, metric, circuits)
    circuits = circuits_of_edges(graph, scores, edges)
    result["by_edges"], _ = curve_of(model, to_test, metric, circuits)
    shares = result["by_edges"]["explained"]
    chosen = min(settles(shares, 0.9), len(circuits) - 1)
    return Components(result, scores, edges, list(circuits.values())[chosen], shares[chosen])


def measure(model, to_score, to_test, metric, steps, another):
    """Components of a model, with their controls. another: pairs of another task (controls.py)."""
    found = components_of(model, to_score, to_test, metric, steps)
    found.result["controls"] = component_controls(model, to_score, to_test, metric, found.edges,
                                                  found.circuit, steps, another)
    try:
        by_chance = components_of(untrained(model), to_score, to_test, metric, steps)
        found.result["untrained"] = by_chance.result["by_edges"]["needed"]["0.9"]
    except UserError:  # it knows nothing at all
        found.result["untrained"] = None
    return found


def circuits_of_heads(graph, components, dead):
    """{n: the edges between embedding, MLPs and the n heads with the largest score}. components (W,): scores;
    dead (L, H) bool.
    """
    is_head, always = torch.zeros(2, graph.W, dtype=torch.bool)
    for layer in range(graph.L):
        is_head[graph.writer["heads", layer]] = ~dead[layer]
        always[graph.writer["mlp", layer]] = True
    always[0] = True
    ranked = torch.where(is_head, components.abs(), -1.0).argsort(descending=True)
    heads, circuits = int(is_head.sum()), {}
    for n in [0, *(range(1, heads + 1) if heads <= 40 else sizes(heads))]:
        kept = always.clone()
        kept[ranked[:n]] = True
        circuits[n] = graph.of_components(kept)
    return circuits


def circuits_of_edges(graph, scores, edges):
    """{size: those of the n best edges that lie on a path}, for n from 1 to all."""
    circuits = {}
    for n in sizes(int(edges.sum())):
        kept = graph.on_paths(best_edges(scores, edges, n))
        if kept.any():
            circuits.setdefault(int(kept.sum()), kept)
    return circuits


def curve_of(model, pairs, metric, circuits):
    """(explained effect over size, with its band; the metrics between which it lies).

    circuits: {size: edges}. Raises UserError if there is no effect to explain.
    """
    clean, corrupted, values = effects(model, pairs, metric, list(circuits.values()))
    if not clean.mean() > corrupted.mean():  # nor is NaN an effect
        raise UserError(f"the {'sparse' if model.config.gated else 'dense'} model does not know the task: "
                        f"{metric} {clean.mean():.2f} on clean prompts, {corrupted.mean():.2f} on corrupted "
                        "ones. There is no effect to explain")
    counts = list(circuits)
    share, low, high = (part.tolist() for part in explained(clean, corrupted, values))
    # some draws of few pairs have no effect to divide by, and so no band
    low, high = ([x if math.isfinite(x) else None for x in bound] for bound in (low, high))
    reached = {str(level): needed([max(n, 1) for n in counts], share, level) for level in LEVELS}
    return ({"n": counts, "explained": share, "low": low, "high": high, "needed": reached},
            {"clean": clean.mean().item(), "corrupted": corrupted.mean().item()})


def prompts(task, n, seed, tokens, room):
    """(pairs to rank on, other pairs to test on, metric). room: the models' context, tokens.

    Raises UserError.
    """
    to_score, metric = make_pairs(task, n, 2 * seed, tokens)
    to_test, _ = make_pairs(task, n, 2 * seed + 1, tokens)
    seen = {tuple(pair.clean) for pair in to_score}
    to_test = [pair for pair in to_test if tuple(pair.clean) not in seen]
    if not to_test:
        raise UserError(f"{task} has so few prompts that none is left to test on. Try a smaller --n")
    longest = max(len(pair.clean) for pair in to_score + to_test)
    if longest > room:
        raise UserError(f"{task} has prompts of {longest} tokens, and a model has a context of {room}. "
                        "Try another task, or a model with a larger block_size")
    return to_score, to_test, metric


class Comparison(NamedTuple):
    """What `compare` found."""

    result: dict  # plain numbers, for circuit-<task>.json
    sparse: Components  # to draw
    prompt: list  # token ids of one clean prompt that was tested, to draw
    pair: Pair | None  # one that both models know with the other edges cut, to draw


def compare(dense, sparse, tokenizer, task, n, seed, steps):
    """Measure both models, of one vocabulary, on a task: a Comparison.

    tokenizer: its name; n: pairs; steps: of integrated gradients.
    """
    tokens = vocabulary(tokenizer, sparse.config.vocab_size)
    room = min(dense.config.block_size, sparse.config.block_size)
    to_score, to_test, metric = prompts(task, n, seed, tokens, room)
    models = {"dense": dense, "sparse": sparse}

    def is_known(pairs, metric):
        return len(prompt_circuits.known_to(models.values(), pairs, metric, "interchange")) > len(pairs) / 2

    another = pairs_of_another(task, n, 2 * seed + 2, tokens, room, is_known)
    result = {"task": task, "metric": metric, "pairs": n, "pairs_to_test": len(to_test), "seed": seed,
              "steps": steps, "another": another and another[0]}
    found = {}
    for name, model in tqdm(models.items(), desc="component edges", leave=False, disable=None):
        found[name] = measure(model, to_score, to_test, metric, steps, another)
        result[name] = found[name].result
    known, result["attention_edges"] = {}, {}
    for ablation in ABLATIONS:
        result["attention_edges"][ablation], known[ablation] = prompt_circuits.compare(
            models, to_score, to_test, metric, ablation, another)
    return Comparison(result, found["sparse"], to_test[0].clean, next(iter(known["zero"]), None))
