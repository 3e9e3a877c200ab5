"""Where a run comes from: its own last checkpoint, a parent's weights or random ones; and the dense model
whose loss it is to keep.

    init_from    the parent: whose weights a new run takes     'scratch', a run's folder, a config file
                 (trained first), a checkpoint, a name on Hugging Face
    target_from  the reference: whose loss is to be kept       the same; the parent, if left out

`lineage_of` says which runs have to be trained first. What every checkpoint of the run says about its parents
is written down: names, fingerprints, data. So a run that goes on later knows whether they are still what they
were, and refuses if not.

Notable:
- With adapters (lora.py) on the parent, the dense model is the run's own, adapters and gates switched off: no
  second copy.
- A model is prepared while it is empty: cut into parts (sharding.py), given adapters, told to recompute. Then
  weights are read, tensor by tensor.
"""

import os
from functools import partial
from typing import NamedTuple

import torch
import torch.utils.checkpoint

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
from training import hardware, sharding
from training.settings import GATE, SHAPE, Config, make_config
from training.verdict import train_on

# settings that a run hands to a parent that is trained first, where they were set
PASSED_ON = ("seed", "device", "compile", "dtype")


class Planned(NamedTuple):
    """A run that a command trains."""

    config: Config
    given: set  # names of the settings that were set: a parent's shape is taken over where they say nothing
    source: str  # the config file that names it as a parent, '' for the command's own


def run_of(source, config, given):
    """The run of a config file that `config` starts from or is compared with: (Config, names of its
    settings). Seed and hardware are passed on.
    """
    passed_on = {key: getattr(config, key) for key in PASSED_ON if key in given}
    return make_config(source, passed_on)


def sources_of(config):
    """[(setting, value)] of what a run needs: its parent and, of a gated run, its reference."""
    sources = [("init_from", config.init_from)]
    if config.gated and config.target_from:
        sources.append(("target_from", config.target_from))
    return sources


def lineage_of(config, given, source=""):
    """All runs that training `config` takes, in their order: those of the config files that it names, then
    its own. A list of Planned.

    A run that has begun knows its parents' checkpoints: it stands alone. Raises UserError.
    """
    own = Planned(config, given, source)
    if os.path.exists(os.path.join(config.out_dir, "last.pt")):
        return [own]
    lineage = []
    for setting, parent in sources_of(config):
        if not parent.endswith(".py"):
            continue
        run, names = run_of(parent, config, given)
        if config.gated and run.gated:
            raise UserError(
                f"{setting}={parent} is a gated run. Start from a dense one: its loss is the target"
            )
        refuse_own_folder(run.out_dir, config)
        runs = lineage_of(run, names, parent)
        if setting == "init_from":
            refuse_other_shape(parent, runs[0].config, config, given)
        trained = [earlier.config.out_dir for earlier in lineage]
        lineage += [new for new in runs if new.config.out_dir not in trained]
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


def find_dense(source, config, given, setting):
    """The checkpoint that `source`, the value of init_from or target_from, names.

    A config file's run has been trained before. Raises UserError.
    """
    is_config = source.endswith(".py")
    if is_elsewhere(source) or os.path.isfile(source) and not is_config:
        return source
    folder = run_of(source, config, given)[0].out_dir if is_config else source
    refuse_own_folder(folder, config)
    path = kept_checkpoint(folder)
    if path is None:
        raise UserError(
            f"{setting}={source}: there is no best.pt or last.pt in {folder}. It takes the folder of a run, "
            "a config file, a checkpoint of nanoGPT or transformers, "
            f"or one of {', '.join(PRETRAINED)}; init_from also 'scratch' and 'resume'"
        )
    return path


