"""The pictures of a report: the curves of training, where edges are open, and the model at work on examples.

Of addition three sums, dense above sparse (attention_flow.png), and how the edges went out (flow.gif); of a
text what the busiest heads attend to (gallery.png). figures.py draws; here it is decided what.
"""

import os

import numpy as np
import torch

from analysis import figures, flow
from analysis.questions import example_sums, symbols
from models import lora
from models.checkpoint import load_parent
from models.sources import folder_of_answers
from storage import text
from storage.addition import addition_rows, addition_task
from storage.files import UserError, draw_or_say


def draw(result, config, metrics, checkpoint, model, data):
    """The figures of a report, into its run's folder. One that cannot be drawn is named.

    result: the report; model: that of the checkpoint, which is drawn.
    """
    run, edges = folder_of_answers(result["run"]), result["edges"]
    bounds = (config["lambda_min"], config["lambda_max"]) if config["gated"] else ()
    pictures = [("training.png", figures.training, metrics, checkpoint["step"], bounds)]
    if model.config.gated and checkpoint["step"]:  # else all edges are open
        pictures.append(("gates.png", figures.open_by_head, edges["per_head"]))
        pictures.append(("distance.png", figures.open_by_distance, edges["by_distance"], edges["open"]))
        label = "sparse" if result["meets_target"] else f"target missed,\nclosest: step {checkpoint['step']}"
        task = addition_task(data.meta)
        if task:
            pictures.append(("attention_flow.png", attention_flow, model, checkpoint, task, label))
            film = run, task, model.config.n_layer, config["max_steps"]
            pictures.append(("flow.gif", lambda path: flow.film(*film)))
        elif data.meta["kind"] == "stream":
            pictures.append(("gallery.png", gallery, model, checkpoint, data, edges["per_head"], label))
    for name, picture, *arguments in pictures:
        draw_or_say(os.path.join(run, name), picture, *arguments)


def parent_of(model, checkpoint, path):
    """The dense model that a run started from, or None, said aloud, if it is not there any more."""
    if checkpoint.get("base") == checkpoint["parent"]:
        return lora.Base(model)
    try:
        return load_parent(checkpoint)
    except UserError as error:
        print(f"{path} shows the sparse model only: {error}")
        return None


def weights_of(model, tokens):
    """What every edge carries for tokens (B, T): a list of n_layer arrays (B, H, T, T), 0 where shut."""
    layers = []
    model(torch.from_numpy(tokens),
          record=lambda layer, gates: layers.append(gates.weights.numpy()))
    return layers


@torch.no_grad()
def attention_flow(path, model, checkpoint, task, label):
    """attention_flow.png: three sums through the dense parent (if it is still there) and the sparse model,
    that of the checkpoint, whose row is called `label`.
    """
    model = model.cpu()
    dense_model = parent_of(model, checkpoint, path)
    sums = example_sums(task)
    a, b = np.array([(a, b) for a, b, _ in sums]).T
    questions = addition_rows(a, b, *task)[:, 0].astype(np.int64)
    titles = [f"{x} + {y} = {x + y}, {kind}" for x, y, kind in sums]
    columns = [(title, symbols(question)) for title, question in zip(titles, questions)]
    models = [(label, model)]
    if dense_model:
        models.insert(0, ("dense", dense_model))
    rows = []
    for name, net in models:
        answers = net(torch.from_numpy(questions))[0].argmax(-1).numpy()
        weights = np.stack(weights_of(net, questions), axis=1)  # (sums, n_layer, H, T, T)
        said = [[""] * task.first + symbols(answer[task.first:]) for answer in answers]
        rows.append((name, list(zip(weights, said))))
    figures.attention_flow(path, columns, rows)


@torch.no_grad()
def gallery(path, model, checkpoint, data, per_head, label, heads=4, length=36):
    """gallery.png: what the busiest heads of the sparse model, called `label`, attend to on one held-out
    snippet, and what the same heads did before.
    """
    model = model.cpu()
    dense_model = parent_of(model, checkpoint, path)
    length = min(length, model.config.block_size)
    ids = np.asarray(data.val[len(data.val) // 2:][:1000]).astype(np.int64)  # the middle of the held-out text
    pieces = pieces_of(ids.tolist(), data.meta.get("tokenizer"))
    last = min(900, len(pieces) - length)  # a whole snippet must lie behind it
    line_ends = [i for i, piece in enumerate(pieces) if i < last and piece.endswith("↵")]
    begin = line_ends[0] + 1 if line_ends else 0  # from the beginning of a line
    snippet = slice(begin, begin + length)
    fractions = np.array(per_head)
    busiest = sorted(np.ndindex(fractions.shape), key=lambda at: -fractions[at])
    busiest = busiest[:min(heads, (fractions > 0).sum())]
    rows = []
    for which, net in (("dense", dense_model), (label, model)):
        if net:
            weights = weights_of(net, ids[None, snippet])
            rows.append((which, [weights[layer][0, head] for layer, head in busiest]))
    titles = [f"layer {layer}, head {head}: {100 * fractions[layer, head]:.2g} % open"
              for layer, head in busiest]
    figures.gallery(path, titles, pieces[snippet], rows)


def pieces_of(tokens, name):
    """What each token says, in the words of the tokenizer `name`; its number where that cannot be had, said
    aloud.
    """
    if name == "addition":
        return symbols(tokens)
    try:
        if name in text.TOKENIZERS:
            return text.pieces(tokens, text.tokenizer(name))
    except UserError as error:  # no network: a report needs no vocabulary for anything else
        print(f"gallery.png shows the numbers of tokens, not their words: {error}")
    return [str(token) for token in tokens]
