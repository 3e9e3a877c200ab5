"""Are the attribution graphs of a sparse model smaller than its parent's? Heads and edges that carry 80 %.

    for price in 0.1 0.2 0.4; do
        python analyze.py transcode out/addition_dense --price=$price --name=price-$price
        python analyze.py transcode out/addition       --price=$price --name=price-$price
    done
    python analyze.py n80 out/addition --names=price-0.1,price-0.2,price-0.4 --tasks=addition,carry

For prompts that both models answer right: how many heads, and how many attention edges, hold 80 % of what
attention carries to that answer (circuits/influence.py), and what pruning leaves. A worse transcoder makes a
simpler graph, so the two models are compared twice, with the transcoders of the two names that are closest in
features that fire (L0) and with those that are closest in variance explained, the same for all runs. Several
runs, of several seeds, make a table with their range.

Beside it stand the controls: the same model with a transcoder that was never trained; a *nonsense* answer, a
token drawn at random in place of the right one; and what happens in the real model when the strongest
features and heads are cut, and others (circuits/interventions.py). Written to RUN/n80-<tasks>.json.

Notable: in our measurements the controls' sizes are nearly those of the answer. So they say how much of a
model's attention is at work on a prompt, and not how much of it one answer needs: that asks `circuit`.
"""

import itertools
import math
import os
import statistics
from typing import NamedTuple

import torch
from tqdm import tqdm

from analysis.graph import gpt_of, places_of, read_transcoder, summary
from analysis.questions import questions_of
from analysis.view import gated_checkpoint
from circuits.attribution_graph import graph_of
from circuits.compare import prompts
from circuits.interventions import in_short, interventions
from circuits.tasks import vocabulary
from circuits.transcoder import Transcoder, read_and_written
from models.checkpoint import read_parent, tokenizer_of
from models.sources import folder_of_answers
from storage.files import UserError, read_json, write_json

SIZES = {"heads_80": "heads for 80 %", "attention_edges_80": "attention edges for 80 %",
         "kept_nodes": "nodes left", "kept_links": "links left"}
MATCHED = {"l0": "as many features fire", "explained": "as much is explained"}


def models_of(run):
    """{'dense', 'sparse': (folder of its transcoders, checkpoint, model)} of a gated run; or a UserError."""
    why = "n80 compares a gated run, such as out/addition, with its parent"
    checkpoint, path = gated_checkpoint(run, why)
    found = {}
    for name, (place, folder) in places_of(checkpoint, path, run).items():
        own = read_parent(checkpoint) if name == "dense" else checkpoint
        found[name] = folder, own, gpt_of(own, place, run)
    return found


class Asked(NamedTuple):
    """A prompt, and the answer whose graph is drawn."""

    tokens: torch.Tensor  # (T,)
    position: int
    answer: int


@torch.no_grad()
def first_choice(model, tokens, position):
    """The token that a model answers with."""
    return int(model(tokens[None])[0][0, position].argmax())


def prompts_of(tasks, models, n, own=(), run=""):
    """[Asked]: n prompts of each task whose answer is right and both models' first choice; and one's own
    prompts, with the dense model's first choice.
    """
    _, checkpoint, sparse = models["sparse"]
    dense = models["dense"][2]
    words = vocabulary(tokenizer_of(checkpoint), sparse.config.vocab_size)
    found = []
    for task in tasks:
        pairs, *_ = prompts(task, 8 * n, 1, words, sparse.config.block_size)
        known = []
        for pair in pairs:
            tokens, position = torch.tensor(pair.clean), pair.positions[0]
            answers = {first_choice(model, tokens, position) for model in (dense, sparse)}
            if len(answers) == 1 and answers <= set(pair.right[0]):
                known.append(Asked(tokens, position, *answers))
        if not known:
            raise UserError(f"there is no prompt of {task} that both models answer right. Leave it away: "
                            "--tasks=...")
        found += known[:n]
    for question in questions_of(checkpoint, run, own)[0] if own else ():
        tokens = torch.tensor(question.ids)
        found += [Asked(tokens, at, first_choice(dense, tokens, at)) for at in question.positions]
    return found


