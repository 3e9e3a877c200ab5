"""Where a run computes: the device, the precision, and the processes that share the work.

    python train.py ...                              one process
    torchrun --nproc_per_node=8 train.py ...         eight; torchrun tells each its number in the environment

Data parallel: every process holds the whole model and works on its share of every batch. Gradients are
averaged by PyTorch's DistributedDataParallel; the few numbers that decisions hang on (loss, lambda's
measurement, "please stop") are averaged or summed here, so that all processes decide alike. Without torchrun
every function does the obvious thing for one process.

Notable: NCCL connects GPUs, Gloo connects CPUs.
"""

import contextlib
import datetime
import functools
import os
import platform
import re
import time
import zlib

import torch
import torch.distributed as dist

from fast.attention import choose_impl
from storage.files import UserError

# Dense bf16 matrix FLOP/s that the data sheets promise, by words in torch.cuda.get_device_name(). The first
# match counts
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


def program():
    """How this run was started, for a command to go on with: `python`, or torchrun with its processes."""
    if world() == 1:
        return "python"
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    nodes = f"--nnodes={world() // on_this_node} " if on_this_node < world() else ""
    return f"torchrun {nodes}--nproc_per_node={on_this_node}"


def lost_another(error):
    """Is this RuntimeError what is left of a process whose neighbour has stopped?"""
    words = ("closed by peer", "Connection reset", "closed by remote")
    return world() > 1 and any(said in str(error) for said in words)


# ------------------------------------------------------------------------------------------------------------
# One process


def pick_device(name):
    """The torch device for the setting 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N', as a string.

    Raises UserError if there is none such.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"device={name}: it is 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'")
    if ":" in name and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"device={name} would put all processes on one GPU. Leave --device away, and choose GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # mps only on request: nobody has tried it
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun every process has a GPU of its own
    no_such_gpu = name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count()
    no_mps = name == "mps" and not torch.backends.mps.is_available()
    if no_such_gpu or no_mps:
        raise UserError(
            f"device={name}: this machine or this build of torch has none. Leave --device away, use "
            "--device=cpu, or start fewer processes"
        )
    return name


def precision(name, device, cache=True):
    """A function that returns the autocast context for the setting 'auto', 'float32' or 'bfloat16'; and the
    choice in words.

    'auto' is bfloat16 where the hardware multiplies it natively: GPUs since Ampere, CPUs with AMX (Intel's
    since 2023); else float32. cache=False: autocast does not keep its bfloat16 copies of the weights until
    the context ends. There is no float16: its gradients underflow without a loss scaler, and bfloat16 needs
    none.
    """
    kind = device.split(":")[0]
    if name == "auto":
        native = False
        if kind == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        elif kind == "cpu":
            native = torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if native else "float32"
    autocast = functools.partial(torch.autocast, kind, dtype=torch.bfloat16, enabled=name == "bfloat16",
                                 cache_enabled=cache)
    return autocast, name


def attention(setting, device, context=64, width=1, dtype=torch.float32):
    """Who computes gated attention here, see fast/attention.py. Raises UserError if `setting` cannot."""
    try:
        return choose_impl(setting, device.split(":")[0], context, width, dtype)
    except ValueError as error:
        raise UserError(str(error)) from error


def compiles(setting, device, pays_on_cpu):
    """Shall torch.compile be used? Every process has to ask: all get the same answer.

    setting 'on', 'off', or 'auto': on a GPU, and on a CPU if it pays there; where it works. Raises UserError
    if it is on and does not work.
    """
    asked = setting == "on" or device.startswith("cuda") or device == "cpu" and pays_on_cpu
    return setting != "off" and asked and can_compile(setting, device)


@functools.cache  # tried out once
def can_compile(setting, device):
    """Does torch.compile work here? It needs a compiler, Python's headers, and a folder that suits both.

    Says so in a line if not; raises UserError if setting is 'on'.
    """
    # every machine's own: a cache on a disk that several share is no proof that this one can compile
    number, reason = zlib.crc32(platform.node().encode()), ""
    try:
        torch.compile(lambda x: x + number)(torch.zeros(8, device=device))
    except Exception as error:  # of many types, by three packages
        reason = cause_in_a_line(error)
    reasons = [reason]
    if dist.is_initialized():
        reasons *= world()
        dist.all_gather_object(reasons, reason)
    reason = next(filter(None, reasons), "")
    if reason and setting == "on":
        raise UserError(f"compile=on: torch.compile does not work here ({reason}). Mend that, or use "
                        "--compile=off: the same run, but slower")
    if reason:
        say(f"not compiled, so slower: torch.compile does not work here ({reason})")
    return not reason


def cause_in_a_line(error):
    """What a compiler complains about, of the pages that torch.compile raises."""
    said = str(getattr(error, "inner_exception", error)).strip() or type(error).__name__
    lines = (said.partition("Output:\n")[2].strip() or said).splitlines()
    return next((line for line in lines if "error" in line or "cannot find" in line), lines[0])


def uncompiled(model):
    """`with uncompiled(model):` its calls run as they are written, also if it was compiled (in place)."""
    if model._compiled_call_impl is None:
        return contextlib.nullcontext()  # and the compiler need not be imported
    return torch.compiler.set_stance("force_eager")


def peak_flops(device):
    """bf16 FLOP/s that the device could do at best, or None where nobody has written it down (PEAK_FLOPS)."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    for part, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{part}\b(?! (Ti|D|Laptop))", name):
            return flops
    return None


