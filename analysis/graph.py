"""Which features, through which heads, made a model say this? One prompt's attribution graph.

graphs.py has the command. Here is what it prints of one prompt, each head's share, how many heads and
attention edges hold 80 %, and what feeds the answer most (features/attribution_graph.py, influence.py); and
what it writes into the run's folder, graph-<prompt>.json in the format of circuit-tracer and Neuronpedia
(schema version 1), pruned. A link's `heads` says what share of it goes through which; the rest is direct, or
goes through more of them.
"""

import os
import re
import zlib

import torch

from analysis.questions import questions_of
from features.attribution_graph import graph_of, shares_of
from features.influence import NODES, attention_edges_of, heads_of, influence_of, n80, pruned, scores, square
from features.transcoder import Transcoder
from model import GPT
from models.checkpoint import is_finite, is_of, model_of, read_checkpoint
from models.sources import checkpoint_named, folder_of_answers
from storage.files import UserError, typed, write_json

SHOWN = 8  # heads, and edges into the likeliest answer
TYPES = {"feature": "cross layer transcoder", "embedding": "embedding", "error": "mlp reconstruction error",
         "bias": "bias", "logit": "logit"}


def places_of(checkpoint, path, run):
    """{'dense', 'sparse': (its checkpoint, the folder of its transcoders)} of a gated run and its parent.

    checkpoint, path: the run's, and where it lies. A parent that is a name, such as gpt2, has no folder but
    None.
    """
    parent = checkpoint.get("parent") or ""
    return {"dense": (parent, folder_of_answers(os.path.dirname(parent))),
            "sparse": (path, folder_of_answers(run))}


def read_transcoder(folder, name, checkpoint):
    """The trained Transcoder of a run. folder: its; None of a model that is no run. Raises UserError."""
    if folder is None:
        raise UserError("only a run's folder, such as out/addition, can have a transcoder")
    # the price of docs/attribution.md: the default is too dear for sums
    command = typed("python", "analyze.py", "transcode", folder, "--price=0.1", f"--name={name}")
    place = os.path.join(folder, name + ".pt")
    if not os.path.exists(place):
        raise UserError(f"{folder} has no {name}.pt. Train one first: {command}")
    trained = read_checkpoint(place)
    if not is_of(trained["of"], checkpoint):
        raise UserError(f"{place} was trained for other weights than {folder} holds now. Delete it, and: "
                        f"{command}")
    steps = trained["settings"]["steps"]
    if trained["step"] < steps:
        raise UserError(f"{place} is not finished, {trained['step']} of {steps} steps: give "
                        "the same transcode command again, and it goes on")
    if not all(map(is_finite, trained["model"].values())):
        raise UserError(f"{place} holds NaN or infinite numbers. Delete it, and train another with a smaller "
                        f"step: python analyze.py transcode {folder} --name={name} --lr=1e-4")
    coder = Transcoder(**trained["model_args"])
    coder.load_state_dict(trained["model"])
    return coder.eval()


def gpt_of(checkpoint, path, run):
    """The GPT of a checkpoint, on the CPU, in evaluation mode. Raises UserError if it is another model."""
    model = model_of(checkpoint, path, "cpu").eval()
    if not isinstance(model, GPT):
        raise UserError(f"{run} is no GPT: attribution graphs are made for GPTs alone so far")
    return model


def position_of(question, at):
    """The position whose answer is explained: --at names it, else the last one. Raises UserError."""
    names = [question.names[position] for position in question.positions]
    if not at:
        return question.positions[-1]
    if at not in names:
        places = ", ".join(filter(None, names)) or "its end"
        raise UserError(f"--at={at}: this prompt is answered at {places}")
    return question.positions[names.index(at)]


def label(node, question, word):
    """A node in words. word: token id -> str."""
    if node.kind == "bias":
        return "all biases"
    if node.kind == "logit":
        return f"answer {word(node.number)}"
    where = question.names[node.position] or f"{question.pieces[node.position]}@{node.position}"
    if node.kind == "embedding":
        return f"token {where}"
    if node.kind == "error":
        return f"error of MLP {node.layer} at {where}"
    return f"feature {node.layer}.{node.number} at {where}"


def summary(graph):
    """What is printed and written of a graph, a dict."""
    heads, edges = heads_of(graph), attention_edges_of(graph)
    nodes, links = pruned(graph)
    return {"nodes": len(graph.sources) + len(graph.chances), "kept_nodes": int(nodes.sum()),
            "kept_links": int(links.sum()), "heads": heads.tolist(), "heads_80": n80(heads),
            "all_heads": heads.numel(), "attention_edges_80": n80(edges),
            "attention_edges": int((edges > 0).sum()), **scores(graph)}


