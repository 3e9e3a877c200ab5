"""Induction heads (Olsson et al. 2022): having seen `A B ... A`, which heads look at B, and which then say B?

    prefix matching   the weight with which a repeated token reads what came after it the first time
    copying           whether a head raises the logit of the token that it reads: the signs of the eigenvalues
                      of W_E W_V W_O W_U

Notable: both are read off the model itself, one from its attention on random tokens, one from its weights.
This file imports no other file of ours.
"""

import torch


@torch.no_grad()
def prefix_matching(model, sequences=32, length=24, seed=0):
    """(L, H): on random tokens that are repeated, the weight with which the second time reads what came after
    the first time. Shut edges count 0.

    1 is a perfect induction head: having seen `A B ... A` it looks at B. All tokens, of bytes the printable
    ones.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (32, 127) if model.config.vocab_size == 256 else (0, model.config.vocab_size)
    length = min(length, model.config.block_size // 2)
    # no token twice in a sequence
    first = low + torch.rand(sequences, high - low, generator=generator).argsort(dim=1)[:, :length]
    length = first.shape[1]
    scores = torch.zeros(model.config.n_layer, model.config.n_head)

    def look(layer, gates):
        weight = gates.weights[:, :, length:, :]  # queries of the second half
        # query length + i reads key i + 1
        scores[layer] = weight.diagonal(1, dim1=2, dim2=3).mean((0, 2)).cpu()

    model(torch.cat([first, first], dim=1).to(next(model.parameters()).device), record=look)
    return scores


@torch.no_grad()
def copying_scores(model):
    """(L, H): does a head raise the logit of the token that it reads? From -1 to 1: sum of the eigenvalues of
    W_E W_V W_O W_U over the sum of their sizes.

    The product is V x V but has rank D: its eigenvalues are those of the D x D matrix W_O W_U W_E W_V.
    LayerNorm's scale is folded in, its division left out.
    """
    embed, unembed = model.embeddings()
    middle = unembed.T @ embed  # W_U W_E (C, C)
    scores = torch.zeros(model.config.n_layer, model.config.n_head)
    for layer in range(model.config.n_layer):
        reading, writing = model.reading_and_writing(layer)  # (H, D, C), (H, C, D)
        eigenvalues = torch.linalg.eigvals((reading @ middle.T @ writing).float())  # (H, D)
        scores[layer] = (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1).clamp(min=1e-12)).cpu()
    return scores
