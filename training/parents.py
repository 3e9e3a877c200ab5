"""Where a run comes from: its own last checkpoint, a parent's weights or random ones.

    init_from    'scratch', a run's folder, a config file (trained first), a checkpoint, a model's name

A gated run keeps the loss of its parent, run dense. What every checkpoint of the run says about its parent is
written down: name, fingerprint, data. So a run that goes on later knows whether it is still what it was, and
refuses if not.

Notable:
- With adapters (lora.py) the dense model is the run's own, adapters and gates switched off: no second copy.
- A model is prepared while it is empty: cut into parts (sharding.py), given adapters, told to recompute. Then
  weights are read, tensor by tensor.
"""

import os
from dataclasses import fields
from functools import partial

import torch
import torch.utils.checkpoint

from gate import GateConfig
from model import PRETRAINED
from models import lora
from models.checkpoint import (
    fingerprint,
    is_of,
    model_of,
    new_model,
    read_checkpoint,
    require_tokenizer,
    shape_of,
)
from models.sources import is_elsewhere, kept_checkpoint, to_keep
from storage.files import UserError, typed
from training import parallel
from training.config import SHAPE, make_config
from training.judge import train_on

# settings that a run hands to a parent that is trained first, where they were set
PASSED_ON = ("seed", "device", "compile", "dtype")


def run_of(source, config, given):
    """The run of a config file that `config` starts from: (Config, names of its settings). Seed and hardware
    are passed on.
    """
    passed_on = {key: getattr(config, key) for key in PASSED_ON if key in given}
    return make_config(source, passed_on)


def lineage_of(config, given):
    """All runs that training `config` takes, in their order: those of the config files that it starts from,
    then its own. A list of (Config, names of the settings that were set).

    A run that has begun knows its parent's checkpoint: it stands alone. Raises UserError.
    """
    own, parent = (config, given), config.init_from
    if os.path.exists(os.path.join(config.out_dir, "last.pt")) or not parent.endswith(".py"):
        return [own]
    run, names = run_of(parent, config, given)
    if config.gated and run.gated:
        raise UserError(f"init_from={parent} is a gated run. Start from a dense one: its loss is the target")
    refuse_own_folder(run.out_dir, config)
    lineage = lineage_of(run, names)
    refuse_other_shape(parent, lineage[0][0], config, given)
    return [*lineage, own]


def refuse_other_shape(parent, first, config, given):
    """Raise UserError if a shape was given that is not that of the run `parent`, before that is trained.

    first: the settings of the first run of its lineage, which has the shape of all. A shorter context is no
    other shape to an OLMo.
    """
    if first.init_from != "scratch":
        return  # a model that is there: it says so itself, before anything is trained
    for key in SHAPE:
        ours, theirs = getattr(config, key), getattr(first, key)
        shorter = key == "block_size" and first.architecture != "gpt2" and ours < theirs
        if key in given and ours != theirs and not shorter:
            first = typed("python", "train.py", parent, f"--{key}={ours}", "--out_dir=out/PARENT")
            raise UserError(
                f"{key}={ours!r}, but {parent} has {key}={theirs!r}: a run that starts from another keeps "
                f"its shape. First {first}, then this one with --init_from=out/PARENT and without --{key}"
            )


def refuse_own_folder(folder, config):
    """Raise UserError if a run's folder were its parent's as well."""
    if os.path.realpath(folder) == os.path.realpath(config.out_dir):
        raise UserError(
            f"{folder} is the run's own folder and its parent's as well. Give it another with "
            "--out_dir=out/NEW"
        )


def find_parent(config, given):
    """The checkpoint that init_from names, or None of a run from scratch.

    A config file's run has been trained before. Raises UserError.
    """
    source = config.init_from
    if source == "scratch":
        return None
    is_config = source.endswith(".py")
    if is_elsewhere(source) or os.path.isfile(source) and not is_config:
        return source
    folder = run_of(source, config, given)[0].out_dir if is_config else source
    refuse_own_folder(folder, config)
    path = kept_checkpoint(folder)
    if path is None:
        raise UserError(
            f"init_from={source}: there is no best.pt or last.pt in {folder}. It takes the folder of a run, "
            f"a config file, a checkpoint of nanoGPT or transformers, one of {', '.join(PRETRAINED)}, "
            "'scratch' or 'resume'"
        )
    return path


def require_ready(checkpoint, path):
    """Raise UserError if a dense run that was to be trained until it is ready (ready_loss) has not got there:
    what a child is to keep would be an unfinished model's loss.
    """
    ready_loss = checkpoint.get("config", {}).get("ready_loss")
    if ready_loss and not checkpoint.get("ready"):
        folder, steps = os.path.dirname(path), 2 * checkpoint["config"]["max_steps"]
        raise UserError(
            f"{path} is no parent yet: it still gets answers wrong, or its held-out loss is above its "
            f"ready_loss={ready_loss:g}. Train it on: {train_on(folder, steps)}; then the same command as "
            f"now with {typed(f'--init_from={folder}')}"
        )


def origin_of(c, data, path, parent, saved):
    """What every checkpoint of a run says of its origin: its parent, fingerprints, data, adapters."""
    begun = saved or {"reference_fingerprint": fingerprint(parent) if c.gated else None}
    kept = to_keep(path, c.out_dir)
    origin = {"parent": kept, "reference": kept if c.gated else None,
              "reference_fingerprint": begun["reference_fingerprint"],
              "data": {"dataset": c.dataset, "tokenizer": data.meta.get("tokenizer", c.dataset),
                       "sha256": data.meta["sha256"]}}
    if c.lora_rank:
        origin["lora"] = {"rank": c.lora_rank, "alpha": c.lora_alpha, "targets": c.lora_targets}
        origin["base"] = kept
        origin["base_fingerprint"] = saved["base_fingerprint"] if saved else fingerprint(parent)
    return origin


