"""How much memory and time does post-training an OLMo take? A plan, before anything is rented.

    python analyze.py plan --model=7b --gpus=8 --context=512
    python analyze.py plan --model=all --gpus=8                       1b, 7b, 13b and 30b
    python analyze.py plan --model=1b --gpus=1 --measured=out/gpt2    speed of a run of yours, not assumed
    python analyze.py plan --model=30b --recompute_activations=True --micro_batch_size=4  any train.py setting

    per GPU:   parameters + gradients + optimizer + teacher        divided by the number of GPUs under FSDP
             + what FSDP puts together: a block's weights, its gradients before they are shared out
             + autocast's bfloat16 copies of the weights
             + what autograd keeps for the backward pass           of one micro-batch
             + logits: loss, divergence, gradient
    time:      FLOPs of a step / (GPUs x peak x utilisation)

Notable:
- Nothing is a formula from a paper where it can be counted. Parameters and adapters are counted on the real
  model, built on torch's meta device without memory.
- What autograd keeps is counted by running the model there, as a GPU's autocast would (`Autocast`). Gated
  attention is then a kernel that keeps q, k, v, y and one number per row (fast/kernels.py).
- Settings come from config/olmo_1b.py and, for the others, config/olmo_7b.py.
- What is assumed is printed: the utilisation, unless --measured names a run, and 2 GB for the CUDA context,
  the communication's buffers and fragmentation.
"""

import os
import statistics
from dataclasses import replace

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models import lora
from models.olmo import OLMo, OLMoConfig, rotations
from storage.files import CONFIGS, UserError
from training.config import (
    Config,
    check_together,
    forward_passes,
    limits,
    make_config,
    micro_batch_size,
    parse_command_line,
)
from training.folder import read_metrics
from training.parallel import PEAK_FLOPS

OVERHEAD = 2e9  # bytes: assumed
OLMO_2 = dict(generation=2, block_size=4096, vocab_size=100352, n_head=40, n_embd=5120, tied=False)
MODELS = {  # name: (source, its shape)
    "1b": ("allenai/OLMo-1B-hf", OLMoConfig()),
    "7b": ("allenai/OLMo-7B-hf",
           OLMoConfig(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, n_hidden=11008, tied=False)),
    "13b": ("allenai/OLMo-2-1124-13B", OLMoConfig(**OLMO_2, n_layer=40, n_kv_head=40, n_hidden=13824)),
    "30b": ("allenai/OLMo-2-0325-32B", OLMoConfig(**OLMO_2, n_layer=64, n_kv_head=8, n_hidden=27648)),
}
# Bytes per logit, the most at a time. Of the loss alone, bfloat16: logits and their gradient; float32:
# log-softmax, gradient, a factor of it
BYTES_OF_LOGIT = 2 + 2 + 2.5 * 4
# With a divergence, in its middle, bfloat16: logits of student and teacher; float32: log-softmax of the loss,
# of student, of teacher, and three terms of t (log t - log s)
BYTES_OF_TAUGHT_LOGIT = 2 + 2 + 6 * 4


class Kernel(torch.autograd.Function):
    """Stands for gated attention as fast/kernels.py computes it: keeps q, k, v, y and a float32 per row."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(v, memory_format=torch.contiguous_format)  # as fast/attention.py says
        ctx.save_for_backward(q, k, v, y, torch.empty(q.shape[:3], device=q.device))
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Autocast(TorchFunctionMode):
    """A GPU's autocast, as far as an OLMo meets it, on devices that have another or none.

    Products are in bfloat16, norms in float32.
    """

    DTYPES = {F.linear: torch.bfloat16, F.layer_norm: torch.float32, F.rms_norm: torch.float32}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        dtype = self.DTYPES.get(function)

        def cast(x):
            return x.to(dtype) if dtype and torch.is_tensor(x) else x

        options = {name: cast(x) for name, x in (kwargs or {}).items()}
        return function(*map(cast, args), **options)


def kept_bytes(compute, model):
    """Bytes that autograd keeps for the backward pass of compute(), without parameters (there anyway)."""
    there = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            # the storage too: it stays alive, so that no other gets its number
            kept[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Autocast():
        compute()
    return sum(size for size, _ in kept.values())


def built(config, settings):
    """The model on the meta device, in bfloat16, with the settings' adapters."""
    with torch.device("meta"):
        model = OLMo(config).bfloat16()
        if settings.lora_rank:
            lora.add(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    for attention in model.attentions:
        attention.attend = attend_by_kernel
    return model


def attend_by_kernel(q, k, v, **options):
    """`gated_attention` as a GPU computes it: (y, density, no gates). k and v may have fewer heads."""
    group = q.shape[1] // k.shape[1]
    y = Kernel.apply(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))
    return y, q.new_ones(()), None


