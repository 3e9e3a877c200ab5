"""How fast is gated attention, and how much memory does it take? Every way of computing it, beside dense attention, in one run.

    python analyze.py bench                              one table: B=2 H=12 T=1024 D=64 in float32 on a CPU; B=8, bfloat16 on a GPU
    python analyze.py bench --open=1,0.1,0.01,0.004      the same at other shares of open edges
    python analyze.py bench --lengths                    T from 128 to 8192: table and chart
    python analyze.py bench --model=stdlib               a training step of a whole model, dense, gated, taught by a dense one: the text experiment's, or --model=gpt2
    python analyze.py bench --split                      where the seconds of config/addition.py go, part by part
    python analyze.py bench --circuit                    all 32,491 edge scores of a GPT-2 124M (random weights), 64 pairs of 20 tokens; a curve of 30 circuits
    python analyze.py bench --splash=PATH                also the package of the paper's authors (hrpan/splash_attention), from a folder or installed ('')

Everything is written to out/bench/ as well: bench.json, and bench.png for --lengths. A time is the median of --repeats calls, with the quartiles behind
it; a ratio compares medians of one run, whose ways take turns, so that a noisy machine is noisy for all. Memory is what a call needs
beyond its inputs, at its peak (on a CPU only Linux tells).

Notable: the open edges of a post-trained model lie together, near the diagonal, and so do the ones here: q and k are waves of the position,
so that scores depend on the distance and edges open up to some distance. Gates are sampled, as in training; far edges are shut beyond luck.
"""

import ctypes
import functools
import json
import math
import os
import statistics
import sys
import time

import torch
import torch._inductor.config
from torch._dynamo.utils import counters
from torch.nn import functional as F

from fast.dispatch import choose_impl
from gate import gated_attention
from model import GPT, GPTConfig
from training import hardware
from training.distillation import divergence

SHAPES = {"stdlib": dict(vocab_size=256, n_layer=4, n_head=16, n_embd=128, block_size=128), "gpt2": dict(vocab_size=50304)}


