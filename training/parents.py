"""Where a run comes from: its own last checkpoint, a parent's weights or random ones; and the dense model whose loss it is to keep.

    init_from    the parent: whose weights a new run takes     'scratch', a run's folder, a config file (trained first), a checkpoint, a name on Hugging Face
    target_from  the reference: whose loss is to be kept       the same; the parent, if left out

Both are found before anything is trained, and what every checkpoint of the run will say about them is written down: names, fingerprints, data. So a run
that goes on later knows whether they are still what they were, and refuses to go on if not.

Notable:
- With adapters (lora.py) on the parent, the dense model is the run's own, adapters and gates switched off: no second copy.
- A model is prepared while it is empty: cut into parts (sharding.py), given adapters, told to recompute. Then weights are read, tensor by tensor.
"""

import os
from functools import partial

import torch
import torch.utils.checkpoint

from model import PRETRAINED
from models import lora
from models.checkpoint import (
    fingerprint,
    is_elsewhere,
    kept_checkpoint,
    model_of,
    new_model,
    read_checkpoint,
    require_tokenizer,
    shape_of,
)
from storage.files import UserError
from training import hardware, sharding
from training.settings import GATE, make_config

PASSED_ON = ("seed", "device", "compile", "dtype")  # settings that a run hands to a parent that is trained first, where they were set


def run_of(source, config, given):
    """The run of a config file that `config` starts from or is compared with: (Config, names of the settings that were set). Seed and hardware are passed on."""
    passed_on = {key: getattr(config, key) for key in PASSED_ON if key in given}
    return make_config(source, passed_on)


def runs_of(config, given):
    """The Configs of all runs that training `config` takes, in their order: those of the config files that it names, then its own."""
    runs = []
    for source in (config.init_from, config.target_from if config.gated else ""):
        if not source.endswith(".py"):
            continue
        run, names = run_of(source, config, given)
        if os.path.realpath(run.out_dir) == os.path.realpath(config.out_dir):
            continue  # which `find_dense` refuses
        trained = [earlier.out_dir for earlier in runs]
        runs += [earlier for earlier in runs_of(run, names) if earlier.out_dir not in trained]
    return [*runs, config]


def find_dense(source, config, given, what, train):
    """The checkpoint that `source` (a value of init_from or target_from) names. A config file's run is trained first, by `train`, if it is not finished."""
    folder, is_config = source, source.endswith(".py")
    if is_elsewhere(source) or os.path.isfile(source) and not is_config:
        return source
    if is_config:
        run, names = run_of(source, config, given)
        if config.gated and run.gated:
            raise UserError(f"{what}={source} is a gated run. Start from a dense one: its loss is the target")
        folder = run.out_dir
    if os.path.realpath(folder) == os.path.realpath(config.out_dir):
        raise UserError(f"{folder} is the run's own folder and its parent's as well. Give it another with --out_dir=out/NEW")
    if is_config:
        try:
            train(run, names)
        except UserError as error:
            raise UserError(f"the parent, {source}: {error} (flags for the parent go with its own command; another parent is named with --init_from=out/OTHER)") from error
    if path := kept_checkpoint(folder):
        return path
    raise UserError(f"{what}={source}: there is no best.pt or last.pt in {folder}. init_from takes 'scratch', 'resume', the folder of a run, "
                   f"a config file, a checkpoint of nanoGPT or transformers, or one of {', '.join(PRETRAINED)}")


def require_ready(checkpoint, path):
    """Raise UserError if a dense run that was to be trained until it is ready (ready_loss) has not got there: what a child is to keep would be an unfinished model's loss."""
    ready_loss = checkpoint.get("config", {}).get("ready_loss")
    if ready_loss and not checkpoint.get("ready"):
        raise UserError(f"{path} is no parent yet: it still gets answers wrong, or its held-out loss is above its ready_loss={ready_loss:g}. Train it on, with the command that "
                       f"trained it and --init_from=resume --max_steps={2 * checkpoint['config']['max_steps']}; then the same command as now")


