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
`CircuitRun` runs a circuit, `Replace` patches components and `Gradients` keeps all reads apart, so that one
backward pass gives the gradient by each.

Notable: edges that lie on no path from the embedding to the output cannot matter (`ComponentGraph.on_paths`).
What is done with it is in circuits/attribution.py: which edges carry a task (the paper's section on
circuits). This file imports no other file of ours.
"""

import torch


class ComponentGraph:
    """The numbering of writers and readers of a model with L layers of H heads, and which edges there are.

    writers   0 the embedding; 1 + layer (H + 1) + head the heads; 1 + layer (H + 1) + H the MLPs. W of them
    readers   layer (3 H + 1) + part H + head, part 0, 1, 2 being q, k, v; layer (3 H + 1) + 3 H the MLPs; the
              last is the final one. R of them
    """

    def __init__(self, n_layer, n_head):
        self.L, self.H = L, H = n_layer, n_head
        self.W, self.R = 1 + L * (H + 1), L * (3 * H + 1) + 1
        # which pairs (writer, reader) are edges: the writer comes first
        self.edges = torch.zeros(self.W, self.R, dtype=torch.bool)
        for layer in range(L):
            for name in ("q", "k", "v", "mlp"):
                self.edges[:self.before(name, layer), self.reader(name, layer)] = True
        self.edges[:, self.reader("final", None)] = True

    def writer(self, name, layer):
        """The slice of writers that `hooks.write(name, layer, ...)` brings."""
        first = 0 if name == "embed" else 1 + layer * (self.H + 1) + (self.H if name == "mlp" else 0)
        return slice(first, first + (self.H if name == "heads" else 1))

    def reader(self, name, layer):
        """The slice of readers that `hooks.read(name, layer, ...)` asks for."""
        if name == "final":
            return slice(self.R - 1, self.R)
        first = layer * (3 * self.H + 1)
        if name == "mlp":
            return slice(first + 3 * self.H, first + 3 * self.H + 1)
        first += "qkv".index(name) * self.H
        return slice(first, first + self.H)

    def before(self, name, layer):
        """How many writers have written when this reader reads: the first so many."""
        return self.W if name == "final" else 1 + layer * (self.H + 1) + (self.H if name == "mlp" else 0)

    def writer_names(self):
        return ["embed"] + [
            name
            for layer in range(self.L)
            for name in [*(f"{layer}.{head}" for head in range(self.H)), f"mlp {layer}"]
        ]

    def reader_names(self):
        return [
            name
            for layer in range(self.L)
            for name in [
                *(f"{layer}.{head} {part}" for part in "qkv" for head in range(self.H)),
                f"mlp {layer}",
            ]
        ] + ["output"]

    def owner(self, reader):
        """The writer that a reader belongs to; W for the final one."""
        if reader == self.R - 1:
            return self.W
        layer, place = divmod(reader, 3 * self.H + 1)
        return 1 + layer * (self.H + 1) + (place % self.H if place < 3 * self.H else self.H)

    def on_paths(self, edges):
        """edges (W, R) bool without those that lie on no path from the embedding to the output."""
        owner = torch.tensor([self.owner(reader) for reader in range(self.R)])
        reached = torch.zeros(self.W + 1, dtype=torch.bool)  # from the embedding
        reached[0] = True
        # readers are in the order of the layers, and so are the writers that they belong to
        for reader in range(self.R):
            reached[owner[reader]] |= bool((edges[:, reader] & reached[:self.W]).any())
        useful = torch.zeros(self.W + 1, dtype=torch.bool)  # for the output
        useful[self.W] = True
        for writer in reversed(range(self.W)):
            useful[writer] = bool((edges[writer] & useful[owner]).any())
        return edges & reached[:self.W, None] & useful[owner][None, :]

    def of_components(self, kept):
        """The edges among kept writers (W,) bool: all whose two ends are kept. The output is always there."""
        owner = torch.tensor([self.owner(reader) for reader in range(self.R)])
        return self.edges & kept[:, None] & torch.cat([kept, torch.tensor([True])])[owner][None, :]


# ------------------------------------------------------------------------------------------------------------
# Hooks: what patching.py calls with every read and write


class Watch:
    """Changes nothing, remembers all writes: `writes` (B, W, T, C)."""

    def __init__(self, graph):
        self.graph, self.parts = graph, []

    def read(self, name, layer, x):
        return x

    def write(self, name, layer, y):
        self.parts.append(y if y.dim() == 4 else y.unsqueeze(1))
        return y

    @property
    def writes(self):
        return torch.cat(self.parts, dim=1)


class CircuitRun(Watch):
    """Runs a circuit: a reader sees the writers whose edge is kept as they are now, the others as they were
    in the corrupted run.

    keep (W, R) bool; corrupted (B, W, T, C), the corrupted run's writes. Without gradients.
    """

    def __init__(self, graph, keep, corrupted):
        super().__init__(graph)
        self.keep, self.corrupted = keep, corrupted.transpose(0, 1)
        # (W, B, T, C): corrupted - now, as far as the run has come
        self.differences = torch.empty_like(self.corrupted)

    def read(self, name, layer, x):
        first = self.graph.before(name, layer)
        cut = ~self.keep[:first, self.graph.reader(name, layer)]  # (writers so far, heads or 1)
        if not cut.any():
            return x
        # (B, heads or 1, T, C)
        change = (cut.T.to(x.dtype) @ self.differences[:first].flatten(1)).view(-1, *x.shape).transpose(0, 1)
        return x + change[:, 0] if change.shape[1] == 1 else x.unsqueeze(1) + change

    def write(self, name, layer, y):
        who = self.graph.writer(name, layer)
        self.differences[who] = self.corrupted[who] - (y.transpose(0, 1) if y.dim() == 4 else y)
        return y


class Replace(Watch):
    """Patches components: the writers in `replaced` (W,) bool write what they wrote in the corrupted run."""

    def __init__(self, graph, replaced, corrupted):
        super().__init__(graph)
        self.replaced, self.corrupted = replaced, corrupted

    def write(self, name, layer, y):
        who = self.graph.writer(name, layer)
        patched = torch.where(
            self.replaced[who].view(1, -1, 1, 1),
            self.corrupted[:, who],
            y if y.dim() == 4 else y.unsqueeze(1),
        )
        return patched if y.dim() == 4 else patched[:, 0]


class Gradients(Watch):
    """Keeps what every reader reads apart, so that the gradient by it can be asked for.

    embed (B, T, C) takes the embedding's place.
    """

    def __init__(self, graph, embed):
        super().__init__(graph)
        self.embed, self.reads = embed, []

    def read(self, name, layer, x):
        x = x.unsqueeze(1).expand(-1, self.graph.H, -1, -1) if name in ("q", "k", "v") else x.clone()
        self.reads.append((self.graph.reader(name, layer), self.graph.before(name, layer), x))
        return x

    def write(self, name, layer, y):
        return self.embed if name == "embed" else y
