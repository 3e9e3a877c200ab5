"""A dataset on disk: two files of token ids and a description, written whole and checked when it is opened.

    data/<name>/train.bin, val.bin     uint16, nothing but tokens; uint32 if the vocabulary is larger than
                                       65,536 (--tokenizer=olmo2)
    data/<name>/meta.json              kind, vocabulary, sizes, sha256 of both files

There are two kinds, and everything that reads data knows only these:
- rows:   the file is (N, 2, T): per row T tokens that go into the model, then T targets, 65535 where nothing
          is asked. For tasks with a question and an answer.
- stream: the file is one long run of tokens; a training example is any window of it, its targets the same
          window one later. For text (text.py), every document with the tokenizer's separator before it.

What is written is checked: whole numbers of the vocabulary, and something asked in both files.

Notable: files are written under a temporary name and renamed, meta.json last, so that a folder with a
meta.json is whole.
"""

import hashlib
import math
import os
from dataclasses import dataclass

import numpy as np

from storage.addition import IGNORE
from storage.files import UserError, read_json, replacing, sha256, write_json
from storage.text import dtype_for


@dataclass
class Dataset:
    """A dataset opened for reading."""

    name: str
    meta: dict
    train: np.ndarray  # a memory map: (N, 2, T) rows of uint16, or a flat stream of uint16 or uint32
    val: np.ndarray
    remedy: str  # the command that makes it again

    def require_same(self, sha256, run):
        """Raise UserError unless a run was trained and judged on these files. sha256: of its, by split."""
        if sha256 != self.meta["sha256"]:
            raise UserError(f"data/{self.name} is not the data that {run} was trained and judged on: the "
                            "two could not be compared. Put the old data back")

    def batch(self, split, indices, block_size):
        """Inputs and targets, both (B, T) int64, -1 where nothing is asked.

        indices (B,): rows of the split, or the first positions of windows of block_size tokens in a stream.
        Raises UserError if a token is not in the vocabulary.
        """
        data = getattr(self, split)
        if self.meta["kind"] == "rows":
            x, y = np.moveaxis(data[indices].astype(np.int64), 1, 0)
            y[y == IGNORE] = -1
        else:
            windows = np.stack([data[i:i + block_size + 1] for i in indices]).astype(np.int64)
            x, y = windows[:, :-1], windows[:, 1:]
        highest = max(x.max(), y.max())
        if highest >= self.meta["vocab_size"]:
            raise UserError(f"data/{self.name}/{split}.bin holds token {highest}, but its vocabulary has "
                            f"only {self.meta['vocab_size']}: it is damaged. Make it again: {self.remedy}")
        return x, y

    def starts(self, split, block_size):
        """How many examples there are: every index in range(starts) is one that `batch` can read."""
        data = getattr(self, split)
        if self.meta["kind"] == "rows":
            return len(data)
        if len(data) <= block_size:
            raise UserError(f"data/{self.name}/{split}.bin has {len(data)} tokens, too few for "
                            f"block_size={block_size}. Make block_size smaller")
        return len(data) - block_size


def open_dataset(folder, remedy):
    """The Dataset in a folder. remedy: the command that makes it again, unless meta.json knows a better one.

    Raises UserError if it is incomplete, of the wrong size or, for files up to 64 MB, of the wrong sha256.
    """
    meta = read_json(os.path.join(folder, "meta.json"))
    remedy = meta.get("made_by", remedy)
    again = f"Delete {folder} and make it again: {remedy}"
    dtype, splits = dtype_for(meta["vocab_size"]), {}
    for split in ("train", "val"):
        path, shape = os.path.join(folder, f"{split}.bin"), tuple(meta["shape"][split])
        whole = dtype.itemsize * math.prod(shape)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != whole:
            raise UserError(f"{path} has {size} bytes instead of {whole}: it is truncated. {again}")
        if size <= 1 << 26 and sha256(path) != meta["sha256"][split]:
            raise UserError(f"{path} has changed since it was made (wrong sha256). {again}")
        splits[split] = np.memmap(path, dtype, "r", shape=shape)
    return Dataset(os.path.basename(folder), meta, **splits, remedy=remedy)


def write_dataset(folder, train, val, **meta):
    """Write a dataset folder.

    train, val: arrays of token ids, (N, 2, T) for kind='rows' or flat for kind='stream'; or, for a stream
    that does not fit into memory, iterators of flat arrays. meta holds kind and vocab_size at least. Raises
    UserError, what was there before untouched, if the tokens are not what meta says, or the disk is full.
    """
    kind, vocab_size = meta["kind"], int(meta["vocab_size"])
    if kind not in ("rows", "stream"):
        raise UserError(f"{folder}: there is no kind={kind!r}. It is 'rows' or 'stream'")
    if kind == "rows" and vocab_size > IGNORE:
        raise UserError(f"{folder}: vocab_size={vocab_size} is too large for rows, in which {IGNORE} stands "
                        f"where nothing is asked. Make it {IGNORE} or less")
    os.makedirs(folder, exist_ok=True)
    meta |= {"vocab_size": vocab_size, "shape": {}, "sha256": {}}
    train_bin, val_bin, description = (os.path.join(folder, name)
                                       for name in ("train.bin", "val.bin", "meta.json"))
    try:
        with replacing(train_bin) as train_at, replacing(val_bin) as val_at:
            for split, data, path in (("train", train, train_at), ("val", val, val_at)):
                blocks = as_stored(data, f"{folder}: {split}", kind, vocab_size)
                meta["shape"][split], meta["sha256"][split] = write_tokens(path, blocks)
            if os.path.exists(description):
                os.remove(description)  # from here on the old dataset is not whole
        write_json(description, meta)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}. Free some space and type the same command "
                        "again") from error


def as_stored(data, where, kind, vocab_size):
    """An array, or an iterator of arrays, array by array as they are stored.

    Raises UserError at the first token that is not in the vocabulary, and at the end if nothing is asked.
    """
    is_rows, asked = kind == "rows", 0
    for part in [data] if isinstance(data, np.ndarray) else data:
        part = np.asarray(part)
        fits = part.ndim == 3 and part.shape[1] == 2 if is_rows else part.ndim == 1
        if not fits or part.dtype.kind not in "iu":
            raise UserError(f"{where} is of {part.dtype} and of shape {part.shape}. kind={kind!r} wants a "
                            f"numpy array of integers of shape {'(N, 2, T)' if is_rows else '(N,)'}")
        right = (part >= 0) & (part < vocab_size)
        if is_rows:
            right[:, 1] |= part[:, 1] == IGNORE
        if not right.all():
            mark = f", and {IGNORE} (storage.addition.IGNORE) where a target is not asked" if is_rows else ""
            raise UserError(f"{where} holds {part[~right][0]}. Token ids go from 0 to vocab_size - 1 = "
                            f"{vocab_size - 1}{mark}. Change the data or vocab_size")
        asked += np.count_nonzero(part[:, 1] != IGNORE) if is_rows else len(part)
        yield part.astype(dtype_for(vocab_size))
    if asked < (1 if is_rows else 2):  # the first token of a stream is no target
        needed = f"a row with a target that is not {IGNORE}" if is_rows else "two tokens or more"
        raise UserError(f"{where} asks nothing: no model can be trained or judged on it. Give it {needed}")


def write_tokens(path, blocks):
    """Write an iterator of arrays to path. Returns the shape of all of them, a list, and the sha256."""
    digest, count = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for block in blocks:
            content = block.tobytes()
            f.write(content)
            digest.update(content)
            count += len(block)
        f.flush()
        os.fsync(f.fileno())
    return [count, *block.shape[1:]], digest.hexdigest()
