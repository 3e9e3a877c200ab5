"""Train a transcoder for a run's model: its MLPs in few features (features/transcoder.py).

    python analyze.py transcode out/addition --price=0.1          writes out/addition/transcoder.pt and .json
    python analyze.py transcode out/stdlib --price=3              sparser
    python analyze.py transcode out/stdlib --per-layer --name=per-layer       the control

What the MLPs read and write on training text is computed once and kept in memory, in half precision; a step
draws tokens from that. The report is of held-out text: explained variance, features that fire (L0), dead
ones, and what becomes of the model with its MLPs replaced, without error nodes, at the places where an answer
is asked (in a text, all). Ctrl-C, and whatever else stops it, costs at most SAVED steps: the same command
goes on.
"""

import math
import os
import time

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from features.transcoder import Transcoder, quality, read_and_written
from model import GPT
from models.checkpoint import fingerprint, is_finite, is_of, model_of, read_checkpoint, save_checkpoint
from models.sources import checkpoint_named, folder_of_answers
from storage.files import UserError, read_json, write_json
from training import parallel
from training.judge import examples_of

SAVED = 500  # steps between two checkpoints
MOST = 2**31  # bytes of activations that are kept; twice as many where they need single precision
AT_ONCE = 64  # sequences in a forward pass, at most
TOKENS_AT_ONCE = 2**13  # in a forward pass, at most: GPT-2's logits of so many are 1.6 GB
JUDGED = 256  # held-out sequences


