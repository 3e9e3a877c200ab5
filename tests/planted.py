"""A model whose circuit is known, because it was planted there by hand."""

import torch

from circuits.tasks import Pair
from model import GPT, GPTConfig

T = 5  # tokens of its prompts


def planted():
    """Position 2 reads position 0 in head 0 of layer 0, and the last reads position 2 in head 1 of layer 1:
    it says the token of position 0. All others read position 1, where token 0 stands, which is nothing.

    The residual stream has four parts: token (V), position (T), what layer 0 copied (V), what layer 1 copied.
    """
    V = 6
    C = 3 * V + T + 1  # + 1: even, for two heads of 12
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=C, gated=True,
                          gate_bias=0.0, tied=False, bias=False))
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            torch.nn.init.zeros_(parameter)
    D, where = C // 2, V  # width of a head; first number of the position's part
    parts = model.transformer
    parts.wte.weight.data[1:, 1:V] = torch.eye(V - 1)  # token 0 is the zero vector
    parts.wpe.weight.data[:, where:where + T] = torch.eye(T)
    routes = [(0, {2: 0}, 0, V + T), (1, {T - 1: 2}, V + T, 2 * V + T)]  # head, who reads whom, from, to
    for block, (head, reads, source, target) in zip(model.blocks, routes):
        q, k, v = (block.attn.c_attn.weight.data[part * C + head * D:][:D] for part in range(3))
        for position in range(T):
            q[reads.get(position, min(position, 1)), where + position] = 40.0
            k[position, where + position] = 1.0
        v[1:V, source + 1:source + V] = torch.eye(V - 1)
        v[1:V, source] = -1.0  # LayerNorm's centring, which token 0 has, too
        block.attn.c_proj.weight.data[target:target + V, head * D:head * D + V] = torch.eye(V)
    model.lm_head.weight.data[:, 2 * V + T:][:, :V] = torch.eye(V)
    return model.double().eval()


PLANTED = [Pair([1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [T - 1], [[1]], [[2]]),
           Pair([3, 0, 4, 5, 4], [5, 0, 4, 5, 4], [T - 1], [[3]], [[5]])]
