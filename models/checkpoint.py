"""Checkpoints: a model on disk, in and out, whatever its architecture and whoever wrote it.

    {'model': state dict, 'model_args': the config as a dict, ...}            nanoGPT's layout, which is ours,
    with more beside it

Reads our checkpoints, nanoGPT's and those of the paper's authors; OpenAI's GPT-2 by name and what
transformers wrote (huggingface.py); OLMo by name or folder (olmo_files.py); LoRA adapters,
with the base that they name (lora.py).

Notable:
- A file is written under a temporary name, flushed, then renamed: whatever happens, the path holds the old
  one or the new one, whole.
- `torch.load(weights_only=True)`: a file is data, not a program.
- A model is built on torch's meta device, without memory, compared with the tensors, then filled one by one:
  every tensor that is missing, extra or of another shape is named, and the peak is the model and one tensor.
- nanoGPT can load our 'model', but its own GPTConfig does not know our further model_args.
"""

import hashlib
import os
from dataclasses import asdict, fields

import torch
from torch.overrides import TorchFunctionMode

from gate import GateConfig
from model import GPT, GPTConfig
from models import huggingface, lora, olmo, olmo_files
from models.huggingface import unwrapped
from models.sources import config_for, from_here, is_elsewhere
from storage.files import UserError, replacing


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values to path, whole or not at all.

    Raises UserError, the old file untouched, if the disk is full or the folder not writable.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {error}. What it held before is untouched. "
                        "Free some space, or choose another place") from error


def read_checkpoint(path):
    """The dict {'model', 'model_args', ...} of a checkpoint: ours, nanoGPT's, or Hugging Face's in that
    layout (see huggingface.py, olmo_files.py).

    Raises UserError if it is missing, truncated or no checkpoint.
    """
    if olmo_files.is_olmo(path):
        return olmo_files.read(path)
    if huggingface.is_huggingface(path):
        return huggingface.read(path)
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}. Train one first: python train.py {config_for(path)}")
    checkpoint = huggingface.read_file(path)
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= set(checkpoint):
        raise UserError(f"{path} is no checkpoint of this project or of nanoGPT: it has no model and no "
                        f"model_args. To make one of a model: {huggingface.SAVE_ANEW}")
    return as_seen_from_here(checkpoint, path)


def as_seen_from_here(checkpoint, path):
    """A checkpoint that was read from path; in it the models that it names, where they lie seen from here.
    """
    out_dir = (checkpoint.get("config") or {}).get("out_dir")
    for key in ("parent", "reference", "base"):
        if out_dir and checkpoint.get(key):
            checkpoint[key] = from_here(checkpoint[key], os.path.dirname(path), out_dir)
    if "gate_bias" in checkpoint:  # export.py's, beside model_args that nanoGPT understands
        ours = huggingface.gate_of(checkpoint) | {"gelu": checkpoint.get("gelu", "none")}
        checkpoint["model_args"] = checkpoint["model_args"] | ours
    return checkpoint


# ------------------------------------------------------------------------------------------------------------
# Is it the same model?

# of model_args: what changes no number that a model computes; block_size is the shape of a GPT's positions
IDLE = ("gate_temperature", "dropout", "init_std", "block_size")


def fingerprint(checkpoint):
    """Tells checkpoints of one name apart: sha256 of all that a model computes with, tensor by tensor, in
    alphabetical order (1 GB a second); None of a sharded run that has not ended.
    """
    tensors, args = checkpoint["model"], checkpoint["model_args"]
    if tensors is None:
        return None
    idle = (*IDLE, *(() if args.get("gated") else (f.name for f in fields(GateConfig))))
    computed = sorted(f"{key}={value!r}" for key, value in args.items() if key not in idle)
    digest = hashlib.sha256(repr(computed).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy())
    return "whole-" + digest.hexdigest()


def is_of(known, checkpoint):
    """Is `known`, which somebody wrote down, the fingerprint of this checkpoint?"""
    return known == fingerprint(checkpoint)


# ------------------------------------------------------------------------------------------------------------
# From a checkpoint to a model


def stored_names(state):
    """{name in the model: name in state}, but for the causal mask of old nanoGPT checkpoints."""
    names = {unwrapped(name): name for name in state}
    return {plain: name for plain, name in names.items() if not plain.endswith(".attn.bias")}


def require_fit(model, state, path, names=None):
    """Raise UserError, naming every missing, extra or wrongly shaped tensor of state. model may be empty.

    names: what state must hold, no less and no more; everything but LoRA adapters if left out. A matrix that
    serves twice (tied) may be there once.
    """
    expected, adapters, stored = model.state_dict(), lora.state_of(model), stored_names(state)
    names = [name for name in expected if name not in adapters] if names is None else names
    once = dict(model.named_parameters())  # a tied one under its first name alone
    wrong = [f"{name} is missing" for name in names if name not in stored and name in once]
    wrong += [f"{name} is extra" for name in stored if name not in names]
    for name in names:
        found = shape_in(state, stored[name]) if name in stored else None
        if found not in (None, tuple(expected[name].shape)):
            wrong.append(f"{name} is {found}, the model's is {tuple(expected[name].shape)}")
    complain(wrong, path)


