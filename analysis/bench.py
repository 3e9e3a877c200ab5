"""How fast is gated attention, and how much memory does it take? Beside dense attention, in one run.

    python analyze.py bench                            one table; on a CPU B=2 H=12 T=1024 D=64 in float32,
                                                       on a GPU B=8 in bfloat16
    python analyze.py bench --open=1,0.1,0.01,0.004    the same at other shares of open edges
    python analyze.py bench --lengths                  T from 128 to 8192: table and chart
    python analyze.py bench --model=text               a training step of a whole model: dense, gated, taught
                                                       by a dense one. Of 4 layers, 128 bytes; or --model=gpt2
    python analyze.py bench --circuit                  attention edges of 64 prompts of 20 tokens in
                                                       a GPT-2 124M (random weights)

Everything is written to out/bench/ as well: bench.json, and bench.png for --lengths. A time is the median of
--repeats calls, a ratio compares medians of one run (stopwatch.py). Whole models: bench_model.py.

Notable: the open edges of a post-trained model lie together, near the diagonal, and so do the ones here. q
and k are waves of the position: scores depend on the distance, and edges open up to some distance. Gates are
sampled, as in training; far edges are shut beyond luck.
"""

import functools
import math
import os
import statistics
import sys

import torch
import torch._inductor.config
from torch.nn import functional as F

from analysis.bench_model import SHAPES, circuits, whole_model
from analysis.stopwatch import measure, row_of
from fast import attention as fast_attention
from fast.attention import choose_impl
from storage.files import UserError, write_json
from training import parallel

FOLDER = "out/bench"


