"""Attribution graphs: which features, through which heads, made a model say this on this prompt?

The *local replacement model* of a prompt: a transcoder in place of the MLPs (transcoder.py), an error node
for what it gets wrong, at every layer and position, and everything that is not linear frozen at its value on
this prompt: attention weights A_ij p_ij, gates included, and the standard deviations of the LayerNorms. What
it computes is the model's own, exactly; and between a feature and what feeds it everything is linear:

    sources   embeddings (token and position), features that fire, errors, and one node for all biases
    targets   z, the pre-activation of a feature that fires; logits, minus the mean over the vocabulary

    edge(s -> t) = t's reading of what s has written = direct + sum over heads of share(s, t, l, h)
    share(s, t, l, h) = enc_t . LN_t[ W_O^h sum_j A_ij p_ij W_V^h LN_j dx_j^l(s) ]

dx_j^l(s): what of the residual stream below layer l at position j is due to s. A path through several heads
is counted once, at its last one. So all edges into t sum to z_t, and its shares and direct part to each edge.

Why is an edge of attention open? The score is bilinear in what both ends have read, so it splits as well:

    a_ij = sum over pairs of sources (r at i, s at j) of  u_r^T W_Q^T W_K u_s / sqrt(D),   u = LN dx^l

Notable:
- Unlike in circuit-tracer position 0 counts, an embedding holds its position, and biases have a node.
- Which nodes, edges and heads matter: influence.py.
- LayerNorm's gains and biases take part in every formula above. With gains of 1 one would not notice.
Sources: Anthropic 2025, "Circuit tracing"; Ameisen et al.; the paper's last section (arXiv 2512.05865).
"""

import math
from typing import NamedTuple

import torch

from features.transcoder import read_and_written
from storage.files import UserError

QUERY, KEY, VALUE = range(3)
BIAS = -1  # the last source
LOGITS, COVERED = 10, 0.95  # at most so many logits are targets; the likeliest, up to so much probability


class Node(NamedTuple):
    kind: str  # 'embedding', 'feature', 'error', 'bias' or 'logit'
    layer: int  # of features and errors, else -1
    position: int  # -1 of the bias node
    number: int  # of the feature, or the token of an embedding or logit, else -1


class AttributionGraph(NamedTuple):
    """S sources, of which the first N features are also the first targets; then come the logits."""

    sources: list  # of Node: features, then embeddings, errors, the bias
    targets: list  # of Node: the same features, then logits
    edges: torch.Tensor  # (targets, S), edge(s -> t)
    through: torch.Tensor  # (targets, L, H), sum over sources of |share|
    net: torch.Tensor  # (targets, L, H), sum over sources of share
    # (targets, L, H, T), as `through` of what the head reads at each position alone: in sum no less than that
    reads: torch.Tensor
    values: torch.Tensor  # (targets,) z of a feature; a logit minus the mean one
    chances: torch.Tensor  # (logits,) probability
    streams: torch.Tensor  # (L, S, T, C) dx^l, below each layer
    mixed: torch.Tensor  # (L, S, T, H, D) what of a head's mixed values is due to each source
    readers: torch.Tensor  # (targets, C) by which a target reads the residual stream at its position
    spread: dict  # of Frozen

    @property
    def n_features(self):
        """How many features fire: the first sources, and the first targets."""
        return len(self.targets) - len(self.chances)

    @property
    def nodes(self):
        """All nodes, each once: the sources, then the logits."""
        return self.sources + self.targets[self.n_features:]

    def row_of(self, i):
        """The number among the targets of node i, a feature or a logit."""
        return i if i < self.n_features else i - len(self.sources) + self.n_features


class Frozen(NamedTuple):
    """What is frozen on a prompt, and what the transcoder made of it."""

    attention: list  # A_ij p_ij (H, T, T) of every layer
    spread: dict  # {LayerNorm module: standard deviation (T, 1)}
    features: torch.Tensor  # a (T, L, F)
    errors: torch.Tensor  # MLP output - transcoder's (T, L, C)
    logits: torch.Tensor  # (T, V)