def shape_in(state, name):
    """The shape of a tensor in state, or what is there instead."""
    if hasattr(state, "shape"):  # huggingface.LazyTensors, on the disk
        return tuple(state.shape(name))
    return tuple(state[name].shape) if torch.is_tensor(state[name]) else f"a {type(state[name]).__name__}"


def is_finite(tensor):
    """No NaN and no infinite number? Piece by piece, so that a large tensor needs little more memory."""
    return all(piece.isfinite().all() for piece in tensor.flatten().split(1 << 20))


def complain(wrong, path):
    """Raise UserError if there is anything in the list."""
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"{path} does not fit the model: {shown}")


def copy_into(target, tensor):
    """Copy tensor (whole, on any device, of any dtype) into target, of which this process may hold a part
    only (FSDP's DTensor).
    """
    if hasattr(target, "device_mesh"):  # a DTensor
        # here: nobody else waits a second for its import
        from torch.distributed.tensor import distribute_tensor

        # everybody has read it: nothing to send
        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements,
                                   src_data_rank=None)
    target.copy_(tensor)


@torch.no_grad()
def load_weights(model, state, path="the checkpoint", names=None):
    """Put a state dict, or any mapping from names to tensors, into model, one tensor at a time.

    names: what it must hold, no less and no more; everything but LoRA adapters if left out. Raises UserError
    naming every tensor that is missing, extra, of another shape, or not finite.
    """
    require_fit(model, state, path, names)
    targets, wrong = model.state_dict(), []
    for name, stored in stored_names(state).items():
        tensor = state[stored]  # read from the disk here, if the mapping does
        if not is_finite(tensor):
            wrong.append(f"{name} holds NaN or infinite numbers")
        copy_into(targets[name], tensor)
    complain(wrong, path)


class Uninitialised(TorchFunctionMode):
    """`with Uninitialised():` torch.nn.init leaves tensors as they are. On the meta device there is nothing
    to initialise, and torch would import its compiler to do so: a second of every command.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(checkpoint, path, **overrides):
    """The model that a checkpoint's model_args describe, on the meta device: shapes without memory."""
    args = {**checkpoint["model_args"], **overrides}
    for ablation in ("gate_on_weights", "renormalise"):  # of commits up to 09dc135
        if args.pop(ablation, False):
            raise UserError(f"{path} was trained with {ablation}, which this version no longer computes")
    is_olmo = args.get("architecture") == "olmo"
    model_class, config_class = (olmo.OLMo, olmo.OLMoConfig) if is_olmo else (GPT, GPTConfig)
    unknown = sorted(set(args) - {f.name for f in fields(config_class)})
    if unknown:
        raise UserError(f"{path} holds another architecture: its model_args have {', '.join(unknown)}, which "
                        f"{config_class.__name__} does not know")
    if "gated" not in checkpoint["model_args"] and not is_olmo:  # a checkpoint of nanoGPT
        args = {"gelu": "none", "tied": is_tied(checkpoint["model"])} | args
    try:
        with torch.device("meta"), Uninitialised():
            return model_class(config_class(**args))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:  # sizes that make no model
        raise UserError(f"{path}: its model_args make no model: {error}") from error


def is_tied(state):
    """Are a GPT-2's output and input embedding one matrix? A fork of nanoGPT's may have untied them."""
    stored = stored_names(state)
    pair = [state[stored[name]] for name in ("lm_head.weight", "transformer.wte.weight") if name in stored]
    return len(pair) < 2 or torch.equal(*pair)


def model_of(checkpoint, path, device="cpu", prepare=lambda model: model, merged=True, **overrides):
    """The model in a checkpoint's dict, in evaluation mode. overrides change its config, e.g. gated=False to
    run it dense.

    path     is named in errors
    prepare  called with the empty model (on the meta device) before it takes up memory: may change its dtype,
             add adapters, cut it into parts
    merged   of a checkpoint that holds LoRA adapters and the name of their base: merged into the weights,
             else beside them (lora.py)

    Raises UserError if the architecture is unknown or the weights do not fit it.
    """
    state = checkpoint["model"]
    if state is None:
        raise UserError(f"{path} is of a sharded run of an earlier version that has not ended: its weights "
                        "lie in parts beside it. Use its best.pt")
    if "lora" in checkpoint:
        return adapted_model_of(checkpoint, path, device, prepare, merged, **overrides)
    model = empty_model(checkpoint, path, **overrides)
    prepare(model)
    require_fit(model, state, path)  # before anything takes memory
    model.to_empty(device=device).tie()
    for layer in lora.adapters_of(model).values():
        for name, tensor in layer.initial().items():
            copy_into(getattr(layer, name).data, tensor)
    load_weights(model, state, path)
    return model.eval()


