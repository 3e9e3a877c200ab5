"""Turn a run's checkpoints into numbers and pictures.

    python analyze.py report out/addition                 report.json and figures; train.py calls this at the end of a run
    python analyze.py report out/addition out/other ...   the same for several runs, one table
    python analyze.py seeds config/addition.py --seeds=21-40   train twenty seeds, or as many as are not trained yet, and compare (seeds.py)
    python analyze.py explain out/addition                when does each edge open, and what is it for (explain.py)
    python analyze.py ask out/addition 36+28              one sum: its answer, the edges that opened (ask.py)
    python analyze.py ask out/addition 36+28 --shut=1.s2.s4   the same, layer 1's edge from s4 to s2 cut
    python analyze.py circuit out/stdlib_dense out/stdlib --task=quote      how small is a task's circuit, dense and sparse (compare.py)
    python analyze.py induction out/stdlib                which heads copy: prefix matching and copying score of every head
    python analyze.py benchmark out/olmo_1b               TruthfulQA, PIQA, OpenBookQA, ARC-Easy, dense beside sparse (benchmark.py)

Everything is computed again from the checkpoint by evaluate.py, the code that judged the run while it trained.

A report's first line says what became of the run (verdict.py). Of a gated run that missed its target, numbers and pictures are those of its
closest evaluation, and the last lines say what to try.

Writes into the run's folder: report.json, training.png; for a gated run gates.png and distance.png; for addition attention_flow.png,
the paper's first figure, flow.png and flow.gif, edges going out while it trained; for text gallery.png; from `explain` explain.json and explain.png; from `circuit`, into the sparse run's folder,
circuit-<task>.json and its figures; from `induction` induction.json; from `seeds`, beside the runs, out/<name>-seeds.json; from `benchmark` benchmark.json.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

import ask
import compare
import explain
import figures
import hardware
import lora
import prepare_data
import seeds
import text
from configure import ConfigError, parse_command_line
from explain import AnalysisError
from induction import copying_scores, prefix_matching
from checkpoint import CheckpointError, load_checkpoint, model_of, read_checkpoint, tokenizer_of
from report import model_judged, print_reports, report
from resume import checkpoint_named
from tasks import TaskError


# ---------------------------------------------------------------------------------------------------------------------
# explain


def explain_run(run):
    """Write a run's explain.json and explain.png, and print the table."""
    model, data, task = explain.read_addition_run(run)
    if not os.path.isdir(run):
        raise AnalysisError(f"{run} is no run's folder, and the table and the figure go there")
    if not model.config.gated:
        raise AnalysisError(f"{run} is a dense run on {data.name}: explain counts over sums and describes "
                            "gates, so it needs a gated run on addition, such as out/addition")
    a, b = explain.population(data, task)
    edges, intact = explain.explain(model, task, a, b)
    found = explain.summary(edges, intact, task, len(a))
    prepare_data.write_json(os.path.join(run, "explain.json"), found)

    right = f"{100 * intact['sum']:.2f} % of the {len(a):,} sums right"
    title = f"{run}: {found['open']:.2f} open edges on average, {right}"
    print(f"{title}\n{explain.legend(task)}")
    for line in explain.circuit_in_words(edges, intact, task, model.config.n_head):
        print(line)
    print(f"algorithm: {found['algorithm']}")

    drawn = []
    for edge in edges:
        name = explain.edge_name(edge, task, model.config.n_head)
        lines = [name, explain.when(edge), explain.damage(edge, intact, task, model.config.n_head)]
        drawn.append({**edge, "text": "\n    ".join(lines)})
    path = os.path.join(run, "explain.png")
    figures.explanation(path, explain.token_names(task), model.config.n_layer, drawn, title)


# ---------------------------------------------------------------------------------------------------------------------
# circuits


@dataclass
class CircuitOptions:
    """Flags of `analyze.py circuit`."""

    task: str = ""  # see `python tasks.py`
    n: int = 64  # pairs of prompts to rank on, and as many others to test on
    seed: int = 1
    steps: int = 5  # of integrated gradients; 1 is plain attribution


def model_and_tokenizer(source):
    """The model that a run's folder, a checkpoint, or a name such as 'gpt2' or 'allenai/OLMo-1B-hf' means, and the name of its tokenizer."""
    path = checkpoint_named(source)
    checkpoint = read_checkpoint(path)
    return model_of(checkpoint, path, hardware.pick_device("auto")), tokenizer_of(checkpoint)


def circuit_run(dense_run, sparse_run, options):
    """Compare two runs on a task: print the table, write JSON and figures into the sparse run's folder."""
    (dense, tokenizer), (sparse, other) = model_and_tokenizer(dense_run), model_and_tokenizer(sparse_run)
    if not os.path.isdir(sparse_run):
        raise AnalysisError(f"{sparse_run} is no run's folder, and the table and figures go there")
    shapes = [(model.config.vocab_size, model.config.n_layer, model.config.n_head) for model in (dense, sparse)]
    if dense.config.gated or not sparse.config.gated or tokenizer != other or shapes[0] != shapes[1]:
        raise AnalysisError(f"circuit compares a dense run with a sparse one of the same vocabulary and shape: `analyze.py circuit DENSE SPARSE --task=...`, not {dense_run} with {sparse_run}")
    result = compare.compare(dense, sparse, tokenizer, options.task, options.n, options.seed, options.steps, sparse_run)
    print(compare.table(result) + f"\nfigures: {sparse_run}/circuit-{options.task}.png, -graph.png, -gallery.png")


