"""Transcoders: what an MLP computes, said with few features at a time.

    z^l = W_enc^l x^l + b_enc^l                         x^l: what the MLP of layer l reads, normalised
    a^l = JumpReLU(z^l) = z^l where z^l > theta^l, else 0             features, most of them 0
    y^l = sum over l' <= l of W_dec^{l'->l} a^{l'} + b_dec^l          stands in for the MLP's output

With decoders into its own layer and all later ones it is a *cross-layer* transcoder (CLT; Anthropic 2025,
"Circuit tracing"); with cross=False, into its own alone, a per-layer one, the control: a CLT may say two hops
in one (Lange et al. 2026). Trained to

    L = sum_l |y^l - MLP^l|^2  +  c sum_i tanh(4 |W_i| a_i)  +  d sum_i ReLU(theta_i - z_i) |W_i|

the squared error, a price for every feature that fires, the same for all that are not weak, and a pull that
brings features back that never fire. |W_i|: all decoders of feature i together. Means over tokens.

Notable:
- x and MLP^l are scaled to a mean norm of sqrt(C), layer by layer, so that c means the same everywhere;
  `folded` takes the scales into the weights, and what stands above holds for the model's own numbers.
- A threshold has no gradient. JumpReLU's by theta is that of a rectangle of width 1 around it,
  straight-through (Rajamanoharan et al. 2024).
- Features start out firing on FIRES of the tokens, by a choice of b_enc.
- `replacing` runs a model with its MLPs replaced: what a later layer reads then is what the features made.
"""

import contextlib
import math

import torch
from torch import nn

FIRES = 0.05  # share of tokens on which a feature fires at the start
THRESHOLD = 0.03  # at the start
WIDTH = 1.0  # of the rectangle


class JumpReLU(torch.autograd.Function):
    """z where z > theta, else 0. z (..., F); theta (F,), above 0."""

    @staticmethod
    def forward(ctx, z, theta):
        ctx.save_for_backward(z, theta)
        return z * (z > theta)

    @staticmethod
    def backward(ctx, gradient):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < WIDTH / 2).to(z.dtype) / WIDTH
        by_theta = (-theta * near * gradient).flatten(0, -theta.dim() - 1).sum(0)
        return gradient * (z > theta), by_theta


class Transcoder(nn.Module):
    """L layers of F features each, for MLPs that read and write C numbers."""

    def __init__(self, L, C, F, cross=True):
        super().__init__()
        self.shape = {"L": L, "C": C, "F": F, "cross": cross}
        self.encoder = nn.Parameter(torch.empty(L, F, C).uniform_(-1, 1) / math.sqrt(F))
        self.b_enc = nn.Parameter(torch.zeros(L, F))
        self.log_theta = nn.Parameter(torch.full((L, F), math.log(THRESHOLD)))
        # [from layer, to layer]; only to the same or a later one
        self.decoder = nn.Parameter(torch.empty(L, L, F, C).uniform_(-1, 1) / math.sqrt(L * C))
        self.b_dec = nn.Parameter(torch.zeros(L, C))
        reaches = torch.ones(L, L).triu() if cross else torch.eye(L)
        self.register_buffer("reaches", reaches[:, :, None, None])
        self.register_buffer("scale_in", torch.ones(L, 1))
        self.register_buffer("scale_out", torch.ones(L, 1))

    def decoders(self):
        """W_dec (from L, to L, F, C), 0 where a layer does not reach."""
        return self.decoder * self.reaches

    def pre_activations(self, x):
        """z (..., L, F) of scaled x (..., L, C)."""
        return torch.einsum("...lc,lfc->...lf", x, self.encoder) + self.b_enc

    def features(self, x):
        """a (..., L, F) of what MLPs read, x (..., L, C), as the model has it."""
        return JumpReLU.apply(self.pre_activations(x * self.scale_in), self.log_theta.exp())

    def forward(self, x):
        """What the MLPs would write, (..., L, C), of what they read, x (..., L, C)."""
        y = torch.einsum("...mf,mlfc->...lc", self.features(x), self.decoders()) + self.b_dec
        return y / self.scale_out

    def loss(self, x, y, c, d):
        """The equation above, and its squared error alone, both means over tokens. x, y (N, L, C)."""
        z = self.pre_activations(x * self.scale_in)
        theta, decoders = self.log_theta.exp(), self.decoders()
        a = JumpReLU.apply(z, theta)
        off = torch.einsum("nmf,mlfc->nlc", a, decoders) + self.b_dec - y * self.scale_out
        error = off.square().sum((1, 2)).mean()
        size = decoders.square().sum((1, 3)).sqrt()  # |W_i| (L, F)
        price = torch.tanh(4 * size * a).sum((1, 2)).mean()
        asleep = ((theta - z).relu() * size).sum((1, 2)).mean()
        return error + c * price + d * asleep, error

    @torch.no_grad()
    def start(self, x, y):
        """Scales, biases and firing rates for tokens like these. x, y (N, L, C); changes self in place."""
        C = x.shape[-1]
        self.scale_in.copy_(math.sqrt(C) / x.norm(dim=-1).mean(0)[:, None])
        self.scale_out.copy_(math.sqrt(C) / y.norm(dim=-1).mean(0)[:, None])
        self.b_dec.copy_(y.mean(0) * self.scale_out)
        z = self.pre_activations(x * self.scale_in)
        self.b_enc.sub_(z.quantile(1 - FIRES, dim=0) - self.log_theta.exp())

    @torch.no_grad()
    def folded(self):
        """The same function with the scales in its weights: scale_in = scale_out = 1."""
        same = Transcoder(**self.shape).to(self.encoder)
        same.load_state_dict(self.state_dict())
        same.encoder.mul_(self.scale_in[:, None])
        same.decoder.div_(self.scale_out[None, :, None])
        same.b_dec.div_(self.scale_out)
        same.scale_in.fill_(1)
        same.scale_out.fill_(1)
        return same


