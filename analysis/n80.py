"""Are the attribution graphs of a sparse model smaller than its parent's? Heads and edges that carry 80 %.

    for price in 0.1 0.2 0.4; do
        python analyze.py transcode out/addition_dense --price=$price --name=price-$price
        python analyze.py transcode out/addition       --price=$price --name=price-$price
    done
    python analyze.py n80 out/addition --names=price-0.1,price-0.2,price-0.4 --tasks=addition,carry

For prompts that both models know: how many heads, and how many attention edges, hold 80 % of what attention
carries (circuits/influence.py), and what pruning leaves. A worse transcoder makes a simpler graph, so the two
models are compared twice, with the transcoders that are closest in features that fire (L0) and with those
that are closest in variance explained. Several runs, of several seeds, make a table with their range.

Beside it stand the controls: the same model with a transcoder that was never trained; a *nonsense* answer, a
token drawn at random in place of the one the model gives; and what happens in the real model when the
strongest features and heads are cut, and others (circuits/interventions.py). Written to RUN/n80.json.
"""

import json
import os
import statistics

import torch
from tqdm import tqdm

from analysis.graph import read_transcoder, summary
from analysis.questions import questions_of
from circuits import prompt_circuits
from circuits.attribution_graph import graph_of
from circuits.compare import prompts, vocabulary_of
from circuits.interventions import in_short, interventions
from circuits.transcoder import Transcoder, read_and_written
from models.checkpoint import checkpoint_named, folder_of_answers, model_of, read_checkpoint, tokenizer_of
from storage.files import UserError, write_json

SIZES = {"heads_80": "heads for 80 %", "attention_edges_80": "attention edges for 80 %",
         "kept_nodes": "nodes left", "kept_links": "links left"}
MATCHED = {"l0": "as many features fire", "explained": "as much is explained"}


def models_of(run):
    """{'dense', 'sparse': (folder of its transcoders, checkpoint, model)} of a gated run; or a UserError."""
    path = checkpoint_named(run)
    checkpoint = read_checkpoint(path)
    if not checkpoint["model_args"].get("gated"):
        raise UserError(f"{run} is a dense run: n80 compares a gated run, such as out/addition, with its "
                        "parent")
    found, parent = {}, checkpoint["reference"]
    for name, place in (("dense", parent), ("sparse", path)):
        own = read_checkpoint(place)
        found[name] = folder_of_answers(os.path.dirname(place)), own, model_of(own, place, "cpu").eval()
    return found


def prompts_of(tasks, models, n, own=(), run=""):
    """[(tokens, position asked)] of n prompts a task, such that both models know the answer there; and of
    one's own prompts, as they are.
    """
    _, checkpoint, sparse = models["sparse"]
    vocabulary = vocabulary_of(tokenizer_of(checkpoint), sparse.config.vocab_size)
    found = []
    for task in tasks:
        pairs, _, metric = prompts(task, 4 * n, 1, vocabulary, sparse.config.block_size)
        known = prompt_circuits.known_to([models["dense"][2], sparse], pairs, metric, "zero")[:n]
        if not known:
            raise UserError(f"there is no prompt of {task} that both models know. Leave it away: --tasks=...")
        found += [(torch.tensor(pair.clean), pair.positions[0]) for pair in known]
    for question in questions_of(checkpoint, run, own)[0] if own else ():
        found += [(torch.tensor(question.ids), position) for position in question.positions]
    return found


def qualities(folder, names):
    """{name: what `transcode` wrote of it} of a run's transcoders."""
    found = {}
    for name in names:
        with open(os.path.join(folder, name + ".json"), encoding="utf-8") as f:
            found[name] = json.load(f)
    return found


def closest(dense, sparse, by):
    """(name of a dense model's transcoder, name of a sparse one's), the pair that differs least in `by`."""
    return min(((a, b) for a in dense for b in sparse),
               key=lambda pair: abs(dense[pair[0]][by] - sparse[pair[1]][by]))


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
    draw = torch.Generator().manual_seed(0)
    for tokens, at in asked:
        graph = graph_of(model, coder, tokens, at)
        sizes.append(summary(graph))
        cuts.append(interventions(model, coder, tokens, graph))
        anything = int(torch.randint(model.config.vocab_size, (), generator=draw))
        nonsense.append(summary(graph_of(model, coder, tokens, at, answer=anything)))
        progress.update()
    kept = (*SIZES, "replacement", "completeness", "all_heads", "attention_edges")
    found = {key: statistics.mean(one[key] for one in sizes) for key in kept}
    found["nonsense"] = {key: statistics.mean(one[key] for one in nonsense) for key in SIZES}
    return found | {kind: in_short([one[kind] for one in cuts]) for kind in ("features", "heads")}