def induction_run(run):
    """Print and write both induction scores of every head."""
    model, _ = model_and_tokenizer(run)
    matching, copying = prefix_matching(model), copying_scores(model)
    heads = [{"layer": layer, "head": head, "prefix_matching": matching[layer, head].item(), "copying": copying[layer, head].item()} for layer, head in np.ndindex(*matching.shape)]
    if os.path.isdir(run):  # and no name such as 'gpt2'
        prepare_data.write_json(os.path.join(run, "induction.json"), heads)
    print(f"{run}: the ten heads that match prefixes best, of {len(heads)}\n{'head':>6} {'prefix matching':>16} {'copying':>8}")
    for found in sorted(heads, key=lambda found: -found["prefix_matching"])[:10]:
        print(f"{found['layer']:>3}.{found['head']:<2} {found['prefix_matching']:16.3f} {found['copying']:8.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks


@dataclass
class BenchmarkOptions:
    """Flags of `analyze.py benchmark`."""

    tasks: str = "truthfulqa_mc1,piqa,openbookqa,arc_easy"  # names of the harness, comma-separated; these are the paper's
    limit: int = 0  # questions of each task; 0 is all
    include: str = ""  # folder of tasks of your own


def benchmark_run(run, options):
    """Score a run's model, and its dense parent where it has one, on standard benchmarks: print the table, write benchmark.json."""
    try:
        import benchmark  # here, because the harness is a large package that nothing else needs
    except ImportError as error:
        raise AnalysisError(f"benchmark needs EleutherAI's harness, which is not installed ({error.name} is missing): pip install lm_eval") from error
    path = checkpoint_named(run)
    checkpoint, device = read_checkpoint(path), hardware.pick_device("auto")
    name = tokenizer_of(checkpoint)
    if name not in text.TOKENIZERS:
        raise AnalysisError(f"{run} was trained on {name}, which is no text: benchmark needs a run on text")
    if "lora" in checkpoint:  # one model is both
        model = model_judged(checkpoint, path)
        models = {"dense": lambda: lora.Base(model), "sparse": lambda: model}
    elif checkpoint["model_args"]["gated"]:
        models = {"dense": lambda: load_checkpoint(checkpoint["parent"], device, block_size=checkpoint["model_args"]["block_size"]), "sparse": lambda: model_judged(checkpoint, path)}
    else:
        models = {"dense": lambda: model_judged(checkpoint, path)}
    table = benchmark.benchmark(models, text.tokenizer(name), options.tasks, options.limit or None, options.include or None)
    if not table:
        raise AnalysisError(f"none of {options.tasks} is scored by accuracy, which is what benchmark reports")
    print(f"{run}, score +- standard error over questions\n{benchmark.lines(table)}")
    if os.path.isdir(run):  # and no name such as 'gpt2'
        prepare_data.write_json(os.path.join(run, "benchmark.json"), table)


USAGE = __doc__.split("\n\n")[1]


def main(arguments):
    command, runs = (arguments[0] if arguments else ""), [run.rstrip("/") for run in arguments[1:] if not run.startswith("--")]
    flags = [flag for flag in arguments[1:] if flag.startswith("--")]
    takes_flags = command in ("circuit", "benchmark", "ask", "seeds")
    known = ("report", "seeds", "explain", "ask", "circuit", "induction", "benchmark")
    if command not in known or not runs or flags and not takes_flags or command == "circuit" and (len(runs) != 2 or not flags):
        sys.exit(f"usage:\n{USAGE}")
    limits = {"n": ("at least 2", lambda v: v >= 2), "steps": ("at least 1", lambda v: v >= 1), "seed": ("0 or more", lambda v: v >= 0), "limit": ("0 or more", lambda v: v >= 0)}
    try:
        if command == "report":
            print_reports([report(run) for run in runs])
        elif command == "seeds":
            sys.exit(seeds.run_seeds(arguments[1:]))
        elif command == "ask":
            ask.ask_run(runs[0], "".join(runs[1:]), flags)
        elif command == "circuit":
            circuit_run(*runs, CircuitOptions(**parse_command_line(flags, CircuitOptions, limits)[1]))
        elif command == "benchmark":
            for run in runs:
                benchmark_run(run, BenchmarkOptions(**parse_command_line(flags, BenchmarkOptions, limits)[1]))
        else:
            for run in runs:
                (explain_run if command == "explain" else induction_run)(run)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory: {str(error).splitlines()[0]} To compute on the CPU: CUDA_VISIBLE_DEVICES= python analyze.py {' '.join(arguments)}")
    except (AnalysisError, CheckpointError, ConfigError, TaskError, lora.LoRAError, hardware.HardwareError, text.TextError, prepare_data.DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