def require_ready(checkpoint, path, setting):
    """Raise UserError if a dense run that was to be trained until it is ready (ready_loss) has not got there:
    what a child is to keep would be an unfinished model's loss. setting: by which it was named.
    """
    ready_loss = checkpoint.get("config", {}).get("ready_loss")
    if ready_loss and not checkpoint.get("ready"):
        folder, steps = os.path.dirname(path), 2 * checkpoint["config"]["max_steps"]
        raise UserError(
            f"{path} is no parent yet: it still gets answers wrong, or its held-out loss is above its "
            f"ready_loss={ready_loss:g}. Train it on: {train_on(folder, steps)}; then the same command as "
            f"now with {typed(f'--{setting}={folder}')}"
        )


class Sources(NamedTuple):
    """What a run's models are made of."""

    parent: str | None  # path or name of the checkpoint whose weights a run starts from; None: random ones
    reference: str | None  # of the dense model whose loss is kept; None of a dense run
    # the checkpoints themselves; {} where there is none, or of a parent where the run has begun
    of_parent: dict
    of_reference: dict


def find_sources(c, given, checkpoint):
    """The Sources of the run that the settings c describe. checkpoint: its own last.pt, or None."""
    if checkpoint:
        parent, reference = checkpoint["parent"], checkpoint["reference"]
        if c.gated and not is_elsewhere(reference) and not os.path.exists(reference):
            raise UserError(f"{c.out_dir} is to keep the loss of {reference}, which is gone. Put it back, or "
                            "train it again with the command that made it")
    else:
        found = {setting: find_dense(source, c, given, setting) for setting, source in sources_of(c)
                 if (setting, source) != ("init_from", "scratch")}
        parent = found.get("init_from")
        reference = found.get("target_from", parent) if c.gated else None
    with hardware.first_alone():  # who downloads, if need be
        of_reference = read_checkpoint(reference) if c.gated else {}
        if parent == reference:
            of_parent = of_reference
        else:
            of_parent = read_checkpoint(parent) if parent and not checkpoint else {}
    return Sources(parent, reference, of_parent, of_reference)


def origin_of(c, data, sources, checkpoint):
    """What every checkpoint of a run says of its origin: parents, fingerprints, data, adapters."""
    begun = checkpoint or {"reference_fingerprint": fingerprint(sources.of_reference) if c.gated else None}
    origin = {"parent": to_keep(sources.parent, c.out_dir),
              "reference": to_keep(sources.reference, c.out_dir),
              "reference_fingerprint": begun["reference_fingerprint"],
              "data": {"dataset": c.dataset, "tokenizer": data.meta.get("tokenizer", c.dataset),
                       "sha256": data.meta["sha256"]}}
    if c.lora_rank:
        origin["lora"] = {"rank": c.lora_rank, "alpha": c.lora_alpha, "targets": c.lora_targets}
        origin["base"] = origin["parent"]
        origin["base_fingerprint"] = (
            checkpoint["base_fingerprint"] if checkpoint else fingerprint(sources.of_parent)
        )
    return origin


def check_sources(c, sources, origin, checkpoint):
    """Raise UserError if parent or reference are not what this run can start from, or not what it was begun
    with.
    """
    pairs = [("target_from" if c.target_from else "init_from", sources.reference, sources.of_reference),
             ("init_from", sources.parent, sources.of_parent)]
    for setting, source, found in pairs:
        if not found:
            continue
        require_tokenizer(found, source, origin["data"]["tokenizer"])
        if c.gated and found["model_args"].get("gated"):
            raise UserError(f"{setting}={getattr(c, setting)} is a gated run. Start from a dense one: its "
                            "loss is the target, its gates are not open or shut yet")
        if c.gated:
            require_ready(found, source, setting)
    if not checkpoint:
        if c.lora_rank and "lora" in sources.of_parent:
            merge = typed("python", "analyze.py", "export", sources.parent, "--to", "hf", "FOLDER")
            raise UserError(
                f"{sources.parent} holds adapters itself, and one model has one set of them. Merge them "
                f"first ({merge}) and start from FOLDER"
            )
        return
    if c.gated and not is_of(checkpoint["reference_fingerprint"], sources.of_reference):
        raise UserError(
            f"{sources.reference} holds other weights now than when {c.out_dir} was begun: the target is "
            "not "
            "that model's any more. Put the old file back, or start a new run with --out_dir=out/NEW"
        )
    if checkpoint["data"] != origin["data"]:
        raise UserError(
            f"data/{c.dataset} is not the data that {c.out_dir} was begun with ({checkpoint['data']} there, "
            f"{origin['data']} here): it cannot go on exactly. Put the old data back, or start a new run "
            "with --out_dir=out/NEW"
        )