# ------------------------------------------------------------------------------------------------------------
# With a model


@torch.no_grad()
def read_and_written(model, tokens, **options):
    """What every MLP reads and what it writes, both (B, T, L, C). tokens (B, T); options: of the model."""
    read, written = [], []

    def look(mlp, arguments, output):
        read.append(arguments[0])
        written.append(output)

    hooks = [block.mlp.register_forward_hook(look) for block in model.blocks]
    try:
        model(tokens, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(read, dim=2), torch.stack(written, dim=2)


@contextlib.contextmanager
def replacing(model, transcoder):
    """While this lasts, `transcoder` stands in for the model's MLPs."""
    plain, so_far = transcoder.folded(), []  # so_far: features of the layers below, in this run
    decoders = plain.decoders()

    def mlp(layer):
        def forward(x):
            if layer == 0:
                so_far.clear()
            z = x @ plain.encoder[layer].T + plain.b_enc[layer]
            so_far.append(JumpReLU.apply(z, plain.log_theta[layer].exp()))
            return plain.b_dec[layer] + sum(a @ decoders[below, layer] for below, a in enumerate(so_far))
        return forward

    for layer, block in enumerate(model.blocks):
        block.mlp.forward = mlp(layer)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.mlp.forward  # the class's own is seen again


@torch.no_grad()
def quality(model, transcoder, batches):
    """How well it stands in, on batches of (tokens, targets), (B, T) each, a dict:

    explained  share of the variance of what the MLPs write, all layers together, and by_layer
    l0         features that fire on a token, a layer
    dead       share of features that fire on none of these tokens
    kl_where_asked      KL(model || model with its MLPs replaced), nats, mean over the tokens with a target
                        (not -1): what a model says where nobody asks was never trained
    agrees_where_asked  share of equal first choices there
    """
    parts = [sums_of_quality(model, transcoder, *batch) for batch in batches]
    n, y, y_squared, off, fires, asked, kl, agrees = (sum(part) for part in zip(*parts))
    spread = (y_squared - y.square() / n).sum(-1)  # (L,)
    return {
        "explained": 1 - (off.sum() / spread.sum()).item(),
        "by_layer": (1 - off / spread).tolist(),
        "l0": fires.sum().item() / n / len(fires),
        "dead": (fires == 0).double().mean().item(),
        "kl_where_asked": kl.item() / asked,
        "agrees_where_asked": agrees.item() / asked,
    }


def sums_of_quality(model, transcoder, tokens, targets):
    """Sums over the n tokens of one batch: (n, y (L, C), y^2 (L, C), squared error (L,), firings (L, F)), and
    over those with a target: (how many, KL, equal first choices).
    """
    tokens, asked = tokens.to(transcoder.encoder.device), targets != -1
    x, y = read_and_written(model, tokens)
    off, fires = transcoder(x) - y, transcoder.features(x) > 0  # (B, T, L, C), (B, T, L, F)
    before = model(tokens)[0][asked].log_softmax(-1)  # (asked, V)
    with replacing(model, transcoder):
        after = model(tokens)[0][asked].log_softmax(-1)
    y = y.double()
    return (tokens.numel(), y.sum((0, 1)), y.square().sum((0, 1)), off.double().square().sum((0, 1, 3)),
            fires.sum((0, 1)), len(before), (before.exp() * (before - after)).sum(dtype=torch.float64),
            (before.argmax(-1) == after.argmax(-1)).sum())
