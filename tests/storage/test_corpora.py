"""Collections that are downloaded: whole files, whole documents, parallel, resumable, and what is said when
something is missing. No network: localhost in its place.
"""

import gzip
import json
import os
import sys

import numpy as np
import pytest

import prepare_data
from helpers import apart, decoded
from prepare_data import load
from storage import corpora


def fineweb_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())


def test_fineweb_leaves_out_the_document_that_began_in_the_held_out_shard(workplace, server, monkeypatch):
    (workplace / "served").mkdir()
    fineweb_shard(workplace / "served/fineweb_val_000000.bin", [50256, 1, 2, 50256, 3])
    fineweb_shard(workplace / "served/fineweb_train_000001.bin", [4, 5, 50256, 6, 7])
    fineweb_shard(workplace / "served/fineweb_train_000002.bin", [8, 50256, 9])
    monkeypatch.setattr(corpora, "FINEWEB", server.url + "/fineweb_{}_{:06d}.bin")
    prepare_data.main(["fineweb", "--shards=2"])
    data = load("fineweb")
    assert data.train.tolist() == [50256, 6, 7, 8, 50256, 9] and data.val.tolist() == [50256, 1, 2, 50256, 3]
    asked = len(server.requests)
    prepare_data.main(["fineweb", "--shards=2"])
    assert len(server.requests) == asked == 3  # nothing is fetched twice
    path = workplace / "data/fineweb/shards/fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(SystemExit, match="train_000002.bin is no shard of fineweb10B-gpt2, or a damaged one"):
        prepare_data.main(["fineweb", "--shards=2"])


def test_openwebtext_through_datasets(workplace, monkeypatch):
    """The real package, two processes, a local folder in the hub's place."""
    pytest.importorskip("datasets", reason="pip install -r tests/requirements.txt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "cache")
    documents = [f"This is document {i}. " * (1 + i % 3) for i in range(20_000)]
    (workplace / "hub").mkdir()
    (workplace / "hub/train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    monkeypatch.setattr(corpora, "OPENWEBTEXT", str(workplace / "hub"))
    import datasets

    real, revisions = datasets.load_dataset, []

    def hub(path, revision=None, **options):
        """As the hub does since datasets 4: the repository is a script, its conversion is not."""
        revisions.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return real(path, **options)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    prepare_data.main(["openwebtext", "--tokenizer=bytes", "--processes=2"])
    assert revisions == [None, "refs/convert/parquet"]
    data = load("openwebtext-bytes")
    train, val = decoded(data.train, data), decoded(data.val, data)
    assert sorted(d.decode() for d in train + val) == sorted(documents) and 1 <= len(val) <= 30


@pytest.fixture
def hub(workplace, server, monkeypatch):
    """A localhost that hosts Dolma's list and two files, and OLMo's tokenizers; and the environment for
    processes that use it.
    """
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r tests/requirements.txt")
    root = workplace / "served"
    for number in range(2):
        (root / "dolma").mkdir(parents=True, exist_ok=True)
        with gzip.open(root / f"dolma/part-{number}.json.gz", "wt") as f:
            for i in range(1000):
                words = f"Document {i} of part {number}, naïve. " * (1 + i % 3)
                line = {"id": str(i), "text": words, "metadata": {"i": i} if i % 2 else {}}
                f.write(json.dumps(line) + "\n")
    (root / "urls.txt").write_text("".join(f"{server.url}/dolma/part-{number}.json.gz\n"
                                           for number in range(2)))
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Document of part naïve. def f(x): return x"] * 10, vocab_size=300,
                            min_frequency=1, special_tokens=["<|endoftext|>"])
    for name in ("OLMo-1B-hf", "OLMo-2-0425-1B"):
        (root / f"allenai/{name}/resolve/main").mkdir(parents=True)
        bpe.save(str(root / f"allenai/{name}/resolve/main/tokenizer.json"))
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(workplace / "cache"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


def dolma(hub, *flags):
    return apart("import sys, prepare_data; from storage import corpora; "
                 f"corpora.DOLMA = {hub['HF_ENDPOINT']!r} + '/urls.txt'; prepare_data.main(sys.argv[1:])",
                 "dolma", *flags, **hub)


def test_dolma_in_olmos_tokens(hub, server):
    done = dolma(hub, "--shards=2", "--processes=2")
    assert done.returncode == 0, done.stderr
    data = load("dolma")
    assert data.meta["tokenizer"] == "olmo"
    assert 256 < data.meta["vocab_size"] <= 300
    assert sum(data.meta["documents"].values()) == 2000
    assert 1 <= data.meta["documents"]["val"] <= 30
    assert (np.asarray(data.train) == 0).sum() == data.meta["documents"]["train"]
    asked = len(server.requests)
    # the tokenizer's date is asked for, no file is fetched again
    assert dolma(hub, "--shards=2", "--processes=2").returncode == 0 and len(server.requests) <= asked + 4
    part = "data/dolma/shards/part-1.json.gz"
    with open(part, "r+b") as f:
        f.truncate(500)
    os.rename("cache", "other")  # what `datasets` has cached
    for processes in (1, 2):
        done = dolma(hub, "--shards=2", f"--processes={processes}")
        said = [line for line in done.stderr.splitlines() if "it/s" not in line and "examples" not in line]
        assert done.returncode == 1 and len(said) < 4, done.stderr
        assert "error: data/dolma/shards/part-1.json.gz is no file of Dolma, or a damaged one" in done.stderr


def test_olmos_tokenizers_come_from_the_hub_once(hub, server):
    code = ("from storage import text; t = text.tokenizer('olmo2'); "
            "ids = text.encode_document('Document naïve'.encode(), t); "
            "print(t.decode(ids), t.separator, ids.dtype, 0 in t.encode(b'<|endoftext|>'))")
    done = apart(code, **hub)
    assert done.stdout.strip() == "<|endoftext|>Document naïve 0 uint16 False", done.stderr
    assert apart(code, **hub | {"HF_HUB_OFFLINE": "1"}).stdout == done.stdout
    empty = apart("import sys, prepare_data; prepare_data.main(sys.argv[1:])", "stdlib", "--tokenizer=olmo",
                  **hub | {"HF_HOME": "nowhere", "HF_HUB_OFFLINE": "1"})
    assert empty.returncode == 1
    assert "the vocabulary of allenai/OLMo-1B-hf cannot be fetched" in empty.stderr
    assert "HF_HOME" in empty.stderr and "Traceback" not in empty.stderr


def test_missing_packages_say_what_to_install(workplace, monkeypatch):
    for name, flags, package, words in (
        ("openwebtext", [], "datasets", "pip install datasets"),
        ("dolma", [], "datasets", "pip install datasets"),
        ("stdlib", ["--tokenizer=olmo"], "tokenizers", "pip install -r requirements-olmo.txt"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(SystemExit, match=words):
                prepare_data.main([name, *flags])


def test_a_large_vocabulary_takes_four_bytes(workplace):
    tokens = np.array([0, 70_000, 100_351, 5], dtype=np.uint32)
    prepare_data.write_dataset("data/big", tokens, tokens[:2], kind="stream", vocab_size=100_352,
                               tokenizer="olmo2")
    data = load("big")
    assert data.train.dtype == np.uint32
    assert data.train.tolist() == tokens.tolist()
    assert os.path.getsize("data/big/train.bin") == 16
    x, y = data.batch("train", [0], 3)
    assert x.tolist() == [[0, 70_000, 100_351]] and y.tolist() == [[70_000, 100_351, 5]]
