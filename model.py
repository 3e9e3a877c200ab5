"""GPT-2 with gated attention: one transformer, dense or sparse by one flag.

    x = wte[token] + wpe[position]                 the residual stream                 (B, T, C)
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))   n_layer times, pre-LayerNorm
    logits = lm_head(ln_f(x))

A dense and a gated model hold the same parameters: `gated` only says whether attention goes through the
Bernoulli gates of gate.py (the paper's gated attention) or through ordinary softmax attention. So any
pre-trained checkpoint can be post-trained, and a gated checkpoint can be run dense to see what the gates do.

Notable:
- Parameter names are nanoGPT's (`transformer.h.0.attn.c_attn.weight`), so its users' tools load our
  checkpoints.
- As with dropout, `model.train()` samples the gates and `model.eval()` makes them thresholds, unless `gates`
  says which.
- forward gives the density penalty beside the loss. It does not add them up: that is the business of geco.py.
- `record` shows every layer's gates and attention pattern, `keep` shuts chosen edges: the analysis needs no
  more.
- `GPT.from_pretrained("gpt2")` brings OpenAI's weights; models/checkpoint.py reads those, nanoGPT's and our
  own alike.
- Two differences to nanoGPT: GELU is GPT-2's own tanh approximation, so that OpenAI's weights give OpenAI's
  logits (a nanoGPT checkpoint gets the exact one, which it was trained with), and there is no dropout on
  attention weights.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fast.attention import attention
from gate import GateConfig
from storage.download import hub_file
from storage.files import UserError


@dataclass
class GPTConfig(GateConfig):
    """The shape of a model; defaults are GPT-2 124M.

    Saved in every checkpoint as `model_args`, as nanoGPT does.
    """

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257  # number of token ids
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C, width of the residual stream
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm layers
    tied: bool = True  # lm_head and wte are one matrix
    gelu: str = "tanh"  # 'tanh', GPT-2's approximation, or 'none', the exact one, as in nanoGPT
    # of random weights; GPT-2's, made for C = 768. A narrow model learns faster from wider ones, about 0.6 /
    # sqrt(C)
    init_std: float = 0.02


def cross_entropy(logits, targets):
    """Mean over the targets, nats; 0, and no gradient, where all are -1. Shapes: see `GPT.forward`."""
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()  # (B T, V), (B T,)
    summed = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return summed / (targets != -1).sum().clamp(min=1)


def by_layer(config, keep, device):
    """For every layer {'bias', 'keep'} of `gate.gated_attention`: config's gate_bias, of a list [layer][head]
    a (H, 1, 1); its part of keep (n_layer, ...), or None. Raises ValueError if keep has no such parts.
    """
    biases, kept = [config.gate_bias] * config.n_layer, [None] * config.n_layer
    if isinstance(config.gate_bias, list):
        biases = torch.tensor(config.gate_bias, device=device)[:, :, None, None]
    if keep is not None:
        if keep.dim() < 4 or len(keep) != config.n_layer:
            raise ValueError("keep must be (n_layer, H, T, T) or (n_layer, B, H, T, T) with n_layer="
                             f"{config.n_layer}, not {tuple(keep.shape)}")
        kept = keep
    return [{"bias": b, "keep": k} for b, k in zip(biases, kept)]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def attend(self, q, k, v, **gate_options):
        """q, k, v (B, H, T, D) -> y, density and gates, see `gated_attention`."""
        temperature, dense = self.config.gate_temperature, not self.config.gated
        return attention(q, k, v, temperature=temperature, dense=dense, **gate_options)

    def forward(self, x, **gate_options):
        """x (B, T, C) -> y (B, T, C); density, a scalar; gates, a `gate.Gates` or None.

        Options: see `gated_attention`.
        """
        B, T, C = x.shape
        H, D = self.config.n_head, C // self.config.n_head
        # (B, H, T, D)
        q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y, density, gates = self.attend(q, k, v, **gate_options)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y)), density, gates


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), each position on its own; the hidden layer is 4 C wide."""

    def __init__(self, config):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, **gate_options):
        """As attention, y being the residual stream after both writes."""
        y, density, gates = self.attn(self.ln_1(x), **gate_options)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, density, gates


