"""Dense against sparse: how small is the circuit of a task in each, as a table, two curves, a gallery and a drawing.

    python analyze.py circuit out/stdlib_dense out/stdlib --task=quote

The question of the paper's section on circuits: does sparse attention make the circuits of tasks small? For both models alike, heads or edges
are ranked by their score on one set of prompts (circuit.py: exact in a graph of at most EXACT edges, EAP-IG in a larger one); the best n are kept, all
others see the corrupted prompt's activations; and the explained effect is measured on other prompts, for n from 1 to all. The fewer are needed for
90 %, the smaller the circuit that this ranking finds; a smaller one may exist.

Notable: in the curve over heads embedding and MLPs are always kept, as in the paper; in the curve over edges everything has to be earned. An edge counts
only if it lies on a path from the embedding to the output. Heads that never open on the task's prompts are out before anything is ranked.
"""

import os

import torch

import figures
import prepare_data
import text
from circuit import attribute_edges, best_edges, cut_edges, dead_heads, effects, explained, needed, patch_components, settles, sizes, without_dead_heads
from graph import Graph
from tasks import TaskError, Vocabulary, make_pairs, vocabulary

LEVELS = (0.8, 0.9, 0.95)
EXACT = 200  # edges: in a graph of so many or fewer every one is cut by itself


def vocabulary_of(name, size):
    """The tasks.Vocabulary of a model's tokenizer, by its name: one of text.TOKENIZERS, 'addition', or any other, which only `copy` fits."""
    if name in ("olmo", "olmo2"):
        tokens = text.tokenizer(name)
        return Vocabulary(name, size, lambda words: [int(i) for i in tokens.encode(words.encode())])
    return vocabulary(name) if name in ("gpt2", "bytes", "addition") else Vocabulary(name or "of its own", size, None)


def measure(model, pairs_to_score, pairs_to_test, metric, steps):
    """One model's curves: a dict of plain numbers, and what the figures want of it: scores (W, R), the edges of the 90 % circuit and what it explains."""
    graph = Graph(model.config.n_layer, model.config.n_head)
    dead = dead_heads(model, pairs_to_score + pairs_to_test)
    edges = without_dead_heads(graph, dead)
    if graph.edges.sum() <= EXACT:
        scores, components = cut_edges(model, pairs_to_score, metric, edges), patch_components(model, pairs_to_score, metric)
    else:
        scores = attribute_edges(model, pairs_to_score, metric, steps)
        components = scores.sum(dim=1)  # what a component writes reaches everything through its edges, and the derivative of a sum is the sum
    found = {"heads": int((~dead).sum()), "heads_off": int(dead.sum()), "edges": int(edges.sum())}

    def curve(counts, circuits):
        """Explained effect with its band; and the two metrics between which it lies."""
        clean, corrupted, values = effects(model, pairs_to_test, metric, circuits)
        if clean.mean() <= corrupted.mean():
            raise TaskError(f"a model does not know the task: {metric} {clean.mean():.2f} on clean prompts, {corrupted.mean():.2f} on corrupted ones. There is no effect to explain")
        share, low, high = (part.tolist() for part in explained(clean, corrupted, values))
        found["metric"] = {"clean": clean.mean().item(), "corrupted": corrupted.mean().item()}
        return {"n": counts, "explained": share, "low": low, "high": high, "needed": {str(level): needed([max(n, 1) for n in counts], share, level) for level in LEVELS}}

    is_head, always = torch.zeros(2, graph.W, dtype=torch.bool)
    for layer in range(graph.L):
        is_head[graph.writer("heads", layer)] = ~dead[layer]
        always[graph.writer("mlp", layer)] = True
    always[0] = True
    ranked = torch.where(is_head, components.abs(), -1.0).argsort(descending=True)
    counts = [0] + (list(range(1, found["heads"] + 1)) if found["heads"] <= 40 else sizes(found["heads"]))
    circuits = []
    for n in counts:
        kept = always.clone()
        kept[ranked[:n]] = True
        circuits.append(graph.of_components(kept))
    found["by_heads"] = curve(counts, circuits)

    circuits = {}  # by their size
    for n in sizes(found["edges"]):
        kept = graph.on_paths(best_edges(scores, edges, n))
        if kept.any():
            circuits.setdefault(int(kept.sum()), kept)
    found["by_edges"] = curve(list(circuits), list(circuits.values()))
    chosen = min(settles(found["by_edges"]["explained"], 0.9), len(circuits) - 1)
    return found, scores, list(circuits.values())[chosen], found["by_edges"]["explained"][chosen]


def ratio(dense, sparse, by, level):
    """How many times fewer the sparse model needs; None if one of the two never gets there."""
    a, b = (model[by]["needed"][str(level)] for model in (dense, sparse))
    return a / b if a and b else None