def check_parent(c, path, parent, origin, saved):
    """Raise UserError if a run cannot start from the parent's checkpoint, or was begun with another.

    parent: {} of a run from scratch, or of a dense run that has begun.
    """
    if parent:
        require_tokenizer(parent, path, origin["data"]["tokenizer"])
    if c.gated:
        if parent["model_args"].get("gated"):
            raise UserError(f"init_from={c.init_from} is a gated run. Start from a dense one: its loss is "
                            "the target, its gates are not open or shut yet")
        require_ready(parent, path)
    if not saved:
        if c.lora_rank and "lora" in parent:
            merge = typed("python", "analyze.py", "export", path, "--to", "hf", "FOLDER")
            raise UserError(f"{path} holds adapters itself, and one model has one set of them. Merge them "
                            f"first ({merge}) and start from FOLDER")
        return
    if c.gated and not is_of(saved["reference_fingerprint"], parent):
        raise UserError(
            f"{path} holds other weights now than when {c.out_dir} was begun: the target is not that model's "
            "any more. Put the old file back, or start a new run with --out_dir=out/NEW"
        )
    if saved["data"] != origin["data"]:
        raise UserError(
            f"data/{c.dataset} is not the data that {c.out_dir} was begun with ({saved['data']} there, "
            f"{origin['data']} here): it cannot go on exactly. Put the old data back, or start a new run "
            "with --out_dir=out/NEW"
        )


def models_of(c, given, data, device, saved):
    """(model, dense, origin) of the run that the settings c describe.

    given    names of the settings that were set: a parent's shape is taken over where they say nothing
    saved    the run's own last.pt, or None of a new run
    model    in evaluation mode, on its device, perhaps cut into parts (whose weights come later, by
             sharding.load)
    dense    of a gated run: its parent, frozen. It sets the target, is compared with on the same batch, and
             teaches; else None
    origin   see `origin_of`
    Changes the shape in c to that of the model. Raises UserError and what the loaders raise.
    """
    path = saved["parent"] if saved else find_parent(c, given)
    if saved and c.gated and not is_elsewhere(path) and not os.path.exists(path):
        raise UserError(f"{c.out_dir} is to keep the loss of {path}, which is gone. Put it back, or train it "
                        "again with the command that made it")
    with parallel.first_alone():  # who downloads, if need be
        parent = read_checkpoint(path) if path and (c.gated or not saved) else {}
    origin = origin_of(c, data, path, parent, saved)
    check_parent(c, path, parent, origin, saved)
    torch.manual_seed(c.seed)
    model = model_to_train(c, given, data, device, saved, path, parent)
    check_data_fits(c, data, model)
    if not c.gated:
        return model, None, origin
    if c.lora_rank:
        return model, lora.Base(model), origin
    # an OLMo's positions are no weights: its context may be shorter
    context = {"block_size": c.block_size} if "architecture" in parent["model_args"] else {}
    return model, model_of(parent, path, device, partial(cut_if_sharded, c, device), **context), origin


def model_to_train(c, given, data, device, saved, path, parent):
    """The run's own model: of its checkpoint, of its parent's, or random."""
    prepared = partial(prepare, c, device)
    gate_settings = {f.name: getattr(c, f.name) for f in fields(GateConfig)}
    if saved:
        return model_of(saved, f"{c.out_dir}/last.pt", device, prepared, merged=False, in_parts=True)
    if not path:
        return prepared(new_model(c, data.meta["vocab_size"], gate_settings).to(device))
    args = parent["model_args"]
    shorter = {}
    if "architecture" in args and "block_size" in given and c.block_size < args["block_size"]:
        shorter = {"block_size": c.block_size}  # an OLMo's positions are no weights
    model = model_of(parent, path, device, prepared, **gate_settings, **shorter)
    for key, value in shape_of(model.config).items():
        if key in given and getattr(c, key) != value:
            raise UserError(
                f"{key}={getattr(c, key)!r}, but {path} has {key}={value!r}: a run that starts from another "
                f"keeps its shape. Leave {key} away"
            )
        setattr(c, key, value)
    return model


def check_data_fits(c, data, model):
    """Raise UserError if model cannot read the dataset."""
    if model.config.vocab_size < data.meta["vocab_size"]:
        raise UserError(f"the model knows {model.config.vocab_size} tokens, data/{c.dataset} has "
                        f"{data.meta['vocab_size']}: they do not belong together")
    if data.meta["kind"] == "rows" and model.config.block_size < data.train.shape[2]:
        raise UserError(
            f"a row of data/{c.dataset} has {data.train.shape[2]} tokens, the model's block_size is "
            f"{model.config.block_size}: make it larger"
        )


def cut_if_sharded(c, device, model):
    """Cut model into parts if the run is to be sharded; return it."""
    if parallel.is_sharded(c.parallel):
        from training import sharding

        sharding.shard(model, device)
    return model


def prepare(c, device, model):
    """What is done to the run's model while it is empty: adapters, precision, recomputation, parts.

    Returns model, changed in place.
    """
    if c.lora_rank:
        if not lora.adapters_of(model):  # a new run's
            lora.add(model, c.lora_rank, c.lora_alpha, c.lora_targets)
        lora.freeze_in(model, getattr(torch, c.base_dtype))
    for block in model.blocks:
        if parallel.is_sharded(c.parallel) and parallel.compiles(c.compile, device, pays_on_cpu=False):
            # by itself, because the graph of the whole would break wherever a block is put together
            block.forward = torch.compile(block.forward)
        if c.recompute_activations:
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    return cut_if_sharded(c, device, model)