# ------------------------------------------------------------------------------------------------------------
# Many processes


def start_processes(device):
    """Join the other processes that torchrun has started, if any."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # the timeout is how long the others wait while the first one downloads weights
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(hours=2)
        )


def stop_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, from 0 to world() - 1. Only 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_alone():
    """`with first_alone():` process 0 goes first, the others follow: it downloads or makes what they find
    ready.
    """
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def is_sharded(setting):
    """Is a run with this setting of `parallel` cut into parts (sharding.py)? Not if one process is alone."""
    return setting == "fsdp" and world() > 1


def whole(tensor):
    """The whole tensor, which all processes must ask for together, if it is cut; else itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def all_reduce_sum(values, device="cpu"):
    """Sums over all processes of a list of numbers; every process gets them. A list of floats."""
    place = "cpu" if torch.device(device).type == "mps" else device  # mps has no float64
    summed = torch.tensor(values, dtype=torch.float64, device=place)
    if dist.is_initialized():
        dist.all_reduce(summed)
    return summed.tolist()


def broadcast(value):
    """Process 0's value, for all: where rounding may differ and all must go on alike."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def say(*words):
    """print, once and not once per process."""
    if rank() == 0:
        print(*words, flush=True)


class Speed:
    """A stopwatch for training steps that leaves evaluations out: tokens per second, model FLOPs utilisation
    (recomputed activations do not count), peak GPU memory.

    tokens_per_step, over all processes; flops_per_token, forward and backward, see `GPT.flops_per_token`.
    """

    def __init__(self, tokens_per_step, flops_per_token, device):
        self.tokens_per_step, self.flops_per_token, self.device = tokens_per_step, flops_per_token, device
        self.peak = peak_flops(device)
        self.steps, self.seconds, self.memory = 0, 0.0, None
        self.go_on()

    def step(self):
        self.steps += 1

    def pause(self):
        self.seconds += time.perf_counter() - self.since
        if self.device.startswith("cuda"):
            self.memory = torch.cuda.max_memory_allocated(self.device) / 1e9

    def go_on(self):
        self.since = time.perf_counter()
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self):
        """What was measured since the last call, as a dict; null where there is nothing to tell.

        Call it while paused.
        """
        speed = self.tokens_per_step * self.steps / self.seconds if self.steps else None
        found = {
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / (self.peak * world()) if speed and self.peak else None,
            "gpu_memory_gb": self.memory,
        }
        self.steps, self.seconds = 0, 0.0
        return found