def activations(model, micro_batch, context, settings):
    """Bytes that autograd keeps for one micro-batch: (in the blocks, behind them).

    Behind them are the last norm and the logits.
    """
    # the residual stream: OLMo 2 adds what a norm returns, in float32
    half = settings.base_dtype == "bfloat16" and model.config.generation == 1
    dtype = torch.bfloat16 if half else torch.float32
    x = torch.empty(micro_batch, context, model.config.n_embd, device="meta", dtype=dtype, requires_grad=True)

    def one_block():
        return model.blocks[0](x, rotations(model.config, context, "meta"))[0]

    per_block = kept_bytes(one_block, model)
    if settings.recompute_activations:  # x: a block's input, where it starts anew
        in_blocks = len(model.blocks) * x.nbytes + per_block
    else:
        in_blocks = len(model.blocks) * per_block
    per_logit = BYTES_OF_TAUGHT_LOGIT if settings.distill_weight else BYTES_OF_LOGIT
    return in_blocks, micro_batch * context * model.config.vocab_size * per_logit


def plan(name, settings, gpus, context):
    """A dict of bytes per GPU by purpose, parameters, adapters, and FLOPs of a step."""
    model = built(replace(MODELS[name][1], block_size=context), settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    micro = micro_batch_size(settings, gpus)
    of_blocks, of_logits = activations(model, micro, context, settings)
    forward = model.flops_per_token(context) / 3  # FLOPs of a forward pass
    return {"parameters": parameters, "trained": trained,
            "memory": memory_of(model, parameters, trained, settings, gpus)
            | {"activations": of_blocks, "logits": of_logits, "overhead": OVERHEAD},
            "flops": forward * forward_passes(settings) * settings.batch_size * context}


def memory_of(model, parameters, trained, settings, gpus):
    """Bytes per GPU of what does not depend on the batch: weights, gradients and what belongs to them."""
    shards = gpus if settings.parallel == "fsdp" else 1
    half = settings.base_dtype == "bfloat16"  # of frozen weights
    size = {}  # of each parameter, bytes
    for p in model.parameters():
        size[id(p)] = p.numel() * (2 if half and not p.requires_grad else 4)
    whole = sum(size.values())
    gathered, to_share = 0, 0
    if shards > 1:
        gathered, to_share = put_together(model, trained, size)
    teachers = 1
    if settings.lora_rank or not settings.distill_weight:
        teachers = 0
    copies = 2 * parameters  # autocast's, in bfloat16, which the backward pass wants
    if half or settings.recompute_activations:
        copies = 0
    gradients = 4 * trained
    if shards == 1 and gpus > 1:
        gradients *= 2  # DDP sends them in buckets of its own
    return {"parameters": whole / shards, "gradients": gradients / shards, "optimizer": 8 * trained / shards,
            "teacher": teachers * 4 * parameters / shards,
            "put together": (1 + teachers) * gathered + to_share, "copies": copies}


def put_together(model, trained, size):
    """What FSDP makes whole: bytes of (weights, gradients). size: {id of a parameter: its bytes}."""
    n = len(model.blocks)
    block = sum(size[id(p)] for p in model.blocks[0].parameters())
    # this block and the next; and all that is outside of blocks
    gathered = 2 * block + sum(size.values()) - n * block
    # Gradients, and the same once more in the order of the processes; the output's wait for the embedding's
    in_block = sum(p.numel() for p in model.blocks[0].parameters() if p.requires_grad)
    outside = trained - n * in_block
    return gathered, 4 * max(2 * outside, outside + 2 * in_block)


def utilisation(run):
    """The median share of the peak that a run of yours reached, from its metrics.jsonl."""
    found = [line["mfu"] for line in read_metrics(os.path.join(run, "metrics.jsonl")) if line["mfu"]]
    if not found:
        raise UserError(f"{run}/metrics.jsonl has no mfu: it was no run on a GPU whose peak is known "
                        "(parallel.PEAK_FLOPS)")
    return statistics.median(found)


# GB of a GPU's memory, by its data sheet; of an A100 the larger one's
GPU_MEMORY = {"H100 PCIe": 80, "H100 NVL": 94, "H200": 141, "H100": 80, "B200": 180, "A100": 80, "L40S": 48,
              "L4": 24, "A10": 24, "4090": 24, "3090": 24}


def fits(found, gpu):
    """Is there room for what `plan` returns?"""
    return sum(found["memory"].values()) <= 1e9 * GPU_MEMORY[gpu]


def what_would_fit(name, given, options):
    """The flags with which a model fits that does not, as few as do, or None: nothing here helps."""
    settings, _ = plan_of(name, given, options)
    flags, micro = {}, micro_batch_size(settings, options.gpus)
    sizes = [size for size in (4, 1) if size < micro and settings.batch_size % (size * options.gpus) == 0]
    for key, value in (("parallel", "fsdp"), ("recompute_activations", True),
                       *(("micro_batch_size", size) for size in sizes)):
        if getattr(settings, key) == value or options.gpus == 1 and key == "parallel":
            continue
        flags[key] = value
        if fits(plan_of(name, given | flags, options)[1], options.gpu):
            return " ".join(f"--{flag}={value}" for flag, value in flags.items())
    return None


def add_arguments(parser):
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="tokens")
    parser.add_argument("--gpu", choices=PEAK_FLOPS, default="H100", help="whose bf16 peak to calculate with")
    parser.add_argument("--full", action="store_true", help="train all weights instead of adapters")
    parser.add_argument("--measured", metavar="RUN",
                        help="take the utilisation of the peak from this run's metrics.jsonl")


