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
there; it is imported only here. Nobody could run these three on the real thing where this was built: tests
run them on small files on localhost.
"""

import functools
import gzip
import json
import os
import zlib

import numpy as np
from tqdm import tqdm

from storage import text
from storage.download import download, hub_file
from storage.files import UserError


def the_package_datasets(name):
    """`datasets`, imported only where it is needed."""
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
    encoded = source.map(encode_row, fn_kwargs={"tokenizer": tokenizer, "held_out": held_out},
                         remove_columns=source.column_names, num_proc=processes, desc="encoding")
    is_held_out = np.asarray(encoded.with_format("numpy")["held_out"][:])
    sides = {"train": encoded.select(np.flatnonzero(~is_held_out)),
             "val": encoded.select(np.flatnonzero(is_held_out))}

    def parts(split):
        rows = sides[split].select_columns("ids").with_format("numpy")
        firsts = range(0, len(rows), 1000)
        for i in tqdm(firsts, desc=f"writing {split}", unit="thousand documents", disable=None):
            yield np.concatenate(list(rows[i:i + 1000]["ids"]))

    return {"train": parts("train"), "val": parts("val"), "kind": "stream", "vocab_size": tokens.vocab_size,
            "tokenizer": tokens.name, "documents": {split: len(side) for split, side in sides.items()}}


def encode_row(row, tokenizer, held_out):
    """One document, in a worker process."""
    document = row["text"].encode()
    return {"ids": text.encode_document(document, tokenizer_of_this_process(tokenizer)),
            "held_out": text.is_held_out(document, held_out)}


tokenizer_of_this_process = functools.cache(text.tokenizer)
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
        source = datasets.load_dataset(OPENWEBTEXT, revision="refs/convert/parquet", split="train",
                                       num_proc=processes)
    if len(source) != OPENWEBTEXT_DOCUMENTS:
        print(f"note: this copy of OpenWebText has {len(source):,} documents; the whole is "
              f"{OPENWEBTEXT_DOCUMENTS:,}")
    return encode(source, tokenizer, processes, held_out=0.0005)


def dolma(folder, shards, tokenizer, processes):
    """The first `shards` files, one document in 200 held out.

    The list of files is fetched first, then every file from where it says, into folder.
    """
    datasets = the_package_datasets("dolma")
    text.tokenizer(tokenizer)  # an error now rather than after the downloads
    with open(hub_file("allenai/dolma", "urls/v1_6-sample.txt", repo_type="dataset"), encoding="utf-8") as f:
        urls = f.read().split()[:shards]
    paths = [download(url, os.path.join(folder, os.path.basename(url))) for url in urls]
    for path in paths:
        require_whole(path)
    source = datasets.Dataset.from_generator(dolma_documents, gen_kwargs={"paths": paths},
                                             num_proc=min(processes, len(paths)))
    return encode(source, tokenizer, processes, held_out=0.005)


def require_whole(path):
    """Raise UserError unless a .gz file can be read to its end, where its own checksum stands."""
    try:
        with gzip.open(path) as f:
            while f.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and type the same command again") from error


def dolma_documents(paths):
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            for line in f:
                yield {"text": json.loads(line)["text"]}


ENDOFTEXT = 50256


def fineweb_tokens(split, number):
    """The tokens of one of modded-nanogpt's files: 256 int32 (magic number, version, number of tokens,
    zeros), then uint16 tokens.
    """
    path = hub_file("kjj0/fineweb10B-gpt2", f"fineweb_{split}_{number:06d}.bin", repo_type="dataset")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def fineweb(shards):
    """The first `shards` training files; the file of validation is held out."""
    val = fineweb_tokens("val", 0)
    first, *others = [fineweb_tokens("train", number) for number in range(1, shards + 1)]
    # A document starts with <|endoftext|>. The first shard begins in the middle of one, the last of the
    # held-out ones: leave its rest away
    begin = int(np.flatnonzero(first == ENDOFTEXT)[0])
    train = tqdm([first[begin:], *others], desc="writing train", unit="shard", disable=None)
    return {"train": train, "val": val, "kind": "stream", "vocab_size": 50257, "tokenizer": "gpt2"}