def make_inputs(B, H, T, D, share, dtype, device):
    """q, k, v, dy (B, H, T, D) and a bias: about `share` of the causal edges are open, by [s > 0]."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(T, dtype=torch.float64, device=device)
    frequencies = torch.randn(D // 2, generator=generator, dtype=torch.float64).to(device)
    v = torch.randn(B, H, T, D, generator=generator)
    dy = torch.randn(B, H, T, D, generator=generator)

    def waves(reach):
        """(T, D) for which a_ij = 20 mean_d cos(frequency_d (i - j) / reach): 20 at i = j, then falling."""
        angles = position[:, None] * frequencies / reach
        return torch.cat([angles.cos(), angles.sin()], 1) * math.sqrt(20 * math.sqrt(D) / (D // 2))

    # the reach for which the right share of edges has a score above 12, by bisection
    low, high, bias = 1e-3, 1e3 * T, -12.0
    for _ in range(40):
        reach = math.sqrt(low * high)
        x = waves(reach)
        is_open = x @ x.T / math.sqrt(D) + bias > 0
        opened = (is_open.tril().sum() / (T * (T + 1) / 2)).item()
        if opened < share:
            low = reach
        else:
            high = reach
    if share >= 1:
        bias = 25.0
    q = k = x.float().expand(B, H, T, D)
    return [x.to(device, dtype).contiguous() for x in (q, k, v, dy)], bias


def ways(device, T, D, dtype):
    """{name: function (q, k, v, bias) -> (y, density)}: what can be timed here. The first is the floor."""

    def dense(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), q.new_zeros(())

    def gated(impl):
        return lambda q, k, v, bias: fast_attention.attention(q, k, v, bias, gates="sample", impl=impl)[:2]

    found = {"dense (SDPA)": dense,
             "plain, eager": gated("plain"),
             "plain, compiled": torch.compile(gated("plain"), dynamic=False)}
    if device == "cpu":
        found["tiled, eager"] = gated("tiled")
        found["tiled, compiled"] = torch.compile(gated("tiled"), dynamic=False)
    elif choose_impl("auto", device, T, D, dtype) == "triton":
        found["triton"] = gated("triton")
    if not parallel.compiles("auto", device, pays_on_cpu=True):
        found = {name: way for name, way in found.items() if "compiled" not in name}
    return found


def attention(options, device, T, share):
    """Rows of the table for one length and one share of open edges."""
    print(f"T={T}, {100 * share:g} % open ...", file=sys.stderr)
    dtype = getattr(torch, options.dtype)
    (q, k, v, dy), bias = make_inputs(options.B, options.H, T, options.D, share, dtype, device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def forward(way):
        with torch.no_grad():
            way(q, k, v, bias)

    def backward_too(way):
        y, density = way(q, k, v, bias)
        outputs, gradients = [y], [dy]
        if density.requires_grad:  # a dense model has none
            outputs.append(density)
            gradients.append(torch.ones_like(density))
        torch.autograd.grad(outputs, (q, k, v), gradients)

    found = ways(device, T, options.D, dtype)
    needed = options.B * options.H * T * T * q.element_size() * 16  # bytes, by the plain formula
    if needed >= options.most_memory * 1e9:
        found = {name: way for name, way in found.items() if "plain" not in name}
    forward_calls = {name: functools.partial(forward, way) for name, way in found.items()}
    both_calls = {name: functools.partial(backward_too, way) for name, way in found.items()}
    forwards = measure(forward_calls, device, options.repeats)
    both = measure(both_calls, device, options.repeats)
    rows = []
    for name, (times, memory) in both.items():
        forward_times, _ = forwards[name]
        rows.append(row_of(T, share, name, times, memory, statistics.median(forward_times)))
    return rows


def show(rows):
    """The table: within a length and a share of open edges, ratios to the first way."""
    print("|     T |   open | way                  | forward, ms | with backward, ms "
          "| quartiles     | x dense | memory, MB | x dense | MFU  |")
    print("|------:|-------:|----------------------|------------:|------------------:"
          "|---------------|--------:|-----------:|--------:|-----:|")
    for row in rows:
        floor = next(other for other in rows if (other["T"], other["open"]) == (row["T"], row["open"]))
        print(line_of(row, floor))


def line_of(row, floor):
    """A line of the table. floor: the row that ratios are taken to."""
    opened = "" if row["open"] is None else f"{100 * row['open']:.1f} %"
    forward = "" if row["forward_ms"] is None else f"{row['forward_ms']:.2f}"
    memory = more = ""
    if row["memory_mb"] is not None:
        memory = f"{row['memory_mb']:.0f}"
        more = f"{row['memory_mb'] / max(1e-9, floor['memory_mb']):.1f}"
    low, high = row["quartiles_ms"]
    slower = row["ms"] / floor["ms"]
    mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
    return (f"| {row['T']:5d} | {opened:>6} | {row['way']:20} | {forward:>11} | {row['ms']:17.2f} "
            f"| {low:.1f} to {high:.1f} | {slower:7.2f} | {memory:>10} | {more:>7} | {mfu:>4} |")


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
        axis.set_xlabel("T, tokens of context")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def add_arguments(parser):
    parser.add_argument("--device", default="auto")
    parser.add_argument("--B", type=int, help="examples; default 2, on a GPU 8")
    parser.add_argument("--H", type=int, default=12, help="heads")
    parser.add_argument("--T", type=int, default=1024, help="tokens")
    parser.add_argument("--D", type=int, default=64, help="width of a head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default float32, on a GPU bfloat16")
    parser.add_argument("--open", default="0.01", help="shares of open edges, e.g. 1,0.1,0.01,0.004")
    parser.add_argument("--lengths", nargs="?", const="128,256,512,1024,2048,4096,8192",
                        help="lengths T for a table and a chart; alone: 128 to 8192")
    parser.add_argument("--model", choices=SHAPES, help="a whole model's training step")
    parser.add_argument("--circuit", action="store_true", help="attention edges of a GPT-2 124M")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--most_memory", type=float, default=8.0,
                        help="GB: lengths and models for which the plain formula would need more "
                             "are left out for it")


def numbers(flag, words, kind):
    """`1,0.1` -> [1.0, 0.1]. Raises UserError unless all are above 0."""
    try:
        found = [kind(word) for word in words.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < math.inf for number in found):
        raise UserError(f"--{flag}={words}: write numbers above 0, with commas between them")
    return found


def title_of(options, device):
    """The machine, and what is the same in all rows."""
    title = f"CPU, {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        title = torch.cuda.get_device_name(device)
    title += f", torch {torch.__version__}"
    if options.circuit:
        return title
    title += f", B={options.B}"
    if not options.model:
        title += f" H={options.H} D={options.D} {options.dtype}"
    return title


def run(options, settings):
    """`analyze.py bench`."""
    device = parallel.pick_device(options.device)
    if ":" in device:  # 'cuda:1'; torch takes no 'cuda' here
        torch.cuda.set_device(device)
    torch._inductor.config.fallback_random = True  # torch's own generator in compiled code, as in train.py
    torch._dynamo.config.recompile_limit = 64  # many lengths; at 8 torch would give up compiling, silently
    on_gpu = device.startswith("cuda")
    options.B = options.B or (8 if on_gpu else 2)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")

    title = title_of(options, device)
    print(title)
    if options.circuit:
        return circuits(device)
    rows = []
    if options.model:
        rows = whole_model(options, device, options.model)
    else:
        lengths = numbers("lengths", options.lengths or str(options.T), int)
        for T in lengths:
            for share in numbers("open", options.open, float):
                rows += attention(options, device, T, share)
    show(rows)
    os.makedirs(FOLDER, exist_ok=True)
    write_json(os.path.join(FOLDER, "bench.json"), {"machine": title, "rows": rows})
    if options.lengths:
        chart(rows, os.path.join(FOLDER, "bench.png"), title)