def make_inputs(B, H, T, D, share, dtype, device):
    """q, k, v, dy (B, H, T, D) and a bias, for which about `share` of the causal edges are open under deterministic gates."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(T, dtype=torch.float64, device=device)
    frequencies = torch.randn(D // 2, generator=generator, dtype=torch.float64).to(device)
    v, dy = (torch.randn(B, H, T, D, generator=generator) for _ in range(2))

    def waves(reach):  # a_ij = 20 mean_d cos(frequency_d (i - j) / reach): 20 on the diagonal, falling off over `reach` positions
        angles = position[:, None] * frequencies / reach
        return torch.cat([angles.cos(), angles.sin()], 1) * math.sqrt(20 * math.sqrt(D) / (D // 2))

    low, high, bias = 1e-3, 1e3 * T, -12.0
    for _ in range(40):  # the reach for which the right share of edges has a score above 12
        reach = math.sqrt(low * high)
        x = waves(reach)
        opened = ((x @ x.T / math.sqrt(D) + bias > 0).tril().sum() / (T * (T + 1) / 2)).item()
        low, high = (reach, high) if opened < share else (low, reach)
    if share >= 1:
        bias = 25.0
    q = k = x.float().expand(B, H, T, D)
    return [x.to(device, dtype).contiguous() for x in (q, k, v, dy)], bias


def ways(device, T, D, dtype, splash):
    """{name: function (q, k, v, bias) -> (y, density)}: everything that can be timed here. The first is the floor."""
    def gated(impl):
        return lambda q, k, v, bias: gated_attention(q, k, v, bias, sample=True, impl=impl)[:2]

    found = {"dense (SDPA)": lambda q, k, v, bias: (F.scaled_dot_product_attention(q, k, v, is_causal=True), q.new_zeros(())),
             "plain, eager": gated("plain"), "plain, compiled": torch.compile(gated("plain"), dynamic=False)}
    if device == "cpu":
        found |= {"tiled, eager": gated("tiled"), "tiled, compiled": torch.compile(gated("tiled"), dynamic=False)}
    elif choose_impl("auto", device, T, D, dtype) == "triton":
        found["triton"] = gated("triton")
    if splash is not None:
        sys.path.insert(0, splash)
        from splash_attention import (
            splash_attention,  # (q, k, v, bias, causal, sample, return_map) -> y, mean of sigmoid, map
        )
        found["splash (authors)"] = lambda q, k, v, bias: splash_attention(q, k, v, bias, True, True, False)[:2]
    return found


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(call, device):
    """Bytes that a call needs at its peak beyond what is there before; None where nobody tells."""
    wait(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier call has freed is given back, so that it counts again
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets VmHWM, the high-water mark
    before = from_status("VmRSS")
    call()
    return max(0, from_status("VmHWM") - before)


def from_status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":"))


def measure(calls, device, repeats):
    """{name: call} -> {name: (times in ms, sorted; peak bytes)}. Calls take turns. One that runs out of memory is left out."""
    results, memory = {}, {}
    for name, call in calls.items():
        try:
            call()  # compiles
            call()
            memory[name], results[name] = peak_memory(call, device), []
        except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU the allocator names itself
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            print(f"{name}: out of memory")
    in_a_row = 1 if device == "cpu" else 10  # a GPU is given work ahead, as in training: else one would time Python
    for _ in range(repeats):
        for name in results:
            wait(device)
            began = time.perf_counter()
            for _ in range(in_a_row):
                calls[name]()
            wait(device)
            results[name].append(1000 * (time.perf_counter() - began) / in_a_row)
    return {name: (sorted(times), memory[name]) for name, times in results.items()}


def attention(options, device, T, share):
    """Rows of the table for one length and one share of open edges."""
    dtype = getattr(torch, options.dtype)
    (q, k, v, dy), bias = make_inputs(options.B, options.H, T, options.D, share, dtype, device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def backward_too(way):
        y, density = way(q, k, v, bias)
        found = [(y, dy)] + [(density, torch.ones_like(density))] * density.requires_grad  # a dense model has none
        torch.autograd.grad([output for output, _ in found], (q, k, v), [gradient for _, gradient in found])

    def forward(way):
        with torch.no_grad():
            way(q, k, v, bias)

    found = {name: way for name, way in ways(device, T, options.D, dtype, options.splash).items()
             if "plain" not in name or options.B * options.H * T * T * q.element_size() * 16 < options.most_memory * 1e9}
    forwards = measure({name: functools.partial(forward, way) for name, way in found.items()}, device, options.repeats)
    both = measure({name: functools.partial(backward_too, way) for name, way in found.items()}, device, options.repeats)
    return [row_of(T, share, name, times, memory, statistics.median(forwards[name][0])) for name, (times, memory) in both.items()]


def row_of(T, share, way, times, memory, forward_ms=None, mfu=None):
    """One line of the table and of bench.json. share: of open edges, None for a whole model; times in ms, sorted; memory in bytes or None; mfu: see `used`."""
    return {"T": T, "open": share, "way": way, "forward_ms": forward_ms, "ms": statistics.median(times),
            "quartiles_ms": [times[len(times) // 4], times[3 * len(times) // 4]], "memory_mb": None if memory is None else memory / 1e6, "mfu": mfu}


def floor_of(B, H, T, D, dtype, device):
    """What no kernel can avoid, in words: multiplications on and below the diagonal, and every tensor once through memory."""
    product = 2 * B * H * D * T * (T + 1) / 2  # FLOP of one product of T x T scores with D columns
    tensor = B * H * T * D * getattr(torch, dtype).itemsize
    words = (f"T={T}: scores and values are 2 products forward, {2 * product / 1e9:.1f} GFLOP, and 5 backward, {5 * product / 1e9:.1f} GFLOP (fast/kernels.py computes 7); "
             f"q, k, v, y, dy, dq, dk, dv once through memory are {8 * tensor / 1e6:.0f} MB")
    peak = hardware.peak_flops(device) if dtype != "float32" else None
    return words + (f"; at the data sheet's {peak / 1e12:.0f} TFLOP/s the products take {7 * product / peak * 1000:.3f} ms" if peak else "")


def training_steps(options, device, name):
    """{way: (training step, its FLOP)} of a whole model: forward, backward, AdamW, compiled. Dense; gated; gated with a dense teacher, as with train.py's distill_weight."""
    shape = SHAPES[name]
    context = shape.get("block_size", 1024)
    x = torch.randint(0, shape["vocab_size"], (options.B, context), device=device)
    autocast, _ = hardware.precision("auto", device)

    def built(gated, impl):
        model = GPT(GPTConfig(**shape, gated=gated, gate_bias=options.gate_bias)).to(device)
        model.attention_impl = impl
        return model, torch.compile(model) if gated or device != "cpu" else model

    def step_of(gated, impl, teacher=None):
        model, network = built(gated, impl)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step():
            with autocast():
                logits, loss, density = network(x, x)
                if teacher is not None:
                    with torch.no_grad():
                        taught = teacher(x)[0]
                    loss = loss + divergence(logits, taught, x)
            (loss + density).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, model.flops_per_token(context) / 3 * x.numel() * (3 + (teacher is not None))  # a forward pass is a third of a step

    config = GPTConfig(**shape)
    matrices = config.n_layer * config.n_head * options.B * context**2 * 4  # bytes of one T x T matrix in float32
    fast = "tiled" if device == "cpu" else "triton"
    steps = {f"{name}, dense": step_of(False, "auto"), f"{name}, {fast}": step_of(True, fast)}
    if 3 * matrices < options.most_memory * 1e9:
        steps[f"{name}, plain"] = step_of(True, "plain")
    _, teacher = built(False, "auto")
    return steps | {f"{name}, {fast}, taught": step_of(True, fast, teacher)}


