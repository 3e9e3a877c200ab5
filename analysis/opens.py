"""Addition: which features open an edge, and on which sums do they fire?

    python analyze.py transcode out/addition --price=0.1     first, once
    python analyze.py opens out/addition                     of the edge that opens on about half of the sums

An edge is open where its score a = q k / sqrt(D) plus the head's bias is above 0, and the score splits
exactly into pairs, a source of the query and a source of the key (`why_open` in
circuits/attribution_graph.py). So what opens an edge is what adds more to the score on sums on which it is
open than on others:

    difference of a pair = its mean on sums with the edge open - its mean on sums with the edge shut

and the differences of all pairs sum to that of the score. The tables have the largest, and what either side
adds, summed over the other; opens-<edge>.png draws their features as *operand plots* (Anthropic's, "On the
biology of a large language model", addition): one dot for every sum a + b of 0 .. 99, brighter where the
feature fires more strongly. The first is the gate itself, open or shut. At last the key's features are cut in
the real model, one by one and together (circuits/interventions.py): on how many sums does the edge still
open?

Notable: sums are drawn, half with the edge open, half shut; the operand plots are of all 10,000. LayerNorm
divides everything at a position by one number, and that differs from sum to sum: so what is always there, a
token or the biases, adds more on one than on another, and only because something else is larger or smaller.
"""

import os

import numpy as np
import torch
from tqdm import tqdm

from analysis import feature_figures
from analysis.ask import parse_edge
from analysis.explain import population, read_addition_run, run_sums
from analysis.graph import ending_of, label, read_transcoder
from analysis.questions import sum_question
from circuits.attribution_graph import graph_of, why_open
from circuits.interventions import without
from circuits.transcoder import read_and_written
from models.checkpoint import read_checkpoint
from models.sources import checkpoint_named, folder_of_answers
from storage.addition import addition_rows, token_names
from storage.files import UserError, write_json

SHOWN = 6  # lines of each table
DRAWN = 8  # features, at most
MOST_WRITTEN = 500  # pairs in opens-<edge>.json


def edge_to_explain(words, is_open, config, task):
    """(layer, head, query, key) of the words (ask.py); of none, that which is open on a share of the sums
    closest to a half. is_open (n_layer, H, T, T, N); config: the model's. Raises UserError.
    """
    shares = is_open.mean(-1)
    if not words:
        if not ((shares > 0) & (shares < 1)).any():
            raise UserError("every edge of this model is always open, or never: there is nothing to explain")
        return tuple(int(i) for i in np.unravel_index(np.abs(shares - 0.5).argmin(), shares.shape))
    edge = parse_edge(words, config, task, "--edge")
    share = shares[edge]
    if not 0 < share < 1:
        raise UserError(f"--edge={words} is open on {100 * share:.0f} % of the sums: nothing to explain")
    return edge


def parts_of_score(model, coder, question, edge):
    """(sources in words, their Nodes, (S, S) what each pair adds to the edge's score, (by what LayerNorm
    divides at the query, at the key)) on one sum.
    """
    layer, head, i, j = edge
    graph = graph_of(model, coder, torch.tensor(question.ids))
    words = [label(node, question, str) for node in graph.sources]
    spread = graph.spread[model.blocks[layer].ln_1][:, 0]
    return words, graph.sources, why_open(model, graph, layer, head, i, j).numpy(), spread[[i, j]].numpy()


def mean_of(sums, order):
    """(N, N): the mean over sums of what each pair adds, 0 where a source is missing. order: {words: place}.
    """
    total = np.zeros((len(order), len(order)))
    for words, _, matrix, _ in sums:
        places = [order[one] for one in words]
        total[np.ix_(places, places)] += matrix
    return total / len(sums)


def differences(on_open, on_shut):
    """{'pairs', 'key', 'query': [[in words, mean where open, mean where shut]]}, the largest difference
    first: pairs of a source at the query and one at the key, and each side by itself, summed over the other.
    What never adds anything is left out. on_open, on_shut: lists of `parts_of_score`.
    """
    words = sorted({one for sums in (on_open, on_shut) for some, *_ in sums for one in some})
    order = {one: place for place, one in enumerate(words)}
    means = np.stack([mean_of(sums, order) for sums in (on_open, on_shut)])  # (2, query, key)
    pairs = [([words[i], words[j]], means[:, i, j]) for i, j in np.argwhere((means != 0).any(0)).tolist()]
    sides = {"key": means.sum(1), "query": means.sum(2)}
    found = {"pairs": pairs} | {side: [([word], both[:, place]) for place, word in enumerate(words)]
                                for side, both in sides.items()}
    for side, rows in found.items():
        rows = [[*words, *both.tolist()] for words, both in rows if both.any()]
        found[side] = sorted(rows, key=lambda row: -abs(row[-2] - row[-1]))
    return found


@torch.no_grad()
def operand_plots(model, coder, task, nodes):
    """(len(nodes), 100, 100): how strongly each feature, a Node, fires on a + b; a downwards, b across."""
    a, b = np.divmod(np.arange(10_000), 100)
    questions = torch.from_numpy(addition_rows(a, b, *task).astype(np.int64))[:, 0]
    grids = []
    for chunk in questions.split(1000):
        read, _ = read_and_written(model, chunk)
        grids.append(torch.stack([coder.features(read[:, node.position])[:, node.layer, node.number]
                                  for node in nodes]))
    return torch.cat(grids, dim=1).view(len(nodes), 100, 100).numpy()