def batches_of(data, split, T, tokens):
    """Yield (tokens, targets), (B, T) each, of a split, some `tokens` in all, spread evenly over it."""
    at_once = max(1, min(AT_ONCE, TOKENS_AT_ONCE // T))
    indices = examples_of(data, split, T, at_once, max_batches=max(1, tokens // (at_once * T)))
    for first in range(0, len(indices), at_once):
        yield tuple(map(torch.from_numpy, data.batch(split, indices[first:first + at_once], T)))


def cached(model, data, tokens, T):
    """What MLPs read and what they write on training data: two (N, L, C), float16, or float32 if they hold
    numbers that are too large for that.
    """
    c, device = model.config, next(model.parameters()).device
    tokens = min(tokens, MOST // (4 * c.n_layer * c.n_embd))
    read, written = [], []
    for x, _ in batches_of(data, "train", T, tokens):
        for kept, now in zip((read, written), read_and_written(model, x.to(device))):
            now = now.flatten(0, 1)
            half = now.half()
            kept.append(half if half.isfinite().all() else now)  # one of float32, and `cat` makes all so
    return torch.cat(read), torch.cat(written)


def train(coder, x, y, options, start, save):
    """Adam on random tokens of x and y (N, L, C). start: a checkpoint to go on from, or None; save(step,
    optimizer) is called now and then. Raises UserError, and saves no more, if training leaves the numbers.
    """
    optimizer = torch.optim.Adam(coder.parameters(), lr=options.lr)
    if start:
        optimizer.load_state_dict(start["optimizer"])
    first = start["step"] if start else 0
    steps = tqdm(range(first, options.steps), initial=first, total=options.steps, disable=None, leave=False)
    for step in steps:
        rows = np.random.default_rng((options.seed, step)).integers(0, len(x), options.batch)
        warm = min(1.0, (step + 1) / (0.7 * options.steps))  # the price of features comes in slowly
        loss, error = coder.loss(x[rows].float(), y[rows].float(), warm * options.price, options.revive)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        saves = (step + 1) % SAVED == 0 or step + 1 == options.steps
        if not loss.isfinite() or saves and not all(map(is_finite, coder.parameters())):
            what = f"training left the numbers at step {step}, squared error {error.item():g}"
            raise left_the_numbers(what, options)
        if step % 50 == 0:
            steps.set_postfix_str(f"squared error {error.item():.3g}")
        if saves:
            save(step + 1, optimizer)


def left_the_numbers(what, options):
    """The UserError of what is no finite number."""
    return UserError(f"{what}: this becomes no transcoder of {options.run}. Try smaller steps, "
                     f"--lr={min(options.lr / 3, 1e-3):.1g}, and --name=ANOTHER")


def add_arguments(parser):
    parser.add_argument("run", metavar="RUN", help="a run's folder, dense or gated, a GPT")
    parser.add_argument("--features", type=int, default=256, help="a layer")
    parser.add_argument("--price", type=float, default=1.0, help="c, of a feature that fires; 0.1 for sums")
    parser.add_argument("--revive", type=float, default=1e-3, help="d, of a feature that is far from firing")
    parser.add_argument("--per-layer", action="store_true", help="decoders into the own layer only")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of training data")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=1024, help="tokens a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="transcoder", help="of the files in the run's folder")


SETTINGS = ("features", "price", "revive", "per_layer", "tokens", "steps", "batch", "lr", "seed")


def begun(place, settings, of_model):
    """The checkpoint of an earlier command with the same settings, or None. Raises UserError if it is of
    other settings or of another model than that of the checkpoint of_model.
    """
    if not os.path.exists(place):
        answers = os.path.splitext(place)[0] + ".json"
        if os.path.exists(answers) and "explained" not in read_json(answers):
            raise UserError(f"{answers} is there already and of no transcoder: say --name=ANOTHER")
        return None
    checkpoint = read_checkpoint(place)
    if checkpoint.get("settings") != settings or not is_of(checkpoint.get("of"), of_model):
        raise UserError(f"{place} was trained with other settings, or for other weights. Delete it, or say "
                        "--name=ANOTHER")
    return checkpoint


def run(options, settings):
    """`analyze.py transcode`."""
    if min(options.features, options.tokens, options.steps, options.batch) < 1 or options.lr <= 0:
        raise UserError("--features, --tokens, --steps and --batch must be at least 1, --lr above 0")
    if min(options.price, options.revive) < 0:
        raise UserError("--price and --revive must be 0 or more")
    path = checkpoint_named(options.run.rstrip("/"))
    checkpoint = read_checkpoint(path)
    model = model_of(checkpoint, path, parallel.pick_device("auto")).eval()
    if not isinstance(model, GPT):
        raise UserError(f"{options.run} is no GPT: transcoders are made for its MLPs alone so far")
    folder = folder_of_answers(options.run.rstrip("/"))
    if folder is None or "data" not in checkpoint:
        raise UserError(f"{options.run} is no run, and the text it was trained on is not here: a transcoder "
                        "is trained of a run's folder, such as out/addition")
    place = os.path.join(folder, options.name + ".pt")
    settings, of = {key: getattr(options, key) for key in SETTINGS}, fingerprint(checkpoint)
    start = begun(place, settings, checkpoint)
    data = prepare_data.load(checkpoint["data"]["dataset"])
    T = data.train.shape[2] if data.meta["kind"] == "rows" else model.config.block_size

    torch.manual_seed(options.seed)
    shape = {"L": model.config.n_layer, "C": model.config.n_embd, "F": options.features}
    coder = Transcoder(**shape, cross=not options.per_layer).to(next(model.parameters()).device)
    if start:
        coder.load_state_dict(start["model"])
    began, before = time.time(), start["seconds"] if start else 0.0

    def save(step, optimizer):
        parts = {"model": coder.state_dict(), "model_args": coder.shape, "optimizer": optimizer.state_dict()}
        save_checkpoint(place, parts | {"step": step, "of": of, "settings": settings,
                                        "seconds": before + time.time() - began})

    if not start or start["step"] < options.steps:
        x, y = cached(model, data, options.tokens, T)
        if not start:
            coder.start(x[:10_000].float(), y[:10_000].float())
        train(coder, x, y, options, start, save)
    found = quality(model, coder.eval(), batches_of(data, "val", T, JUDGED * T))
    if not math.isfinite(found["explained"] + found["kl_where_asked"]):
        raise left_the_numbers(f"{place} explains {found['explained']} of the variance, KL "
                               f"{found['kl_where_asked']}", options)
    found |= {"run": options.run, "seconds": read_checkpoint(place)["seconds"]} | settings
    write_json(os.path.join(folder, options.name + ".json"), found)
    print(f"{place}: {in_words(found)}")


def in_words(found):
    """A line about a transcoder's quality."""
    layers = ", ".join(f"{100 * share:.0f}" for share in found["by_layer"])
    return (f"{100 * found['explained']:.1f} % of the variance explained ({layers} by layer); "
            f"{found['l0']:.1f} of {found['features']} features a layer fire, {100 * found['dead']:.0f} % "
            f"are dead; with the MLPs replaced, where an answer is asked, KL {found['kl_where_asked']:.4f} "
            f"nats, {100 * found['agrees_where_asked']:.1f} % of first choices the same; "
            f"{found['seconds']:.0f} s")