def whole_model(options, device, name):
    """Rows of the table for a training step of a whole model."""
    steps = training_steps(options, device, name)
    counters["graph_break"].clear()
    found = measure({way: step for way, (step, _) in steps.items()}, device, options.repeats)
    print(f"graph breaks: {dict(counters['graph_break']) or 'none'}")
    return [row_of(SHAPES[name].get("block_size", 1024), None, way, times, memory, mfu=used(steps[way][1], statistics.median(times), device)) for way, (times, memory) in found.items()]


def used(flop, ms, device):
    """Share of the data sheet's bf16 FLOP/s that a step of so many FLOP, counted as for dense attention, gets in so many ms; None where no data sheet is known."""
    peak = hardware.peak_flops(device)
    return flop / (ms / 1000) / peak if peak else None


def circuits(device):
    """Time and memory of circuits/attribution.py on a model of GPT-2's size: scores of all edges, and the explained effects of 30 circuits. Printed."""
    from circuits.attribution import attribute_edges, best_edges, effects, sizes
    from circuits.graph import Graph
    from circuits.tasks import LOGIT, Pair

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPES["gpt2"])).to(device).eval()
    prompts = torch.randint(0, 50000, (2, 64, 20)).tolist()
    pairs = [Pair(clean, other, [19], [[1]], [[2]]) for clean, other in zip(*prompts)]
    graph, found = Graph(12, 12), {}
    for name, call in (("scores of 32,491 edges (EAP), 64 pairs", lambda: found.update(scores=attribute_edges(model, pairs, LOGIT))),
                       ("30 circuits, 64 pairs", lambda: effects(model, pairs, LOGIT, [graph.on_paths(best_edges(found["scores"], graph.edges, n)) for n in sizes(32491)], batch_size=16))):
        began = time.perf_counter()
        memory = peak_memory(call, device)
        print(f"{name}: {time.perf_counter() - began:.1f} s" + ("" if memory is None else f", {memory / 1e9:.2f} GB beyond the model"))


def show(rows):
    """The table: within a length and a share of open edges, ratios to the first way."""
    print("|     T |   open | way                  | forward, ms | with backward, ms | quartiles     | x dense | memory, MB | x dense | MFU  |")
    print("|------:|-------:|----------------------|------------:|------------------:|---------------|--------:|-----------:|--------:|-----:|")
    for row in rows:
        floor = next(other for other in rows if (other["T"], other["open"]) == (row["T"], row["open"]))
        opened = "" if row["open"] is None else f"{100 * row['open']:.1f} %"
        forward = "" if row["forward_ms"] is None else f"{row['forward_ms']:.2f}"
        memory, more = ("", "") if row["memory_mb"] is None else (f"{row['memory_mb']:.0f}", f"{row['memory_mb'] / max(1e-9, floor['memory_mb']):.1f}")
        low, high = row["quartiles_ms"]
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
        print(f"| {row['T']:5d} | {opened:>6} | {row['way']:20} | {forward:>11} | {row['ms']:17.2f} | {low:.1f} to {high:.1f} | {row['ms'] / floor['ms']:7.2f} | {memory:>10} | {more:>7} | {mfu:>4} |")


