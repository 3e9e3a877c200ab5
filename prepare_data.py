"""Every dataset: how it is made, how it lies on disk, how it is read.

    python prepare_data.py addition        two-digit addition, all 10,000 sums, made offline in a second

A dataset is a folder data/<name>/ with two files of 16-bit token ids and a description:

    train.bin, val.bin     uint16, nothing but tokens
    meta.json              kind, vocabulary, sizes, sha256 of both files

There are two kinds, and everything that reads data knows only these:
- rows:   the file is (N, 2, T): per row T tokens that go into the model, then T targets, 65535 where nothing is asked.
          For tasks with a question and an answer.
- stream: the file is one long run of tokens; a training example is any window of it, its targets the same window one later.
          For text (none ships yet).

Notable: a split is made once, by a fixed seed, and never overlaps; files are written under a temporary name and renamed,
meta.json last, so that a folder with a meta.json is whole. This file imports no other file of ours.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass

import numpy as np

IGNORE = 65535  # a target that is not asked for, as stored; -1 once it is read


class DataError(Exception):
    """A dataset that is missing or damaged. The message says which and what to type."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Dataset:
    """A dataset opened for reading: `train` and `val` are uint16 memory maps, (N, 2, T) rows or a flat stream."""

    name: str
    meta: dict
    train: np.ndarray
    val: np.ndarray

    def batch(self, split, indices, block_size):
        """Inputs and targets, both (B, T) int64, -1 where nothing is asked.

        indices (B,): rows of the split, or the first positions of windows of block_size tokens in a stream.
        Raises DataError if a token is not in the vocabulary.
        """
        data = self.train if split == "train" else self.val
        if self.meta["kind"] == "rows":
            x, y = np.moveaxis(data[indices].astype(np.int64), 1, 0)
            y[y == IGNORE] = -1
        else:
            windows = np.stack([data[i:i + block_size + 1] for i in indices]).astype(np.int64)
            x, y = windows[:, :-1], windows[:, 1:]
        highest = max(x.max(), y.max())
        if highest >= self.meta["vocab_size"]:
            raise DataError(f"data/{self.name}/{split}.bin holds token {highest}, but its vocabulary has only "
                            f"{self.meta['vocab_size']}: it is damaged. Make it again: {how_to_make(self.name)}")
        return x, y

    def starts(self, split, block_size):
        """How many examples there are: every index in range(starts) is one that `batch` can read."""
        data = self.train if split == "train" else self.val
        if self.meta["kind"] == "rows":
            return len(data)
        if len(data) <= block_size:
            raise DataError(f"data/{self.name}/{split}.bin has {len(data)} tokens, too few for block_size={block_size}. Make block_size smaller")
        return len(data) - block_size


def how_to_make(name):
    return f"python prepare_data.py {name}"


def load(name, root="data"):
    """Open dataset `name`; one that can be made offline is made on first use.

    Raises DataError if it is unknown, incomplete, of the wrong size or, for files up to 64 MB, of the wrong sha256.
    """
    folder = os.path.join(root, name)
    if not os.path.exists(os.path.join(folder, "meta.json")):
        if name not in OFFLINE:
            raise DataError(f"there is no dataset {folder}. Datasets that can be made here: {', '.join(OFFLINE)}, "
                            f"for instance: {how_to_make(OFFLINE[0])}")
        print(f"making {folder} ...")
        DATASETS[name](folder)
    try:
        with open(os.path.join(folder, "meta.json")) as f:
            meta = json.load(f)
    except ValueError as error:
        raise DataError(f"{folder}/meta.json is damaged. Delete {folder} and make it again: {how_to_make(name)}") from error
    splits = {}
    for split in ("train", "val"):
        path = os.path.join(folder, f"{split}.bin")
        size = os.path.getsize(path) if os.path.exists(path) else 0
        right_size = 2 * int(np.prod(meta["shape"][split]))
        if size != right_size:
            raise DataError(f"{path} has {size} bytes instead of {right_size}: it is truncated. "
                            f"Delete {folder} and make it again: {how_to_make(name)}")
        if size <= 1 << 26 and sha256(path) != meta["sha256"][split]:
            raise DataError(f"{path} has changed since it was made (wrong sha256). Delete {folder} and make it again: {how_to_make(name)}")
        splits[split] = np.memmap(path, dtype=np.uint16, mode="r", shape=tuple(meta["shape"][split]))
    return Dataset(name, meta, **splits)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path, content):
    """Write bytes to path, whole or not at all: to a temporary name first, then renamed."""
    with open(path + ".tmp", "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_json(path, content):
    """Write plain values to path as indented JSON, whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_dataset(folder, train, val, **meta):
    """Write a dataset folder. train, val: uint16 arrays, (N, 2, T) for kind='rows' or flat for kind='stream'."""
    os.makedirs(folder, exist_ok=True)
    digests = {}
    for split, data in (("train", train), ("val", val)):
        path = os.path.join(folder, f"{split}.bin")
        write_whole(path, data.astype("<u2").tobytes())
        digests[split] = sha256(path)
    meta |= {"shape": {"train": list(train.shape), "val": list(val.shape)}, "sha256": digests}
    write_json(os.path.join(folder, "meta.json"), meta)


# ---------------------------------------------------------------------------------------------------------------------
# addition: `5 3 + 2 1 = ? ? ? ? ?` -> `0 0 0 7 4`

ADDITION_TOKENS = "0123456789+=?"


def addition_rows(a, b):
    """Rows for the sums a + b: (N, 2, 11) uint16, the question and, at its five `?`, the digits of the answer.

    a, b: (N,) integers from 0 to 99. The model answers all five digits in parallel, in one forward pass.
    """
    a, b = np.asarray(a), np.asarray(b)
    plus, equals, ask = (ADDITION_TOKENS.index(c) for c in "+=?")
    rows = np.full((len(a), 2, 11), IGNORE, dtype=np.uint16)
    rows[:, 0] = np.stack([a // 10, a % 10, a * 0 + plus, b // 10, b % 10, a * 0 + equals] + [a * 0 + ask] * 5, axis=1)
    rows[:, 1, 6:] = np.stack([(a + b) // 10**place % 10 for place in (4, 3, 2, 1, 0)], axis=1)
    return rows


def make_addition(folder):
    """All 10,000 pairs, shuffled by a fixed seed: 8,000 to train on, 2,000 held out, no pair in both."""
    order = np.random.default_rng(0).permutation(10_000)
    rows = addition_rows(order // 100, order % 100)
    write_dataset(folder, rows[:8000], rows[8000:], kind="rows", vocab_size=len(ADDITION_TOKENS), vocab=list(ADDITION_TOKENS))


DATASETS = {"addition": make_addition}
OFFLINE = ["addition"]  # those that need no network: train.py makes them on first use


def main(arguments):
    if len(arguments) != 1 or arguments[0] not in DATASETS:
        sys.exit(f"usage: python prepare_data.py NAME, with NAME one of: {', '.join(DATASETS)}")
    folder = os.path.join("data", arguments[0])
    DATASETS[arguments[0]](folder)
    data = load(arguments[0])
    print(f"{folder}: {data.meta['kind']}, train {data.train.shape}, val {data.val.shape}, vocabulary of {data.meta['vocab_size']}")


if __name__ == "__main__":
    main(sys.argv[1:])
