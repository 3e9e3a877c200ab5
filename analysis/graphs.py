"""Features and heads behind answers: the graph of one prompt, and means over many.

    python analyze.py transcode out/addition --price=0.1           first, once
    python analyze.py graph out/addition --prompt=36+28 --at=s1    what made the tens? (graph.py)
    python analyze.py graph out/stdlib --prompt="name = 'main"     what made the next byte?
    python analyze.py graph out/addition --opens                   what opens an edge? such as --opens=2.s1.=
    python analyze.py graph out/addition --tasks=addition,carry    are its graphs smaller than its parent's?

**What opens an edge.** An edge is open where its score a = q k / sqrt(D) plus the head's bias is above 0, and
the score splits exactly into pairs, a source of the query and a source of the key (`why_open` in
features/attribution_graph.py). So what opens an edge is what adds more to the score on sums on which it is
open than on others:

    difference of a source = its mean on sums with the edge open - its mean on sums with the edge shut,

either side summed over the other, and the differences of all sources of a side sum to that of the score.
opens-<edge>.png draws the largest as *operand plots* (Anthropic's, "On the biology of a large language
model", addition): one dot for every sum a + b of 0 .. 99, brighter where the feature fires more strongly. The
first is the gate itself, open or shut. At last the key's features are cut in the real model, one by one and
together (features/interventions.py): on how many sums does the edge still open?

Notable: sums are drawn, half with the edge open, half shut; the operand plots are of all 10,000. LayerNorm
divides everything at a position by one number, and that differs from sum to sum: so what is always there, a
token or the biases, adds more on one than on another, and only because something else is larger or smaller.

**How large graphs are.** For prompts that a gated run and its parent both answer right: how many heads, and
how many attention edges, hold 80 % of what attention carries to that answer (features/influence.py), and what
pruning leaves. A worse transcoder makes a simpler graph: so give several, trained at several prices
(--name=price-0.1,price-0.2), and the two models are compared twice, with the two that are closest in features
that fire (L0) and with those that are closest in variance explained, the same for all runs. Several runs, of
several seeds, make a table with their range. Written to RUN/n80-<tasks>.json.

Beside it stand the controls: the same model with a transcoder that was never trained; a *nonsense* answer, a
token drawn at random in place of the right one; and what happens in the real model when the strongest
features and heads are cut, and others.

Notable: in our measurements the controls' sizes are nearly those of the answer. So they say how much of a
model's attention is at work on a prompt, and not how much of it one answer needs: that asks `circuit`.
"""

import functools
import itertools
import math
import os
import statistics
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from analysis import circuit_figures
from analysis.explain import population, read_addition_run, run_sums
from analysis.graph import ending_of, gpt_of, label, places_of, read_transcoder, summary, write_graph
from analysis.questions import parse_edge, questions_of, sum_question
from circuits.compare import prompts
from circuits.tasks import vocabulary
from features.attribution_graph import graph_of, why_open
from features.interventions import in_short, interventions, without
from features.transcoder import Transcoder, read_and_written
from models.checkpoint import read_checkpoint, read_parent, tokenizer_of
from models.sources import checkpoint_named, folder_of_answers
from storage.addition import addition_rows, token_names
from storage.files import UserError, read_json, write_json

# ------------------------------------------------------------------------------------------------------------
# what opens an edge

SHOWN = 6  # lines of each table
DRAWN = 8  # features, at most


def edge_to_explain(words, is_open, config, task):
    """(layer, head, query, key) of the words (questions.py); of none, that which is open on a share of the
    sums closest to a half. is_open (n_layer, H, T, T, N); config: the model's. Raises UserError.
    """
    shares = is_open.mean(-1)
    if not words:
        if not ((shares > 0) & (shares < 1)).any():
            raise UserError("every edge of this model is always open, or never: there is nothing to explain")
        return tuple(int(i) for i in np.unravel_index(np.abs(shares - 0.5).argmin(), shares.shape))
    edge = parse_edge(words, config, task, "--opens")
    share = shares[edge]
    if not 0 < share < 1:
        raise UserError(f"--opens={words} is open on {100 * share:.0f} % of the sums: nothing to explain")
    return edge


