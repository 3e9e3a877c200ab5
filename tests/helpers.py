"""What several tests need: small runs, small datasets, another package's models."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import pytest
import torch

import analyze
import prepare_data
import train as train_file
from analysis import seeds
from features.transcoder import Transcoder
from model import GPT, GPTConfig
from models.checkpoint import checkpoint_of, fingerprint, read_checkpoint, save_checkpoint
from storage.addition import IGNORE
from storage.files import REPOSITORY
from train import train
from training.config import make_config, parse_command_line
from training.folder import StopRequest
from training.judge import MISSED

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


def assert_same_losses(one, two, within=1e-5, but=()):
    """Two runs' folders: the same evaluations, with the same losses, densities and lambda; but for some."""
    one, two = metrics(one), metrics(two)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two):
        for key in ("val_loss", "batch_loss", "density", "lambda", "constraint_loss", "constraint_target",
                    "violation", "fraction", "target_loss"):
            if key in but:
                continue
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=within), (a["step"], key)


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


MAIN = {"train.py": train_file.main, "analyze.py": analyze.main}


class OneAfterAnother:
    """A ThreadPoolExecutor without threads."""

    def __init__(self, workers):
        self.workers = workers

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, function, *inputs):
        future = Future()
        future.set_result(function(*inputs))
        return future


def in_this_process(monkeypatch):
    """What `analyze.py seeds` and `train.py` start as programs of their own runs here: nothing is imported
    anew.
    """
    monkeypatch.setattr(seeds, "ThreadPoolExecutor", OneAfterAnother)

    def start(command, stdout=None, stderr=None, **options):
        done = call(MAIN[os.path.basename(command[1])], *command[2:])
        (stdout or sys.stdout).write(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(seeds.subprocess, "run", start)


# A server that has imported torch already, and forks what is asked for
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "train", "analysis.report"])
TRAIN = "import sys, train; train.report = lambda folder: 0; train.main(sys.argv[1:])"
TRAIN_AND_REPORT = ("import sys, analyze, train; train.report = lambda folder: "
                    "analyze.main(['report', folder]); train.main(sys.argv[1:])")


def begin(code, *arguments, log="apart", **environment):
    """A process of its own that runs code with these arguments: one that has torch and nothing of the hub's
    packages. What it says goes to <log>.out and <log>.err.
    """
    process = FORKS.Process(target=within, args=(code, arguments, log, environment))
    process.start()
    return process


def within(code, arguments, log, environment):
    os.environ.update(environment)
    sys.argv[1:] = arguments
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    exec(code, {})


def ended(process, log="apart"):
    """What a process that `begin` started left."""
    process.join(300)
    process.kill()  # if it hangs
    process.join()
    said = [open(f"{log}.{name}", encoding="utf-8").read() for name in ("out", "err")]
    return Done(process.exitcode, *said)


def apart(code, *arguments, **environment):
    return ended(begin(code, *arguments, **environment))


def launch(processes, *arguments, code=TRAIN):
    """train.py in so many processes, to its end, whether it meets its target or not; its output.

    One process is this one. More are told their numbers as torchrun does, which would import torch anew.
    """
    if processes == 1:
        train(*make_config(*parse_command_line(arguments)))
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = [begin(code, *arguments, log=f"rank-{rank}", RANK=str(rank), LOCAL_RANK=str(rank),
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes),
                  LOCAL_WORLD_SIZE=str(processes)) for rank in range(processes)]
    done = [ended(process, f"rank-{rank}") for rank, process in enumerate(team)]
    assert done[0].returncode in (0, MISSED) and not any(one.returncode for one in done[1:]), done
    return "".join(one.stdout + one.stderr for one in done)


def torchrun(*arguments):
    """train.py in two processes as users start it: a Popen, and all of it in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               os.path.join(REPOSITORY, "train.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def wait_for(path, process, seconds=60):
    """Until there is such a file or folder."""
    for _ in range(seconds * 50):
        if os.path.exists(path):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"waited for {path} in vain")


def write_config(path, **settings):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{name} = {value!r}\n" for name, value in settings.items())


def count_dataset(train=2000, val=1000):
    """Tokens that go up by 1 or 2, at random."""
    tokens = (np.cumsum(np.random.default_rng(0).integers(1, 3, train + val)) % 10).astype(np.uint16)
    prepare_data.write_dataset("data/count", tokens[:train], tokens[train:], kind="stream", vocab_size=10,
                               tokenizer="digits")


def unequal_rows():
    """Questions whose answers have 1 or 8 tokens: a dataset, and a dense parent at out/dense that knows
    nothing. Returns the settings of a child that makes one step, without noise.
    """
    rows = np.random.default_rng(0).integers(0, 9, (80, 2, 8)).astype(np.uint16)
    rows[::2, 1, :7] = IGNORE
    prepare_data.write_dataset("data/unequal", rows[:64], rows[64:], kind="rows", vocab_size=9)
    settings = ["--dataset=unequal", "--batch_size=16", "--max_steps=1", "--eval_interval=1", "--device=cpu"]
    launch(1, *settings, "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8",
           "--out_dir=out/dense")
    return [*settings, "--init_from=out/dense", "--gated=True", "--gate_bias=0", "--noise_free_steps=1",
            "--distill_weight=0.5"]


def randomized(model, std=0.5):
    """The model with weights so large that some of its edges open and others do not, in evaluation mode."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def random_gpt(seed=1, std=0.5, **shape):
    """A GPT of 2 layers and random weights; of the gated ones about half of the edges open."""
    torch.manual_seed(seed)
    return randomized(GPT(GPTConfig(**{"n_layer": 2, "n_head": 1, "n_embd": 8} | shape)), std)


def keep_run(name, model, **more):
    """A run's folder out/<name> with nothing but its best.pt; returns that file's path."""
    os.makedirs(f"out/{name}", exist_ok=True)
    save_checkpoint(f"out/{name}/best.pt", checkpoint_of(model, **more))
    return f"out/{name}/best.pt"


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


def keep_transcoder(run, L, C, F, name="transcoder", decoder=1.0):
    """A random Transcoder for the run out/<run>, kept there; returns it. decoder: how large its decoders are,
    so that features matter, and pruning leaves some.
    """
    coder = Transcoder(L, C, F)
    torch.nn.init.normal_(coder.b_enc, std=0.5)
    torch.nn.init.normal_(coder.decoder, std=decoder)
    save_checkpoint(f"out/{run}/{name}.pt", trained(coder, f"out/{run}/best.pt"))
    return coder.eval()


@contextlib.contextmanager
def stopped_after(steps):
    """Ctrl-C in that step of a run, counted from 1."""
    asked = itertools.chain([False] * (steps - 1), itertools.repeat(True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "asked", property(lambda self: next(asked), lambda self, value: None),
                      raising=False)
        yield


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)
