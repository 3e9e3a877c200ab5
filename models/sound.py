"""Is a checkpoint what it says? Asked before anything is built from it, because it may come from a stranger.

    model_args    one value for each field of the config, of its type and of a size that a model can have
    model         for each of the model's tensors one of its shape, dense, finite; and no other

What is wrong is named, all of it, in one message. Nothing takes memory or minutes before both are known to be
right: a model is compared while it is empty (on torch's meta device).
"""

import math
from dataclasses import fields

import torch

from models import lora
from storage.files import UserError

LARGEST = 10**7  # of any size in model_args
# what torch.compile, DDP, FSDP and recomputation put into names, in front and in the middle
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def require_args(args, config_class, state, path):
    """Raise UserError if args, {field: value} of config_class, describe no model. state: its tensors or None.
    """
    wrong = [f"{f.name}={args[f.name]!r}" for f in fields(config_class)
             if f.name in args and not fits(args[f.name], f.type)]
    if not wrong:
        config = config_class(**args)
        if state is not None and config.n_layer > len(state):
            wrong.append(f"n_layer={config.n_layer} with {len(state)} tensors")
        if isinstance(config.gate_bias, list) and not is_bias_of_heads(config):
            wrong.append("gate_bias is no list of n_layer lists of n_head numbers")
    if wrong:
        raise UserError(f"{path} is damaged, its model_args make no sense: {', '.join(wrong)}")


def require_adapters(checkpoint, base, path):
    """Raise UserError if what a checkpoint says of its LoRA adapters makes no sense. base: its base's."""
    adapters = checkpoint["lora"]
    kinds = {"rank": int, "alpha": float, "targets": str}
    known = isinstance(adapters, dict) and set(adapters) == set(kinds)
    if not known or not all(fits(adapters[key], kind) for key, kind in kinds.items()):
        raise UserError(f"{path} is damaged, its adapters make no sense: {adapters!r}")
    if "lora" in base:
        raise UserError(f"{path} is damaged: its base, {checkpoint['base']}, has adapters itself")


def fits(value, kind):
    """Is value one of a config's field of this type? An int is a size, a float finite."""
    if kind is int:
        return type(value) is int and 0 < value <= LARGEST
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (bool, str):
        return type(value) is kind
    if kind in (list, dict, type(None)):
        return isinstance(value, kind)
    return any(fits(value, one) for one in kind.__args__)  # a union, such as float | None


def is_bias_of_heads(config):
    """Is gate_bias [n_layer][n_head] finite numbers?"""
    layers = config.gate_bias
    if len(layers) != config.n_layer or not all(isinstance(heads, list) for heads in layers):
        return False
    return all(len(heads) == config.n_head and all(fits(b, float) for b in heads) for heads in layers)


def unwrapped(name):
    """A tensor's name without WRAPPERS."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def stored_names(state):
    """{name in the model: name in state}."""
    names = {unwrapped(name): name for name in state}
    # the causal mask of old nanoGPT checkpoints
    return {plain: name for plain, name in names.items() if not plain.endswith(".attn.bias")}


def require_fit(model, state, path, names=None):
    """Raise UserError, naming every missing, extra or wrongly shaped tensor of state. model may be empty.

    names: what state must hold, no less and no more; everything but LoRA adapters if left out. A matrix that
    serves twice (tied) may be there once.
    """
    own, adapters, stored = model.state_dict(), lora.state_of(model), stored_names(state)
    names = [name for name in own if name not in adapters] if names is None else names
    once = dict(model.named_parameters())  # a tied one under its first name alone
    wrong = [f"{name} is missing" for name in names if name not in stored and name in once]
    wrong += [f"{name} is extra" for name in stored if name not in names]
    for name in names:
        if name in stored:
            found = described(state, stored[name])
            if found != tuple(own[name].shape):
                wrong.append(f"{name} is {found}, the model's is {tuple(own[name].shape)}")
    complain(wrong, path)


def is_tied(state):
    """Are a GPT-2's output and input embedding one matrix? A fork of nanoGPT's may have untied them."""
    stored = stored_names(state)
    pair = [state[stored[name]] for name in ("lm_head.weight", "transformer.wte.weight") if name in stored]
    return len(pair) < 2 or torch.equal(*pair)


def described(state, name):
    """The shape of a tensor in state, or what is there instead."""
    if hasattr(state, "shape"):  # huggingface.LazyTensors, on the disk
        return tuple(state.shape(name))
    tensor = state[name]
    if not torch.is_tensor(tensor):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        return f"{tensor.layout} of {tensor.dtype}"
    return tuple(tensor.shape)


def is_finite(tensor):
    """No NaN and no infinite number? Piece by piece, so that a large tensor needs little more memory."""
    return all(piece.isfinite().all() for piece in tensor.flatten().split(1 << 20))


def complain(wrong, path):
    """Raise UserError if there is anything in the list."""
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"{path} does not fit the model: {shown}")
