"""How small is the circuit of a task, in a dense and in a sparse model? The table, numbers and pictures.

    python analyze.py circuit                                           the tasks that there are
    python analyze.py circuit --task=quote                              its prompts
    python analyze.py circuit out/stdlib_dense out/stdlib --task=quote
    python analyze.py circuit out/stdlib --task=induction               which heads copy? any runs

circuits/compare.py measures. Here the models are read, and what was found goes into the sparse run's folder:
circuit-<task>.json, the curves circuit-<task>.png, one prompt's attention edges -edges.png, the circuit of
components -graph.png, and what its strongest heads attend to -gallery.png. Of `induction`
(circuits/induction.py) there are both scores of every head, in induction.json.
"""

import os

import numpy as np
import torch

from analysis import circuit_figures, figures
from analysis.circuit_table import lines_of_prompts, lines_of_tasks, table
from analysis.report_figures import pieces_of
from circuits import compare, induction, tasks
from circuits.attention_edges import terms_of
from circuits.graph import ComponentGraph
from circuits.prompt_circuits import circuit_of
from models.checkpoint import model_of, read_checkpoint, tokenizer_of
from models.sources import checkpoint_named, folder_of_answers
from storage.files import UserError, write_json
from training import parallel

DRAWN_HEADS = 5
LISTED_HEADS = 10  # of induction


def model_and_tokenizer(source):
    """(model, name of its tokenizer) of a source.

    source: a run's folder, a checkpoint, or a name such as 'gpt2' or 'allenai/OLMo-1B-hf'
    """
    path = checkpoint_named(source)
    checkpoint = read_checkpoint(path)
    return model_of(checkpoint, path, parallel.pick_device("auto")), tokenizer_of(checkpoint)


def two_models(dense_run, sparse_run):
    """(dense, sparse, name of their tokenizer). Raises UserError if the two cannot be compared."""
    dense, tokenizer = model_and_tokenizer(dense_run)
    sparse, other = model_and_tokenizer(sparse_run)
    tokenizer, other = tokenizer or other, other or tokenizer  # what nobody wrote down is no other one
    shape = ("vocab_size", "n_layer", "n_head")
    same_shape = all(getattr(dense.config, key) == getattr(sparse.config, key) for key in shape)
    if dense.config.gated or not sparse.config.gated or tokenizer != other or not same_shape:
        raise UserError("circuit compares a dense run with a sparse one of the same vocabulary and shape: "
                        f"`analyze.py circuit DENSE SPARSE --task=...`, not {dense_run} with {sparse_run}")
    return dense, sparse, tokenizer


def kept_edges(graph, found):
    """The circuit as a list of (from, to, as q, k or v, score), components by their number."""
    roles = [name.rpartition(" ")[2] if "." in name else "" for name in graph.reader_names]
    return [(writer, graph.owner[reader].item(), roles[reader], found.sparse.scores[writer, reader].item())
            for writer, reader in found.sparse.circuit.nonzero().tolist()]


def strongest_heads(graph, kept):
    """The heads with the most score on their edges, the strongest first."""
    weight = torch.zeros(graph.W)
    for writer, owner, _, score in kept:
        for end in (writer, owner):
            if end < graph.W:
                weight[end] += abs(score)
    names = graph.writer_names
    heads = [w for w in weight.argsort(descending=True).tolist() if weight[w] > 0 and "." in names[w]]
    return heads[:DRAWN_HEADS]


