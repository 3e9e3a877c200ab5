"""A forward pass that can be watched and changed: what every component reads from the residual stream, and
what it writes to it.

    logits = patched(model, idx, hooks)

    hooks.read(name, layer, x)     is called with what 'q', 'k', 'v', 'mlp' or 'final' are about to read, (B,
                                   1, T, C). The pass goes on with what it returns: the same shape, or, for q,
                                   k and v, (B, H, T, C), one for each head
    hooks.write(name, layer, y)    is called with what 'embed' or 'mlp' write, (B, 1, T, C), or 'heads', each
                                   by itself, (B, H, T, C)

It computes what `GPT.forward` and `OLMo.forward` do, head by head instead of all heads in one product, so
that each can read something of its own; tests compare the two. Gates are computed from what q and k read, so
they follow a change. layer is None for 'embed' and 'final'.

Notable: a norm after the sum of heads (OLMo 2) is linear once its denominator is known, so what a head writes
is well defined. Which hooks there are: graph.py.
"""

import torch

from model import by_layer
from models.olmo import OLMo, rms_norm_of_heads, rotate, rotations


def patched(model, idx, hooks):
    """Logits (B, T, V) of a GPT or OLMo whose reads and writes go through hooks. idx (B, T)."""
    run = run_olmo if isinstance(model, OLMo) else run_gpt
    options = [own | {"impl": model.attention_impl} for own in by_layer(model.config, None, idx.device)]
    return run(model, idx, hooks, options)[:, 0]


# ------------------------------------------------------------------------------------------------------------
# GPT-2. The residual stream x is (B, 1, T, C) throughout


def run_gpt(model, idx, hooks, options):
    """Logits (B, 1, T, V) of model.py's GPT. options: of `gated_attention`, one dict a layer."""
    parts = model.transformer
    x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device))
    x = hooks.write("embed", None, x.unsqueeze(1))
    for layer, block in enumerate(model.blocks):
        x = x + gpt_heads(block, layer, x, hooks, options[layer])
        x = x + hooks.write("mlp", layer, block.mlp(block.ln_2(hooks.read("mlp", layer, x))))
    return model.lm_head(parts.ln_f(hooks.read("final", None, x)))


def gpt_heads(block, layer, x, hooks, options):
    """What a layer's attention adds to the residual stream x."""
    attention, C, H = block.attn, x.shape[-1], block.attn.config.n_head
    weight = attention.c_attn.weight.view(3, H, -1, C).transpose(2, 3)  # (3, H, C, D)
    bias = (0.0, 0.0, 0.0) if attention.c_attn.bias is None else attention.c_attn.bias.view(3, H, 1, -1)
    qkv = []
    for part, name in enumerate("qkv"):
        read = block.ln_1(hooks.read(name, layer, x))
        qkv.append(read @ weight[part] + bias[part])  # (B, H, T, D)
    y, _, _ = attention.attend(*qkv, **options)
    out = attention.c_proj.weight.view(C, H, -1).permute(1, 2, 0)  # (H, D, C)
    heads = hooks.write("heads", layer, y @ out)  # (B, H, T, C)
    constant = 0.0 if attention.c_proj.bias is None else attention.c_proj.bias
    return heads.sum(dim=1, keepdim=True) + constant


# ------------------------------------------------------------------------------------------------------------
# OLMo


def run_olmo(model, idx, hooks, options):
    """As `run_gpt`, of models/olmo.py's OLMo."""
    config, T = model.config, idx.shape[1]
    plain = rotations(config, T, idx.device)
    stretched = rotations(config, T, idx.device, stretched=True) if config.yarn else None
    x = hooks.write("embed", None, model.model.embed_tokens(idx).unsqueeze(1))
    for layer, block in enumerate(model.blocks):
        is_stretched = config.yarn and layer in config.yarn["layers"]
        x = x + olmo_heads(block, layer, x, stretched if is_stretched else plain, hooks, options[layer])
        read = hooks.read("mlp", layer, x)
        x = x + hooks.write("mlp", layer, block.post_feedforward_layernorm(block.mlp(block.before(read))))
    return model.lm_head(model.model.norm(hooks.read("final", None, x)))


def olmo_heads(block, layer, x, rotation, hooks, options):
    """As `gpt_heads`. The norm of q is that of all heads together, whatever each of them reads.

    What a head writes is its share of the normed sum: norm(sum_h y_h) = sum_h w y_h / rms(sum_h y_h).
    """
    attention, config, C = block.self_attn, block.self_attn.config, x.shape[-1]
    H, D = config.n_head, C // config.n_head
    qkv = []
    for name, projection in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
        read = block.before(hooks.read(name, layer, x))
        weight = projection.weight.view(-1, D, C).transpose(1, 2)  # (heads, C, D)
        # grouped heads of k and v once for each reader
        weight = weight.repeat_interleave(H // weight.shape[0], dim=0)
        part = attention.clip(read @ weight)  # (B, H, T, D)
        if config.generation == 2 and name != "v":
            part = rms_norm_of_heads(part, attention.q_norm if name == "q" else attention.k_norm)
        qkv.append(part)
    q, k, v = qkv
    y, _, _ = attention.attend(rotate(q, rotation), rotate(k, rotation), v, **options)
    heads = y @ attention.o_proj.weight.view(C, H, D).permute(1, 2, 0)  # (B, H, T, C)
    if config.generation == 2:
        norm = block.post_attention_layernorm
        mean_square = heads.sum(dim=1, keepdim=True).pow(2).mean(dim=-1, keepdim=True)
        heads = heads * (mean_square + norm.eps).rsqrt() * norm.weight
    return hooks.write("heads", layer, heads).sum(dim=1, keepdim=True)
