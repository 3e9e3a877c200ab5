"""Shared by all tests: our files on the import path, a folder of its own for every test, one thread for
repeatable numbers.
"""

import hashlib
import http.server
import os
import shutil
import sys
import threading

import numpy as np
import pytest
import torch

from storage.addition import IGNORE
from storage.files import REPOSITORY

if not torch.cuda.is_available():
    # Triton's kernels run on the CPU, tile by tile in numpy; read when fast/kernels.py is imported
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["MPLBACKEND"] = "Agg"  # as analyze.py sets it
torch.set_num_threads(1)  # also where a fixture trains before any test begins

sys.path.insert(0, REPOSITORY)

# departures from the paper that most runs of the project make
OURS = {"linear_penalty_steps": 3000, "constraint_gates": "deterministic"}


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder as the current one: data/ and out/ of a test land there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Server:
    """Serves ./served on localhost, with ranges, and with the headers that Hugging Face's client wants to
    see; cut_after: bytes after which the line breaks once; corrupt: one bit is wrong.
    """

    def __init__(self, root):
        self.root, self.cut_after, self.corrupt, self.requests = root, None, False, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                server.requests.append(dict(self.headers))
                path = os.path.join(server.root, self.path.partition("?")[0].lstrip("/"))
                if not os.path.isfile(path):
                    return self.send_error(404)
                with open(path, "rb") as f:
                    content = bytearray(f.read())
                begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
                if begin >= len(content):
                    return self.send_error(416)
                if server.corrupt:
                    content[len(content) // 2] ^= 1
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", len(content) - begin)
                self.send_header("ETag", f'"{server.sha256(content)}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if body:
                    self.wfile.write(content[begin:None if begin else server.cut_after])

            def log_message(self, *arguments):
                """Quiet."""

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def sha256(self, content):
        return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(workplace):
    server = Server(workplace / "served")
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def hub(workplace, server, monkeypatch):
    """The folder that is served where huggingface_hub looks for Hugging Face, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="see tests/requirements.txt")
    for name, value in {"HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/main/{filename}",
                        "HF_HUB_CACHE": str(workplace / "hub"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    (workplace / "served").mkdir()
    return workplace / "served"


def make_echo():
    """A task with a known circuit: of four tokens the last asks for the first.

    One edge of 10 in one head is enough.
    """
    import prepare_data
    from helpers import SMALL, write_config

    x = np.random.default_rng(0).integers(0, 8, (600, 4))
    x[:, 3] = 8
    rows = np.full((600, 2, 4), IGNORE, dtype=np.uint16)
    rows[:, 0], rows[:, 1, 3] = x, x[:, 0]
    prepare_data.write_dataset("data/echo", rows[:400], rows[400:], kind="rows", vocab_size=9)
    write_config("dense.py", **SMALL)
    shape = ("n_layer", "n_head", "n_embd", "block_size", "device")
    write_config("sparse.py", init_from="dense.py", gated=True, **OURS,
                 **{k: v for k, v in SMALL.items() if k not in shape})


def make_counting():
    """A stream in which every token is the one before plus 1 or 2, by a coin that its position tosses: a loss
    above 0, a few edges needed.
    """
    from helpers import SMALL, count_dataset, write_config

    count_dataset(5000, 1000)
    shape = {k: SMALL[k] for k in ("n_layer", "n_head", "n_embd")} | {"block_size": 8}
    shared = {k: v for k, v in SMALL.items() if k not in shape} | {
        "dataset": "count", "eval_batches": 1, "eval_batch_size": 50}
    write_config("dense.py", **shared, **shape)
    write_config("control.py", init_from="dense.py", **shared)
    write_config("sparse.py", init_from="dense.py", **shared, **OURS, gated=True, open_above=0.02,
                 constraint_paired=True, loss_slack=0.02)


@pytest.fixture
def echo(workplace):
    make_echo()
    return workplace


@pytest.fixture
def counting(workplace):
    make_counting()
    return workplace


def with_a_dense_run(make, folder):
    from helpers import run

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make()
        run("dense.py")
    return folder


@pytest.fixture(scope="session")
def echo_runs(tmp_path_factory):
    return with_a_dense_run(make_echo, tmp_path_factory.mktemp("echo"))


@pytest.fixture(scope="session")
def counting_runs(tmp_path_factory):
    return with_a_dense_run(make_counting, tmp_path_factory.mktemp("counting"))


@pytest.fixture
def echo_parent(workplace, echo_runs):
    """`echo`, and its dense run is finished: trained once for all tests."""
    return shutil.copytree(echo_runs, workplace, dirs_exist_ok=True)


@pytest.fixture
def counting_parent(workplace, counting_runs):
    return shutil.copytree(counting_runs, workplace, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def untrained_runs(tmp_path_factory):
    """Runs with random weights, no more than their best.pt: sums (with a transcoder), its parent sums_dense,
    heads (two a layer) and three (digits), all of addition; text, of bytes; other, whose tokens are no words.
    """
    import prepare_data
    from helpers import keep_run, keep_transcoder, random_gpt

    folder = tmp_path_factory.mktemp("untrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        nothing = np.zeros(99, np.uint16)
        for name in ("text", "other"):
            prepare_data.write_dataset(f"data/{name}", nothing, nothing, kind="stream", vocab_size=13)
        prepare_data.load("addition")
        prepare_data.load("addition3")
        shapes = {"sums_dense": {"gated": False}, "heads": {"n_head": 2}, "three": {"block_size": 13},
                  "text": {"block_size": 64, "vocab_size": 256}}
        data = {"three": ("addition3", "addition3"), "text": ("text", "bytes"), "other": ("other", "other")}
        for name in ("sums", "sums_dense", "heads", "three", "text", "other"):
            model = random_gpt(**{"block_size": 11, "vocab_size": 13, "gated": True, "gate_bias": -0.5}
                               | shapes.get(name, {}))
            dataset, tokenizer = data.get(name, ("addition", "addition"))
            keep_run(name, model, data={"dataset": dataset, "tokenizer": tokenizer},
                     parent="out/sums_dense/best.pt", config={"out_dir": f"out/{name}"})
        keep_transcoder("sums", 2, 8, 12)
    return folder


@pytest.fixture
def models_to_ask(untrained_runs, monkeypatch):
    """The folder of `untrained_runs` as the current one, for tests that change nothing there."""
    monkeypatch.chdir(untrained_runs)
