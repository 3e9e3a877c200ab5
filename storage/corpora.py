"""Text collections too large to hold in memory: fetched, encoded in parallel, split by document, handed on in
parts.

    openwebtext   8 million web pages, 9 billion GPT-2 tokens; what GPT-2 was trained on, rebuilt
                  (Gokaslan & Cohen 2019)
    fineweb       ready GPT-2 tokens in 103 files of 100 million, as Keller Jordan's modded-nanogpt hosts them
                  (Penedo et al. 2024)
    dolma         what OLMo 1's training data was drawn from: a sample of version 1.6, 10 billion tokens in
                  103 files   (Soldaini et al. 2024)

Each function returns what `dataset.write_dataset` takes: {'train', 'val'}, iterators of arrays of token
ids, and the description.

Notable: `datasets` does the parallel work and caches what is finished, so a run that was stopped goes on from
there; it is imported only here. Files that come by URL are resumed, too (download.py). Nobody could run these
three on the real thing where this was built: tests run them on small files on localhost.
"""

import gzip
import json
import os

import numpy as np
from tqdm import tqdm

from storage import text
from storage.download import download, hub
from storage.files import UserError


def the_package_datasets(name):
    """`datasets`, imported only where it is needed."""
    hub()
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs a package that is not installed: pip install datasets") from error
    return datasets


def encode(source, tokenizer, processes, held_out):
    """Encode the column 'text' of a `datasets` dataset in parallel and split it.

    held_out: share of the documents.
    """
    tokens = text.tokenizer(tokenizer)  # an error now rather than in a worker after an hour
    encoded = source.map(_encode_row, fn_kwargs={"tokenizer": tokenizer, "held_out": held_out},
                         remove_columns=source.column_names, num_proc=processes, desc="encoding")
    is_held_out = np.asarray(encoded.with_format("numpy")["held_out"][:])
    sides = {
        "train": encoded.select(np.flatnonzero(~is_held_out)),
        "val": encoded.select(np.flatnonzero(is_held_out)),
    }

    def parts(split):
        rows = sides[split].select_columns("ids").with_format("numpy")
        firsts = range(0, len(rows), 1000)
        for i in tqdm(firsts, desc=f"writing {split}", unit="thousand documents", disable=None):
            yield np.concatenate(list(rows[i:i + 1000]["ids"]))

    return {
        "train": parts("train"),
        "val": parts("val"),
        "kind": "stream",
        "vocab_size": tokens.vocab_size,
        "tokenizer": tokens.name,
        "documents": {split: len(side) for split, side in sides.items()},
    }


def _encode_row(row, tokenizer, held_out):
    """One document, in a worker process, which builds its tokenizer once."""
    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = text.tokenizer(tokenizer)
    document = row["text"].encode()
    return {
        "ids": text.encode_document(document, _tokenizers[tokenizer]),
        "held_out": text.is_held_out(document, held_out),
    }


_tokenizers = {}
OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_DOCUMENTS = 8_013_769


def openwebtext(tokenizer, processes):
    """One document in 2,000 held out, as in nanoGPT."""
    datasets = the_package_datasets("openwebtext")
    try:
        source = datasets.load_dataset(OPENWEBTEXT, split="train", num_proc=processes)
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        # The repository is a loading script, which `datasets` has refused to run since version 4; Hugging
        # Face's own conversion holds the same rows
        source = datasets.load_dataset(
            OPENWEBTEXT, revision="refs/convert/parquet", split="train", num_proc=processes
        )
    if len(source) != OPENWEBTEXT_DOCUMENTS:
        print(
            f"note: this copy of OpenWebText has {len(source):,} documents; the whole is "
            f"{OPENWEBTEXT_DOCUMENTS:,}"
        )
    return encode(source, tokenizer, processes, held_out=0.0005)


DOLMA = "https://huggingface.co/datasets/allenai/dolma/raw/main/urls/v1_6-sample.txt"


def dolma(folder, shards, tokenizer, processes):
    """The first `shards` files, one document in 200 held out.

    The list of files is fetched first, then every file from where it says, into folder.
    """
    datasets = the_package_datasets("dolma")
    text.tokenizer(tokenizer)  # an error now rather than after the downloads
    with open(download(DOLMA, os.path.join(folder, "urls.txt")), encoding="utf-8") as f:
        urls = f.read().split()[:shards]
    paths = [download(url, os.path.join(folder, os.path.basename(url))) for url in urls]
    workers = min(processes, len(paths))
    try:
        source = datasets.Dataset.from_generator(
            _dolma_documents, gen_kwargs={"paths": paths}, num_proc=workers if workers > 1 else None
        )
    except datasets.exceptions.DatasetGenerationError as error:
        # of another process it is the whole traceback
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip('" ')]
        ours = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
        raise UserError((ours + lines[-1:])[0]) from error
    return encode(source, tokenizer, processes, held_out=0.005)


def _dolma_documents(paths):
    for path in paths:
        try:
            with gzip.open(path, "rt", encoding="utf-8") as f:
                for line in f:
                    yield {"text": json.loads(line)["text"]}
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is no file of Dolma, or a damaged one ({type(error).__name__}). Delete it and type "
                "the same command again"
            ) from error


FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"
ENDOFTEXT = 50256


def fineweb_tokens(path):
    """The tokens of one of modded-nanogpt's files: 256 int32 (magic number, version, number of tokens,
    zeros), then uint16 tokens.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    if (
        len(header) < 256
        or header[0] != 20240520
        or header[1] != 1
        or os.path.getsize(path) != 1024 + 2 * int(header[2])
    ):
        raise UserError(
            f"{path} is no shard of fineweb10B-gpt2, or a damaged one. Delete it and type the same command "
            "again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def fineweb(folder, shards, tokenizer):
    """The first `shards` training files; the file of validation is held out."""
    if tokenizer != "gpt2":
        raise UserError(
            "fineweb comes in GPT-2's tokens already: python prepare_data.py fineweb --tokenizer=gpt2"
        )
    paths = [download(FINEWEB.format(*shard), os.path.join(folder, "fineweb_{}_{:06d}.bin".format(*shard)))
             for shard in [("val", 0)] + [("train", i) for i in range(1, shards + 1)]]
    first = fineweb_tokens(paths[1])
    # A document starts with <|endoftext|>. The first shard begins in the middle of one, the last of the
    # held-out ones: leave its rest away
    begin = int(np.flatnonzero(first == ENDOFTEXT)[0])

    def train():
        yield first[begin:]
        for path in tqdm(paths[2:], desc="writing train", unit="shard", disable=None):
            yield fineweb_tokens(path)

    return {
        "train": train(),
        "val": np.asarray(fineweb_tokens(paths[0])),
        "kind": "stream",
        "vocab_size": 50257,
        "tokenizer": "gpt2",
    }
