"""OLMo with gated attention: the same gate on a modern transformer of 1B to 32B parameters, and Hugging
Face's weights in.

    generation 1   x = x + attn(norm(x));  x = x + mlp(norm(x))    OLMo 1. LayerNorm without parameters before
                                                                   each read
    generation 2   x = x + norm(attn(x));  x = x + norm(mlp(x))    OLMo 2 and 3. RMSNorm after each write, and
                                                                   of q and k
    mlp(x)         down(silu(gate(x)) * up(x))                     SwiGLU; its `gate` is none of ours

What differs from GPT-2 (model.py): positions are rotations of q and k (RoPE, below), there are no biases, k
and v may have fewer heads than q (grouped queries), and generation 1 may clip q, k and v. What does not: the
gate sees q and k as the softmax does, after norm and rotation.

    RoPE: the pair (x_d, x_{d + D/2}) of position t is turned by the angle t theta^(-2d/D): then q_i . k_j
          depends on i - j alone

Notable:
- `OLMo.forward` takes and gives what `GPT.forward` does, with record, keep, linear penalty and noise:
  train.py, evaluate.py, circuits/attribution.py and the figures do not know which of the two they hold.
- Parameter names are those of transformers (`model.layers.0.self_attn.q_proj.weight`): its checkpoints are
  ours.
- Weights are read one tensor at a time into an empty model: the peak is the model and one tensor
  (olmo_files.py).
- OLMo 3 is generation 2 with stretched rotations (YaRN) in every fourth layer; the other layers look back
  4,096 tokens at most, so that is how long a context may be here.

Sources: OLMo (Groeneveld et al. 2024), OLMo 2 (2025), RoPE (Su et al. 2021), YaRN (Peng et al. 2023); arXiv
2512.05865, its section on OLMo.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fast.attention import attention
from gate import GateConfig
from model import by_layer, cross_entropy


@dataclass
class OLMoConfig(GateConfig):
    """The shape of an OLMo; defaults are OLMo-1B-hf. Saved in every checkpoint as `model_args`."""

    architecture: str = "olmo"  # by which checkpoint.py knows whose checkpoint it is
    generation: int = 1  # 1, or 2 for OLMo 2 and 3
    block_size: int = 2048  # longest context, tokens. No weight depends on it
    vocab_size: int = 50304
    n_layer: int = 16
    n_head: int = 16  # H
    n_kv_head: int = 16  # heads of k and v; each serves n_head / n_kv_head heads of q
    n_embd: int = 2048  # C, width of the residual stream
    n_hidden: int = 8192  # width of the MLP
    tied: bool = True  # lm_head and embed_tokens are one matrix
    clip_qkv: float | None = None  # generation 1: largest absolute value in q, k and v
    norm_eps: float = 1e-5  # in the denominator of a norm
    rope_theta: float = 10000.0
    # {'layers': [...], 'factor', 'original', 'attention_factor', 'beta_fast', 'beta_slow'}: layers with
    # stretched rotations
    yarn: dict | None = None
    init_std: float = 0.02  # of random weights; as OLMo 2's, and transformers'


# ------------------------------------------------------------------------------------------------------------
# RoPE


def rotations(config, T, device, stretched=False):
    """cos and sin of all angles, (T, D/2) each, float32: position by dimension. stretched: YaRN's, of the
    layers in config.yarn['layers'].

    YaRN: dimensions that turn often within the original context keep their angle, those that turn less than
    once are slowed down by `factor`, those in between are interpolated; cos and sin are scaled, which makes
    the softmax sharper.
    """
    D = config.n_embd // config.n_head
    # radians per position (D/2,)
    speed = config.rope_theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    scale = 1.0
    if stretched:
        y = config.yarn

        def dimension_that_turns(times):  # within the original context
            return D * math.log(y["original"] / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

        low, high = (
            max(math.floor(dimension_that_turns(y["beta_fast"])), 0),
            min(math.ceil(dimension_that_turns(y["beta_slow"])), D - 1),
        )
        slowed = ((torch.arange(D // 2, device=device) - low) / max(high - low, 0.001)).clamp(0, 1)
        speed, scale = speed * (1 - slowed) + speed / y["factor"] * slowed, y["attention_factor"]
    cos, sin = cos_and_sin(torch.arange(T, device=device)[:, None] * speed)  # (T, D/2) each
    return cos * scale, sin * scale


@torch.library.custom_op("sparse_attention::cos_and_sin", mutates_args=())
def cos_and_sin(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator of its own, or torch.compile would compute a cosine anew for every element of every q and
    k: on a CPU a quarter of a training step.
    """
    return angle.cos(), angle.sin()


@cos_and_sin.register_fake
def _(angle):
    return torch.empty_like(angle), torch.empty_like(angle)


