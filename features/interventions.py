"""Does an attribution graph say what happens? Features and heads cut in the real model, nothing frozen.

    total(s)      edge(s -> answer) + sum over features t of edge(s -> t) / z_t * total(t)
    total(l, h)   share(answer, l, h) + sum over features t of share(t, l, h) / z_t * total(t)
    foretold      - total
    seen          the answer's logit, minus the mean one, without it; minus the same with it

The graph is linear, so it foretells what the answer gains when all that a feature or a head has written is
taken away (z_t falls by edge(s -> t), and what t passes on falls with it). In the real model attention,
gates, LayerNorms and MLPs all answer to the cut. If the graph is right, the sign is mostly the same, and what
it ranks high moves the answer more than what it does not. The first is easily had: a transcoder that was
never trained foretells signs as well. The second is not: what it finds hardly moves the answer.

Notable:
- A feature is cut by taking its writes a W_dec off what the MLPs write, at its position, in its own and all
  later layers: the model keeps its MLPs, and with them what the transcoder gets wrong.
- A head is cut at all positions. Foretold are the paths on which it is the last head before a feature or the
  answer (attribution_graph.py counts them there); what goes on through other heads is left out.
- Cutting is deterministic; random nodes are drawn from those that the ranking left over.
"""

import contextlib
import math
from typing import NamedTuple

import torch

from features.influence import heads_of, influence_of, square

FEATURES, HEADS = 10, 3  # the strongest so many are cut, and as many others


class CutEffect(NamedTuple):
    """What one cut does to the answer, nats."""

    foretold: float
    seen: float


def totals(graph):
    """(S,): what of the likeliest answer's logit is due to each source, over all paths."""
    n = graph.n_features
    passed_on = graph.edges[:n] / graph.values[:n, None]
    total = graph.edges[n]
    for _ in range(n + 1):  # no path is longer
        before, total = total, graph.edges[n] + total[:n] @ passed_on
        if torch.allclose(before, total, rtol=1e-12, atol=1e-12):
            break
    return total


def totals_of_heads(graph):
    """(L, H): what of it passes each head last, on the way to a feature or to the answer."""
    n = graph.n_features
    weights = totals(graph)[:n] / graph.values[:n]
    return graph.net[n] + torch.einsum("t,tlh->lh", weights, graph.net[:n])


@torch.no_grad()
def answer_of(model, tokens, node, keep=None):
    """The logit of a graph's answer, its Node, minus the mean one there. tokens (T,); keep as in model.py."""
    logits = model(tokens[None], keep=keep)[0][0, node.position]
    return (logits[node.number] - logits.mean()).item()


@contextlib.contextmanager
def without(model, coder, features):
    """While this lasts, what these features, Nodes, write is taken off what the MLPs write. coder: a
    Transcoder with its scales folded. What they would write is found on the way, so a batch may have many
    prompts.
    """
    decoders, fires, hooks = coder.decoders(), {}, []

    def cut_in(layer):
        def cut(mlp, arguments, output):
            output = output.clone()
            for feature in features:
                if feature.layer == layer:
                    z = arguments[0][:, feature.position] @ coder.encoder[layer, feature.number]
                    z = z + coder.b_enc[layer, feature.number]
                    fires[feature] = z * (z > coder.log_theta[layer, feature.number].exp())
                if feature.layer <= layer:
                    written = fires[feature][:, None] * decoders[feature.layer, layer, feature.number]
                    output[:, feature.position] -= written
            return output

        return cut

    for layer, block in enumerate(model.blocks):
        hooks.append(block.mlp.register_forward_hook(cut_in(layer)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def without_head(model, tokens, layer, head, answer):
    """answer_of, with all edges of a head shut."""
    T = len(tokens)
    shape = (model.config.n_layer, model.config.n_head, T, T)
    keep = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    keep[layer, head] = False
    return answer_of(model, tokens, answer, keep)


def strongest_and_others(strength, most, seed):
    """([index] of the `most` strongest, [index] of as many others, drawn). strength (n,): 0 takes no part."""
    order = strength.argsort(descending=True)[:int((strength > 0).sum())]
    rest = order[most:]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:most]
    return order[:most].tolist(), rest[drawn].tolist()


def interventions(model, coder, tokens, graph, seed=0):
    """{'features', 'heads': ([CutEffect] of the strongest, [CutEffect] of others)}, on one prompt's graph, an
    AttributionGraph.
    """
    n, coder = graph.n_features, coder.folded()
    answer, due, due_to_heads = graph.targets[n], totals(graph), totals_of_heads(graph)
    before, H = answer_of(model, tokens, answer), due_to_heads.shape[1]

    def of_feature(i):
        with without(model, coder, [graph.sources[i]]):
            after = answer_of(model, tokens, answer)
        return CutEffect(-due[i].item(), after - before)

    def of_head(i):
        after = without_head(model, tokens, i // H, i % H, answer)
        return CutEffect(-due_to_heads.flatten()[i].item(), after - before)

    found = {}
    for kind, strength, most, cut in (("features", influence_of(*square(graph))[:n], FEATURES, of_feature),
                                      ("heads", heads_of(graph).flatten(), HEADS, of_head)):
        found[kind] = tuple([cut(i) for i in some] for some in strongest_and_others(strength, most, seed))
    return found


def in_short(cuts):
    """{'same_sign', 'strongest', 'others', 'correlation'} of one kind of cuts, [(strongest, others)] of many
    prompts: the share of the strongest whose sign was foretold; how far the strongest and the others move the
    answer, the mean of |seen|; the correlation of foretold and seen over all. None of nothing.
    """
    first, others = ([cut for pair in cuts for cut in pair[part]] for part in (0, 1))
    same = [cut.foretold * cut.seen > 0 for cut in first]
    found = {"same_sign": mean(same), "strongest": mean([abs(cut.seen) for cut in first]),
             "others": mean([abs(cut.seen) for cut in others]), "correlation": None}
    if len(first) + len(others) > 2:
        correlation = torch.corrcoef(torch.tensor([*first, *others]).T)[0, 1].item()
        found["correlation"] = correlation if math.isfinite(correlation) else None  # all cuts do the same
    return found


def mean(values):
    """Their mean; None of nothing."""
    return sum(values) / len(values) if values else None
