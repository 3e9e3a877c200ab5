"""LoRA: train a low-rank change of some matrices instead of the matrices.

    y = W x + (alpha / r) B A x            W (out, in) frozen; A (r, in) random, B (out, r) zero at first, so
                                           that training starts from the model as it is
    y = (w + d) x / rms(x)                 a norm: w (C,) frozen, d (C,) zero at first

For OLMo the paper trains such adapters: r (in + out) numbers per matrix instead of in * out. With r far below
both, optimizer, gradients and checkpoint are small, and the dense teacher needs no memory of its own, because
it is the same model with the adapters switched off (`Base`).

Which matrices? The gate is a function of q and k alone, so their projections are what moves edges; with v, o
and the MLP the model can also make up for what it does not read any more. `lora_targets` says which. An
embedding that is both the input's and the output's gets one adapter for both, `model.tie`.

And the norms of q and k, where a model has them (OLMo 2). Such a norm fixes the total size of a position's
queries, so W_q can only give more of it to one head and less to another. The gate compares scores with a
constant: to make all of them larger or smaller the norm's weights have to be free. Frozen, they left twice as
many edges open in the beginning of a run, at a higher loss (3.6 instead of 1.7 %: an OLMo 2 of 4 layers, 128
wide, rank 32, 2,000 steps).

Notable:
- A frozen matrix keeps its name in the model; its adapter stands beside it: `...q_proj.weight`,
  `...q_proj.lora_a`, `...q_proj.lora_b`.
- `merge` adds (alpha / r) B A to W, and d to w: then the model is an ordinary one again, and the outputs are
  the same up to rounding. Source: Hu et al. 2021; A's initialisation is that of the authors' loralib.
"""

import contextlib
import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from storage.files import UserError


class Adapter(nn.Module):
    """A layer, its weight frozen, and a change of this weight beside it. `on` = False leaves the change out.
    """

    def __init__(self, layer):
        super().__init__()
        self.weight, self.on = layer.weight.requires_grad_(False), True

    def plain(self):
        """An ordinary layer with the same weight, without the change."""
        layer = self.empty()
        layer.weight = self.weight
        return layer


class LoRAMatrix(Adapter):
    """A layer whose weight is a matrix, (out, in), with a change of low rank."""

    def __init__(self, layer, rank, alpha):
        super().__init__(layer)
        # adapters learn in small steps, which bfloat16 would round away
        where = {"device": layer.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, layer.weight.shape[1], **where))
        self.lora_b = nn.Parameter(torch.empty(layer.weight.shape[0], rank, **where))
        self.scale = alpha / rank

    def initial(self):
        """{name: tensor} of an adapter that changes nothing yet, on the CPU: the same on every device and
        however the model is cut.
        """
        a = torch.empty(self.lora_a.shape, device="cpu")
        return {
            "lora_a": nn.init.kaiming_uniform_(a, a=math.sqrt(5)),
            "lora_b": torch.zeros(self.lora_b.shape, device="cpu"),
        }

    def change(self):
        """(alpha / r) B A, (out, in): what the adapter adds to the weight."""
        return self.scale * self.lora_b @ self.lora_a


