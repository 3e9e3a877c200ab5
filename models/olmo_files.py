"""OLMo as Hugging Face stores it: config.json in and out, weights one tensor at a time, and the tokenizer
that a vocabulary's size tells.

The tensors' names are ours already (olmo.py). What a config.json asks for and olmo.py does not compute is
refused by name, before gigabytes are downloaded.

Source: transformers, OlmoConfig, Olmo2Config and Olmo3Config.
"""

import math
import os

from models import huggingface
from storage.files import UserError, read_json

GENERATIONS = {"olmo": 1, "olmo2": 2, "olmo3": 2}  # their model_type
NAMES = {
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
}


def tokenizer_for(vocab_size):
    """The tokenizer, 'olmo' or 'olmo2', with a vocabulary of this size, which may be padded to a multiple of
    128; None for other sizes.
    """
    return "olmo" if 50280 <= vocab_size <= 50304 else "olmo2" if 100278 <= vocab_size <= 100352 else None


def is_olmo(source):
    """Does `source` name an OLMo on Hugging Face ('allenai/OLMo-2-0425-1B'), or a folder that holds one as
    transformers writes it?
    """
    folder = os.path.join(source, "config.json")
    if os.path.exists(folder):
        return read_json(folder).get("model_type") in GENERATIONS
    return source.lower().startswith("allenai/olmo") and not os.path.exists(source)


def config_of(theirs, source):
    """model_args for their config.json (a dict). Raises UserError, naming what we cannot compute."""
    kind = theirs.get("model_type")
    if kind not in GENERATIONS:
        raise UserError(f"{source} is a model of type {kind!r}; olmo.py computes {', '.join(GENERATIONS)}")
    missing = [name for name in NAMES.values() if name not in theirs]
    if missing:
        raise UserError(f"{source}: config.json has no {', '.join(missing)}")
    rope = rope_of(theirs)
    thetas = {part.get("rope_theta", theirs.get("rope_theta")) for part in rope.values()} - {None}
    refuse_what_differs(theirs, source, thetas, rope)
    args = {ours: theirs[name] for ours, name in NAMES.items()}
    args |= {
        "architecture": "olmo",
        "generation": GENERATIONS[kind],
        "n_kv_head": theirs.get("num_key_value_heads") or args["n_head"],
        "tied": theirs.get("tie_word_embeddings", False),
        "clip_qkv": theirs.get("clip_qkv") if kind == "olmo" else None,  # ignored by transformers, too
        "norm_eps": theirs.get("rms_norm_eps", 1e-5),
        "rope_theta": float(thetas.pop() if thetas else 500000.0 if kind == "olmo3" else 10000.0),
    }
    args |= huggingface.gate_of(theirs)
    if kind == "olmo3":
        args["block_size"] = min(args["block_size"], theirs.get("sliding_window") or args["block_size"])
    if kind_of_rope(rope["full_attention"]) == "yarn":
        args["yarn"] = yarn_of(theirs, rope["full_attention"])
    return args


def rope_of(theirs):
    """Settings of the rotations: 'full_attention', and 'sliding_attention' of layers that look back less."""
    rope = theirs.get("rope_parameters") or {}
    if "full_attention" in rope:  # flat settings beside it are ignored by transformers, too
        return {kind: rope.get(kind) or {} for kind in ("full_attention", "sliding_attention")}
    # before transformers 5, rope_theta and rope_scaling stood alone
    return {"full_attention": rope | (theirs.get("rope_scaling") or {}), "sliding_attention": rope}


def kind_of_rope(settings):
    """'default', 'yarn' or another rope_type."""
    return settings.get("rope_type", settings.get("type", "default"))


