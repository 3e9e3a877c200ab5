"""How long calls take and how much memory they need, measured side by side in one run.

A time is the median of many calls, with the quartiles behind it. Calls that are compared take turns, so that
a noisy machine is noisy for all. Memory is what a call needs beyond what was there before, at its peak: CUDA
counts its own; on a CPU Linux tells how large the process has been (VmHWM), and other systems do not.

Notable: a GPU is given ten calls ahead, as in training. Else one would time Python.
"""

import ctypes
import statistics
import sys
import time

import torch
from tqdm import tqdm


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
    # what an earlier call has freed is given back, so that it counts again
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")  # resets VmHWM, the high-water mark
    before = from_status("VmRSS")
    call()
    return max(0, from_status("VmHWM") - before)


def from_status(key):
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":"))


def measure(calls, device, repeats):
    """{name: call} -> {name: (times in ms, sorted; peak bytes)}. Calls take turns.

    A call that runs out of memory is left out.
    """
    results, memory = {}, {}
    for name, call in tqdm(calls.items(), desc="compile and warm up", leave=False, disable=None):
        try:
            call()  # compiles
            call()
            memory[name] = peak_memory(call, device)
            results[name] = []
        except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU the allocator names itself
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            print(f"{name}: out of memory")
    # a GPU is given work ahead, as in training: else one would time Python
    in_a_row = 1 if device == "cpu" else 10
    for _ in tqdm(range(repeats), desc="time", leave=False, disable=None):
        for name in results:
            wait(device)
            began = time.perf_counter()
            for _ in range(in_a_row):
                calls[name]()
            wait(device)
            results[name].append(1000 * (time.perf_counter() - began) / in_a_row)
    return {name: (sorted(times), memory[name]) for name, times in results.items()}


def row_of(T, share, way, times, memory, forward_ms=None, mfu=None):
    """One line of the table and of bench.json.

    share    of open edges; None for a whole model
    times    in ms, sorted
    memory   in bytes, or None
    mfu      see `used`
    """
    return {"T": T, "open": share, "way": way, "forward_ms": forward_ms, "ms": statistics.median(times),
            "quartiles_ms": [times[len(times) // 4], times[3 * len(times) // 4]],
            "memory_mb": None if memory is None else memory / 1e6, "mfu": mfu}


def time_call(name, call, device):
    """Print how long one call takes, and how much memory."""
    began = time.perf_counter()
    memory = peak_memory(call, device)
    seconds = time.perf_counter() - began
    beyond = "" if memory is None else f", {memory / 1e9:.2f} GB beyond the model"
    print(f"{name}: {seconds:.1f} s{beyond}")
