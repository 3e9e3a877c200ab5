"""Take a model elsewhere: to transformers, TransformerLens or nanoGPT.

    python analyze.py export out/run --to hf PATH                 a folder of transformers: GPT2LMHeadModel
                                                                  or OlmoForCausalLM from_pretrained(PATH)
    python analyze.py export out/run --to transformer_lens PATH   a file: {'cfg', 'state_dict'} for
                                                                  TransformerLens 2 and 3
    python analyze.py export out/run --to nanogpt PATH            a file for nanoGPT's model.py and sample.py:
                                                                  {'model', 'model_args', ...}

TransformerLens 4 wraps a transformers model, so for its TransformerBridge export `--to hf`.

Notable: all of them compute dense attention. A gated model is itself again once the deterministic gate A_ij =
[a_ij + b > 0] is put back, with this model's b (`gate_bias` in the file or in config.json); docs/export.md
shows the few lines for each package, and tests prove them.
"""

import os
from dataclasses import asdict, fields

from gate import GateConfig
from models import huggingface, olmo, olmo_files
from models.checkpoint import load_checkpoint, save_checkpoint
from models.sources import checkpoint_named
from storage.files import UserError


def transformer_lens(model):
    """{'cfg', 'state_dict', 'gate_bias'}: keywords for HookedTransformerConfig, and the weights under
    nanoGPT's names, which TransformerLens' own convert_nanogpt_weights takes.
    """
    c = model.config
    cfg = {
        "n_layers": c.n_layer,
        "n_heads": c.n_head,
        "d_model": c.n_embd,
        "d_head": c.n_embd // c.n_head,
        "d_mlp": 4 * c.n_embd,
        "n_ctx": c.block_size,
        "d_vocab": c.vocab_size,
        "act_fn": huggingface.ACTIVATION[c.gelu],
        "normalization_type": "LN",
        "eps": 1e-5,
        "default_prepend_bos": False,
    }
    return {"cfg": cfg, "state_dict": model.state_dict(), "gate_bias": c.gate_bias if c.gated else None}


def nanogpt(model):
    """Weights and model_args as in nanoGPT's ckpt.pt, and 'gate_bias' and 'gelu', by which we read the same
    model again; no state of its optimizer, so its train.py cannot resume.

    Raises UserError if the model does not tie its embeddings, as nanoGPT always does.
    """
    c = model.config
    if not c.tied:
        raise UserError("nanoGPT ties the embeddings always, and this model was made with tied=False")
    if c.gelu == "tanh":
        print(
            "note: nanoGPT computes the exact GELU and this model GPT-2's approximation, so its logits will "
            "differ from the third digit on"
        )
    args = {
        key: getattr(c, key)
        for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    }
    gate_bias = c.gate_bias if c.gated else None
    return {"model": model.state_dict(), "model_args": args, "gate_bias": gate_bias, "gelu": c.gelu}


def refuse_what_would_be_lost(model, run):
    """Raise UserError if model has a gate that no file of another package has a place for."""
    config = type(model.config)(vocab_size=model.config.vocab_size)
    lost = [f.name for f in fields(GateConfig) if f.name not in KNOWN_OF_GATE
            and getattr(model.config, f.name) != getattr(config, f.name)]
    lost += [name for name in model.state_dict() if name.split(".")[-2] not in KNOWN_MODULES]
    if lost:
        raise UserError(f"{run} has {', '.join(lost[:5])}, for which other packages have no place: exported "
                        "it would be another model. Take its numbers along by hand, or teach export.py")


# gate_temperature is training's alone
KNOWN_OF_GATE = ("gated", "gate_bias", "gate_temperature")
KNOWN_MODULES = (
    "wte", "wpe", "ln_1", "ln_2", "ln_f", "c_attn", "c_proj", "c_fc", "lm_head",  # GPT-2
    "embed_tokens", "norm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm",  # OLMo
    "gate_proj", "up_proj", "down_proj", "post_attention_layernorm", "post_feedforward_layernorm",
)


def export(run, kind, path):
    """Write the model of a run's folder or checkpoint to path, as `kind`.

    Raises UserError, also rather than overwrite anything.
    """
    if os.path.exists(path) and (kind != "hf" or not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"{path} exists already. Choose another name, or delete it first")
    model = load_checkpoint(checkpoint_named(run))
    is_olmo = isinstance(model, olmo.OLMo)
    refuse_what_would_be_lost(model, run)
    if is_olmo and kind != "hf":
        raise UserError(
            f"{kind} knows GPT-2's format only, and {run} is an OLMo. Export --to hf: TransformerLens' "
            "bridge wraps that"
        )
    if kind == "hf":
        try:
            (olmo_files if is_olmo else huggingface).write(path, model.state_dict(), asdict(model.config))
        except OSError as error:
            raise UserError(str(error)) from error
    else:
        save_checkpoint(path, {"transformer_lens": transformer_lens, "nanogpt": nanogpt}[kind](model))


def add_arguments(parser):
    parser.add_argument("run", help="a run's folder or a checkpoint")
    parser.add_argument("path", help="folder (hf) or file to write")
    parser.add_argument("--to", required=True, choices=["hf", "transformer_lens", "nanogpt"])


def run(options, settings):
    """`analyze.py export`."""
    export(options.run, options.to, options.path)
    print(f"wrote {options.path}")
