"""A model that no GPU can hold alone: every process keeps a share of each tensor (FSDP2), and a run's
checkpoint is written in shares, too.

    parallel = 'ddp'     every process holds the whole model, gradients and optimizer; gradients are averaged:
                         parallel.py
    parallel = 'fsdp'    parameters, gradients and optimizer are cut into one part for each process;
                         a block is put together just before it computes, on all at once: this file

Both compute the same (tests/training/test_sharding.py). PyTorch's `fully_shard` does the work; parameters are
then DTensors, tensors that know that they are parts.

Notable:
- last.pt of a sharded run is small: step, lambda, and the name of a folder shards-<step> that
  torch.distributed.checkpoint writes, every process its part. A new folder is written first and last.pt names
  it afterwards, so last.pt always names one that is whole.
- Such a folder knows names, not processes: what two wrote, one can read (`load`), sharded or not. Its index
  is a pickle, and so are the optimizer's numbers: `Index` and `Plain` read nothing that could run code.
- best.pt, and last.pt when the run ends, hold the model gathered and whole, for analyze.py and everybody else
  to read.
- Gradients are summed over the processes after every micro-batch: more is sent than with DDP, but no process
  ever holds a whole model's gradients.
- No mixed-precision policy: parameters travel in the precision in which they are kept, autocast does the
  rest, and the model is judged in it. Autocast's bfloat16 copies of float32 weights are kept for the backward
  pass, whole; `recompute_activations` avoids that, and so does `base_dtype` under LoRA.

Sources: Zhao et al. 2023 (FSDP), the documentation of torch.distributed.fsdp.fully_shard.
"""

import io
import os
import pathlib
import pickle

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from training import parallel


def shard(model, device):
    """Cut model (a GPT or OLMo, in place) into parts, block by block. All processes call it."""
    mesh = init_device_mesh(device.split(":")[0], (parallel.world(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is left: embeddings, the last norm


def whole_state(state):
    """A state dict of whole tensors on the CPU: process 0 gets it, the others an empty one.

    One tensor at a time is put together.
    """
    gathered = {}
    for name, tensor in state.items():
        tensor = parallel.whole(tensor)
        if parallel.rank() == 0:
            gathered[name] = tensor.cpu()
    return gathered


# of a model with LoRA adapters the optimizer knows these alone
TRAINED = StateDictOptions(ignore_frozen_params=True)


def save(folder, weights, model, optimizer):
    """Write weights, {name: tensor} of what a checkpoint of model holds, and optimizer, into folder, every
    process its part; whole once all have returned. Raises OSError.
    """
    state = {"model": weights}
    # else it has not made a step, and asking would make PyTorch pretend one, which Adam counts
    if optimizer.state:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=TRAINED)
    try:
        dcp.save(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        raise OSError(
            f"cannot write {folder}: {next(iter(error.failures.values()))[0]}. last.pt still names an "
            "earlier one. Free some space, and the same command goes on"
        ) from error


class Index(pickle.Unpickler):
    """Reads .metadata: the few classes that torch writes there, and no other name."""

    def find_class(self, module, name):
        known = (torch, torch.serialization, pathlib, metadata, filesystem)
        found = getattr({m.__name__: m for m in known}.get(module), name, None)
        if isinstance(found, torch.dtype) or found in INDEXED:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no business there")


INDEXED = (torch.Size, torch.serialization._get_layout, pathlib.PosixPath, pathlib.WindowsPath,
           filesystem._StorageInfo, metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta,
           metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata,
           metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING)


class Reader(dcp.FileSystemReader):
    """PyTorch's, with an index that is data and not a program."""

    def read_metadata(self, *args, **kwargs):
        with self.fs.create_stream(self.path / ".metadata", "rb") as f:
            found = Index(f).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}")
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Plain(dcp.DefaultLoadPlanner):
    """PyTorch's, for what is no tensor: numbers and lists of them, and nothing else."""

    def load_bytes(self, read_item, value):
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def load(folder, weights, model, optimizer):
    """Read them back, by as many processes as there are now; weights, which are the model's own tensors, are
    filled in place. Raises OSError if the folder is not there or not whole.
    """
    if not os.path.exists(os.path.join(folder, ".metadata")):
        raise OSError(f"{folder} is missing or not whole: last.pt beside it cannot go on without it")
    state = {"model": weights}
    try:
        stored = Reader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # pickle's, of many types
        raise OSError(f"{folder}/.metadata is damaged, or no checkpoint of ours ({type(error).__name__}: "
                      f"{error})") from error
    has_moments = any(name.startswith("optimizer.") for name in stored)
    if has_moments:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=TRAINED)
    try:
        dcp.load(state, storage_reader=Reader(folder), planner=Plain())
    except dcp.CheckpointException as error:
        raise OSError(f"{folder} is damaged: {next(iter(error.failures.values()))[0]}") from error
    if has_moments:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
