"""Models as Hugging Face stores them: files and downloads for all, and GPT-2's format (OLMo's:
olmo_files.py).

Which of their names and matrices are which of ours is said in model.py, at OpenAI's weights.

Notable: `pytorch_model.bin` is read with torch.load(weights_only=True). `model.safetensors`, which
transformers writes today, needs the package safetensors, imported only here.
"""

import errno
import os
import re
from collections.abc import Mapping

import torch

from model import CONV1D, PRETRAINED, from_openai, openai_checkpoint
from storage.files import UserError, json_of, read_json, replacing

# vocabularies of GPT-2's: with a few tokens more, such as a pad token, or padded; 50,280 is OLMo's
GPT2_SIZES = [size for size in range(50257, 50305) if size != 50280]
# the id of <|endoftext|> by the size of the vocabulary
END_OF_TEXT = dict.fromkeys(GPT2_SIZES, 50256) | {50280: 50279, 100278: 100257}
# their names -> torch's `approximate`
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
ACTIVATION = {"tanh": "gelu_new", "none": "gelu"}  # and back
# settings of theirs that change what the model computes, and the one value that our model computes
FIXED = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "layer_norm_epsilon": 1e-5,
    "add_cross_attention": False,
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# what torch.compile, DDP, FSDP and recomputation put into names, in front and in the middle
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# what transformers itself leaves aside when it loads a language model: angles of the rotations, and the head
# of a classifier
LEFT_ASIDE = re.compile(r"(rotary_emb\.inv_freq|(^|\.)score\.weight)$")


def unwrapped(name):
    """A tensor's name without WRAPPERS."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def leave_aside(tensors, source):
    """Remove from tensors (a dict by name) what transformers leaves aside, too, and say so."""
    for name in [name for name in tensors if LEFT_ASIDE.search(name)]:
        print(f"{source}: {name} is left aside, as transformers does")
        del tensors[name]


def is_huggingface(path):
    """Does `path` name one of OpenAI's models, or a folder or file that transformers wrote?"""
    is_folder = os.path.exists(os.path.join(path, "config.json")) and any(
        os.path.exists(os.path.join(path, name)) for name in WEIGHTS)
    return path in PRETRAINED or path.endswith((".safetensors", ".bin")) or is_folder


def read(source):
    """A checkpoint as nanoGPT lays it out, {'model', 'model_args'}, from OpenAI's name, a folder of
    transformers, or a file of one. Raises UserError.
    """
    if source in PRETRAINED:
        return openai_checkpoint(source)
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    config = os.path.join(folder, "config.json")
    theirs = read_json(config) if os.path.exists(config) else {}
    if not os.path.isdir(source):
        tensors = read_file(source)
    elif any(os.path.exists(os.path.join(folder, name)) for name in WEIGHTS[:2]):
        tensors = LazyTensors(folder)
    else:
        tensors = read_file(os.path.join(folder, WEIGHTS[2]))
    return convert({unwrapped(name): tensors[name] for name in tensors}, theirs, source)


def fetch(name, patterns):
    """The local folder of a model on Hugging Face ('allenai/OLMo-1B-hf') with the files whose names fit
    patterns, downloaded once into huggingface_hub's cache (HF_HOME).
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"{name} is downloaded through a package that is not installed: pip install -r "
                        "requirements-olmo.txt") from error
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # of many types, by three packages
        raise UserError(f"{name} cannot be downloaded ({type(error).__name__}: "
                        f"{str(error).partition(chr(10))[0]}). The same command goes on where this one "
                        "stopped. Without network here, bring the folder by hand and give its path instead "
                        "of the name") from error


class LazyTensors(Mapping):
    """The tensors of a folder with one safetensors file, or several and an index; each is read when it is
    asked for, and not kept.

    So a model of many GB is loaded with one tensor of it in memory beside itself. Raises UserError, naming
    the file, if one is missing or damaged.
    """

    def __init__(self, folder):
        index = os.path.join(folder, "model.safetensors.index.json")
        promised = files_of_index(index) if os.path.exists(index) else {}
        self.place = {}  # name -> (path, name in that file)
        for file in sorted(set(promised.values())) or ["model.safetensors"]:
            path = os.path.join(folder, file)
            with self.opened(path) as f:
                self.place |= {name: (path, name) for name in f.keys()}
        lost = [f"{name} in {file}" for name, file in promised.items() if name not in self.place]
        leave_aside(self.place, folder)
        if lost:
            raise UserError(f"{folder}: {lost[0]} is missing, and {len(lost) - 1} more that the index "
                            "promises. Bring the folder again")

    def opened(self, path):
        if not os.path.exists(path):
            raise UserError(f"there is no {path}")
        load = safetensors().safe_open
        try:
            return load(path, framework="pt")
        except Exception as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}): it is truncated or damaged. "
                            "Delete it and bring it again") from error

    def alias(self, name, other):
        """A second name for a tensor, unless it is stored under both."""
        if other in self.place:
            self.place.setdefault(name, self.place[other])

    def shape(self, name):
        """Of a tensor that stays on the disk."""
        path, stored_as = self.place[name]
        with self.opened(path) as f:
            return f.get_slice(stored_as).get_shape()

    def __getitem__(self, name):
        path, stored_as = self.place[name]
        # opened anew: closing it gives the memory back that the system took for the file
        with self.opened(path) as f:
            return f.get_tensor(stored_as)

    def __iter__(self):
        return iter(self.place)

    def __len__(self):
        return len(self.place)


def files_of_index(path):
    """{tensor: file beside the index} of a .index.json. Raises UserError if it leads out of its folder."""
    place = read_json(path).get("weight_map", {})
    for name, file in place.items():
        if os.path.basename(str(file)) != file:
            raise UserError(f"{path} says that {name} is in {file!r}, which is no file beside it")
    return place


def read_file(path):
    """What torch.save or safetensors wrote: tensors and plain values. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"there is no {path}")
    load_file = safetensors().torch.load_file if path.endswith(".safetensors") else None
    try:
        return load_file(path) if load_file else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle errors of many types
        raise UserError(f"{path} cannot be read {cause_of(error)}") from error