def compare(run, names, tasks, n, own=()):
    """What n80.json holds of one gated run: {'l0', 'explained': {'dense', 'sparse': measured},
    'untrained': likewise}.
    """
    models = models_of(run)
    asked = prompts_of(tasks, models, n, own, run)
    known = {kind: {name: read_transcoder(folder, name, checkpoint) for name in names}
             for kind, (folder, checkpoint, _) in models.items()}
    quality = {kind: qualities(folder, names) for kind, (folder, _, _) in models.items()}
    result, measured = {"run": run, "tasks": [*tasks, *own], "prompts": len(asked)}, {}
    with tqdm(desc=run, unit="graph", leave=False, disable=None) as progress:
        for by in MATCHED:
            result[by] = {}
            for kind, name in zip(models, closest(quality["dense"], quality["sparse"], by)):
                if (kind, name) not in measured:
                    measured[kind, name] = measure(models[kind][2], known[kind][name], asked, progress)
                own = {key: quality[kind][name][key] for key in (*MATCHED, "kl", "agrees")}
                result[by][kind] = {"transcoder": name, **own, **measured[kind, name]}
        result["untrained"] = {}
        for kind, (_, _, model) in models.items():
            batch = torch.stack([tokens[:min(len(one) for one, _ in asked)] for tokens, _ in asked])
            fresh = untrained(model, batch, known[kind][names[0]])
            result["untrained"][kind] = measure(model, fresh, asked, progress)
    return result


# ------------------------------------------------------------------------------------------------------------
# The command


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN", help="gated runs; their parents are known")
    parser.add_argument("--names", default="transcoder", help="of transcoders, with commas")
    parser.add_argument("--tasks", required=True, help="such as bracket,quote")
    parser.add_argument("--n", type=int, default=8, help="prompts of each task")
    parser.add_argument("--prompt", action="append", default=[], help="one more, of your own; repeatable")


def run(options, settings):
    """`analyze.py n80`."""
    if options.n < 1:
        raise UserError("--n must be at least 1")
    names, tasks = options.names.split(","), options.tasks.split(",")
    results = []
    for run in options.runs:
        run = run.rstrip("/")
        results.append(compare(run, names, tasks, options.n, options.prompt))
        write_json(os.path.join(folder_of_answers(run), "n80.json"), results[-1])
        print("\n".join(lines_of(results[-1])))
    if len(results) > 1:
        print("\n".join(lines_of_all(results)))


def lines_of(result):
    """What is printed of a run."""
    lines = [f"{result['run']}, {result['prompts']} prompts of {', '.join(result['tasks'])}"]
    for by, words in MATCHED.items():
        for kind, found in result[by].items():
            lines.append(f"  {words}, {kind}: {100 * found['explained']:.1f} % explained, {found['l0']:.1f} "
                         "features fire")
            lines += in_words(found)
    for kind, found in result["untrained"].items():
        lines += [f"  untrained, {kind}", *in_words(found)]
    return lines


def in_words(found):
    """Sizes, scores and interventions of one model, lines."""
    sizes = "; ".join(f"{found[key]:.1f} {size}" for key, size in SIZES.items())
    nonsense = ", ".join(f"{found['nonsense'][key]:.1f}" for key in SIZES)
    cuts = "; ".join(
        f"{kind}: {100 * found[kind]['same_sign']:.0f} % of signs foretold, the strongest move the answer by "
        f"{found[kind]['strongest']:.2f}, others by {found[kind]['others']:.2f}, correlation "
        f"{found[kind]['correlation']:.2f}" for kind in ("features", "heads"))
    return [f"    {sizes} (of a nonsense answer {nonsense})",
            f"    replacement score {found['replacement']:.2f}, completeness {found['completeness']:.2f}",
            f"    cut: {cuts}"]


def lines_of_all(results):
    """Dense over sparse, its mean and range over the runs."""
    lines = [f"{len(results)} runs, dense against sparse, mean (range):"]
    for by, words in MATCHED.items():
        for key, size in SIZES.items():
            ratios = [one[by]["dense"][key] / max(one[by]["sparse"][key], 1e-9) for one in results]
            means = [statistics.mean(one[by][kind][key] for one in results) for kind in ("dense", "sparse")]
            lines.append(f"  {words}: {size} {means[0]:.1f} against {means[1]:.1f}, "
                         f"{statistics.mean(ratios):.1f}x fewer ({min(ratios):.1f} to {max(ratios):.1f})")
    return lines
