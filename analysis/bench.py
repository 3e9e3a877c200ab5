"""How fast is gated attention, and how much memory does it take? Beside dense attention, in one run.

    python analyze.py bench                            one table; on a CPU B=2 H=12 T=1024 D=64 in float32,
                                                       on a GPU B=8 in bfloat16
    python analyze.py bench --open=1,0.1,0.01,0.004    the same at other shares of open edges
    python analyze.py bench --lengths                  T from 128 to 8192: table and chart
    python analyze.py bench --model=text               a training step of a whole model: dense, gated, taught
                                                       by a dense one. Of 4 layers, 128 bytes; or --model=gpt2

torch.utils.benchmark measures: a time is the median of --repeats measurements, with the quartiles behind it.
Calls that are compared take turns, so that a noisy machine is noisy for all. Memory is what a call needs
beyond what was there before, at its peak: CUDA counts its own; on a CPU Linux tells how large the process has
been (VmHWM), and other systems do not. Everything is in out/bench/bench.json as well.

    MFU = FLOP of a step / seconds / the data sheet's bf16 FLOP/s

Notable:
- The open edges of a post-trained model lie together, near the diagonal, and so do the ones here. q and k are
  waves of the position: scores depend on the distance, and edges open up to some distance. Gates are sampled,
  as in training; far edges are shut beyond luck.
- FLOP are counted as for dense attention, whatever is open and whatever a kernel computes twice: MFU says
  what the researcher gets for the money.
"""

import argparse
import ctypes
import functools
import math
import os
import sys

import numpy as np
import torch
import torch._inductor.config
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.benchmark import Measurement, Timer
from tqdm import tqdm

from fast import attention as fast_attention
from fast.attention import choose_impl
from model import GPT, GPTConfig
from storage.files import write_json
from training import parallel
from training.handover import divergence

FOLDER = "out/bench"
SHAPES = {
    "text": dict(vocab_size=256, n_layer=4, n_head=16, n_embd=128, block_size=128),
    "gpt2": dict(vocab_size=50304, block_size=1024),
}


# ------------------------------------------------------------------------------------------------------------
# Time and memory of calls


def measure(calls, device, repeats):
    """{name: call} -> {name: (torch's Measurement, peak bytes or None)}. Calls take turns.

    A call that runs out of memory is left out.
    """
    timers, memory = {}, {}
    for name, call in tqdm(calls.items(), desc="compile", leave=False, disable=None):
        try:
            call()
            call()  # after the first one memory is not at its usual level
            memory[name] = peak_memory(call, device)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            continue
        timers[name] = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    # a GPU is given work ahead, as in training: else one would time Python
    in_a_row = 1 if device == "cpu" else 10
    rounds = [[timer.timeit(in_a_row) for timer in timers.values()]
              for _ in tqdm(range(repeats), desc="time", leave=False, disable=None)]
    return {name: (Measurement.merge(measured)[0], memory[name])
            for name, measured in zip(timers, zip(*rounds))}


def peak_memory(call, device):
    """Bytes that a call needs at its peak beyond what is there before; None where nobody tells."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        call()
        return None
    # what an earlier call has freed is given back, so that it counts again
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")  # resets VmHWM, the high-water mark
    before = from_status("VmRSS")
    call()
    return max(0, from_status("VmHWM") - before)


def from_status(key):
    """Bytes, of a line of Linux' /proc/self/status."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":"))


def row_of(T, share, way, measured, memory, forward_ms=None, mfu=None):
    """One line of the table and of bench.json. share: of open edges, None for a whole model; measured:
    torch's Measurement; memory: bytes, or None; mfu: None where no data sheet is known.
    """
    return {"T": T, "open": share, "way": way, "forward_ms": forward_ms, "ms": 1000 * measured.median,
            "quartiles_ms": [1000 * seconds for seconds in np.percentile(measured.times, (25, 75))],
            "memory_mb": None if memory is None else memory / 1e6, "mfu": mfu}


# ------------------------------------------------------------------------------------------------------------
# Attention alone


