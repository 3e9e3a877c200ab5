"""Where a run computes: the device, the precision, and the processes that share the work.

    python train.py ...                              one process
    torchrun --nproc_per_node=8 train.py ...         eight; torchrun tells each its number in the environment

    parallel = 'ddp'     every process holds the whole model, gradients and optimizer, and works on its share
                         of every batch; gradients are averaged (PyTorch's DistributedDataParallel)
    parallel = 'fsdp'    parameters, gradients and optimizer are cut into one part for each process; a block
                         is put together just before it computes, on all at once (PyTorch's fully_shard)

Both compute the same. The few numbers that decisions hang on (loss, lambda's measurement, "please stop") are
summed here, so that all processes decide alike. Without torchrun every function does the obvious thing for
one process.

Notable:
- NCCL connects GPUs, Gloo connects CPUs.
- A checkpoint is whole, however the model was cut: process 0 gathers it, tensor by tensor, in its memory. So
  what eight processes wrote one can read. Of a model with adapters it holds these alone and is small.
- With 'fsdp' parameters travel in the precision in which they are kept, autocast does the rest, and the model
  is judged in it. Autocast's bfloat16 copies of float32 weights are kept for the backward pass, whole;
  `recompute_activations` avoids that, and so does `base_dtype` under LoRA.

Sources: Zhao et al. 2023 (FSDP), the documentation of torch.distributed.fsdp.fully_shard.
"""

import contextlib
import datetime
import functools
import os
import re
import time

import torch
import torch.distributed as dist

from fast.attention import choose_impl
from storage.files import UserError

# dense bf16 FLOP/s of the data sheets, by words in torch.cuda.get_device_name(). The first match counts
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
# channels. On an EPYC with AVX512_BF16 bfloat16 is 5 times faster at 576, and 2.4 times slower at 64; between
# the two nobody has measured
WIDE = 512
# channels times tokens of a forward pass, below which a second thread on a CPU costs more than it brings: on
# a machine with something else to do OpenMP's threads wait for each other, spinning (docs/speed.md)
SMALL = 2**16
ALL_THREADS = torch.get_num_threads()


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
        raise UserError(f"device={name} would put all processes on one GPU. Leave --device away, and choose "
                        "GPUs with CUDA_VISIBLE_DEVICES")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # mps only on request: nobody has tried it
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun every process has a GPU of its own
    no_such_gpu = name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count()
    if no_such_gpu or name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={name}: this machine or this build of torch has none. Leave --device away, "
                        "use --device=cpu, or start fewer processes")
    return name


def precision(name, device, width, cache=True):
    """A function that returns the autocast context for the setting 'auto', 'float32' or 'bfloat16'; and the
    choice in words. width: channels of the model.

    'auto' is bfloat16 where it is faster, else float32: on GPUs since Ampere; on CPUs with AMX (Intel's since
    2023); and of a wide model on CPUs with AVX512_BF16 (AMD's since Zen 4), which a narrow one slows down.
    cache=False: autocast does not keep its bfloat16 copies of the weights until the context ends. There is
    no float16: its gradients underflow without a loss scaler.
    """
    kind = device.split(":")[0]
    if name == "auto":
        faster = (kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
                  or kind == "cpu" and (torch.cpu._is_amx_tile_supported()
                                        or torch.cpu._is_avx512_bf16_supported() and width >= WIDE))
        name = "bfloat16" if faster else "float32"
    autocast = functools.partial(torch.autocast, kind, dtype=torch.bfloat16, enabled=name == "bfloat16",
                                 cache_enabled=cache)
    return autocast, name


def set_threads(device, width, tokens):
    """Give a small model one thread, a larger one what torch found; what OMP_NUM_THREADS or torchrun say,
    wins. width: channels; tokens: of a forward pass.
    """
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # which torchrun sets
        torch.set_num_threads(1 if width * tokens <= SMALL else ALL_THREADS)


def attention(setting, device, context=64, width=1, dtype=torch.float32):
    """Who computes gated attention here, see fast/attention.py. Raises UserError if `setting` cannot."""
    try:
        return choose_impl(setting, device.split(":")[0], context, width, dtype)
    except ValueError as error:
        raise UserError(str(error)) from error


def compiles(setting, device, pays_on_cpu):
    """Shall torch.compile be used?

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
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # of many types, by three packages, pages long
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
    if setting == "on":
        raise UserError(f"compile=on: torch.compile does not work here ({reason}). Mend that, or use "
                        "--compile=off: the same run, but slower")
    say(f"not compiled, so slower: torch.compile does not work here ({reason})")
    return False


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


# ------------------------------------------------------------------------------------------------------------
# A model that no GPU can hold alone


def is_sharded(setting):
    """Is a run with this setting of `parallel` cut into parts? Not if one process is alone."""
    return setting == "fsdp" and world() > 1


def shard(model, device, setting):
    """Cut model (a GPT or OLMo, in place) into parts, block by block, if `setting` asks for it. All processes
    call it. Returns model.
    """
    if not is_sharded(setting):
        return model
    from torch.distributed.device_mesh import init_device_mesh  # here: nobody else waits for their import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.split(":")[0], (world(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is left: embeddings, the last norm
    return model


def whole(tensor):
    """The whole tensor, which all processes must ask for together, if it is cut; else itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put_together(tree):
    """Nested dicts and lists with whole tensors on the CPU in place of parts, for process 0; the others get
    None in their place. All processes call it; one tensor after the other is put together.
    """
    if isinstance(tree, dict):
        return {key: put_together(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [put_together(value) for value in tree]
    if not isinstance(tree, torch.Tensor):
        return tree
    tensor = whole(tree)
    return tensor.cpu() if rank() == 0 else None


# ------------------------------------------------------------------------------------------------------------
# What all processes agree on


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

    tokens_per_step, over all processes; flops_per_token, forward and backward, see `GPT.flops_per_token`;
    start: the step from which it measures.
    """

    def __init__(self, tokens_per_step, flops_per_token, device, start):
        self.tokens_per_step, self.flops_per_token, self.device = tokens_per_step, flops_per_token, device
        self.peak = peak_flops(device)
        self.step, self.memory = start, None
        self.go_on()

    def pause(self):
        self.seconds = time.perf_counter() - self.since
        if self.device.startswith("cuda"):
            self.memory = torch.cuda.max_memory_allocated(self.device) / 1e9

    def go_on(self):
        self.since = time.perf_counter()
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self, step):
        """What was measured up to this step since the last call, while it is paused; null where there is
        nothing to tell.
        """
        steps, self.step = step - self.step, step
        speed = self.tokens_per_step * steps / self.seconds if steps else None
        return {
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / (self.peak * world()) if speed and self.peak else None,
            "gpu_memory_gb": self.memory,
        }
