"""A transformer as a graph: who writes to the residual stream, who reads from it, and what a run is like when
some of that is exchanged.

The residual stream is a sum of what components write: x = embed + sum of heads + sum of MLPs. So a model is a
graph, with an edge from every writer to every reader behind it; the q, k and v of a head are readers of their
own, since each may listen to something else:

    writers   embed, L H heads, L MLPs
    readers   3 L H of heads (q, k, v), L of MLPs, the final one
    edges     GPT-2 small: 157 writers, 445 readers, 32,491 edges

A run is watched and changed by the object that it is given as `hooks` (patching.py): it calls `read` with
what a component is about to read and goes on with what it returns, and `write` likewise. `Watch` only looks,
`CircuitRun` runs a circuit, and `Gradients` keeps all reads apart, so that one backward pass gives the
gradient by each.

Notable: edges that lie on no path from the embedding to the output cannot matter (`ComponentGraph.on_paths`).
What is done with it is in circuits/attribution.py. This file imports no other file of ours.
"""

import torch


class ComponentGraph:
    """The numbering of writers and readers of a model with L layers of H heads, and which edges there are.

    writer, reader  {(name, layer): slice of the W writers, R readers}, names and layers as in `hooks` above
    before          {(name, layer): how many writers have written when that reads: the first so many}
    owner           (R,) the writer that a reader belongs to; W for the final one
    writer_names    '3.5' is head 5 of layer 3, 'mlp 3' its MLP; reader_names: '3.5 k', 'mlp 3'
    edges           (W, R) bool: the writer comes first
    """

    def __init__(self, n_layer, n_head):
        self.L, self.H = n_layer, n_head
        self.writer, self.reader, self.before = {}, {}, {}
        self.writer_names, self.reader_names, owner = [], [], []

        def add_writers(name, layer, names):
            first = len(self.writer_names)
            self.writer[name, layer] = slice(first, first + len(names))
            self.writer_names += names

        def add_readers(name, layer, names):
            first, written = len(self.reader_names), len(self.writer_names)
            self.reader[name, layer] = slice(first, first + len(names))
            self.before[name, layer] = written
            self.reader_names += names
            owner.extend(range(written, written + len(names)))  # who reads now writes next

        add_writers("embed", None, ["embed"])
        for layer in range(n_layer):
            heads = [f"{layer}.{head}" for head in range(n_head)]
            for part in "qkv":
                add_readers(part, layer, [f"{head} {part}" for head in heads])
            add_writers("heads", layer, heads)
            add_readers("mlp", layer, [f"mlp {layer}"])
            add_writers("mlp", layer, [f"mlp {layer}"])
        add_readers("final", None, ["output"])

        self.W, self.R, self.owner = len(self.writer_names), len(self.reader_names), torch.tensor(owner)
        self.edges = torch.zeros(self.W, self.R, dtype=torch.bool)
        for key, readers in self.reader.items():
            self.edges[:self.before[key], readers] = True

    def on_paths(self, edges):
        """edges (W, R) bool without those that lie on no path from the embedding to the output."""
        reached = torch.zeros(self.W + 1, dtype=torch.bool)  # from the embedding
        reached[0] = True
        # readers are in the order of the layers, and so are the writers that they belong to
        for reader in range(self.R):
            reached[self.owner[reader]] |= bool((edges[:, reader] & reached[:self.W]).any())
        useful = torch.zeros(self.W + 1, dtype=torch.bool)  # for the output
        useful[self.W] = True
        for writer in reversed(range(self.W)):
            useful[writer] = bool((edges[writer] & useful[self.owner]).any())
        return edges & reached[:self.W, None] & useful[self.owner][None, :]

    def of_components(self, kept):
        """The edges among kept writers (W,) bool: all whose two ends are kept. The output is always there."""
        return self.edges & kept[:, None] & torch.cat([kept, torch.tensor([True])])[self.owner][None, :]


# ------------------------------------------------------------------------------------------------------------
# Hooks: what patching.py calls with every read and write. x is (B, 1, T, C) or (B, H, T, C), y likewise


class Watch:
    """Changes nothing, remembers all writes: `writes` (B, W, T, C)."""

    def __init__(self, graph):
        self.graph, self.parts = graph, []

    def read(self, name, layer, x):
        return x

    def write(self, name, layer, y):
        self.parts.append(y)
        return y

    @property
    def writes(self):
        return torch.cat(self.parts, dim=1)


class CircuitRun:
    """Runs a circuit: a reader sees the writers whose edge is kept as they are now, the others as they were
    in the corrupted run.

    keep (W, R) bool; corrupted (B, W, T, C), the corrupted run's writes. Without gradients.
    """

    def __init__(self, graph, keep, corrupted):
        self.graph, self.keep, self.corrupted = graph, keep, corrupted.transpose(0, 1)
        # (W, B, T, C): corrupted - now, as far as the run has come
        self.differences = torch.empty_like(self.corrupted)

    def read(self, name, layer, x):
        first = self.graph.before[name, layer]
        cut = ~self.keep[:first, self.graph.reader[name, layer]]  # (writers so far, heads or 1)
        if not cut.any():
            return x
        change = cut.T.to(x.dtype) @ self.differences[:first].flatten(1)  # (heads or 1, B T C)
        return x + change.view(-1, *self.differences.shape[1:]).transpose(0, 1)

    def write(self, name, layer, y):
        who = self.graph.writer[name, layer]
        self.differences[who] = self.corrupted[who] - y.transpose(0, 1)
        return y


class Gradients:
    """Keeps what every reader reads apart, so that the gradient by it can be asked for: `reads`, a list of
    (readers, a slice; how many writers came before; x).

    embed (B, 1, T, C) takes the embedding's place.
    """

    def __init__(self, graph, embed):
        self.graph, self.embed, self.reads = graph, embed, []

    def read(self, name, layer, x):
        readers = self.graph.reader[name, layer]
        x = x.expand(-1, readers.stop - readers.start, -1, -1).clone()
        self.reads.append((readers, self.graph.before[name, layer], x))
        return x

    def write(self, name, layer, y):
        return self.embed if name == "embed" else y
