"""Does the sparse model still know what the dense one knew? Standard benchmarks, dense beside sparse.

    python analyze.py benchmark out/olmo_1b
        the paper's four: TruthfulQA (mc1), PIQA, OpenBookQA, ARC-Easy
    python analyze.py benchmark out/olmo_1b --tasks=hellaswag --limit=200
        any other task of the harness, the first 200 questions of each
    python analyze.py benchmark out/stdlib --tasks=mine --include=FOLDER
        tasks of your own, in the harness' YAML

EleutherAI's lm-evaluation-harness scores the answers (`pip install lm_eval`; it fetches the questions);
harness.py says how. Writes benchmark-<task>.json into the run's folder; with a limit
benchmark-<task>-<limit>.json.
"""

import os

from analysis.report import model_judged
from models import lora
from models.checkpoint import load_parent, read_checkpoint, tokenizer_of
from models.sources import checkpoint_named, folder_of_answers
from storage import text
from storage.files import UserError, write_json
from training import parallel

PAPERS = "truthfulqa_mc1,piqa,openbookqa,arc_easy"


def the_harness():
    """harness.py, imported only here: it needs a large package that nothing else needs."""
    try:
        from analysis import harness
    except ImportError as error:
        raise UserError("benchmark needs EleutherAI's harness, which is not installed "
                        f"({error.name} is missing): pip install lm_eval") from error
    return harness


def models_to_compare(checkpoint, path):
    """{'dense': function, 'sparse': function}; each brings a model. A dense run has the first alone."""
    def judged():
        return model_judged(checkpoint, path)

    def parent():
        context = checkpoint["model_args"]["block_size"]
        return load_parent(checkpoint, parallel.pick_device("auto"), block_size=context)

    if "lora" in checkpoint:  # one model is both
        model = judged()
        return {"dense": lambda: lora.Base(model), "sparse": lambda: model}
    if not checkpoint["model_args"].get("gated"):
        return {"dense": judged}
    return {"dense": parent, "sparse": judged}


def benchmark_run(folder, options):
    """Score a run's model, and its dense parent where it has one: print the table, write
    benchmark-<task>.json.
    """
    harness = the_harness()
    path = checkpoint_named(folder)
    checkpoint = read_checkpoint(path)
    name = tokenizer_of(checkpoint)
    if name not in text.TOKENIZERS:
        raise UserError(f"{folder} was trained on {name}, which is no text: benchmark needs a run on text")
    models = models_to_compare(checkpoint, path)
    tokens, limit = text.tokenizer(name), options.limit or None
    table = harness.benchmark(models, tokens, options.tasks, limit, options.include)
    if not table:
        raise UserError(f"none of {options.tasks} is scored by accuracy, which is what benchmark reports")
    print(f"{folder}, score +- standard error over questions\n{harness.lines(table)}")
    answers = folder_of_answers(folder)
    if answers:  # and no name such as 'gpt2'
        questions = f"-{limit}" if limit else ""
        for task, scores in table.items():
            write_json(os.path.join(answers, f"benchmark-{task}{questions}.json"), scores)


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run's folder, a checkpoint, or a name such as gpt2")
    parser.add_argument("--tasks", default=PAPERS,
                        help=f"names of the harness, comma-separated; default {PAPERS}")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task; 0 is all")
    parser.add_argument("--include", metavar="FOLDER", help="folder of tasks of your own")


def run(options, settings):
    """`analyze.py benchmark`."""
    if options.limit < 0:
        raise UserError("--limit must be 0 or more")
    for folder in options.runs:
        benchmark_run(folder.rstrip("/"), options)