def adapted_model_of(checkpoint, path, device, prepare, merged, **overrides):
    """`model_of`, of a checkpoint that holds LoRA adapters and the name of their base."""
    base = read_named(checkpoint, "base")
    if not is_of(checkpoint["base_fingerprint"], base):
        raise UserError(f"{path} holds adapters for {checkpoint['base']}, which holds other weights now than "
                        "when they were trained. Put the old file back")

    def with_adapters(model):
        model = lora.add(model, **checkpoint["lora"])
        return model if merged else prepare(model)

    model = model_of(base, checkpoint["base"], device, with_adapters,
                     **{**checkpoint["model_args"], **overrides})
    load_weights(model, checkpoint["model"], path, names=lora.state_of(model))
    return prepare(lora.merge(model)) if merged else model  # merge before anything is cut


def load_checkpoint(path, device="cpu", **overrides):
    """The model saved at path: `read_checkpoint`, then `model_of`."""
    return model_of(read_checkpoint(path), path, device, **overrides)


# ------------------------------------------------------------------------------------------------------------
# What a checkpoint says of others


def read_named(checkpoint, key):
    """The checkpoint that another names as its 'parent' or 'base'. Raises UserError if it is gone."""
    path = checkpoint.get(key)
    if not path or not is_elsewhere(path) and not os.path.exists(path):
        raise UserError(f"{path or 'the parent'}, from which this model was trained, is gone. Put it back "
                        "where it was, seen from the model's own folder")
    return read_checkpoint(path)


def load_parent(checkpoint, device="cpu", **overrides):
    """The dense model that a gated run's checkpoint started from. Raises UserError: see `read_parent`."""
    return model_of(read_parent(checkpoint), checkpoint["parent"], device, **overrides)


def read_parent(checkpoint):
    """The checkpoint that a gated run's started from. Raises UserError if it is gone, or has been trained on
    since.
    """
    parent, known = read_named(checkpoint, "parent"), checkpoint.get("reference_fingerprint")
    reference = checkpoint.get("reference", checkpoint["parent"])  # which earlier versions could tell apart
    if known and checkpoint["parent"] == reference and not is_of(known, parent):
        raise UserError(f"{checkpoint['parent']} holds other weights now than when its child was begun: it "
                        "is another model. Train a new child from it, with another --out_dir")
    return parent


def tokenizer_of(checkpoint):
    """Name of the tokenizer that a checkpoint's model was trained with ('bytes', 'gpt2', 'olmo', ...), or
    None if nobody wrote it down.
    """
    if "data" in checkpoint:
        return checkpoint["data"]["tokenizer"]
    vocab_size = checkpoint["model_args"].get("vocab_size", 0)
    if "architecture" in checkpoint["model_args"]:  # an OLMo of Hugging Face's
        return olmo_files.tokenizer_for(vocab_size)
    return "gpt2" if vocab_size in huggingface.GPT2_SIZES else None


def require_tokenizer(checkpoint, path, tokenizer):
    """Raise UserError if the model in a checkpoint is known to have been trained with another tokenizer than
    the one of that name.
    """
    trained_with = tokenizer_of(checkpoint)
    if trained_with not in (None, tokenizer):
        raise UserError(f"{path} was trained on tokens of {trained_with!r}, the data has those of "
                        f"{tokenizer!r}: the same numbers mean other words. Choose a dataset that belongs to "
                        "it (prepare_data.py takes --tokenizer), or start from another model")


# ------------------------------------------------------------------------------------------------------------
# From a model to a checkpoint


def state_to_save(model):
    """The tensors that a checkpoint of `model` holds: all, or of a model with LoRA adapters these alone."""
    return lora.state_of(model) or model.state_dict()


def checkpoint_of(model, **more):
    """The dict to save for a model; `more` is stored beside it (step, optimizer, ...); for a model with LoRA
    adapters it must say `lora`, `base` and `base_fingerprint`.
    """
    return {"model": state_to_save(model), "model_args": asdict(model.config), **more}


SHAPE = ("n_layer", "n_head", "n_embd", "block_size")  # of every architecture
SHAPE_OF_GPT = ("dropout", "gelu")


def new_model(c, vocab_size, gate_settings):
    """A model of the shape that the settings c describe, with random weights.

    gate_settings: the fields of gate.GateConfig.
    """
    shared = {key: getattr(c, key) for key in (*SHAPE, "init_std")} | gate_settings
    if c.architecture == "gpt2":
        shared |= {key: getattr(c, key) for key in SHAPE_OF_GPT}
        return GPT(GPTConfig(vocab_size=vocab_size, **shared))
    return olmo.OLMo(olmo.OLMoConfig(vocab_size=vocab_size, generation=2 if c.architecture == "olmo2" else 1,
                                     n_kv_head=c.n_head, n_hidden=4 * c.n_embd, **shared))


def shape_of(config):
    """The shape of a model that is there already, in the words of training.config.SHAPE."""
    architecture = "gpt2" if isinstance(config, GPTConfig) else "olmo2" if config.generation == 2 else "olmo"
    names = [name for name in (*SHAPE, *SHAPE_OF_GPT) if hasattr(config, name)]
    return {name: getattr(config, name) for name in names} | {"architecture": architecture}
