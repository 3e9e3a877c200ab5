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
from helpers import decoded
from prepare_data import load
from storage import corpora, text
from storage.download import hub_file
from storage.files import UserError


def fineweb_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())


def test_fineweb_leaves_out_the_document_that_began_in_the_held_out_shard(hub):
    files = hub / "datasets/kjj0/fineweb10B-gpt2/resolve/main"
    files.mkdir(parents=True)
    fineweb_shard(files / "fineweb_val_000000.bin", [50256, 1, 2, 50256, 3])
    fineweb_shard(files / "fineweb_train_000001.bin", [4, 5, 50256, 6, 7])
    fineweb_shard(files / "fineweb_train_000002.bin", [8, 50256, 9])
    prepare_data.main(["fineweb", "--shards=2"])
    data = load("fineweb")
    assert data.train.tolist() == [50256, 6, 7, 8, 50256, 9] and data.val.tolist() == [50256, 1, 2, 50256, 3]


def test_openwebtext_through_datasets(workplace, monkeypatch):
    """The real package, two processes, a local folder in the hub's place."""
    pytest.importorskip("datasets", reason="pip install -r tests/requirements.txt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "cache")
    documents = [f"This is document {i}. " * (1 + i % 3) for i in range(4000)]
    (workplace / "hub").mkdir()
    (workplace / "hub/train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    monkeypatch.setattr(corpora, "OPENWEBTEXT", str(workplace / "hub"))
    import datasets

    real, revisions = datasets.load_dataset, []

    def load_dataset(path, revision=None, **options):
        """As the hub does since datasets 4: the repository is a script, its conversion is not."""
        revisions.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return real(path, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare_data.main(["openwebtext", "--tokenizer=bytes", "--processes=2"])
    assert revisions == [None, "refs/convert/parquet"]
    data = load("openwebtext-bytes")
    train, val = decoded(data.train, data), decoded(data.val, data)
    assert sorted(d.decode() for d in train + val) == sorted(documents) and 1 <= len(val) <= 30


@pytest.fixture
def olmo_hub(hub):
    """A hub with OLMo's tokenizers."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r tests/requirements.txt")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Document of part naïve. def f(x): return x"] * 10, vocab_size=300,
                            min_frequency=1, special_tokens=["<|endoftext|>"])
    for name in ("OLMo-1B-hf", "OLMo-2-0425-1B"):
        (hub / f"allenai/{name}/resolve/main").mkdir(parents=True)
        bpe.save(str(hub / f"allenai/{name}/resolve/main/tokenizer.json"))
    return hub


def test_dolma_in_olmos_tokens(olmo_hub, server, monkeypatch):
    pytest.importorskip("datasets", reason="pip install -r tests/requirements.txt")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", olmo_hub / "cache")
    (olmo_hub / "datasets/allenai/dolma/resolve/main/urls").mkdir(parents=True)
    urls = [f"{server.url}/part-{number}.json.gz\n" for number in range(2)]
    (olmo_hub / "datasets/allenai/dolma/resolve/main/urls/v1_6-sample.txt").write_text("".join(urls))
    for number in range(2):
        with gzip.open(olmo_hub / f"part-{number}.json.gz", "wt") as f:
            for i in range(1000):
                words = f"Document {i} of part {number}, naïve. " * (1 + i % 3)
                line = {"id": str(i), "text": words, "metadata": {"i": i} if i % 2 else {}}
                f.write(json.dumps(line) + "\n")
    prepare_data.main(["dolma", "--shards=2", "--processes=2"])
    data = load("dolma")
    assert data.meta["tokenizer"] == "olmo" and 256 < data.meta["vocab_size"] <= 300
    assert sum(data.meta["documents"].values()) == 2000 and 1 <= data.meta["documents"]["val"] <= 30
    assert (np.asarray(data.train) == 0).sum() == data.meta["documents"]["train"]
    with open("data/dolma/shards/part-1.json.gz", "r+b") as f:
        f.truncate(500)
    with pytest.raises(SystemExit, match="data/dolma/shards/part-1.json.gz is damaged .*Delete it"):
        prepare_data.main(["dolma", "--shards=2"])


def test_olmos_tokens(olmo_hub):
    tokens = text.tokenizer("olmo2")
    ids = text.encode_document("Document naïve".encode(), tokens)
    assert tokens.decode(ids) == "<|endoftext|>Document naïve"
    assert tokens.separator == 0 and ids.dtype == np.uint16 and 0 not in tokens.encode(b"<|endoftext|>")


def test_a_file_of_the_hub_is_fetched_once_and_is_the_one_that_the_hub_states(hub, server, monkeypatch):
    (hub / "us/it/resolve/main").mkdir(parents=True)
    content = bytes(100_000)
    (hub / "us/it/resolve/main/file").write_bytes(content)
    server.cut_after = 50_000
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    path = hub_file("us/it", "file")
    assert server.requests[-1]["Range"] == "bytes=50000-", "it went on where the line broke"
    server.cut_after = None
    with open(path, "rb") as f:
        assert f.read() == content
    asked = len(server.requests)
    hub_file("us/it", "file")
    assert not any("Range" in request for request in server.requests[asked:])
    with open(path, "r+b") as f:
        f.write(b"x")
    with pytest.raises(UserError, match="file is not the file .*wrong sha256.*it is deleted"):
        hub_file("us/it", "file")
    with pytest.raises(UserError, match="wrong sha256"):  # it is the hub's again, and another one is pinned
        hub_file("us/it", "file", pinned="0" * 64)
    assert not os.path.exists(path)
    with pytest.raises(UserError, match="other of us/it cannot be fetched .*Error.*HF_HOME"):
        hub_file("us/it", "other")


@pytest.mark.parametrize("name, flags, package, words", [
    ("openwebtext", [], "datasets", "pip install datasets"),
    ("dolma", [], "datasets", "pip install datasets"),
    ("fineweb", [], "huggingface_hub", "pip install huggingface_hub"),
    ("stdlib", ["--tokenizer=olmo"], "tokenizers", "pip install -r requirements-olmo.txt"),
])
def test_a_missing_package_says_what_to_install(workplace, monkeypatch, name, flags, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=words):
        prepare_data.main([name, *flags])