def parts_of_score(model, coder, question, edge):
    """({'key', 'query': {source in words: what it adds to the edge's score, with all of the other side}},
    {source in words: its Node}, (by what LayerNorm divides at the query, at the key)) on one sum.
    """
    layer, head, i, j = edge
    graph = graph_of(model, coder, torch.tensor(question.ids))
    words = [label(node, question, str) for node in graph.sources]
    pairs = why_open(model, graph, layer, head, i, j).numpy()  # (S, S), query by key
    adds = {side: dict(zip(words, pairs.sum(over).tolist())) for over, side in enumerate(("key", "query"))}
    spread = graph.spread[model.blocks[layer].ln_1][:, 0]
    return adds, dict(zip(words, graph.sources)), spread[[i, j]].numpy()


def differences(on_open, on_shut):
    """{'key', 'query': [[source in words, mean where open, mean where shut]]}, the largest difference first.
    What never adds anything is left out. on_open, on_shut: for each sum, {side: {source: what it adds}}.
    """
    table = {}
    for side in ("key", "query"):
        open_total, shut_total = Counter(), Counter()  # 0 where a source is missing
        for total, sums in ((open_total, on_open), (shut_total, on_shut)):
            for adds in sums:
                total.update(adds[side])
        rows = [[words, open_total[words] / len(on_open), shut_total[words] / len(on_shut)]
                for words in sorted({*open_total, *shut_total})]
        table[side] = sorted((row for row in rows if any(row[1:])), key=lambda row: -abs(row[1] - row[2]))
    return table


@torch.no_grad()
def operand_grids(model, coder, task, nodes):
    """(len(nodes), 100, 100): how strongly each feature, a Node, fires on a + b; a downwards, b across."""
    a, b = np.divmod(np.arange(10_000), 100)
    sums = torch.from_numpy(addition_rows(a, b, *task).astype(np.int64))[:, 0]
    grids = []
    for chunk in sums.split(1000):
        read, _ = read_and_written(model, chunk)
        grids.append(torch.stack([coder.features(read[:, node.position])[:, node.layer, node.number]
                                  for node in nodes]))
    return torch.cat(grids, dim=1).view(len(nodes), 100, 100).numpy()