def compare(dense, sparse, tokenizer, task, n, seed, steps, folder):
    """Measure both models (of one vocabulary, the tokenizer's of that name), write circuit-<task>.json and the figures into folder; return the dict."""
    tokens = vocabulary_of(tokenizer, sparse.config.vocab_size)
    (to_score, metric), (to_test, _) = (make_pairs(task, n, part, tokens) for part in (2 * seed, 2 * seed + 1))
    seen = {tuple(pair.clean) for pair in to_score}
    to_test = [pair for pair in to_test if tuple(pair.clean) not in seen]
    if not to_test:
        raise TaskError(f"{task} has so few prompts that none is left to test on. Try a smaller --n")
    longest, room = max(len(pair.clean) for pair in to_score + to_test), min(model.config.block_size for model in (dense, sparse))
    if longest > room:
        raise TaskError(f"{task} has prompts of {longest} tokens, and a model has a context of {room}. Try another task, or a model with a larger block_size")
    graph = Graph(sparse.config.n_layer, sparse.config.n_head)
    result = {"task": task, "metric": metric, "pairs": n, "pairs_to_test": len(to_test), "seed": seed, "steps": steps}
    result["dense"], *_ = measure(dense, to_score, to_test, metric, steps)
    result["sparse"], scores, circuit, share = measure(sparse, to_score, to_test, metric, steps)
    result["fewer"] = {by: {str(level): ratio(result["dense"], result["sparse"], by, level) for level in LEVELS} for by in ("by_heads", "by_edges")}
    prepare_data.write_json(os.path.join(folder, f"circuit-{task}.json"), result)
    figures.circuit_curves(os.path.join(folder, f"circuit-{task}.png"), task, result)

    readers = graph.reader_names()
    kept = [(writer, graph.owner(reader), readers[reader].rpartition(" ")[2] if "." in readers[reader] else "", scores[writer, reader].item())
            for writer, reader in circuit.nonzero().tolist()]  # (from, to, as q, k or v, score)
    figures.circuit_graph(os.path.join(folder, f"circuit-{task}-graph.png"), graph.writer_names() + ["output"], graph.H, kept,
                          f"{task}: the {len(kept)} edges that explain {100 * share:.0f} % in the sparse model")

    weight = torch.zeros(graph.W)
    for writer, owner, _, score in kept:
        for end in (writer, owner):
            if end < graph.W:
                weight[end] += abs(score)
    busiest = [w for w in weight.argsort(descending=True).tolist() if weight[w] > 0 and "." in graph.writer_names()[w]][:5]
    if busiest:
        prompt, names = torch.tensor([to_test[0].clean], device=next(sparse.parameters()).device), tokens.encode and pieces_of(to_test[0].clean, tokens)
        rows = []
        for label, model in (("dense", dense), ("sparse", sparse)):
            layers = []
            model(prompt, record=lambda layer, gates: layers.append((gates.open * gates.pattern)[0].detach().cpu().numpy()))
            rows.append((label, [layers[(w - 1) // (graph.H + 1)][(w - 1) % (graph.H + 1)] for w in busiest]))
        figures.gallery(os.path.join(folder, f"circuit-{task}-gallery.png"), [f"head {graph.writer_names()[w]}" for w in busiest], names or [str(i) for i in to_test[0].clean], rows,
                        f"{task}: the circuit's strongest heads on one prompt")
    return result


def pieces_of(ids, tokens):
    if tokens.name == "addition":
        return [prepare_data.ADDITION_TOKENS[i] for i in ids]
    return text.pieces(ids, text.tokenizer(tokens.name))


def table(result):
    """The numbers as text: components and edges at 80, 90 and 95 %."""
    def number(x):
        return "-" if x is None else f"{x:.1f}" if x < 100 else f"{x:.0f}"

    lines = [f"{result['task']}, {result['metric']}; {result['pairs']} pairs to rank, {result['pairs_to_test']} others to test", f"{'':34} {'dense':>9} {'sparse':>9} {'fewer':>8}"]
    for key in ("clean", "corrupted"):
        lines.append(f"{'the metric, ' + key:34} {result['dense']['metric'][key]:9.2f} {result['sparse']['metric'][key]:9.2f}")
    for key, label in (("heads", "heads that open on these prompts"), ("edges", "edges among what is left")):
        lines.append(f"{label:34} {result['dense'][key]:9d} {result['sparse'][key]:9d}")
    for by, label in (("by_heads", "heads"), ("by_edges", "edges")):
        for level in LEVELS:
            a, b, fewer = result["dense"][by]["needed"][str(level)], result["sparse"][by]["needed"][str(level)], result["fewer"][by][str(level)]
            lines.append(f"{label + f' for {100 * level:.0f} % of the effect':34} {number(a):>9} {number(b):>9} {'-' if fewer is None else f'{fewer:.1f}x':>8}")
    return "\n".join(lines)