class GPT(nn.Module):
    """GPT-2. `GPT(GPTConfig(...))` starts from GPT-2's random initialisation; `load_checkpoint` from a file.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}: the "
                             "heads share the width")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        # GPT-2's initialisation: N(0, init_std), and 1 / sqrt(2 n_layer) of it for the layers that write into
        # the residual stream
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=config.init_std / (math.sqrt(2 * config.n_layer) if writes else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    # who computes gated attention: see fast/attention.py. A choice of this run, not of the model: in no
    # checkpoint
    attention_impl = "auto"

    def tie(self):
        """If config.tied: let lm_head use the input embedding's own parameters.

        To be called again after one of them has been replaced.
        """
        if self.config.tied:
            # the matrix, and its LoRA adapter
            for name, parameter in self.transformer.wte.named_parameters():
                setattr(self.lm_head, name, parameter)

    @property
    def blocks(self):
        return self.transformer.h

    @property
    def attentions(self):
        return [block.attn for block in self.blocks]

    def forward(self, idx, targets=None, keep=None, record=None, linear_penalty=False, gates=None):
        """idx (B, T) token ids; targets (B, T) the token to predict at each position, -1 where nothing is
        asked.

        keep    bool, (n_layer, H, T, T) or (n_layer, B, H, T, T): an edge that is False here is forced shut;
                or float, for gradients by edges
        record  called as record(layer, gates) for every layer, gates a `gate.Gates`: what is open, what is
                attended to
        gates   'sample' or 'threshold', see gate.py; left out, training mode samples
        linear_penalty  the density is made of the penalty that does not saturate, see gate.py; False is the
                        paper's

        Returns logits (B, T, vocab_size); loss, the mean cross-entropy in nats over the targets, None without
        targets; density, the mean penalty of all layers' edges: the expected open fraction (a dense model's
        is 1). Raises ValueError if idx is longer than block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a context of {T} tokens does not fit into this model's block_size of "
                             f"{self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
        x = self.transformer.drop(x)
        gates = gates or ("sample" if self.training else "threshold")
        densities, options = [], by_layer(self.config, keep, idx.device)
        for layer, block in enumerate(self.blocks):
            x, density, shown = block(x, **options[layer], return_gates=record is not None, gates=gates,
                                      linear_penalty=linear_penalty, impl=self.attention_impl)
            densities.append(density)
            if record is not None:
                record(layer, shown)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        loss = None if targets is None else cross_entropy(logits, targets)
        return logits, loss, torch.stack(densities).mean()

    @classmethod
    def from_pretrained(cls, name, device="cpu", **overrides):
        """OpenAI's 'gpt2' (124M parameters), 'gpt2-medium' (350M), 'gpt2-large' (774M) or 'gpt2-xl' (1558M),
        in evaluation mode.

        overrides change the GPTConfig, e.g. gated=True. Raises UserError if there is no such model, or the
        download fails.
        """
        if name not in PRETRAINED:
            raise UserError(f"OpenAI's models are {', '.join(PRETRAINED)}, not {name}. "
                            "A run's folder or a checkpoint is read by models.checkpoint.load_checkpoint")
        checkpoint = openai_checkpoint(name)
        model = cls(GPTConfig(**checkpoint["model_args"] | overrides))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval()

    def reading_and_writing(self, layer):
        """Of a layer's heads, what v reads, (H, D, C), and what they write, (H, C, D), with the scale of
        LayerNorm folded in: for induction.py.
        """
        attn, H, C = self.attentions[layer], self.config.n_head, self.config.n_embd
        values = attn.c_attn.weight[2 * C:] * self.blocks[layer].ln_1.weight
        return values.view(H, -1, C), attn.c_proj.weight.view(C, H, -1).transpose(0, 1)

    def embeddings(self):
        """The input embedding (V, C), and the output embedding (V, C) with the scale of the last LayerNorm
        folded in.
        """
        return self.transformer.wte.weight, self.lm_head.weight * self.transformer.ln_f.weight

    def flops_per_token(self, context):
        """Floating point operations per token of a training step, forward and backward, in dense attention
        (PaLM's appendix B).

        6 for every weight that multiplies (the input embeddings only look up), and 12 C T per layer for
        scores and values.
        """
        c, looked_up = self.config, self.transformer.wpe.weight.numel()
        if not c.tied:
            looked_up += self.transformer.wte.weight.numel()
        multiplied = sum(p.numel() for p in self.parameters()) - looked_up
        return 6 * multiplied + 12 * c.n_layer * c.n_embd * context


# ------------------------------------------------------------------------------------------------------------
# OpenAI's weights
#
#     our Linear:      y = x W^T + b    W (out, in)
#     their Conv1D:    y = x W + b      W (in, out)     so four matrices of every block are stored transposed
#
# Names are the same otherwise (nanoGPT took them over), but for a prefix `transformer.` that their files
# lack, a tied lm_head that is not stored twice, and the causal mask, which old files hold as `attn.bias`.

# As the organisation openai-community hosts them. The sha256 of the one that several public sources confirm;
# of the others the hub's own word counts
PRETRAINED = {
    "gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421",
    "gpt2-medium": None,
    "gpt2-large": None,
    "gpt2-xl": None,
}
CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
MASK = re.compile(r"\.attn\.(masked_)?bias$")


def openai_checkpoint(name):
    """{'model', 'model_args'} of one of OpenAI's models, downloaded once into huggingface_hub's cache
    (HF_HOME) and checked. Raises UserError.
    """
    path = hub_file(f"openai-community/{name}", "pytorch_model.bin", PRETRAINED[name])
    return from_openai(torch.load(path, map_location="cpu", weights_only=True), name)


def from_openai(tensors, source, **args):
    """OpenAI's tensors, {name: tensor}, under our names and the right way round: {'model', 'model_args'}.

    source is named in errors. args: model_args that the tensors do not tell. Raises UserError if they are no
    GPT-2's.
    """
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
             if not MASK.search(name)}
    if "wte.weight" not in state or "wpe.weight" not in state:
        raise UserError(f"{source} holds no GPT-2: wte.weight or wpe.weight is missing. It has "
                        f"{', '.join(list(tensors)[:3])}, ...")
    state = {name: tensor.t().contiguous() if CONV1D.search(name) else tensor
             for name, tensor in state.items()}
    embedding = state["wte.weight"]
    lm_head = state.pop("lm_head.weight", embedding)
    vocab_size, n_embd = embedding.shape
    found = {
        "n_layer": len({name.split(".")[1] for name in state if name.startswith("h.")}),
        "n_head": max(1, n_embd // 64),  # every GPT-2 has heads of width 64
        "n_embd": n_embd,
        "block_size": len(state["wpe.weight"]),
        "vocab_size": vocab_size,
        "bias": True,
        "gelu": "tanh",
        "tied": torch.equal(lm_head, embedding),
    }
    model = {f"transformer.{name}": tensor.float() for name, tensor in state.items()}
    return {"model": model | {"lm_head.weight": lm_head.float()}, "model_args": found | args}