def explain_edge(run, options):
    """Print what opens an edge, and write opens-<edge>.json and its operand plots."""
    model, data, task = read_addition_run(run)
    if not model.config.gated or task.digits != 2:
        raise UserError(f"{run}: --opens looks at the gates of two-digit addition, such as out/addition's")
    n = 200 if options.n is None else options.n
    if n < 2:
        raise UserError("--n must be at least 2: a sum with the edge open, and one with it shut")
    folder = folder_of_answers(run)
    coder = read_transcoder(folder, options.name, read_checkpoint(checkpoint_named(run))).folded()
    model.eval()
    a, b = population(data, task)
    _, is_open = run_sums(model, task, a, b)
    edge = edge_to_explain(options.opens, is_open, model.config, task)
    layer, head, query, key = edge
    opens = is_open[edge]

    draw, parts = np.random.default_rng(options.seed), []
    for which in (opens, ~opens):
        drawn = draw.choice(np.flatnonzero(which), min(n // 2, int(which.sum())), replace=False)
        parts.append([parts_of_score(model, coder, sum_question(f"{a[number]}+{b[number]}", task), edge)
                      for number in tqdm(drawn, unit="sum", leave=False, disable=None)])
    table = differences(*([adds for adds, *_ in some] for some in parts))
    nodes = {words: node for some in parts for _, sources, _ in some for words, node in sources.items()}
    names = token_names(task)
    title = f"layer {layer} head {head}, {names[query]} reads {names[key]}"
    print("\n".join(lines_of_edge(title, opens, table)))
    (here, there), (here_shut, there_shut) = [np.mean([part[2] for part in some], axis=0) for some in parts]
    print(f"LayerNorm divides by {here:.2f} at the query where open, by {here_shut:.2f} where shut; at the "
          f"key by {there:.2f} and {there_shut:.2f}: so biases and tokens differ, too")

    name = f"opens-{layer}.{head}.{names[query]}.{names[key]}{ending_of(options.name)}"
    path = os.path.join(folder, name)
    write_json(path + ".json", {"edge": edge, "open_on": int(opens.sum())} | table)
    shown = {}  # the strongest features: of an edge to its own place one stands at both sides, by the key's
    for side in ("query", "key"):
        rows = [row for row in table[side] if nodes[row[0]].kind == "feature"][:DRAWN // 2]
        shown |= {words: where_open - where_shut for words, where_open, where_shut in rows}
    # no feature feeds an edge of layer 0
    grids = operand_grids(model, coder, task, [nodes[words] for words in shown]) if shown else []
    titles = [f"the gate: {title}", *(f"{words}: {adds:+.2f}" for words, adds in shown.items())]
    circuit_figures.operand_plots(path + ".png", titles, [opens.reshape(100, 100), *grids])
    print(f"on which sums these features fire: {path}.png")

    at_key = [nodes[words] for words in shown if nodes[words].position == key]
    for cut in [[node] for node in at_key] + [at_key] * (len(at_key) > 1):
        with without(model, coder, cut):
            _, now = run_sums(model, task, a, b)
        still, newly = (now[edge] & opens).sum(), (now[edge] & ~opens).sum()
        numbers = ", ".join(f"{node.layer}.{node.number}" for node in cut)
        print(f"without feature {numbers} the edge is still open on {still:,} sums, newly open on {newly:,}")


def lines_of_edge(title, opens, table):
    """What is printed of an edge, a list of lines."""
    score, elsewhere = (sum(row[place] for row in table["key"]) for place in (1, 2))
    lines = [f"{title}: open on {opens.sum():,} of {len(opens):,} sums, with a score of {score:.2f},",
             f"{score - elsewhere:.2f} more than on the others. It opens where the score is above -b, its "
             "head's bias"]
    for side, rows in table.items():
        lines += ["", f"{'open - shut':>12}  {'open':>8}  {'shut':>8}  what stands at the {side}"]
        lines += [f"{where_open - where_shut:+12.2f}  {where_open:+8.2f}  {where_shut:+8.2f}  {words}"
                  for words, where_open, where_shut in rows[:SHOWN]]
        rest = sum(row[1] - row[2] for row in rows[SHOWN:])
        lines.append(f"{rest:+12.2f}  all others, {max(0, len(rows) - SHOWN):,}")
    return lines


# ------------------------------------------------------------------------------------------------------------
# how large graphs are

SIZES = {"heads_80": "heads for 80 %", "attention_edges_80": "attention edges for 80 %",
         "kept_nodes": "nodes left", "kept_links": "links left"}
MATCHED = {"l0": "as many features fire", "explained": "as much is explained"}


def models_of(run):
    """{'dense', 'sparse': (folder of its transcoders, checkpoint, model)} of a gated run; or a UserError."""
    path = checkpoint_named(run)
    checkpoint = read_checkpoint(path)
    if not checkpoint["model_args"].get("gated"):
        raise UserError(f"{run} is a dense run: --tasks compares a gated run, such as out/addition, with its "
                        "parent")
    places = places_of(checkpoint, path, run)
    checkpoints = {"dense": read_parent(checkpoint), "sparse": checkpoint}
    return {kind: (folder, checkpoints[kind], gpt_of(checkpoints[kind], place, run))
            for kind, (place, folder) in places.items()}


@torch.no_grad()
def first_choice(model, tokens, position):
    """The token that a model answers with."""
    return int(model(tokens[None])[0][0, position].argmax())


def prompts_of(tasks, models, n, own=(), run=""):
    """[(tokens (T,), position, answer)]: n prompts of each task whose answer is right and both models' first
    choice; and one's own prompts, with the dense model's first choice.
    """
    (*_, dense), (_, checkpoint, sparse) = models["dense"], models["sparse"]
    words = vocabulary(tokenizer_of(checkpoint), sparse.config.vocab_size)
    asked = []
    for task in tasks:
        pairs, *_ = prompts(task, 8 * n, 1, words, sparse.config.block_size)
        known = []
        for pair in pairs:
            tokens, position = torch.tensor(pair.clean), pair.positions[0]
            answers = {first_choice(model, tokens, position) for model in (dense, sparse)}
            if len(answers) == 1 and answers <= set(pair.right[0]):
                known.append((tokens, position, *answers))
        if not known:
            raise UserError(f"there is no prompt of {task} that both models answer right. Leave it away: "
                            "--tasks=...")
        asked += known[:n]
    for question in questions_of(checkpoint, run, own)[0] if own else ():
        tokens = torch.tensor(question.ids)
        asked += [(tokens, at, first_choice(dense, tokens, at)) for at in question.positions]
    return asked


def transcoders_of(models, names):
    """{'dense', 'sparse': {name: (Transcoder, what `transcode` wrote of it)}}. Raises UserError."""
    coders = {}
    for kind, (folder, checkpoint, _) in models.items():
        coders[kind] = {}
        for name in names:
            place = os.path.join(folder or "", name + ".json")
            coder = read_transcoder(folder, name, checkpoint)
            if not os.path.exists(place):
                raise UserError(f"there is no {place}, for `transcode` was stopped in its last part: give "
                                "the same command again")
            coders[kind][name] = coder, read_json(place)
    return coders


def closest(coders_of_runs, names, by):
    """(name of the dense models' transcoders, of the sparse ones'): the pair that differs least in `by`, in
    the mean over runs; in L0 by its logarithm. coders_of_runs: of `transcoders_of`.
    """
    scale = (lambda value: math.log(max(value, 1e-9))) if by == "l0" else float

    def apart(pair):
        both = [[scale(coders[kind][name][1][by]) for kind, name in zip(("dense", "sparse"), pair)]
                for coders in coders_of_runs]
        return sum(abs(one - other) for one, other in both)

    return min(itertools.product(names, names), key=apart)


def untrained(model, tokens, like):
    """A Transcoder as training finds it, of the shape of `like`, whose scales fit these tokens (B, T)."""
    torch.manual_seed(0)
    coder = Transcoder(**like.shape)
    x, y = read_and_written(model, tokens)
    coder.start(x.flatten(0, 1), y.flatten(0, 1))
    return coder.eval()


def measure(model, coder, asked, progress):
    """Means over prompts, a dict: sizes, scores, the same of a nonsense answer, and interventions."""
    sizes, nonsense, cuts = [], [], []
    draw, V = torch.Generator().manual_seed(0), model.config.vocab_size
    for tokens, at, answer in asked:
        graph = graph_of(model, coder, tokens, at, answer)
        sizes.append(summary(graph))
        cuts.append(interventions(model, coder, tokens, graph))
        another = (answer + int(torch.randint(1, V, (), generator=draw))) % V
        nonsense.append(summary(graph_of(model, coder, tokens, at, another)))
        progress.update()
    kept = (*SIZES, "replacement", "completeness", "all_heads", "attention_edges")
    means = {key: statistics.mean(one[key] for one in sizes) for key in kept}
    means["nonsense"] = {key: statistics.mean(one[key] for one in nonsense) for key in SIZES}
    return means | {kind: in_short([one[kind] for one in cuts]) for kind in ("features", "heads")}


def compare(run, models, coders, matched, tasks, n, own):
    """What n80-<tasks>.json holds of one gated run: {'l0', 'explained': {'dense', 'sparse': measured},
    'untrained': likewise}. coders: of `transcoders_of`; matched: {by: `closest`}; own: prompts.
    """
    asked = prompts_of(tasks, models, n, own, run)
    shortest = min(len(tokens) for tokens, *_ in asked)
    batch = torch.stack([tokens[:shortest] for tokens, *_ in asked])
    with tqdm(desc=run, unit="graph", leave=False, disable=None) as progress:
        @functools.cache  # both ways of matching may choose one transcoder
        def measured(kind, name):
            coder, quality = coders[kind][name]
            known = {key: quality.get(key) for key in (*MATCHED, "kl_where_asked", "agrees_where_asked")}
            return {"transcoder": name} | known | measure(models[kind][-1], coder, asked, progress)

        result = {by: {kind: measured(kind, name) for kind, name in zip(models, pair)}
                  for by, pair in matched.items()}
        result["untrained"] = {
            kind: measure(models[kind][-1], untrained(models[kind][-1], batch, coders[kind][name][0]), asked,
                          progress) for kind, name in zip(models, matched["l0"])}
    return {"run": run, "tasks": tasks + own, "prompts": len(asked)} | result


def compare_runs(runs, options):
    """Print how large the graphs of runs and of their parents are, and write a file for each."""
    n = 8 if options.n is None else options.n
    if n < 1:
        raise UserError("--n must be at least 1")
    names, tasks = options.name.split(","), options.tasks.split(",")
    models = [models_of(run) for run in runs]
    coders = [transcoders_of(both, names) for both in models]  # a missing one is found before measuring
    matched = {by: closest(coders, names, by) for by in MATCHED}
    results = []
    for run, *of_run in zip(runs, models, coders):
        results.append(compare(run, *of_run, matched, tasks, n, options.prompt))
        write_json(os.path.join(folder_of_answers(run), f"n80-{'-'.join(tasks)}.json"), results[-1])
        print("\n".join(lines_of_run(results[-1])), flush=True)
    if len(results) > 1:
        print("\n".join(lines_of_runs(results)))


def lines_of_run(result):
    """What is printed of a run."""
    lines = [f"{result['run']}, {result['prompts']} prompts of {', '.join(result['tasks'])}"]
    for by, words in (MATCHED | {"untrained": "untrained"}).items():
        for kind, means in result[by].items():
            lines.append(f"  {words}, {kind}")
            if by in MATCHED:
                lines[-1] += f": {100 * means['explained']:.1f} % explained, {means['l0']:.1f} features fire"
            sizes = "; ".join(f"{means[key]:.1f} {size}" for key, size in SIZES.items())
            nonsense = ", ".join(f"{means['nonsense'][key]:.1f}" for key in SIZES)
            lines += [f"    {sizes} (of a nonsense answer {nonsense})",
                      f"    replacement score {means['replacement']:.2f}, completeness "
                      f"{means['completeness']:.2f}",
                      f"    cut: {cuts_in_words('features', means)}; {cuts_in_words('heads', means)}"]
    return lines


def cuts_in_words(part, means):
    """What cutting the strongest features, or heads, did: `-` where nothing could be cut."""
    cut = {key: math.nan if value is None else value for key, value in means[part].items()}
    words = (f"{part}: {100 * cut['same_sign']:.0f} % of signs foretold, the strongest move the answer by "
             f"{cut['strongest']:.2f}, others by {cut['others']:.2f}, correlation {cut['correlation']:.2f}")
    return words.replace("nan", "-")


def lines_of_runs(results):
    """Dense over sparse, its mean and range over the runs, and beside it the controls' mean."""
    def ratios(pairs, key):
        return [dense[key] / max(sparse[key], 1e-9) for dense, sparse in pairs]

    lines = [f"{len(results)} runs, dense against sparse, mean (range):"]
    of_untrained = [(one["untrained"]["dense"], one["untrained"]["sparse"]) for one in results]
    for by, words in MATCHED.items():
        pairs = [(one[by]["dense"], one[by]["sparse"]) for one in results]
        of_nonsense = [(dense["nonsense"], sparse["nonsense"]) for dense, sparse in pairs]
        for key, size in SIZES.items():
            fewer = ratios(pairs, key)
            means = [statistics.mean(model[key] for model in models) for models in zip(*pairs)]
            nonsense, control = (statistics.mean(ratios(some, key)) for some in (of_nonsense, of_untrained))
            lines.append(f"  {words}: {size} {means[0]:.1f} against {means[1]:.1f}, "
                         f"{statistics.mean(fewer):.1f}x fewer ({min(fewer):.1f} to {max(fewer):.1f}); "
                         f"nonsense {nonsense:.1f}x, an untrained transcoder {control:.1f}x")
    return lines


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN", help="with transcoders; several with --tasks")
    parser.add_argument("--prompt", action="append", default=[],
                        help="a sum or a text; with --tasks one more; may be given several times")
    parser.add_argument("--at", default="", help="of a sum: which answer, such as s1; the last one")
    parser.add_argument("--opens", nargs="?", const="", metavar="LAYER.QUERY.KEY",
                        help="what opens this edge? left out: the one that opens on about half of the sums")
    parser.add_argument("--tasks", help="compare with the parent, on tasks such as bracket,quote")
    parser.add_argument("--name", default="transcoder",
                        help="of the transcoder, as in `transcode`; with --tasks several, with commas")
    parser.add_argument("--n", type=int, help="sums of --opens, 200; prompts of each of --tasks, 8")
    parser.add_argument("--seed", type=int, default=1, help="by which the sums of --opens are drawn")


def run(options, settings):
    """`analyze.py graph`."""
    runs = [run.rstrip("/") for run in options.runs]
    if options.tasks:
        return compare_runs(runs, options)
    if len(runs) > 1:
        raise UserError("several runs are compared with --tasks=... only: give one")
    if options.opens is not None:
        return explain_edge(runs[0], options)
    if not options.prompt:
        raise UserError("say what to explain: --prompt=..., --opens or --tasks=...")
    for prompt in options.prompt:
        write_graph(runs[0], prompt, options.at, options.name)