def largest(shares, most, least):
    """[[layer, head, share]] of the `most` largest above `least`, of shares (L, H)."""
    best = shares.flatten().topk(min(most, shares.numel()))
    H = shares.shape[1]
    return [[i // H, i % H, share] for share, i in zip(*map(torch.Tensor.tolist, best)) if share > least]


def parts_of_link(model, graph, t, s, most=3):
    """([[layer, head, share of the link]] of the heads that carry most of the link from source s to target t,
    the share that is direct). Shares of absolute values: heads may work against each other.
    """
    shares = shares_of(model, graph, t, s)
    direct = (graph.edges[t, s] - shares.sum()).abs()
    whole = (direct + shares.abs().sum()).clamp(min=1e-30)
    return largest(shares.abs() / whole, most, 0.01), (direct / whole).item()


# ------------------------------------------------------------------------------------------------------------
# The file for circuit-tracer's and Neuronpedia's pages


def identity(node, L):
    """(node_id, layer, feature, jsNodeId) in the schema's terms."""
    if node.kind == "embedding":
        return f"E_{node.number}_{node.position}", "E", node.position, f"E_{node.number}-{node.position}"
    if node.kind == "logit":
        name = f"{L + 1}_{node.number}_{node.position}"
        return name, str(L + 1), node.number, f"L_{node.number}-{node.position}"
    if node.kind == "bias":
        return "bias_-1_0", "E", None, "bias_-1-0"
    layer, number, feature = node.layer, -1, -1  # of an error
    if node.kind == "feature":
        number = node.number
        feature = (layer + number) * (layer + number + 1) // 2 + number  # Cantor's pairing
    js = f"{layer}_{number}-" + ("0" if node.kind == "feature" else str(node.position))
    return f"{layer}_{number}_{node.position}", str(layer), feature, js


def as_json(model, graph, found, question, word, run, name):
    """The pruned graph as a dict, schema version 1. found: its `summary`."""
    matrix, ends = square(graph)
    influence = influence_of(matrix, ends)
    order = influence.argsort(descending=True)
    reached = torch.zeros(len(influence))
    reached[order] = (influence[order].cumsum(0) / influence.sum()).float()  # small is important
    kept, links = pruned(graph)
    nodes, L = graph.nodes, graph.through.shape[1]
    chance = dict(zip(nodes[-len(graph.chances):], graph.chances.tolist()))
    named, written, connections = {}, [], []
    for i in kept.nonzero().flatten().tolist():
        node, (node_id, layer, feature, js) = nodes[i], identity(nodes[i], L)
        named[i] = node_id
        clerp = label(node, question, word)
        if node.kind == "logit":
            clerp = f'Output "{word(node.number)}" (p={chance[node]:.3f})'
        written.append({
            "node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": max(node.position, 0),
            "feature_type": TYPES[node.kind], "jsNodeId": js, "clerp": clerp,
            "influence": None if node.kind == "logit" else reached[i].item(),
            "token_prob": chance.get(node, 0.0),
            "is_target_logit": i == len(graph.sources),
            "activation": graph.values[i].item() if node.kind == "feature" else None})
    for target, source in links.nonzero().tolist():
        row = graph.row_of(target)
        connections.append({"source": named[source], "target": named[target],
                            "weight": graph.edges[row, source].item(),
                            "heads": parts_of_link(model, graph, row, source)[0]})
    return {"metadata": {"slug": name, "scan": run, "prompt": question.title,
                         "prompt_tokens": question.pieces, "node_threshold": NODES, "schema_version": 1,
                         "info": found},
            "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": written, "links": connections}


def write_graph(run, prompt, at, name):
    """Print what made a run answer a prompt, and write its graph. at: which answer; name: of a transcoder."""
    path = checkpoint_named(run)
    checkpoint = read_checkpoint(path)
    model, folder = gpt_of(checkpoint, path, run), folder_of_answers(run)
    coder = read_transcoder(folder, name, checkpoint)
    [question], word, _ = questions_of(checkpoint, run, [prompt])
    graph = graph_of(model, coder, torch.tensor(question.ids), position_of(question, at))
    found = summary(graph)
    name = name_of(question.title, at, name)
    place = os.path.join(folder, name + ".json")
    write_json(place, as_json(model, graph, found, question, word, run, name))  # first: it knows no NaN
    print("\n".join(lines_of(graph, found, question, word)))
    print(f"for circuit-tracer's and Neuronpedia's pages: {place}")


def name_of(title, at, transcoder):
    """`graph-36-28-s1`: of the file, and its own for every prompt, answer and transcoder."""
    words = re.sub(r"\W+", "-", title).strip("-")
    if not re.fullmatch(r"\d+\+\d+", title):  # or texts that differ in punctuation alone would share a file
        number = zlib.crc32(title.encode("utf-8", "surrogateescape"))
        words = f"{words[:60] or 'prompt'}-{number:08x}"
    return f"graph-{words}{ending_of(transcoder)}" + (f"-{at}" if at else "")


def ending_of(transcoder):
    """What a file's name says of a transcoder: nothing of the usual one."""
    return "" if transcoder == "transcoder" else f"-{transcoder}"


def lines_of(graph, found, question, word):
    """What is printed, a list of lines. found: the graph's `summary`."""
    first = graph.n_features
    answers = [f"{word(node.number)!r} {100 * chance:.1f} %"
               for node, chance in zip(graph.targets[first:], graph.chances.tolist())]
    lines = [f"{question.title!r}: {', '.join(answers)}",
             f"{found['kept_nodes']} of {found['nodes']} nodes and {found['kept_links']} links are left; "
             f"replacement score {found['replacement']:.2f}, completeness {found['completeness']:.2f}",
             f"80 % of what heads carry: {found['heads_80']} of {found['all_heads']} heads, "
             f"{found['attention_edges_80']} of {found['attention_edges']} attention edges"]
    heads = torch.tensor(found["heads"])
    named = [f"{layer}.{head} {100 * share:.0f} %"
             for layer, head, share in largest(heads / heads.sum().clamp(min=1e-30), SHOWN, 0)]
    lines += ["heads: " + ", ".join(named),
              f"what speaks for {label(graph.targets[first], question, word)}, and against it, most:"]
    edge = graph.edges[first]
    return lines + [f"  {edge[s]:+8.3f}  {label(graph.sources[s], question, word)}"
                    for s in edge.abs().topk(min(SHOWN, len(edge))).indices.tolist()]