@torch.no_grad()
def patterns(model, ids, heads, graph):
    """What each head, by its number among the writers, attends to on one prompt: a list of (T, T)."""
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    layers = [terms.weights[0].cpu().numpy() for terms in terms_of(model, prompt)]
    per_layer = graph.H + 1  # the heads and the MLP; the embedding is number 0
    return [layers[(w - 1) // per_layer][(w - 1) % per_layer] for w in heads]


def draw(found, dense, sparse, tokenizer, folder):
    """The figures of a Comparison, of its heads where it has some. Returns their paths."""
    task = found.result["task"]
    path = os.path.join(folder, f"circuit-{task}")
    circuit_figures.circuit_curves(path + ".png", task, found.result)
    graph = ComponentGraph(sparse.config.n_layer, sparse.config.n_head)
    kept = kept_edges(graph, found)
    title = f"{task}: the {len(kept)} edges that explain {100 * found.sparse.share:.0f} % in the sparse model"
    names = graph.writer_names + ["output"]
    circuit_figures.circuit_graph(path + "-graph.png", names, graph.H, kept, title)
    drawn = [path + ".png", path + "-graph.png"]
    heads = strongest_heads(graph, kept)
    if not heads:
        return drawn
    rows = [("dense", patterns(dense, found.prompt, heads, graph)),
            ("sparse", patterns(sparse, found.prompt, heads, graph))]
    names = [f"head {graph.writer_names[w]}" for w in heads]
    title = f"{task}: the circuit's strongest heads on one prompt"
    figures.gallery(path + "-gallery.png", names, pieces_of(found.prompt, tokenizer), rows, title)
    return [*drawn, path + "-gallery.png"]


def draw_prompt(found, models, tokenizer, folder):
    """The attention edges of one prompt's circuit, in each model; nothing if it is not known to both. Returns
    the paths of what was drawn.

    models: {'dense': model, 'sparse': model}
    """
    task, rows = found.result["task"], []
    for name, model in models.items():
        measured = found.result["attention_edges"]["zero"].get(name)
        if measured is None or found.pair is None:
            return []
        kept = circuit_of(model, found.pair, found.result["metric"], "zero", measured["ranking"])
        prompt = torch.tensor([found.pair.clean], device=next(model.parameters()).device)
        weights = torch.stack([layer.weights[0] for layer in terms_of(model, prompt)])
        rows.append((name, (weights * kept).cpu().numpy()))
    path = os.path.join(folder, f"circuit-{task}-edges.png")
    title = f"{task}: the attention edges within 10 % of the effect on one prompt, all others cut"
    circuit_figures.prompt_circuits(path, pieces_of(found.pair.clean, tokenizer), rows, title)
    return [path]


def score_heads(source):
    """Print the heads of a source that look most like induction heads, and write all into induction.json."""
    model, _ = model_and_tokenizer(source)
    matching, copying = induction.prefix_matching(model), induction.copying_scores(model)
    heads = [{"layer": layer, "head": head, "prefix_matching": matching[layer, head].item(),
              "copying": copying[layer, head].item()} for layer, head in np.ndindex(*matching.shape)]
    folder = folder_of_answers(source)
    if folder:
        write_json(os.path.join(folder, "induction.json"), heads)
    print(f"{source}: the ten heads that match prefixes best, of {len(heads)}")
    print(f"{'head':>6} {'prefix matching':>16} {'copying':>8}")
    for head in sorted(heads, key=lambda head: -head["prefix_matching"])[:LISTED_HEADS]:
        name = f"{head['layer']:>3}.{head['head']:<2}"
        print(f"{name} {head['prefix_matching']:16.3f} {head['copying']:8.2f}")


def compare_runs(dense_run, sparse_run, options):
    """Print and write how much of two models a task needs, and draw it."""
    n = 64 if options.n is None else options.n
    if n < 2 or options.steps < 1:
        raise UserError("--n must be at least 2, --steps at least 1")
    dense, sparse, tokenizer = two_models(dense_run, sparse_run)
    if not options.task:
        name = tasks.vocabulary(tokenizer, sparse.config.vocab_size).name
        raise UserError(f"say which task: --task={' or --task='.join(tasks.fitting(name))}")
    folder = folder_of_answers(sparse_run)
    found = compare.compare(dense, sparse, tokenizer, options.task, n, options.seed, options.steps)
    runs = {"dense": dense_run, "sparse": sparse_run}
    write_json(os.path.join(folder, f"circuit-{options.task}.json"), {"runs": runs} | found.result)
    print(table(found.result))
    drawn = draw(found, dense, sparse, tokenizer, folder)
    drawn += draw_prompt(found, {"dense": dense, "sparse": sparse}, tokenizer, folder)
    print(f"figures: {', '.join(drawn)}")


def add_arguments(parser):
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="a dense run, or a name such as gpt2, and a gated run's folder; for induction "
                             "any; left out: the task's prompts are printed")
    parser.add_argument("--task", help="left out, with no run: the tasks that there are")
    parser.add_argument("--n", type=int,
                        help="pairs of prompts to rank on, and as many others to test on, 64; or to print, 5")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--steps", type=int, default=5,
                        help="of integrated gradients (EAP-IG) on component edges; 1 is plain attribution")
    parser.add_argument("--vocabulary", choices=["gpt2", "bytes", "addition"],
                        help="of prompts that are printed; default: the first that the task fits")


def run(options, settings):
    """`analyze.py circuit`."""
    runs = [run.rstrip("/") for run in options.runs]
    if runs and options.task == "induction":
        for source in runs:
            score_heads(source)
    elif len(runs) == 2:
        compare_runs(*runs, options)
    elif runs:
        raise UserError("circuit compares two runs: `analyze.py circuit DENSE SPARSE --task=...`")
    elif options.task:
        n = 5 if options.n is None else options.n
        print("\n".join(lines_of_prompts(options.task, n, options.seed, options.vocabulary)))
    else:
        print("\n".join(lines_of_tasks()))