def refuse_what_differs(theirs, source, thetas, rope):
    """Raise UserError for settings that olmo.py does not compute.

    thetas: of all rotations; rope: see `rope_of`.
    """
    fixed = {"attention_bias": False, "hidden_act": "silu"}
    if theirs.get("head_dim") is not None:
        fixed["head_dim"] = theirs[NAMES["n_embd"]] // theirs[NAMES["n_head"]]
    different = [f"{key}={theirs[key]!r}" for key, value in fixed.items() if theirs.get(key, value) != value]
    if len(thetas) > 1:
        different.append(f"rope_theta={sorted(thetas)}")
    stretches = theirs["model_type"] == "olmo3"
    for kind, settings in rope.items():
        known = ("default", "yarn") if stretches and kind == "full_attention" else ("default",)
        if kind_of_rope(settings) not in known:
            different.append(f"rope_type={kind_of_rope(settings)!r} of {kind}")
        if settings.get("partial_rotary_factor", 1.0) != 1.0:
            different.append(f"partial_rotary_factor={settings['partial_rotary_factor']!r}")
    if not (theirs.get("rope_parameters") or {}).get("truncate", True):
        different.append("truncate=False")
    odd = set(theirs.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if odd:
        different.append(f"layer_types with {', '.join(sorted(odd))}")
    if different:
        raise UserError(f"{source} is no OLMo that olmo.py can compute: {', '.join(different)}")


def yarn_of(theirs, full):
    """OLMoConfig.yarn for an OLMo 3. full: the settings of the rotations that are stretched."""
    n_layer = theirs[NAMES["n_layer"]]
    kinds = theirs.get("layer_types")
    if not kinds:
        kinds = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(n_layer)]
    original = full["original_max_position_embeddings"]
    factor = full.get("factor") or theirs[NAMES["block_size"]] / original
    return {
        "layers": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
        "factor": factor,
        "original": original,
        "attention_factor": full.get("attention_factor") or sharpening(factor, full),
        "beta_fast": full.get("beta_fast") or 32,
        "beta_slow": full.get("beta_slow") or 1,
    }


def sharpening(factor, full):
    """YaRN's scale of cos and sin where none is given: 0.1 m ln(factor) + 1; of two m's the ratio."""
    def scale(m):
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    m, all_dim = full.get("mscale"), full.get("mscale_all_dim")
    return scale(m) / scale(all_dim) if m and all_dim else scale(1)


def read(source):
    """{'model': LazyTensors, 'model_args'} of a folder of transformers, or of a name on Hugging Face,
    downloaded through huggingface_hub.

    Raises UserError. The checkpoint's tensors are read when they are asked for; `checkpoint.model_of` puts
    them into an empty model one by one.
    """
    local = os.path.isdir(source)
    folder = source if local else huggingface.fetch(source, ["config.json"])
    # refused, if it must be, before gigabytes are here
    args = config_of(read_json(os.path.join(folder, "config.json")), source)
    folder = source if local else huggingface.fetch(source, ["*.safetensors", "*.safetensors.index.json"])
    tensors = huggingface.LazyTensors(folder)
    if args["tied"]:
        tensors.alias("lm_head.weight", "model.embed_tokens.weight")
    return {"model": tensors, "model_args": args}


def write(folder, state, args):
    """Write a folder that transformers' OlmoForCausalLM, Olmo2ForCausalLM or Olmo3ForCausalLM loads.

    state, args: as in `read`'s result.
    """
    kind = "olmo3" if args.get("yarn") else "olmo" if args["generation"] == 1 else "olmo2"
    classes = {"olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM"}
    ends = {"olmo": 50279, "olmo2": 100257}  # <|endoftext|>
    rope = {"rope_type": "default", "rope_theta": args["rope_theta"]}
    config = {
        "model_type": kind,
        "architectures": [classes[kind]],
        **{theirs: args[ours] for ours, theirs in NAMES.items()},
        "num_key_value_heads": args["n_kv_head"],
        "tie_word_embeddings": args["tied"],
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": args["rope_theta"],
        "rope_parameters": rope,
        "pad_token_id": None,
        "eos_token_id": ends.get(tokenizer_for(args["vocab_size"])),
    }
    if kind == "olmo":
        config["clip_qkv"] = args["clip_qkv"]
    else:
        config["rms_norm_eps"] = args["norm_eps"]
    if kind == "olmo3":
        config |= stretched(args, rope)
    if args["gated"]:
        config["gate_bias"] = args["gate_bias"]  # transformers keeps what it does not know
    shared = "lm_head.weight" if args["tied"] else None
    huggingface.write_folder(folder, {name: state[name] for name in state if name != shared}, config)


def stretched(args, rope):
    """What an OLMo 3's config.json says of its layers and their rotations. rope: of those not stretched."""
    yarn = args["yarn"]
    full = rope | {
        "rope_type": "yarn",
        "factor": yarn["factor"],
        "original_max_position_embeddings": yarn["original"],
        "attention_factor": yarn["attention_factor"],
        "beta_fast": yarn["beta_fast"],
        "beta_slow": yarn["beta_slow"],
    }
    kinds = ["sliding_attention"] * args["n_layer"]
    for layer in yarn["layers"]:
        kinds[layer] = "full_attention"
    return {
        "sliding_window": args["block_size"],
        "layer_types": kinds,
        "rope_parameters": {"sliding_attention": rope, "full_attention": full},
    }
