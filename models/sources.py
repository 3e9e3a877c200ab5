"""Which checkpoint a name means: a run's folder, a file, or a model that others published.

    out/addition               a run's folder       the checkpoint it is known by, best.pt
    out/addition/last.pt       a file               itself
    gpt2, allenai/OLMo-1B-hf   a model's name       on Hugging Face (huggingface.py, olmo_files.py)

And the other way: where answers about it go, which config file would make it, and where a model lies that a
run names. Nothing is read here; that does checkpoint.py.
"""

import os

from models import huggingface, olmo_files
from storage.files import CONFIGS, UserError


def is_elsewhere(source):
    """Is `source` a model's name on Hugging Face, or a folder or file that transformers wrote?"""
    return olmo_files.is_olmo(source) or huggingface.is_huggingface(source)


def kept_checkpoint(folder):
    """The checkpoint file that a run is known by: best.pt; where no evaluation met the target closest.pt, or
    else last.pt; None if there is none.
    """
    paths = [os.path.join(folder, name) for name in ("best.pt", "closest.pt", "last.pt")]
    return next((path for path in paths if os.path.exists(path)), None)


def checkpoint_named(run):
    """The checkpoint that `run` means: the one a run's folder is known by; any other path is returned as it
    is. Raises UserError.
    """
    path = kept_checkpoint(run)
    if os.path.isdir(run) and not path and not is_elsewhere(run):
        raise UserError(f"there is no best.pt or last.pt in {run}. Give a run's folder, such as out/stdlib")
    return path or run


def folder_of_answers(run):
    """Where what is found out about `run` goes: a run's folder; of one checkpoint, out/x/last.pt, the folder
    out/x/last, which is made. None of a name such as gpt2.
    """
    if os.path.isdir(run):
        return run
    if not os.path.exists(run):
        return None
    folder = os.path.splitext(run)[0]
    os.makedirs(folder, exist_ok=True)
    return folder


def to_keep(path, out_dir):
    """How a run writes down where a model lies: as it was named, which `from_here` understands, or absolute
    where the run's own folder does not say where one stood.
    """
    leads_out = os.path.isabs(out_dir) or out_dir.startswith(os.pardir)
    is_place = path and path not in huggingface.PRETRAINED and os.path.exists(path)
    return os.path.abspath(path) if leads_out and is_place else path


def from_here(path, folder, out_dir):
    """Where a model lies that a run wrote down as `path` when it was called out_dir. folder: the run's, seen
    from here. A name such as gpt2, and what is not there, stays as it is.
    """
    if path in huggingface.PRETRAINED or os.path.isabs(path) or os.path.isabs(out_dir):
        return path
    found = os.path.abspath(os.path.join(folder, os.path.relpath(path, out_dir)))
    return found.removeprefix(os.path.join(os.getcwd(), "")) if os.path.exists(found) else path


def config_for(path):
    """The config file whose run would leave a checkpoint at path, if there is one; else the main job's."""
    parts = os.path.normpath(path).split(os.sep)
    names = [part.partition("-seed")[0] for part in parts]
    known = [f"config/{name}.py" for name in names if os.path.exists(os.path.join(CONFIGS, name + ".py"))]
    return (known or ["config/addition.py"])[0]
