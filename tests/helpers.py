"""What several tests need: small runs, small datasets, another package's models."""

import contextlib
import io
import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import torch

import prepare_data
from conftest import REPOSITORY
from models.checkpoint import fingerprint, read_checkpoint
from train import train
from training.configure import parse_command_line
from training.settings import Config, limits, make_config
from training.verdict import MISSED

SMALL = {"dataset": "echo", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 4, "batch_size": 32,
         "max_steps": 60, "warmup_steps": 5, "learning_rate": 3e-3, "eval_interval": 20,
         "eval_batch_size": 500, "device": "cpu"}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None}


def run(path, **given):
    config, names = make_config(path, given)
    train(config, names)
    return config.out_dir


def metrics(folder):
    with open(f"{folder}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


class Done(NamedTuple):
    """What a program left, as subprocess.run tells it."""

    returncode: int
    stdout: str
    stderr: str


def call(main, *arguments):
    """Run a program's main(arguments) as a shell would, but here: torch need not be imported again."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as stop:
            status = stop.code or 0
    if isinstance(status, str):  # sys.exit("error: ...")
        err.write(status + "\n")
        status = 1
    return Done(status, out.getvalue(), err.getvalue())


def launch(processes, *arguments):
    """train.py in so many processes, to its end, whether it meets its target or not; its output.

    One process is this one. torchrun is `python -m torch.distributed.run`.
    """
    if processes == 1:
        train(*make_config(*parse_command_line(arguments, Config, limits())))
        return None
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([sys.executable, *torchrun, os.path.join(REPOSITORY, "train.py"), *arguments],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          timeout=300)
    # torchrun's own status is 1 then
    missed = done.returncode == MISSED or f"exitcode  : {MISSED} " in done.stderr
    assert done.returncode == 0 or missed, done.stderr
    return done.stdout


def count_dataset():
    """Tokens that go up by 1 or 2, at random."""
    tokens = (np.cumsum(np.random.default_rng(0).integers(1, 3, 3000)) % 10).astype(np.uint16)
    prepare_data.write_dataset("data/count", tokens[:2000], tokens[2000:], kind="stream", vocab_size=10,
                               tokenizer="digits")


def theirs(kind, **settings):
    """A random OlmoForCausalLM, Olmo2ForCausalLM, ...

    whose norms are random too, so that none can be forgotten unseen.
    """
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**TINY | settings)
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def decoded(split, data):
    return bytes(np.asarray(split).astype(np.uint8)).split(b"\0")[1:]


def parameters(folder, name="last.pt"):
    return read_checkpoint(f"{folder}/{name}")["model"]


def trained(coder, path):
    """The file of a Transcoder that has been trained, to its end, for the checkpoint at path."""
    return {"model": coder.state_dict(), "model_args": coder.shape, "of": fingerprint(read_checkpoint(path)),
            "step": 1, "settings": {"steps": 1}}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)