def rotate(x, rotation):
    """x (..., T, D) turned by what `rotations` returns, in float32."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------
# The model


def rms_norm_of_heads(x, norm):
    """RMSNorm over the width of all heads together, heads apart: x (B, H, T, D).

    A norm of fewer heads (grouped keys) serves its copies.
    """
    weight = norm.weight.view(-1, 1, x.shape[-1])  # (heads of the norm, 1, D)
    weight = weight.repeat_interleave(x.shape[1] // weight.shape[0], dim=0)
    return x * (x.pow(2).mean(dim=(1, 3), keepdim=True) + norm.eps).rsqrt() * weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C, D = config.n_embd, config.n_embd // config.n_head
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        if config.generation == 2:
            self.q_norm = nn.RMSNorm(C, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.n_kv_head * D, eps=config.norm_eps)

    def clip(self, x):
        return x if self.config.clip_qkv is None else x.clamp(-self.config.clip_qkv, self.config.clip_qkv)

    def attend(self, q, k, v, **gate_options):
        """q (B, H, T, D), k and v (B, n_kv_head or H, T, D), normed and rotated."""
        temperature, dense = self.config.gate_temperature, not self.config.gated
        return attention(q, k, v, temperature=temperature, dense=dense, **gate_options)

    def forward(self, x, rotation, **gate_options):
        """x (B, T, C) -> y (B, T, C); density, a scalar; gates, a `gate.Gates` or None."""
        B, T, C = x.shape
        q, k, v = self.clip(self.q_proj(x)), self.clip(self.k_proj(x)), self.clip(self.v_proj(x))
        if self.config.generation == 2:
            # under autocast a GPU's norm returns float32
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        # (B, heads, T, D)
        q, k, v = (part.view(B, T, -1, C // self.config.n_head).transpose(1, 2) for part in (q, k, v))
        y, density, gates = self.attend(rotate(q, rotation), rotate(k, rotation), v, **gate_options)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C)), density, gates


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), each position on its own."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def norm_of(config):
    """Of the residual stream: OLMo 1's has no parameters, those of OLMo 2 and 3 a scale."""
    if config.generation == 1:
        return nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        if config.generation == 1:
            self.before = norm_of(config)  # before both; it holds nothing
            self.post_attention_layernorm = nn.Identity()
            self.post_feedforward_layernorm = nn.Identity()
        else:
            self.before = nn.Identity()
            self.post_attention_layernorm = norm_of(config)
            self.post_feedforward_layernorm = norm_of(config)

    def forward(self, x, rotation, **gate_options):
        """x (B, T, C) -> the residual stream after both writes; density; gates."""
        y, density, gates = self.self_attn(self.before(x), rotation, **gate_options)
        x = x + self.post_attention_layernorm(y)
        x = x + self.post_feedforward_layernorm(self.mlp(self.before(x)))
        return x, density, gates


class OLMo(nn.Module):
    """OLMo 1, 2 or 3.

    `OLMo(OLMoConfig(...))` starts from a random initialisation;
    `checkpoint.load_checkpoint("allenai/OLMo-1B-hf")` brings the weights.
    """

    def __init__(self, config):
        super().__init__()
        odd = config.n_embd % config.n_head or config.n_embd // config.n_head % 2
        if odd or config.n_head % config.n_kv_head:
            raise ValueError(
                f"n_embd={config.n_embd} must be an even multiple of n_head={config.n_head}, and n_head a "
                f"multiple of n_kv_head={config.n_kv_head}"
            )
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm=norm_of(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=config.init_std)

    attention_impl = "auto"  # who computes gated attention: see fast/attention.py

    def tie(self):
        """If config.tied: let lm_head use the input embedding's own parameters.

        To be called again after one of them has been replaced.
        """
        if self.config.tied:
            # the matrix, and its LoRA adapter
            for name, parameter in self.model.embed_tokens.named_parameters():
                setattr(self.lm_head, name, parameter)

    @property
    def blocks(self):
        return self.model.layers

    @property
    def attentions(self):
        return [block.self_attn for block in self.blocks]

    def forward(self, idx, targets=None, keep=None, record=None, linear_penalty=False, gates=None):
        """Takes and returns what `GPT.forward` in model.py does.

        Raises ValueError if idx is longer than block_size.
        """
        B, T = idx.shape
        c = self.config
        if T > c.block_size:
            raise ValueError(
                f"a context of {T} tokens does not fit into this model's block_size of {c.block_size}"
            )
        x = self.model.embed_tokens(idx)  # (B, T, C)
        plain, stretched = rotations(c, T, idx.device), c.yarn and rotations(c, T, idx.device, stretched=True)
        gates = gates or ("sample" if self.training else "threshold")
        densities, own = [], by_layer(c, keep, idx.device)
        for layer, block in enumerate(self.blocks):
            rotation = stretched if c.yarn and layer in c.yarn["layers"] else plain
            x, density, shown = block(x, rotation, **own[layer], return_gates=record is not None, gates=gates,
                                      linear_penalty=linear_penalty, impl=self.attention_impl)
            densities.append(density)
            if record is not None:
                record(layer, shown)
        logits = self.lm_head(self.model.norm(x))  # (B, T, V)
        loss = None
        if targets is not None:
            loss = cross_entropy(logits, targets)
        return logits, loss, torch.stack(densities).mean()

    def reading_and_writing(self, layer):
        """As `GPT.reading_and_writing`: of a layer's heads, what v reads, (H, D, C), and what they write, (H,
        C, D).
        """
        c, block = self.config, self.blocks[layer]
        reading = block.self_attn.v_proj.weight.view(c.n_kv_head, -1, c.n_embd).repeat_interleave(
            c.n_head // c.n_kv_head, dim=0
        )
        scale = block.post_attention_layernorm.weight[:, None] if c.generation == 2 else 1.0
        return reading, (scale * block.self_attn.o_proj.weight).view(c.n_embd, c.n_head, -1).transpose(0, 1)

    def embeddings(self):
        """As `GPT.embeddings`: the input and the output embedding, (V, C) each."""
        return self.model.embed_tokens.weight, self.lm_head.weight * (
            self.model.norm.weight if self.config.generation == 2 else 1.0
        )

    def flops_per_token(self, context):
        """Floating point operations per token of a training step, forward and backward, in dense attention;
        as `GPT.flops_per_token`.
        """
        embeddings = 0 if self.config.tied else self.model.embed_tokens.weight.numel()
        return (
            6 * (sum(p.numel() for p in self.parameters()) - embeddings)
            + 12 * self.config.n_layer * self.config.n_embd * context
        )
