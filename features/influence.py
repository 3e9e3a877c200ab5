"""What matters in an attribution graph: influence, pruning, two scores, and a ranking of heads and reads.

    A           |edge| as a share of all that comes into its target
    influence   w (A + A^2 + A^3 + ...)         w: the logits' probabilities. All paths to what is said

    kept        nodes with 80 % of the influence, and all tokens; of the edges between them those with 98 %
                of A_ts (influence_t + w_t); then features that nothing comes into, or out of, go
    replacement score     the tokens' influence beside that of tokens and errors
    completeness score    sum (1 - error's share of what comes in) (influence + w) / sum (influence + w)
    a head      sum over targets of (influence + w) sum_s |share| / sum_s |edge|
    an edge     (layer, head, query, key) likewise, of what the head reads at that key alone
    n80         the fewest heads, or edges, with 80 % of that, of all together

All but the last three are circuit-tracer's definitions. The paper says "5 heads against more than 40" without
its rule (arXiv 2512.05865, its last section): ours is ours. attribution_graph.py makes the graph.
"""

import torch

NODES, EDGES = 0.8, 0.98  # of the influence, that pruning keeps


def square(graph):
    """(n, n) of all nodes, sources then logits: |edge| as a share of all that comes into a target; and the
    weights (n,) of the nodes as ends, the logits' probabilities.
    """
    S, features = len(graph.sources), graph.n_features
    n = S + len(graph.chances)
    shares = graph.edges.abs() / graph.edges.abs().sum(1, keepdim=True).clamp(min=1e-30)
    matrix = shares.new_zeros(n, n)
    matrix[:features, :S] = shares[:features]
    matrix[S:, :S] = shares[features:]
    ends = shares.new_zeros(n)
    ends[S:] = graph.chances / graph.chances.sum()
    return matrix, ends


def influence_of(matrix, ends):
    """(n,): ends (A + A^2 + ...). The graph has no cycles, so the sum ends."""
    total, now = torch.zeros_like(ends), ends
    for _ in range(len(ends)):  # no path is longer
        now = now @ matrix
        if not now.any():
            break
        total = total + now
    return total


def of_kind(graph, kind):
    """Mask (n,) of the nodes of a kind."""
    return torch.tensor([node.kind == kind for node in graph.nodes], device=graph.edges.device)


def scores(graph):
    """{replacement, completeness}: the share of the tokens' influence beside the errors'; the share of what
    comes into the nodes that is no error, weighted by influence.
    """
    matrix, ends = square(graph)
    influence = influence_of(matrix, ends)
    is_error, is_token = of_kind(graph, "error"), of_kind(graph, "embedding")
    tokens, errors = influence[is_token].sum(), influence[is_error].sum()
    weight = influence + ends
    right = 1 - matrix[:, is_error].sum(1)
    return {"replacement": (tokens / (tokens + errors)).item(),
            "completeness": ((right * weight).sum() / weight.sum()).item()}


def least_that_hold(weights, share):
    """Mask of the fewest entries, the largest first, that hold `share` of the sum; where it is 0, of none."""
    ordered, order = weights.flatten().sort(descending=True)
    few = int((ordered.cumsum(0) < share * ordered.sum()).sum()) + 1 if ordered.any() else 0
    mask = torch.zeros(weights.numel(), dtype=torch.bool, device=weights.device)
    mask[order[:few]] = True
    return mask.view(weights.shape)


def pruned(graph):
    """(nodes (n,) bool, edges (n, n) bool) that are kept, of `square`'s nodes: those with NODES of the
    influence, tokens and logits, and of the edges between them those with EDGES of it; then features that
    nothing comes into or nothing comes out of go, until none is left; errors and biases that lead nowhere,
    too.
    """
    matrix, ends = square(graph)
    is_end = (ends > 0) | of_kind(graph, "embedding")
    keep = least_that_hold(influence_of(matrix, ends), NODES) | is_end
    matrix = matrix * keep[:, None] * keep
    matrix = matrix / matrix.sum(1, keepdim=True).clamp(min=1e-30)
    weights = matrix * (influence_of(matrix, ends) + ends)[:, None]
    edges = least_that_hold(weights, EDGES) & (weights > 0)
    is_feature = of_kind(graph, "feature")
    while True:
        alive = keep & (is_end | edges.any(0)) & (~is_feature | edges.any(1))
        if torch.equal(alive, keep):
            return keep, edges
        keep = alive
        edges = edges & keep[:, None] & keep


def weights_of_targets(graph):
    """(targets,): influence + w, divided by all that comes in."""
    matrix, ends = square(graph)
    weight = influence_of(matrix, ends) + ends
    of_targets = torch.cat([weight[:graph.n_features], weight[len(graph.sources):]])
    return of_targets / graph.edges.abs().sum(1).clamp(min=1e-30)


def heads_of(graph):
    """(L, H): how much each head carries."""
    return (weights_of_targets(graph)[:, None, None] * graph.through).sum(0)


def attention_edges_of(graph):
    """(L, H, T, T): how much each attention edge carries, query by key."""
    T = graph.reads.shape[-1]
    queries = torch.tensor([node.position for node in graph.targets], device=graph.edges.device)
    weighted = weights_of_targets(graph)[:, None, None, None] * graph.reads  # (targets, L, H, key)
    found = weighted.new_zeros(T, *weighted.shape[1:]).index_add_(0, queries, weighted)
    return found.permute(1, 2, 0, 3)


def n80(weights):
    """The fewest entries, heads or attention edges, that hold 80 % of the sum of all."""
    return int(least_that_hold(weights, 0.8).sum())