SAVE_ANEW = ('torch.save({"model": model.state_dict(), "model_args": {"n_layer": 12, "n_head": 12, '
             '"n_embd": 768, "block_size": 1024, "vocab_size": 50257, "bias": True, "gelu": "none"}}, '
             '"NEW.pt"), with what your model has')


def cause_of(error):
    """Why a file could not be read: most errors mean that it is not what it should be."""
    says = str(error)  # torch raises RuntimeErrors
    held = re.search(r"GLOBAL [\w.]+(?= w)|TorchScript", says)
    if held:
        return (f"(it holds an object, {held[0].removeprefix('GLOBAL ')}, that could run code when it is "
                "read: only tensors and plain values are read here). Save it anew in the program that wrote "
                f"it: {SAVE_ANEW}")
    if isinstance(error, MemoryError) or "allocate memory" in says or "not enough memory" in says:
        return "(there is not enough memory for it)"
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # what torch says of half a file
        return f"({error})"
    return (f"({type(error).__name__}): it is truncated or damaged. Bring it again; if it is a run's, move "
            "the run's folder away and start the run again")


def gate_of(theirs):
    """The model_args of the gates in their config.json, where our export has written them."""
    bias = theirs.get("gate_bias")
    return {} if bias is None else {"gated": True, "gate_bias": bias}


def convert(tensors, theirs, source):
    """Their tensors and config (dicts, the latter may be empty) -> {'model', 'model_args'}."""
    leave_aside(tensors, source)
    different = [f"{key}={theirs[key]!r}" for key, value in FIXED.items() if theirs.get(key, value) != value]
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in GELU:
        different.append(f"activation_function={activation!r}")
    if theirs.get("n_inner") not in (None, 4 * theirs.get("n_embd", 0)):
        different.append(f"n_inner={theirs['n_inner']!r}")
    if different:
        raise UserError(f"{source} is no GPT-2 that model.py can compute: {', '.join(different)}")
    args = {key: theirs[key] for key in ("n_layer", "n_head") if key in theirs}
    return from_openai(tensors, source, **args, gelu=GELU[activation], **gate_of(theirs))


def write(folder, state, args):
    """Write a folder that `transformers.GPT2LMHeadModel.from_pretrained` loads.

    state, args: as in `convert`'s result.
    """
    if not args["bias"]:  # transformers' GPT-2 has biases always: ours that are not there are 0
        biases = {}
        for name, weight in state.items():
            if name.endswith(".weight") and (CONV1D.search(name) or ".ln_" in name):
                biases[name.replace(".weight", ".bias")] = torch.zeros(weight.shape[0])
        state = state | biases
    tensors = {name: tensor.t().contiguous() if CONV1D.search(name) else tensor.contiguous()
               for name, tensor in state.items() if not (args["tied"] and name == "lm_head.weight")}
    config = FIXED | {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": args["vocab_size"],
        "n_positions": args["block_size"],
        **{key: args[key] for key in ("n_embd", "n_layer", "n_head")},
        "tie_word_embeddings": args["tied"],
        **dict.fromkeys(("bos_token_id", "eos_token_id"), END_OF_TEXT.get(args["vocab_size"])),
        "activation_function": ACTIVATION[args["gelu"]],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop"), args["dropout"]),
        "attn_pdrop": 0.0,
    }
    if args["gated"]:
        # transformers keeps what it does not know: model.config.gate_bias
        config["gate_bias"] = args["gate_bias"]
    write_folder(folder, tensors, config)


def write_folder(folder, tensors, config):
    """Write tensors and config as transformers lays them out: model.safetensors and config.json."""
    os.makedirs(folder, exist_ok=True)
    weights, settings = os.path.join(folder, "model.safetensors"), os.path.join(folder, "config.json")
    save_file = safetensors().torch.save_file
    try:
        with replacing(weights) as tensors_at, replacing(settings) as config_at:
            save_file(tensors, tensors_at, metadata={"format": "pt"})
            with open(config_at, "w", encoding="utf-8") as f:
                f.write(json_of(config, settings, indent=1))
    except Exception as error:  # safetensors has errors of its own, for a full disk too
        raise UserError(f"cannot write {weights}: {error}. Free some space, or choose another place"
                        ) from error


def safetensors():
    """The package, imported only where it is needed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("files of the kind .safetensors need a package that is not installed: "
                        "pip install safetensors") from error
    return safetensors