def run(options, settings):
    """`analyze.py plan`."""
    if options.gpus < 1 or options.context < 1:
        raise UserError("--gpus and --context must be at least 1")
    share = utilisation(options.measured) if options.measured else 0.4
    path, given = parse_command_line(settings, Config, limits())
    if path:
        raise UserError(f"plan takes no {path}: choose a --model, and settings as --key=value")
    if options.full:
        given |= {"lora_rank": 0, "base_dtype": "float32"}
    names = MODELS if options.model == "all" else [options.model]
    rows = {name: plan_of(name, given, options) for name in names}
    show(rows, share, options)
    for name, (_, found) in rows.items():
        if not fits(found, options.gpu):
            flags = what_would_fit(name, given, options)
            remedy = f"with {flags} it does" if flags else "more GPUs, or adapters instead of --full"
            print(f"{name} DOES NOT FIT into the {GPU_MEMORY[options.gpu]} GB of a {options.gpu}: {remedy}")


def plan_of(name, given, options):
    """(Config, what `plan` returns) of a model; settings: its config file's and `given`. Raises UserError."""
    file = "olmo_1b.py" if name == "1b" else "olmo_7b.py"
    settings, _ = make_config(os.path.join(CONFIGS, file), given)
    check_together(settings, options.gpus)
    source, config = MODELS[name]
    if options.context > config.block_size:
        raise UserError(f"--context={options.context}: "
                        f"{source} has a context of {config.block_size:,} tokens")
    return settings, plan(name, settings, options.gpus, options.context)


def show(rows, share, options):
    """Print the table. rows: {name: what `plan_of` returns}; share: the utilisation of the peak."""
    trained = "all weights" if options.full else "LoRA"
    origin = f"measured in {options.measured}" if options.measured else "ASSUMED, not measured"
    print(f"{options.gpus} x {options.gpu}, context {options.context}, {trained}; "
          f"{100 * share:.0f} % of the peak {origin}")
    _, first = next(iter(rows.values()))
    titles = "".join(f"{purpose:>14}" for purpose in first["memory"])
    print(f"{'':8}{'parameters':>14}{'trained':>14}{titles}"
          f"{'GB per GPU':>14}{'steps / hour':>14}{'hours':>8}")
    for name, (settings, found) in rows.items():
        memory = found["memory"].values()
        steps = 3600 * options.gpus * PEAK_FLOPS[options.gpu] * share / found["flops"]  # per hour
        gigabytes = "".join(f"{size / 1e9:14.1f}" for size in memory)
        print(f"{name:8}{found['parameters']:14,}{found['trained']:14,}{gigabytes}"
              f"{sum(memory) / 1e9:14.1f}{steps:14,.0f}{settings.max_steps / steps:8.1f}")
        recomputed = ", activations recomputed" if settings.recompute_activations else ""
        print(f"{'':8}{MODELS[name][0]}, {settings.parallel}, "
              f"micro-batches of {micro_batch_size(settings, options.gpus)}, "
              f"{settings.max_steps:,} steps of {settings.batch_size} x {options.context} tokens{recomputed}")
