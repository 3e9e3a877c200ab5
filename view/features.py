"""What the page of `view` shows of features: the graph behind each answer, and what opens an edge.

A run that has a transcoder (`analyze.py transcode RUN`) gets an attribution graph for every position that the
prompt is answered at (features/attribution_graph.py), pruned (influence.py), and for its best open edges the
sources at the key that add most to their score (`why_open`). All plain numbers, for features.js to draw.
"""

import copy
import os

import torch

from analysis.graph import label, parts_of_link, read_transcoder
from features.attribution_graph import graph_of, why_open
from features.influence import influence_of, pruned, scores, square
from model import GPT
from models.checkpoint import read_checkpoint
from storage.files import UserError
from view.data import EDGE, rounded

NODES, LINKS = 120, 400  # of a graph, at most: the strongest
HEADS = 2  # of a link
OPENED, NAMED = 60, 5  # best edges whose score is taken apart, and the sources at the key that are named
# a node's and a link's row on the page
NODE = ("kind", "layer", "position", "words", "value", "influence", "for", "against")
LINK = ("source", "target", "weight", "heads", "direct")


def coders_of(places, models, name):
    """{model's name: (the model on the CPU, its Transcoder)}, of those models that have one. places: {name:
    (its checkpoint's path, the folder of its transcoders, None of a name such as gpt2)}.
    """
    found = {}
    for kind, (path, folder) in places.items():
        if (folder is None or not isinstance(models[kind], GPT)
                or not os.path.exists(os.path.join(folder, name + ".pt"))):
            continue
        try:
            coder = read_transcoder(folder, name, read_checkpoint(path))
            found[kind] = copy.deepcopy(models[kind]).cpu(), coder
        except UserError as error:
            print(f"{error}. The page leaves its features away")
    return found


def graph_on_page(model, graph, question, word):
    """A pruned graph as {'scores', 'nodes', 'links'}, the strongest of each."""
    matrix, ends = square(graph)
    influence = influence_of(matrix, ends) + ends
    kept, links = pruned(graph)
    all_nodes = graph.nodes
    best = [i for i in influence.argsort(descending=True).tolist() if kept[i]][:NODES]
    place, nodes = {i: number for number, i in enumerate(best)}, []
    for i in best:
        node, value, plus, minus = all_nodes[i], None, None, None
        if node.kind in ("feature", "logit"):
            comes_in = graph.edges[graph.row_of(i)]  # in all, pruned or not
            value, plus, minus = (rounded(part.sum().item()) for part in (
                comes_in, comes_in.clamp(min=0), comes_in.clamp(max=0)))
        nodes.append([node.kind, node.layer, node.position, label(node, question, word), value,
                      rounded(influence[i].item()), plus, minus])
    shown = torch.zeros(len(influence), dtype=torch.bool)
    shown[best] = True
    weights, rows = matrix * influence[:, None] * (links & shown[:, None] & shown), []
    for flat in weights.flatten().argsort(descending=True)[:LINKS].tolist():
        target, source = divmod(flat, len(influence))
        if weights[target, source] <= 0:
            break
        row = graph.row_of(target)
        heads, direct = parts_of_link(model, graph, row, source, HEADS)
        heads = [[layer, head, rounded(share, 2)] for layer, head, share in heads]
        rows.append([place[source], place[target], rounded(graph.edges[row, source].item()), heads,
                     rounded(direct, 2)])
    return {"scores": {key: rounded(value, 2) for key, value in scores(graph).items()}, "nodes": nodes,
            "links": rows}


def opened_by(model, graph, edge, words):
    """[[source at the key, what it adds]] of the NAMED that add most to an edge's score, with all that stands
    at the query; and the sum of all others.
    """
    adds = why_open(model, graph, *edge).sum(0)
    best = adds.abs().topk(min(NAMED, len(adds))).indices
    rest = adds.sum() - adds[best].sum()
    return [[words[s], rounded(adds[s].item())] for s in best.tolist()], rounded(rest.item())


def features_of(model, coder, question, word, edges):
    """The features of one prompt in one model, on the CPU. edges: its rows on the page (data.EDGE)."""
    def shown(token):
        return word(token).replace(" ", "␣")

    question = question._replace(pieces=[piece.replace(" ", "␣") for piece in question.pieces])
    graphs = [graph_of(model, coder, torch.tensor(question.ids), at) for at in question.positions]
    words = [label(node, question, shown) for node in graphs[0].sources]
    rank = EDGE.index("rank")
    best = sorted(range(len(edges)), key=lambda number: edges[number][rank])[:OPENED]
    return {"graphs": [graph_on_page(model, graph, question, shown) for graph in graphs],
            "opened": {number: opened_by(model, graphs[0], edges[number][:4], words) for number in best}}