def models_of(c, given, data, device, checkpoint):
    """(model, dense_model, origin) of the run that the settings c describe.

    given        names of the settings that were set: a parent's shape is taken over where they say nothing
    checkpoint   the run's own last.pt, or None of a new run
    model        in evaluation mode, on its device, perhaps cut into parts (whose weights come later, by
                 sharding.load)
    dense_model  the reference, frozen: it sets the target, is compared with on the same batch, and teaches;
                 or None
    origin       see `origin_of`
    Changes the shape in c to that of the model. Raises UserError and what the loaders raise.
    """
    sources = find_sources(c, given, checkpoint)
    origin = origin_of(c, data, sources, checkpoint)
    check_sources(c, sources, origin, checkpoint)
    torch.manual_seed(c.seed)
    model = model_to_train(c, given, data, device, checkpoint, sources)
    check_data_fits(c, data, model)
    if not c.gated:
        return model, None, origin
    if c.lora_rank and sources.reference == sources.parent:
        return model, lora.Base(model), origin
    return model, reference_model(c, data, device, model, sources), origin


def model_to_train(c, given, data, device, checkpoint, sources):
    """The run's own model: of its checkpoint, of its parent's, or random."""
    prepared = partial(prepare, c, device)
    gate_settings = {key: getattr(c, key) for key in GATE}
    if checkpoint:
        return model_of(checkpoint, f"{c.out_dir}/last.pt", device, prepared, merged=False, in_parts=True)
    if not sources.parent:
        return prepared(new_model(c, data.meta["vocab_size"], gate_settings).to(device))
    args = sources.of_parent["model_args"]
    shorter = {}
    if "architecture" in args and "block_size" in given and c.block_size < args["block_size"]:
        shorter = {"block_size": c.block_size}  # an OLMo's positions are no weights
    model = model_of(sources.of_parent, sources.parent, device, prepared, **gate_settings, **shorter)
    for key, value in shape_of(model.config).items():
        if key in given and getattr(c, key) != value:
            raise UserError(
                f"{key}={getattr(c, key)!r}, but {sources.parent} has {key}={value!r}: a run that starts "
                "from "
                f"another keeps its shape. Leave {key} away"
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


def reference_model(c, data, device, model, sources):
    """The dense model whose loss `model` is to keep. Raises UserError if the two cannot be compared."""
    same_context = (
        {"block_size": c.block_size} if "architecture" in sources.of_reference["model_args"] else {}
    )
    dense_model = model_of(
        sources.of_reference, sources.reference, device, partial(cut_if_sharded, c, device), **same_context
    )
    ours, theirs = model.config, dense_model.config
    other_context = data.meta["kind"] == "stream" and theirs.block_size != ours.block_size
    if theirs.vocab_size != ours.vocab_size or other_context:
        raise UserError(f"{sources.reference} has another vocabulary or block_size than {sources.parent}: "
                        "their losses cannot be compared. Choose another target_from")
    return dense_model


def cut_if_sharded(c, device, model):
    """Cut model into parts if the run is to be sharded; return it."""
    if sharding.applies(c.parallel):
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
        if sharding.applies(c.parallel) and hardware.compiles(c.compile, device, pays_on_cpu=False):
            # by itself, because the graph of the whole would break wherever a block is put together
            block.forward = torch.compile(block.forward)
        if c.recompute_activations:
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    return cut_if_sharded(c, device, model)