def models_of(c, given, data, device, checkpoint, train):
    """(model, dense_model, facts) of the run that the settings c describe.

    given        names of the settings that were set: a parent's shape is taken over where they say nothing, and refused where they say otherwise
    checkpoint   the run's own last.pt, or None of a new run
    train        trains a parent that is a config file
    model        in evaluation mode, on its device, perhaps cut into parts (a sharded run's weights come later, by sharding.load)
    dense_model  the reference, frozen: it sets the target, is compared with on the same batch, and teaches. None of a dense run
    facts        what every checkpoint of the run says of its origin
    Changes the shape in c to that of the model. Raises UserError and what the loaders raise.
    """
    if checkpoint:
        parent, reference = checkpoint["parent"], checkpoint["reference"]
    else:
        parent = None if c.init_from == "scratch" else find_dense(c.init_from, c, given, "init_from", train)
        reference = parent if c.gated and not c.target_from else find_dense(c.target_from, c, given, "target_from", train) if c.gated else None
    with hardware.first_alone():  # who downloads, if need be
        of_reference = read_checkpoint(reference) if c.gated else {}
        of_parent = of_reference if parent == reference else read_checkpoint(parent) if parent and not checkpoint else {}

    facts = {"parent": parent, "reference": reference, "reference_fingerprint": fingerprint(of_reference) if c.gated else None,
             "data": {"dataset": c.dataset, "tokenizer": data.meta.get("tokenizer", c.dataset), "sha256": data.meta["sha256"]}}
    if c.lora_rank:
        facts |= {"lora": {"rank": c.lora_rank, "alpha": c.lora_alpha, "targets": c.lora_targets}, "base": parent,
                  "base_fingerprint": checkpoint["base_fingerprint"] if checkpoint else fingerprint(of_parent)}
    for source, found in ((parent, of_parent), (reference, of_reference)):
        if found:
            require_tokenizer(found, source, facts["data"]["tokenizer"])
    for what, found in (("target_from" if c.target_from else "init_from", of_reference), ("init_from", of_parent)):
        if c.gated and found.get("model_args", {}).get("gated"):
            raise UserError(f"{what}={getattr(c, what)} is a gated run. Start from a dense one: its loss is the target, its gates are not open or shut yet")
    if c.gated:
        for source, found in ((parent, of_parent), (reference, of_reference)):
            require_ready(found, source)
    if checkpoint and checkpoint["reference_fingerprint"] != facts["reference_fingerprint"]:
        raise UserError(f"{reference} holds other weights now than when {c.out_dir} was begun: the target is not that model's any more. "
                       "Put the old file back, or start a new run with --out_dir=out/NEW")
    if checkpoint and checkpoint["data"] != facts["data"]:
        raise UserError(f"data/{c.dataset} is not the data that {c.out_dir} was begun with ({checkpoint['data']} there, {facts['data']} here): it cannot go on "
                       "exactly. Put the old data back, or start a new run with --out_dir=out/NEW")
    if not checkpoint and c.lora_rank and "lora" in of_parent:
        raise UserError(f"{parent} holds adapters itself, and one model has one set of them. Merge them first (python model.py export {parent} --to hf FOLDER) and start from FOLDER")

    cut, prepared = partial(cut_if_sharded, c, device), partial(prepare, c, device)
    gate_settings = {key: getattr(c, key) for key in GATE}
    torch.manual_seed(c.seed)
    if checkpoint:
        model = model_of(checkpoint, f"{c.out_dir}/last.pt", device, prepared, merged=False, in_parts=True)
    elif parent:
        args = of_parent["model_args"]
        shorter = {"block_size": c.block_size} if "block_size" in given and "architecture" in args and c.block_size < args["block_size"] else {}  # an OLMo's positions are no weights
        model = model_of(of_parent, parent, device, prepared, **gate_settings, **shorter)
        for key, value in shape_of(model.config).items():
            if key in given and getattr(c, key) != value:
                raise UserError(f"{key}={getattr(c, key)!r}, but {parent} has {key}={value!r}: a run that starts from another keeps its shape. Leave {key} away")
            setattr(c, key, value)
    else:
        model = prepared(new_model(c, data.meta["vocab_size"], gate_settings).to(device))
    if model.config.vocab_size < data.meta["vocab_size"]:
        raise UserError(f"the model knows {model.config.vocab_size} tokens, data/{c.dataset} has {data.meta['vocab_size']}: they do not belong together")
    if data.meta["kind"] == "rows" and model.config.block_size < data.train.shape[2]:
        raise UserError(f"a row of data/{c.dataset} has {data.train.shape[2]} tokens, the model's block_size is {model.config.block_size}: make it larger")

    if not c.gated:
        return model, None, facts
    if c.lora_rank and reference == parent:
        return model, lora.Base(model), facts
    same_context = {"block_size": c.block_size} if "architecture" in of_reference["model_args"] else {}
    dense_model = model_of(of_reference, reference, device, cut, **same_context)
    if dense_model.config.vocab_size != model.config.vocab_size or data.meta["kind"] == "stream" and dense_model.config.block_size != model.config.block_size:
        raise UserError(f"{reference} has another vocabulary or block_size than {parent}: their losses cannot be compared. Choose another target_from")
    return model, dense_model, facts


def cut_if_sharded(c, device, model):
    """Cut model into parts if the run is to be sharded; return it."""
    if sharding.applies(c.parallel):
        sharding.shard(model, device)
    return model


def prepare(c, device, model):
    """What is done to the run's model while it is empty: adapters, precision, recomputation, parts. Returns model, changed in place."""
    if c.lora_rank:
        if not lora.adapters_of(model):  # a new run's
            lora.add(model, c.lora_rank, c.lora_alpha, c.lora_targets)
        lora.freeze_in(model, getattr(torch, c.base_dtype))
    for block in model.blocks:
        if sharding.applies(c.parallel) and hardware.compiles(c.compile, device, pays_on_cpu=False):
            block.forward = torch.compile(block.forward)  # by itself, because the graph of the whole would break wherever a block is put together
        if c.recompute_activations:
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    return cut_if_sharded(c, device, model)
