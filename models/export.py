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
from dataclasses import asdict

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
        print("note: nanoGPT computes the exact GELU and this model GPT-2's approximation, so its logits "
              "will differ from the third digit on")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    return {"model": model.state_dict(), "model_args": {name: getattr(c, name) for name in names},
            "gate_bias": c.gate_bias if c.gated else None, "gelu": c.gelu}


def export(run, kind, path):
    """Write the model of a run's folder or checkpoint to path, as `kind`.

    Raises UserError, also rather than overwrite anything.
    """
    if os.path.exists(path) and (kind != "hf" or not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"{path} exists already. Choose another name, or delete it first")
    model = load_checkpoint(checkpoint_named(run))
    is_olmo = isinstance(model, olmo.OLMo)
    if is_olmo and kind != "hf":
        raise UserError(f"{kind} knows GPT-2's format only, and {run} is an OLMo. Export --to hf: "
                        "TransformerLens' bridge wraps that")
    if kind == "hf":
        (olmo_files if is_olmo else huggingface).write(path, model.state_dict(), asdict(model.config))
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