def add_arguments(parser):
    parser.add_argument("run", metavar="RUN", help="a gated run on two-digit addition, with a transcoder")
    parser.add_argument("--edge", default="", help="layer.query.key, such as 2.s1.=")
    parser.add_argument("--name", default="transcoder", help="of the transcoder, as in `transcode`")
    parser.add_argument("--n", type=int, default=200, help="sums that the table is made of")
    parser.add_argument("--seed", type=int, default=1, help="by which they are drawn")


def run(options, settings):
    """`analyze.py opens`."""
    run = options.run.rstrip("/")
    model, data, task = read_addition_run(run)
    if not model.config.gated or task.digits != 2:
        raise UserError(f"{run}: opens looks at the gates of two-digit addition, such as out/addition's")
    if options.n < 2:
        raise UserError("--n must be at least 2: a sum with the edge open, and one with it shut")
    folder = folder_of_answers(run)
    coder = read_transcoder(folder, options.name, read_checkpoint(checkpoint_named(run))).folded()
    model.eval()
    names = token_names(task)
    a, b = population(data, task)
    _, is_open = run_sums(model, task, a, b)
    edge = edge_to_explain(options.edge, is_open, model.config, task)
    opens = is_open[edge]

    draw, parts = np.random.default_rng(options.seed), []
    for which in (opens, ~opens):
        drawn = draw.choice(np.flatnonzero(which), min(options.n // 2, int(which.sum())), replace=False)
        questions = [sum_question(f"{a[number]}+{b[number]}", task) for number in drawn]
        parts.append([parts_of_score(model, coder, question, edge)
                      for question in tqdm(questions, unit="sum", leave=False, disable=None)])
    table = differences(*parts)
    nodes = {one: node for words, sources, *_ in sum(parts, []) for one, node in zip(words, sources)}
    title = f"layer {edge[0]} head {edge[1]}, {names[edge[2]]} reads {names[edge[3]]}"
    print("\n".join(lines_of(title, opens, table)))
    (query, key), (query_shut, key_shut) = [np.mean([part[3] for part in some], axis=0) for some in parts]
    print(f"LayerNorm divides by {query:.2f} at the query where open, by {query_shut:.2f} where shut; at the "
          f"key by {key:.2f} and {key_shut:.2f}: so biases and tokens differ, too")
    name = name_of(edge, names, options.name)
    write_json(os.path.join(folder, name + ".json"), {"edge": edge, "open_on": int(opens.sum())} | {
        side: rows[:MOST_WRITTEN] for side, rows in table.items()})
    shown = features_of(table, nodes)
    grids = []
    if shown:  # no feature feeds an edge of layer 0
        grids = operand_plots(model, coder, task, [nodes[one] for one in shown])
    path = os.path.join(folder, name + ".png")
    titles = [f"the gate: {title}", *(f"{words}: {adds:+.2f}" for words, adds in shown.items())]
    feature_figures.operand_plots(path, titles, [opens.reshape(100, 100), *grids])
    print(f"on which sums these features fire: {path}")
    at_key = [nodes[one] for one in shown if nodes[one].position == edge[3]]
    for cut in [[node] for node in at_key] + [at_key] * (len(at_key) > 1):
        with without(model, coder, cut):
            _, now = run_sums(model, task, a, b)
        still, newly = (now[edge] & opens).sum(), (now[edge] & ~opens).sum()
        print(f"without {in_words(cut)} the edge is still open on {still:,} sums, newly open on {newly:,}")


def name_of(edge, names, transcoder):
    """`opens-2.0.s1.=`: of the files, its own for every edge and transcoder. names: of the positions."""
    layer, head, query, key = edge
    return f"opens-{layer}.{head}.{names[query]}.{names[key]}{ending_of(transcoder)}"


def in_words(nodes):
    """`feature 1.98`, or the numbers of several."""
    return "feature " + ", ".join(f"{node.layer}.{node.number}" for node in nodes)


def features_of(table, nodes):
    """{feature to draw, in words: what it adds, open - shut}: those of the query, then those of the key, half
    of DRAWN each.
    """
    found = {}
    for side in ("query", "key"):  # of an edge to its own place a feature stands at both: the key's number
        rows = [row for row in table[side] if nodes[row[0]].kind == "feature"][:DRAWN // 2]
        found = found | {words: where_open - where_shut for words, where_open, where_shut in rows}
    return found


def lines_of(title, opens, table):
    """What is printed, a list of lines."""
    score = sum(row[-2] for row in table["pairs"])
    total = score - sum(row[-1] for row in table["pairs"])
    lines = [f"{title}: open on {opens.sum():,} of {len(opens):,} sums, with a score of {score:.2f},",
             f"{total:.2f} more than on the others. It opens where the score is above -b, its head's bias"]
    for side, what in (("key", "what stands at the key"), ("query", "what stands at the query"),
                       ("pairs", "pairs of both, query x key")):
        rows = table[side]
        lines += ["", f"{'open - shut':>12}  {'open':>8}  {'shut':>8}  {what}"]
        for *words, where_open, where_shut in rows[:SHOWN]:
            lines.append(f"{where_open - where_shut:+12.2f}  {where_open:+8.2f}  {where_shut:+8.2f}  "
                         + " x ".join(words))
        rest = sum(row[-2] - row[-1] for row in rows[SHOWN:])
        lines.append(f"{rest:+12.2f}  all others, {max(0, len(rows) - SHOWN):,}")
    return lines