def make_inputs(B, H, T, D, share, dtype, device):
    """q, k, v, dy (B, H, T, D) and a bias: about `share` of the causal edges are open, by [s > 0].

    q = k are random Fourier features of the position:

        a_ij = 20 mean_d cos(frequency_d (i - j) / reach)  ~  20 exp(-(i - j)^2 / (2 reach^2))

    which is above 12 up to the distance reach sqrt(2 log(20 / 12)).
    """
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.randn(D // 2, generator=generator)
    v, dy = torch.randn(2, B, H, T, D, generator=generator)
    distance = T * (1 - math.sqrt(max(0, 1 - share)))  # closer edges are `share` of the triangle
    angles = torch.arange(T)[:, None] * frequencies / (distance / math.sqrt(2 * math.log(20 / 12)))
    x = torch.cat([angles.cos(), angles.sin()], 1) * math.sqrt(20 * math.sqrt(D) / (D // 2))  # (T, D)
    q = k = x.expand(B, H, T, D)
    return [x.to(device, dtype).contiguous() for x in (q, k, v, dy)], -12.0 if share < 1 else 25.0


def ways(device, T, D, dtype):
    """{name: function (q, k, v, bias) -> y, or (y, density)}: what can be timed here. The first is the
    floor.
    """
    def dense(q, k, v, bias):
        return [F.scaled_dot_product_attention(q, k, v, is_causal=True)]

    def gated(impl):
        return lambda q, k, v, bias: fast_attention.attention(q, k, v, bias, gates="sample", impl=impl)[:2]

    found = {"dense (SDPA)": dense}
    for impl in ("plain", "tiled") if device == "cpu" else ("plain",):
        found[f"{impl}, eager"] = gated(impl)
        if parallel.compiles("auto", device, pays_on_cpu=True):
            found[f"{impl}, compiled"] = torch.compile(gated(impl), dynamic=False)
    if device != "cpu" and choose_impl("auto", device, T, D, dtype) == "triton":
        found["triton"] = gated("triton")
    return found


def attention(options, device, T, share):
    """Rows of the table for one length and one share of open edges."""
    print(f"T={T}, {100 * share:g} % open ...", file=sys.stderr)
    dtype = getattr(torch, options.dtype)
    (q, k, v, dy), bias = make_inputs(options.B, options.H, T, options.D, share, dtype, device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    one = torch.ones((), device=device)

    def forward(way):
        with torch.no_grad():
            way(q, k, v, bias)

    def backward_too(way):
        outputs = way(q, k, v, bias)
        torch.autograd.grad(outputs, (q, k, v), (dy, one)[:len(outputs)])

    found = ways(device, T, options.D, dtype)
    needed = options.B * options.H * T * T * q.element_size() * 16  # bytes, by the plain formula
    if needed >= options.most_memory * 1e9:
        found = {name: way for name, way in found.items() if "plain" not in name}
    forwards, both = (measure({name: functools.partial(direction, way) for name, way in found.items()},
                              device, options.repeats) for direction in (forward, backward_too))
    return [row_of(T, share, name, measured, memory, 1000 * forwards[name][0].median)
            for name, (measured, memory) in both.items()]


# ------------------------------------------------------------------------------------------------------------
# Whole models


def training_steps(options, device, name):
    """{way: (training step, its FLOP)} of a whole model: forward, backward, AdamW, compiled; random tokens.

    The ways: dense; gated; gated with a dense teacher, as with train.py's distill_weight.
    """
    config = GPTConfig(**SHAPES[name])
    x = torch.randint(0, config.vocab_size, (options.B, config.block_size), device=device)
    autocast, _ = parallel.precision("auto", device, config.n_embd)

    def built(gated, impl):
        model = GPT(GPTConfig(**SHAPES[name], gated=gated)).to(device)
        model.attention_impl = impl
        if parallel.compiles("auto", device, pays_on_cpu=gated):
            model.compile()
        return model

    def step_of(gated, impl, teacher=None):
        model = built(gated, impl)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step():
            with autocast():
                logits, loss, density = model(x, x)
                if teacher is not None:
                    with torch.no_grad():
                        taught = teacher(x)[0]
                    loss = loss + divergence(logits, taught, x)
            (loss + density).backward()
            optimizer.step()
            optimizer.zero_grad()

        passes = 3 if teacher is None else 4  # a forward pass is a third of a step
        return step, model.flops_per_token(config.block_size) / 3 * x.numel() * passes

    matrices = config.n_layer * config.n_head * options.B * config.block_size**2 * 4  # bytes, T x T, float32
    fast = "tiled" if device == "cpu" else "triton"
    steps = {f"{name}, dense": step_of(False, "auto"), f"{name}, {fast}": step_of(True, fast)}
    if 3 * matrices < options.most_memory * 1e9:
        steps[f"{name}, plain"] = step_of(True, "plain")
    steps[f"{name}, {fast}, taught"] = step_of(True, fast, built(False, "auto"))
    return steps


def whole_model(options, device, name):
    """Rows of the table for a training step of a whole model."""
    steps, peak = training_steps(options, device, name), parallel.peak_flops(device)
    counters["graph_break"].clear()
    found = measure({way: step for way, (step, _) in steps.items()}, device, options.repeats)
    print(f"graph breaks: {dict(counters['graph_break']) or 'none'}")
    return [row_of(SHAPES[name]["block_size"], None, way, measured, memory,
                   mfu=steps[way][1] / measured.median / peak if peak else None)
            for way, (measured, memory) in found.items()]


# ------------------------------------------------------------------------------------------------------------
# Table and chart


def show(rows):
    """The table: within a length and a share of open edges, ratios to the first way."""
    print("|     T |   open | way                  | forward, ms | with backward, ms "
          "| quartiles     | x dense | memory, MB | x dense | MFU  |")
    print("|------:|-------:|----------------------|------------:|------------------:"
          "|---------------|--------:|-----------:|--------:|-----:|")
    for row in rows:
        dense = next(other for other in rows if (other["T"], other["open"]) == (row["T"], row["open"]))
        opened = "" if row["open"] is None else f"{100 * row['open']:.1f} %"
        forward = "" if row["forward_ms"] is None else f"{row['forward_ms']:.2f}"
        low, high = row["quartiles_ms"]
        memory = more = ""
        if row["memory_mb"] is not None:
            memory = f"{row['memory_mb']:.0f}"
            more = f"{row['memory_mb'] / max(1e-9, dense['memory_mb']):.1f}"
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
        print(f"| {row['T']:5d} | {opened:>6} | {row['way']:20} | {forward:>11} | {row['ms']:17.2f} "
              f"| {low:.1f} to {high:.1f} | {row['ms'] / dense['ms']:7.2f} | {memory:>10} | {more:>7} "
              f"| {mfu:>4} |")


def chart(rows, path, title):
    """Time and memory over T, both axes logarithmic."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    lengths = sorted({row["T"] for row in rows})
    shown = [("ms", "forward and backward, ms"), ("memory_mb", "memory beyond the inputs, MB")]
    for axis, (key, label) in zip(axes, shown):
        for way in dict.fromkeys(row["way"] for row in rows):
            points = [(row["T"], row[key]) for row in rows if row["way"] == way and row[key]]
            if points:
                axis.loglog(*zip(*points), "o-", label=way, markersize=4)
        axis.set_xticks(lengths, [str(T) for T in lengths])
        axis.minorticks_off()
        axis.set(xlabel="T, tokens of context", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------------------
# The command


def numbers(words):
    """`1,0.1` -> (1.0, 0.1), for argparse."""
    try:
        found = tuple(map(float, words.split(",")))
    except ValueError:
        found = (0,)
    if not all(0 < number < math.inf for number in found):
        raise argparse.ArgumentTypeError("write numbers above 0, with commas between them")
    return found


def add_arguments(parser):
    parser.add_argument("--device", default="auto")
    parser.add_argument("--B", type=int, help="examples; default 2, on a GPU 8")
    parser.add_argument("--H", type=int, default=12, help="heads")
    parser.add_argument("--T", type=int, default=1024, help="tokens")
    parser.add_argument("--D", type=int, default=64, help="width of a head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default float32, on a GPU bfloat16")
    parser.add_argument("--open", type=numbers, default=(0.01,),
                        help="shares of open edges, e.g. 1,0.1,0.01,0.004")
    parser.add_argument("--lengths", type=numbers, nargs="?", const=(128, 256, 512, 1024, 2048, 4096, 8192),
                        help="lengths T for a table and a chart; alone: 128 to 8192")
    parser.add_argument("--model", choices=SHAPES, help="a whole model's training step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--most_memory", type=float, default=8.0,
                        help="GB: lengths and models for which the plain formula would need more "
                             "are left out for it")


def run(options, settings):
    """`analyze.py bench`."""
    device = parallel.pick_device(options.device)
    title = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device if ":" in device else 0)
        title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    torch._inductor.config.fallback_random = True  # torch's own generator in compiled code, as in train.py
    torch._dynamo.config.recompile_limit = 64  # many lengths; at 8 torch would give up compiling, silently
    options.B = options.B or (8 if on_gpu else 2)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    title += f", B={options.B}" + ("" if options.model else f" H={options.H} D={options.D} {options.dtype}")
    print(title)
    if options.model:
        rows = whole_model(options, device, options.model)
    else:
        rows = [row for T in options.lengths or (options.T,) for share in options.open
                for row in attention(options, device, int(T), share)]
    show(rows)
    os.makedirs(FOLDER, exist_ok=True)
    write_json(os.path.join(FOLDER, "bench.json"), {"machine": title, "rows": rows})
    if options.lengths:
        chart(rows, os.path.join(FOLDER, "bench.png"), title)