class LoRALinear(LoRAMatrix):
    """A Linear layer: y = x (W + (alpha / r) B A)^T + b."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        self.bias = linear.bias

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.on:
            y = y + self.scale * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return y

    def empty(self):
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        layer.bias = self.bias
        return layer


class LoRAEmbedding(LoRAMatrix):
    """An Embedding: row i of W + (alpha / r) B A, (V, C)."""

    def forward(self, idx):
        x = F.embedding(idx, self.weight)
        if self.on:
            x = x + (self.scale * F.embedding(idx, self.lora_b) @ self.lora_a).to(x.dtype)
        return x

    def empty(self):
        return nn.Embedding(*self.weight.shape, device="meta")


class LoRANorm(Adapter):
    """An RMSNorm with a change of each of its weights."""

    def __init__(self, norm, rank, alpha):
        super().__init__(norm)  # a vector has no rank to lower
        self.eps = norm.eps
        self.lora_d = nn.Parameter(
            torch.empty(norm.weight.shape, device=norm.weight.device, dtype=torch.float32)
        )

    def forward(self, x):
        return F.rms_norm(
            x, self.weight.shape, self.weight + self.lora_d if self.on else self.weight, self.eps
        )

    def initial(self):
        return {"lora_d": torch.zeros(self.lora_d.shape, device="cpu")}

    def change(self):
        return self.lora_d

    def empty(self):
        return nn.RMSNorm(self.weight.shape, eps=self.eps, device="meta")


KINDS = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding, nn.RMSNorm: LoRANorm}


def add(model, rank, alpha, targets):
    """Freeze model and put an adapter beside every Linear, Embedding and RMSNorm layer whose name has one of
    targets as its last part ('q_proj,k_proj,q_norm'). 'all' stands for all but embeddings: 'all,embed_tokens'
    takes those of OLMo, too. Returns model, changed in place.

    An output embedding that is the input's matrix gets the input's adapter as well. The adapters hold nothing
    yet: their `initial` says what. Raises UserError, naming the layers there are, if a target is the name of
    none.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) in KINDS}
    last_of = {name: name.rpartition(".")[2] for name in layers}
    embeddings = {last_of[name] for name, layer in layers.items() if isinstance(layer, nn.Embedding)} | {
        "lm_head"
    }
    wanted = {target.strip() for target in targets.split(",")}
    wanted = wanted - {"all"} | (set(last_of.values()) - embeddings if "all" in wanted else set())
    if unknown := sorted(wanted - set(last_of.values())):
        raise UserError(
            f"lora_targets: the model has no Linear, Embedding or RMSNorm layer {unknown[0]!r}. It has "
            f"{', '.join(sorted(set(last_of.values())))}"
        )
    matrices = {id(layer.weight) for name, layer in layers.items() if last_of[name] in wanted}
    model.requires_grad_(False)
    for name, layer in layers.items():
        if id(layer.weight) in matrices:
            setattr(
                model.get_submodule(name.rpartition(".")[0]),
                last_of[name],
                KINDS[type(layer)](layer, rank, alpha),
            )
    model.tie()
    return model


def freeze_in(model, dtype):
    """Keep the frozen weights in torch dtype `dtype`; adapters stay as they are. Returns model."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def adapters_of(model):
    """{name: Adapter} of a model; empty if it has none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def state_of(model):
    """The state dict of the adapters alone: what they have beside the frozen model."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[2].startswith("lora_")
    }


@torch.no_grad()
def merge(model):
    """Add every adapter to its weight and remove it: an ordinary model that computes the same.

    Returns model, changed in place.
    """
    layers = adapters_of(model)
    # a matrix that serves twice is changed once
    for layer in {id(layer.weight): layer for layer in layers.values()}.values():
        layer.weight += layer.change().to(layer.weight.dtype)
    for name, layer in layers.items():
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, layer.plain())
    return model.requires_grad_(True)


@contextlib.contextmanager
def switched_off(model):
    """`with switched_off(model):` it computes what it did before it got adapters and gates,
    deterministically.
    """
    layers, was = adapters_of(model).values(), (model.config.gated, model.training)
    for layer in layers:
        layer.on = False
    model.config.gated = False
    model.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True
        model.config.gated = was[0]
        model.train(was[1])


class Base:
    """The dense model that `model` was before, sharing its weights: callable, and evaluated, like a model of
    its own.
    """

    def __init__(self, model):
        self.model, self.training = model, False
        self.config = replace(model.config, gated=False)

    def __call__(self, *args, **kwargs):
        with switched_off(self.model):
            return self.model(*args, **kwargs)

    def parameters(self):
        return self.model.parameters()

    def compile(self):
        """Its model is, already."""

    @property
    def _compiled_call_impl(self):
        """Torch's name for what compile() has made: its model's."""
        return self.model._compiled_call_impl

    def train(self, mode=True):
        """It has one mode only: as it is evaluated."""
        return self

    eval = train
