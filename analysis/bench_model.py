"""How fast is a whole model? Its training step, dense, gated and taught; and circuits of attention edges.

    python analyze.py bench --model=text|gpt2          forward, backward, AdamW, compiled
    python analyze.py bench --circuit                  circuits/attention_edges.py on a GPT-2 124M

    MFU = FLOP of a step / seconds / the data sheet's bf16 FLOP/s

Notable: FLOP are counted as for dense attention, whatever is open and whatever a kernel computes twice: MFU
says what the researcher gets for the parallel. Weights and tokens are random.
"""

import statistics

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from analysis.stopwatch import measure, row_of, time_call
from model import GPT, GPTConfig
from training import parallel
from training.handover import divergence

SHAPES = {
    "text": dict(vocab_size=256, n_layer=4, n_head=16, n_embd=128, block_size=128),
    "gpt2": dict(vocab_size=50304),
}


def training_steps(options, device, name):
    """{way: (training step, its FLOP)} of a whole model: forward, backward, AdamW, compiled.

    The ways: dense; gated; gated with a dense teacher, as with train.py's distill_weight.
    """
    shape = SHAPES[name]
    context = shape.get("block_size", 1024)
    x = torch.randint(0, shape["vocab_size"], (options.B, context), device=device)
    autocast, _ = parallel.precision("auto", device)

    def built(gated, impl):
        model = GPT(GPTConfig(**shape, gated=gated)).to(device)
        model.attention_impl = impl
        compiles = parallel.compiles("auto", device, pays_on_cpu=gated)
        return model, torch.compile(model) if compiles else model

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

        passes = 3 if teacher is None else 4  # a forward pass is a third of a step
        return step, model.flops_per_token(context) / 3 * x.numel() * passes

    config = GPTConfig(**shape)
    matrices = config.n_layer * config.n_head * options.B * context**2 * 4  # bytes of T x T in float32
    fast = "tiled" if device == "cpu" else "triton"
    steps = {f"{name}, dense": step_of(False, "auto"), f"{name}, {fast}": step_of(True, fast)}
    if 3 * matrices < options.most_memory * 1e9:
        steps[f"{name}, plain"] = step_of(True, "plain")
    _, teacher = built(False, "auto")
    steps[f"{name}, {fast}, taught"] = step_of(True, fast, teacher)
    return steps


def whole_model(options, device, name):
    """Rows of the table for a training step of a whole model."""
    steps = training_steps(options, device, name)
    counters["graph_break"].clear()
    found = measure({way: step for way, (step, _) in steps.items()}, device, options.repeats)
    print(f"graph breaks: {dict(counters['graph_break']) or 'none'}")
    context = SHAPES[name].get("block_size", 1024)
    rows = []
    for way, (times, memory) in found.items():
        _, flop = steps[way]
        share_of_peak = used(flop, statistics.median(times), device)
        rows.append(row_of(context, None, way, times, memory, mfu=share_of_peak))
    return rows


def used(flop, ms, device):
    """Share of the data sheet's bf16 FLOP/s that a step gets; None where no data sheet is known.

    flop: of the step, counted as for dense attention; ms: how long it took.
    """
    peak = parallel.peak_flops(device)
    return flop / (ms / 1000) / peak if peak else None


def circuits(device):
    """Time and memory of attention edges, scores and circuits of every prompt: 64 prompts of 20 tokens in a
    model of GPT-2's size with random weights.
    """
    from circuits.attention_edges import curves, integrated_scores, prepared
    from circuits.tasks import LOGIT, Pair

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPES["gpt2"])).to(device).eval()
    prompts = torch.randint(0, 50000, (2, 64, 20)).tolist()
    pairs = [Pair(clean, other, [19], [[1]], [[2]]) for clean, other in zip(*prompts)]

    def attention_edges():
        for batch in tqdm(list(prepared(model, pairs, "zero")), leave=False, disable=None):
            curves(model, batch, LOGIT, integrated_scores(model, batch, LOGIT).abs())

    time_call("30,240 attention edges a prompt, 64 prompts: scores and circuits of 40 sizes", attention_edges,
              device)