def transcoders_of(models, names):
    """{'dense', 'sparse': {name: (Transcoder, what `transcode` wrote of it)}}. Raises UserError."""
    found = {}
    for kind, (folder, checkpoint, _) in models.items():
        found[kind] = {}
        for name in names:
            place = os.path.join(folder, name + ".json")
            coder = read_transcoder(folder, name, checkpoint)
            if not os.path.exists(place):
                raise UserError(f"there is no {place}, for `transcode` was stopped in its last part: give "
                                "the same command again")
            found[kind][name] = coder, read_json(place)
    return found


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
    found = {key: statistics.mean(one[key] for one in sizes) for key in kept}
    found["nonsense"] = {key: statistics.mean(one[key] for one in nonsense) for key in SIZES}
    return found | {kind: in_short([one[kind] for one in cuts]) for kind in ("features", "heads")}


def compare(folder, models, coders, matched, options):
    """What n80-<tasks>.json holds of one gated run: {'l0', 'explained': {'dense', 'sparse': measured},
    'untrained': likewise}. coders: of `transcoders_of`; matched: {by: `closest`}.
    """
    tasks = options.tasks.split(",")
    asked = prompts_of(tasks, models, options.n, options.prompt, folder)
    result, measured = {"run": folder, "tasks": tasks + options.prompt, "prompts": len(asked)}, {}
    with tqdm(desc=folder, unit="graph", leave=False, disable=None) as progress:
        for by, pair in matched.items():
            result[by] = {}
            for (kind, (*_, model)), name in zip(models.items(), pair):
                coder, quality = coders[kind][name]
                if (kind, name) not in measured:
                    measured[kind, name] = measure(model, coder, asked, progress)
                known = {key: quality.get(key) for key in (*MATCHED, "kl_where_asked", "agrees_where_asked")}
                result[by][kind] = {"transcoder": name, **known, **measured[kind, name]}
        result["untrained"] = {}
        shortest = min(len(one.tokens) for one in asked)
        batch = torch.stack([one.tokens[:shortest] for one in asked])
        for (kind, (*_, model)), name in zip(models.items(), matched["l0"]):
            like, _ = coders[kind][name]
            result["untrained"][kind] = measure(model, untrained(model, batch, like), asked, progress)
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
    names, folders = options.names.split(","), [run.rstrip("/") for run in options.runs]
    models = [models_of(folder) for folder in folders]
    coders = [transcoders_of(both, names) for both in models]  # a missing one is found before measuring
    matched = {by: closest(coders, names, by) for by in MATCHED}
    results = []
    for folder, *of_run in zip(folders, models, coders):
        results.append(compare(folder, *of_run, matched, options))
        name = f"n80-{options.tasks.replace(',', '-')}.json"
        write_json(os.path.join(folder_of_answers(folder), name), results[-1])
        print("\n".join(lines_of(results[-1])), flush=True)
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
    numbers = {kind: {key: float("nan") if value is None else value for key, value in found[kind].items()}
               for kind in ("features", "heads")}
    cuts = "; ".join(
        f"{kind}: {100 * cut['same_sign']:.0f} % of signs foretold, the strongest move the answer by "
        f"{cut['strongest']:.2f}, others by {cut['others']:.2f}, correlation {cut['correlation']:.2f}"
        for kind, cut in numbers.items()).replace("nan", "-")
    return [f"    {sizes} (of a nonsense answer {nonsense})",
            f"    replacement score {found['replacement']:.2f}, completeness {found['completeness']:.2f}",
            f"    cut: {cuts}"]


def lines_of_all(results):
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
            nonsense, untrained = (statistics.mean(ratios(some, key)) for some in (of_nonsense, of_untrained))
            lines.append(f"  {words}: {size} {means[0]:.1f} against {means[1]:.1f}, "
                         f"{statistics.mean(fewer):.1f}x fewer ({min(fewer):.1f} to {max(fewer):.1f}); "
                         f"nonsense {nonsense:.1f}x, an untrained transcoder {untrained:.1f}x")
    return lines