@torch.no_grad()
def freeze(model, coder, tokens):
    """Frozen, of one prompt, tokens (T,). coder: a Transcoder with its scales folded."""
    spread, attention, logits = {}, [], []

    def look(norm, arguments, output):
        spread[norm] = (arguments[0][0].var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()

    norms = [norm for block in model.blocks for norm in (block.ln_1, block.ln_2)] + [model.transformer.ln_f]
    hooks = [norm.register_forward_hook(look) for norm in norms]
    hooks.append(model.lm_head.register_forward_hook(lambda head, x, output: logits.append(output[0])))
    try:
        x, y = read_and_written(model, tokens[None],
                                record=lambda layer, gates: attention.append(gates.weights[0]))
    finally:
        for hook in hooks:
            hook.remove()
    return Frozen(attention, spread, coder.features(x)[0], (y - coder(x))[0], logits[0])


def centred(norm, spread, x):
    """LayerNorm with a frozen spread, without its bias: linear. x (..., C), spread (..., 1)."""
    return norm.weight * (x - x.mean(-1, keepdim=True)) / spread


def centred_back(norm, spread, readers):
    """What reads x as readers (R, C) read centred(norm, spread, x): the transpose of that."""
    gains = norm.weight * readers / spread
    return gains - gains.mean(-1, keepdim=True)


def bias_of(module, like):
    """A module's bias, or zeros where it has none."""
    return like.new_zeros(()) if module.bias is None else module.bias


class Heads(NamedTuple):
    """What the heads of one layer carry of each of S sources."""

    weights: torch.Tensor  # A_ij p_ij (H, T, T)
    v: torch.Tensor  # values (H, T, S, D)
    mixed: torch.Tensor  # sums of values by weight (S, T, H, D)
    w_o: torch.Tensor  # (H, D, C)


class Rows(NamedTuple):
    """R targets at one position: as the fields of the same names of AttributionGraph."""

    edges: torch.Tensor  # (R, S)
    through: torch.Tensor  # (R, L, H)
    net: torch.Tensor  # (R, L, H)
    reads: torch.Tensor  # (R, L, H, T)
    values: torch.Tensor  # (R,)
    readers: torch.Tensor  # (R, C)


def rows_of(norm, spread, stream, i, heads, L, readers, biases, values):
    """Rows of the targets whose readers (R, C) read norm(stream) at position i, and add biases to it.

    spread: of the norm, (T, 1); stream (S, T, C); heads: Heads of all layers below, of L; values (R,)
    """
    back = centred_back(norm, spread[i], readers)  # (R, C) that read the stream itself
    edges = back @ stream[:, i].T
    edges[:, BIAS] += readers @ bias_of(norm, back).expand(back.shape[1]) + biases
    H, T, S, _ = heads[0].v.shape
    through, net = back.new_zeros(2, len(back), L, H)
    reads = back.new_zeros(len(back), L, H, T)
    for layer, (weights, v, mixed, w_o) in enumerate(heads):
        heard = w_o @ back.T  # (H, D, R), that read what a head has mixed
        shares = torch.einsum("shd,hdr->rsh", mixed[:, i], heard)
        through[:, layer], net[:, layer] = shares.abs().sum(1), shares.sum(1)
        by_key = (v[:, :i + 1].flatten(1, 2) @ heard).view(H, i + 1, S, len(back))
        reads[:, layer, :, :i + 1] = (weights[:, i, :i + 1, None] * by_key.abs().sum(2)).permute(2, 0, 1)
    return Rows(edges, through, net, reads, values, back)


@torch.no_grad()
def graph_of(model, coder, tokens, at=-1, answer=None):
    """The AttributionGraph of one prompt, tokens (T,), in evaluation mode. at: the position whose logits are
    targets; answer: the one token whose logit is a target, in place of the likeliest. Raises UserError where
    what the transcoder makes of the prompt is not finite.
    """
    coder = coder.folded()
    frozen = freeze(model, coder, tokens)
    if not (frozen.errors.isfinite().all() and frozen.logits.isfinite().all()):
        raise UserError("this transcoder makes NaN or infinite numbers of the prompt, so there is no graph. "
                        "Train another: python analyze.py transcode RUN --lr=1e-4 --name=ANOTHER")
    parts, T, L, H = model.transformer, len(tokens), model.config.n_layer, model.config.n_head
    fires = frozen.features.transpose(0, 1).nonzero().tolist()  # by layer, then position
    features = [Node("feature", layer, position, number) for layer, position, number in fires]
    embeddings = [Node("embedding", -1, j, int(tokens[j])) for j in range(T)]
    errors = [Node("error", layer, j, -1) for layer in range(L) for j in range(T)]
    sources = [*features, *embeddings, *errors, Node("bias", -1, -1, -1)]

    dx = frozen.errors.new_zeros(len(sources), T, model.config.n_embd)  # of the stream, due to each source
    dx[range(len(features), len(features) + T), range(T)] = (
        parts.wte(tokens) + parts.wpe(torch.arange(T, device=tokens.device)))
    streams, heads, rows = [], [], []
    for layer, block in enumerate(model.blocks):
        streams.append(dx)
        v = parts_of(block, frozen.spread[block.ln_1], dx, VALUE, H)  # (S, T, H, D)
        mixed = torch.einsum("hij,sjhd->sihd", frozen.attention[layer], v)
        w_o = writing(block, H)
        heads.append(Heads(frozen.attention[layer], v.permute(2, 1, 0, 3).contiguous(), mixed, w_o))
        middle = dx + torch.einsum("sihd,hdc->sic", mixed, w_o)
        middle[BIAS] += bias_of(block.attn.c_proj, dx)
        for i in range(T):
            numbers = frozen.features[i, layer].nonzero().flatten()
            rows.append(rows_of(block.ln_2, frozen.spread[block.ln_2], middle, i, heads, L,
                                coder.encoder[layer, numbers], coder.b_enc[layer, numbers],
                                frozen.features[i, layer, numbers]))
        dx = with_mlp(middle, layer, sources, frozen, coder)

    at = at % T
    answers, chances = likeliest(frozen.logits[at]) if answer is None else ([answer], torch.ones(1).to(dx))
    rows.append(rows_of(parts.ln_f, frozen.spread[parts.ln_f], dx, at, heads, L,
                        model.lm_head.weight[answers] - model.lm_head.weight.mean(0), 0.0,
                        frozen.logits[at, answers] - frozen.logits[at].mean()))
    return AttributionGraph(sources, features + [Node("logit", -1, at, token) for token in answers],
                            chances=chances, streams=torch.stack(streams), spread=frozen.spread,
                            mixed=torch.stack([layer.mixed for layer in heads]),
                            **Rows(*map(torch.cat, zip(*rows)))._asdict())


def with_mlp(dx, layer, sources, frozen, coder):
    """dx (S, T, C), and what the features, the error and the bias in place of a layer's MLP write."""
    dx, decoders = dx.clone(), coder.decoders()
    dx[BIAS] += coder.b_dec[layer]
    for s, node in enumerate(sources):
        if node.kind == "feature" and node.layer <= layer:
            a = frozen.features[node.position, node.layer, node.number]
            dx[s, node.position] += a * decoders[node.layer, layer, node.number]
        elif node.kind == "error" and node.layer == layer:
            dx[s, node.position] += frozen.errors[node.position, layer]
    return dx


def writing(block, H):
    """(H, D, C): what a head writes is its mixed values times this."""
    C = block.attn.c_proj.weight.shape[0]
    return block.attn.c_proj.weight.T.view(H, C // H, C)


def likeliest(logits):
    """The likeliest tokens of logits (V,), a list: COVERED of the probability, LOGITS at most; and their
    probabilities.
    """
    chances, tokens = logits.softmax(-1).topk(min(LOGITS, len(logits)))
    most = int((chances.cumsum(0) < COVERED).sum()) + 1
    return tokens[:most].tolist(), chances[:most]


def parts_of(block, spread, dx, role, H):
    """(S, T, H, D): the part of each head's queries, keys or values (role) that is due to each source,
    dx (S, T, C), the last being the biases.
    """
    C = dx.shape[-1]
    weight = block.attn.c_attn.weight.view(3, H, C // H, C)[role]
    u = centred(block.ln_1, spread, dx)
    u[-1] += bias_of(block.ln_1, dx)
    found = torch.einsum("stc,hdc->sthd", u, weight)
    found[-1] += bias_of(block.attn.c_attn, dx).expand(3 * C).view(3, H, C // H)[role]
    return found


@torch.no_grad()
def shares_of(model, graph, t, s):
    """(L, H): share(s, t, l, h) of one edge, from the source to the target of these numbers."""
    node, H = graph.targets[t], model.config.n_head
    found = graph.readers.new_zeros(len(model.blocks), H)
    for layer, block in enumerate(model.blocks):
        if node.kind == "logit" or layer <= node.layer:
            heard = writing(block, H) @ graph.readers[t]
            found[layer] = (graph.mixed[layer, s, node.position] * heard).sum(-1)
    return found


@torch.no_grad()
def why_open(model, graph, layer, head, i, j):
    """(S, S): what each pair of sources, one at the query i, one at the key j, adds to the score a_ij."""
    block, dx, H = model.blocks[layer], graph.streams[layer], model.config.n_head
    q, k = (parts_of(block, graph.spread[block.ln_1], dx, role, H)[:, :, head] for role in (QUERY, KEY))
    return q[:, i] @ k[:, j].T / math.sqrt(q.shape[-1])
