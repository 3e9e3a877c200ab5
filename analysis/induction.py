"""Which heads copy? Both induction scores of every head, as a table and as induction.json.

    python analyze.py induction out/stdlib

circuits/induction.py says what they are and computes them.
"""

import os

import numpy as np

from analysis.circuit import model_and_tokenizer
from circuits.induction import copying_scores, prefix_matching
from models.sources import folder_of_answers
from storage.files import write_json

SHOWN = 10


def scores(model):
    """[{layer, head, prefix_matching, copying}], one for every head."""
    matching, copying = prefix_matching(model), copying_scores(model)
    found = []
    for layer, head in np.ndindex(*matching.shape):
        found.append({"layer": layer, "head": head, "prefix_matching": matching[layer, head].item(),
                      "copying": copying[layer, head].item()})
    return found


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run's folder, a checkpoint, or a name such as gpt2")


def run(options, settings):
    """`analyze.py induction`."""
    for folder in options.runs:
        source = folder.rstrip("/")
        model, _ = model_and_tokenizer(source)
        heads = scores(model)
        place = folder_of_answers(source)
        if place:
            write_json(os.path.join(place, "induction.json"), heads)
        print(f"{source}: the ten heads that match prefixes best, of {len(heads)}")
        print(f"{'head':>6} {'prefix matching':>16} {'copying':>8}")
        best_first = sorted(heads, key=lambda head: -head["prefix_matching"])
        for head in best_first[:SHOWN]:
            name = f"{head['layer']:>3}.{head['head']:<2}"
            print(f"{name} {head['prefix_matching']:16.3f} {head['copying']:8.2f}")
