"""Rules by which attention edges can be cut, each in a line or two, in place of the gate's.

    level(scores, k, layer)     what a layer's heads need to know to keep k edges a query, once
    weights(scores, level)      what they attend to: 0 where an edge is cut; what is left of a row sums to 1

scores (B, H, T, T) are q k / sqrt(D), -inf above the diagonal. baselines.py says what each rule is, and races
them. Notable: a rule stands in for `attend` (circuits/attention_edges.py) and shows its gates as the gate
does, so attention is written once here, and whatever looks at gates can look at these.
"""

import math

import torch

from gate import Gates, shared_among_heads

HALVINGS = 30  # of the interval in which the number of entmax is looked for


def softmax_of(scores, kept):
    """Softmax over the kept causal pairs; a row of which nothing is kept is 0."""
    return scores.masked_fill(~kept, -math.inf).softmax(-1).nan_to_num()


def largest(scores, k):
    """Top-k. k is rounded."""
    k = min(max(1, round(k)), scores.shape[-1])
    return softmax_of(scores, scores >= scores.topk(k, dim=-1).values[..., -1:])


def thresholds(scores, k, layer):
    """(H, 1, 1): the weight that k edges a query are above, in each head."""
    B, H, T, _ = scores.shape
    weights = scores.softmax(-1).transpose(0, 1).reshape(H, -1)
    rank = min(max(1, round(k * B * T)), weights.shape[1])
    return weights.topk(rank, dim=-1).values[:, -1, None, None]


def shared_threshold(scores, k, layer):
    """(1, 1, 1): the weight that k edges a query and head are above, over all heads of the layer."""
    return thresholds(scores.flatten(0, 1)[:, None], k, layer)  # all heads as one


def above(scores, level):
    """The weights that are above level (H or 1, 1, 1), as shares of what they are together."""
    weights = scores.softmax(-1)
    kept = weights * (weights >= level)
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


def recent(scores, k):
    """The window and its sink."""
    T = scores.shape[-1]
    position = torch.arange(T, device=scores.device)
    distance = position[:, None] - position
    window = distance < max(1, round(k) - 1)
    sink = (position == 0) & (round(k) > 1)
    return softmax_of(scores, window | sink)


def drawn(scores, k, layer):
    """(H, T, T) bool: k T of every head's causal pairs, drawn once, others in every layer."""
    H, T = scores.shape[1:3]
    numbers = torch.rand(H, T, T, generator=torch.Generator().manual_seed(layer)).tril()
    rank = min(max(1, round(k * T)), T * (T + 1) // 2)
    return (numbers >= numbers.flatten(1).topk(rank).values[:, -1, None, None]).to(scores.device)


def entmax_of(scores, scale):
    """1.5-entmax of scores times scale (H, 1, 1)."""
    from entmax import entmax15

    low = torch.finfo(scores.dtype).min / 1e6  # -inf makes its gradient nan
    return entmax15((scores * scale).masked_fill(~causal(scores), low), dim=-1)


def scales(scores, k, layer):
    """(H, 1, 1): the scale at which 1.5-entmax leaves k edges a query, in each head, by bisection."""
    low, high = (torch.full((scores.shape[1], 1, 1), x, device=scores.device) for x in (-7.0, 7.0))
    for _ in range(HALVINGS):
        middle = (low + high) / 2  # of the logarithm
        too_many = (entmax_of(scores, middle.exp()) > 0).float().sum(-1).mean((0, 2))[:, None, None] > k
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return high.exp()


def causal(scores):
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


RULES = {  # name: (level, weights)
    "top-k": (lambda scores, k, layer: k, largest),
    "threshold": (thresholds, above),
    "shared": (shared_threshold, above),
    "window": (lambda scores, k, layer: k, recent),
    "entmax": (scales, entmax_of),
    "random": (drawn, lambda scores, kept: softmax_of(scores, kept[:, :scores.shape[2], :scores.shape[3]])),
}


class RuleAttention:
    """A rule at a budget k, standing in for a model's attention: `attending(model, cut)`.

    fitting: choose the levels anew in every pass, layer by layer, so that a layer sees what those below left.
    """

    def __init__(self, rule, k):
        self.level, self.weights = RULES[rule]
        self.k, self.levels, self.fitting = k, {}, True

    def __call__(self, layer, original, q, k, v, keep=None, return_gates=False, **of_the_gate):
        """As `gate.gated_attention`, of which it knows keep and return_gates."""
        k, v = shared_among_heads(k, q), shared_among_heads(v, q)
        with torch.autocast(q.device.type, enabled=False):
            scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        scores = scores.masked_fill(~causal(scores), -math.inf)
        if self.fitting:
            with torch.no_grad():
                self.levels[layer] = self.level(scores.detach(), self.k, layer)
        weights = self.weights(scores, self.levels[layer])
        gates = (weights > 0).to(weights.dtype) * (1 if keep is None else keep)
        y = (gates * weights).to(v.dtype) @ v
        return y, q.new_ones(()), Gates(gates, weights) if return_gates else None