def chart(rows, path, title):
    """Time and memory over T, both axes logarithmic."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key, label in ((axes[0], "ms", "forward and backward, ms"), (axes[1], "memory_mb", "memory beyond the inputs, MB")):
        for way in dict.fromkeys(row["way"] for row in rows):
            points = [(row["T"], row[key]) for row in rows if row["way"] == way and row[key]]
            if points:
                axis.loglog(*zip(*points), "o-", label=way, markersize=4)
        axis.set_xticks(sorted({row["T"] for row in rows}), [str(T) for T in sorted({row["T"] for row in rows})])
        axis.minorticks_off()
        axis.set_xlabel("T, tokens of context")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def add_arguments(parser):
    parser.add_argument("--device", default="auto")
    for name, meaning in (("B", "examples; default 2, on a GPU 8"), ("H", "heads"), ("T", "tokens"), ("D", "width of a head")):
        parser.add_argument(f"--{name}", type=int, default={"H": 12, "T": 1024, "D": 64}.get(name), help=meaning)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32, on a GPU bfloat16")
    parser.add_argument("--open", default="0.01", help="shares of open edges, e.g. 1,0.1,0.01,0.004")
    parser.add_argument("--lengths", nargs="?", const="128,256,512,1024,2048,4096,8192", help="lengths T for a table and a chart; alone: 128 to 8192")
    parser.add_argument("--model", choices=SHAPES, help="a whole model's training step")
    parser.add_argument("--split", action="store_true", help="where the seconds of config/addition.py go (CPU)")
    parser.add_argument("--circuit", action="store_true", help="edge scores of a GPT-2 124M")
    parser.add_argument("--gate_bias", type=float, default=3.0, help="of --model: below 0 most gates are shut")
    parser.add_argument("--splash", nargs="?", const="", help="folder of the authors' package; alone: it is installed")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--most_memory", type=float, default=8.0, help="GB: lengths and models for which the plain formula would need more are left out for it")
    parser.add_argument("--out_dir", default="out/bench")


def run(options, settings):
    """`analyze.py bench`."""
    device = hardware.pick_device(options.device)
    if ":" in device:  # 'cuda:1'; torch takes no 'cuda' here
        torch.cuda.set_device(device)
    torch._inductor.config.fallback_random = True  # torch's own generator inside compiled code, as in train.py
    torch._dynamo.config.recompile_limit = 64  # many lengths; at 8 torch would give up compiling, silently
    options.B = options.B or (8 if device.startswith("cuda") else 2)
    options.dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")

    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    title = f"{where}, torch {torch.__version__}" + ("" if options.circuit else f", B={options.B}") + ("" if options.model or options.circuit else f" H={options.H} D={options.D} {options.dtype}")
    print(title)
    if options.circuit:
        return circuits(device)
    if options.split:
        from analysis.split import show_split, split  # here: it needs a dataset
        return show_split(split(options.repeats))
    if options.model:
        rows = whole_model(options, device, options.model)
    else:
        rows = [row for T in map(int, (options.lengths or str(options.T)).split(",")) for share in map(float, options.open.split(",")) for row in attention(options, device, T, share)]
    show(rows)
    for T in dict.fromkeys(row["T"] for row in rows if row["open"] is not None):
        print(floor_of(options.B, options.H, T, options.D, options.dtype, device))
    os.makedirs(options.out_dir, exist_ok=True)
    with open(os.path.join(options.out_dir, "bench.json"), "w") as f:
        json.dump({"machine": title, "rows": rows}, f, indent=1)
    if options.lengths:
        chart(rows, os.path.join(options.out_dir, "bench.png"), title)
