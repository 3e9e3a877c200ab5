"""Every dataset: how it is made, how it lies on disk, how it is read.

    python prepare_data.py addition                   two-digit addition, all 10,000 sums, made in a second
    python prepare_data.py addition --digits=3        three digits, 20,000 sums: data/addition3
    python prepare_data.py stdlib                     the Python standard library's source, 11 MB, offline
    python prepare_data.py stdlib --tokenizer=gpt2    the same in GPT-2's tokens: data/stdlib-gpt2
    python prepare_data.py text --file=A --file=B     your own files
    python prepare_data.py shakespeare                tiny Shakespeare, 1 MB, by URL
    python prepare_data.py openwebtext --processes=8  what GPT-2 was trained on, rebuilt: 9 billion tokens;
                                                      90 GB of disk; needs `datasets`
    python prepare_data.py fineweb --shards=10        ready GPT-2 tokens, 100 million (200 MB) a shard, by URL
    python prepare_data.py dolma --shards=2           a sample of OLMo's training data: 103 files of 160 MB
                                                      and 80 million tokens; needs `datasets`

A dataset is a folder data/<name>/ with two files of token ids and a description:

    train.bin, val.bin     uint16, nothing but tokens; uint32 if the vocabulary is larger than 65,536
                           (--tokenizer=olmo2)
    meta.json              kind, vocabulary, sizes, sha256 of both files

There are two kinds, and everything that reads data knows only these:
- rows:   the file is (N, 2, T): per row T tokens that go into the model, then T targets, 65535 where nothing
          is asked. For tasks with a question and an answer.
- stream: the file is one long run of tokens; a training example is any window of it, its targets the same
          window one later. For text (text.py), every document with the tokenizer's separator before it.

Notable: a split is made once, always the same, and never overlaps; files are written under a temporary name
and renamed, meta.json last, so that a folder with a meta.json is whole.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from storage import corpora, text
from storage.addition import ADDITION_TOKENS, IGNORE, addition_rows, answers_for
from storage.download import download
from storage.files import UserError, locked, sha256, write_json

# ------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Dataset:
    """A dataset opened for reading: `train` and `val` are memory maps, (N, 2, T) rows of uint16 or a flat
    stream of uint16 or uint32.
    """

    name: str
    meta: dict
    train: np.ndarray
    val: np.ndarray

    def batch(self, split, indices, block_size):
        """Inputs and targets, both (B, T) int64, -1 where nothing is asked.

        indices (B,): rows of the split, or the first positions of windows of block_size tokens in a stream.
        Raises UserError if a token is not in the vocabulary.
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
            raise UserError(
                f"data/{self.name}/{split}.bin holds token {highest}, but its vocabulary has only "
                f"{self.meta['vocab_size']}: it is damaged. Make it again: "
                f"{how_to_make(self.name, self.meta)}"
            )
        return x, y

    def starts(self, split, block_size):
        """How many examples there are: every index in range(starts) is one that `batch` can read."""
        data = self.train if split == "train" else self.val
        if self.meta["kind"] == "rows":
            return len(data)
        if len(data) <= block_size:
            raise UserError(
                f"data/{self.name}/{split}.bin has {len(data)} tokens, too few for block_size={block_size}. "
                "Make block_size smaller"
            )
        return len(data) - block_size


def how_to_make(name, meta=None):
    """The command that makes dataset `name`."""
    if meta and "made_by" in meta:
        return meta["made_by"]
    if name in OFFLINE:
        base, options = OFFLINE[name]
    else:
        base, _, tokenizer = name.partition("-")
        options = {"tokenizer": tokenizer} if tokenizer else {}
    flags = [f"--{flag}={value}" for flag, value in options.items()]
    return " ".join(["python prepare_data.py", base, *flags])


def load(name, root="data"):
    """Open dataset `name`; one that can be made offline is made on first use.

    Raises UserError if it is unknown, incomplete, of the wrong size or, for files up to 64 MB, of the wrong
    sha256.
    """
    folder = os.path.join(root, name)
    if not os.path.exists(os.path.join(folder, "meta.json")):
        if name not in OFFLINE:
            known = name.partition("-")[0] in DATASETS
            raise UserError(
                f"there is no dataset {folder}. "
                + (
                    f"Make it: {how_to_make(name)}"
                    if known
                    else f"Datasets that can be made: {', '.join(DATASETS)}, for instance: "
                         f"{how_to_make('addition')}"
                )
            )
        with locked(folder):
            # no other process has made it while we waited
            if not os.path.exists(os.path.join(folder, "meta.json")):
                print(f"making {folder} ...")
                base, options = OFFLINE[name]
                make(base, folder, **options)
    try:
        with open(os.path.join(folder, "meta.json")) as f:
            meta = json.load(f)
        dtype = text.dtype_for(meta["vocab_size"])
        sizes = {split: dtype.itemsize * int(np.prod(meta["shape"][split])) for split in ("train", "val")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/meta.json is damaged. Delete {folder} and make it again: {how_to_make(name)}"
        ) from error
    splits = {}
    for split in ("train", "val"):
        path = os.path.join(folder, f"{split}.bin")
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != sizes[split]:
            raise UserError(f"{path} has {size} bytes instead of {sizes[split]}: it is truncated. "
                            f"Delete {folder} and make it again: {how_to_make(name, meta)}")
        if size <= 1 << 26 and sha256(path) != meta["sha256"][split]:
            raise UserError(
                f"{path} has changed since it was made (wrong sha256). Delete {folder} and make it again: "
                f"{how_to_make(name, meta)}"
            )
        splits[split] = np.memmap(path, dtype=dtype, mode="r", shape=tuple(meta["shape"][split]))
    return Dataset(name, meta, **splits)


# ------------------------------------------------------------------------------------------------------------
# Writing


def write_dataset(folder, train, val, **meta):
    """Write a dataset folder.

    train, val: arrays of token ids, (N, 2, T) for kind='rows' or flat for kind='stream'; or, for a stream
    that does not fit into memory, iterators of flat arrays. meta holds vocab_size at least. Raises UserError,
    what was there before untouched, if the disk is full.
    """
    os.makedirs(folder, exist_ok=True)
    meta |= {"shape": {}, "sha256": {}}
    paths = {split: os.path.join(folder, f"{split}.bin") for split in ("train", "val")}
    for (split, path), data in zip(paths.items(), (train, val)):
        digest, tokens = hashlib.sha256(), 0
        try:
            with open(path + ".tmp", "wb") as f:
                for part in [data] if isinstance(data, np.ndarray) else data:
                    content = part.astype(text.dtype_for(meta["vocab_size"])).tobytes()
                    f.write(content)
                    digest.update(content)
                    tokens += part.size
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            for written in paths.values():
                if os.path.exists(written + ".tmp"):
                    os.remove(written + ".tmp")
            raise UserError(
                f"cannot write {path}: {error}. Free some space and type the same command again"
            ) from error
        meta["shape"][split] = list(data.shape) if isinstance(data, np.ndarray) else [tokens]
        meta["sha256"][split] = digest.hexdigest()
    if os.path.exists(os.path.join(folder, "meta.json")):
        os.remove(os.path.join(folder, "meta.json"))  # from here on the old dataset is not whole
    for path in paths.values():
        os.replace(path + ".tmp", path)
    write_json(os.path.join(folder, "meta.json"), meta)


# ------------------------------------------------------------------------------------------------------------
# addition: `5 3 + 2 1 = ? ? ? ? ?` -> `0 0 0 7 4`

def make_addition(folder, options):
    """Pairs shuffled by a fixed seed, four fifths to train on, one fifth held out, no pair in both.

    One and two digits: all 100 or 10,000 pairs. More: 20,000 of the 10^(2 digits), drawn without repetition.
    """
    digits, rng = options.digits, np.random.default_rng(0)
    if digits <= 2:
        order = rng.permutation(100**digits)
    else:
        order = rng.choice(100**digits, 20_000, replace=False)
    a, b = np.divmod(order, 10**digits)
    rows = addition_rows(a, b, digits, answers_for(digits))
    train = len(rows) * 4 // 5
    write_dataset(folder, rows[:train], rows[train:], kind="rows", vocab_size=len(ADDITION_TOKENS),
                  vocab=list(ADDITION_TOKENS),
                  task={"name": "addition", "digits": digits, "answers": answers_for(digits)})


# ------------------------------------------------------------------------------------------------------------
# text


def write_text(folder, documents, tokenizer, **meta):
    """Split documents (an iterable of bytes), encode them, write the dataset."""
    tokens = text.tokenizer(tokenizer)
    train, val = text.split(documents)
    encoded = [
        np.concatenate(
            [
                text.encode_document(document, tokens)
                for document in tqdm(side, desc=f"{split}, {tokens.name}", unit="document")
            ]
        )
        for split, side in (("train", train), ("val", val))
    ]
    write_dataset(folder, *encoded, kind="stream", vocab_size=tokens.vocab_size, tokenizer=tokens.name,
                  documents={"train": len(train), "val": len(val)}, **meta)


def make_stdlib(folder, options):
    """The Python standard library of the interpreter that runs this; its version is in meta.json, for another
    one is another text.
    """
    write_text(folder, text.stdlib_documents(), options.tokenizer, python=sys.version.split()[0])


def make_text(folder, options):
    """The files given with --file."""
    if not options.file:
        raise UserError("text needs your files: python prepare_data.py text --file=A.txt --file=B.txt")
    write_text(
        folder,
        text.file_documents(options.file),
        options.tokenizer,
        made_by="python prepare_data.py " + shlex.join(sys.argv[1:]),
    )


SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def make_shakespeare(folder, options):
    """Tiny Shakespeare, as nanoGPT has it: one document, the last tenth held out."""
    path = download(SHAKESPEARE, os.path.join(folder, "input.txt"), SHAKESPEARE_SHA256)
    write_text(folder, text.file_documents([path]), options.tokenizer)


def make_openwebtext(folder, options):
    """What GPT-2 was trained on, rebuilt: see corpora.py, as for the next two."""
    write_dataset(folder, **corpora.openwebtext(options.tokenizer, options.processes))


def make_fineweb(folder, options):
    write_dataset(
        folder, **corpora.fineweb(os.path.join(folder, "shards"), options.shards, options.tokenizer)
    )


def make_dolma(folder, options):
    write_dataset(
        folder,
        **corpora.dolma(
            os.path.join(os.path.dirname(folder), "dolma", "shards"),
            options.shards,
            options.tokenizer,
            options.processes,
        ),
    )


DATASETS = {
    "addition": make_addition,
    "stdlib": make_stdlib,
    "text": make_text,
    "shakespeare": make_shakespeare,
    "openwebtext": make_openwebtext,
    "fineweb": make_fineweb,
    "dolma": make_dolma,
}
MOST_DIGITS = 4
# Those that need no network: train.py makes them on first use. {name: (dataset, options of `make`)}
OFFLINE = {"addition": ("addition", {}),
           "stdlib": ("stdlib", {}),
           "stdlib-gpt2": ("stdlib", {"tokenizer": "gpt2"})}
OFFLINE |= {f"addition{d}": ("addition", {"digits": d}) for d in range(1, MOST_DIGITS + 1) if d != 2}
# made for this tokenizer, and named without it; others for bytes
STANDARD = {"openwebtext": "gpt2", "fineweb": "gpt2", "dolma": "olmo"}


def make(name, folder, file=(), tokenizer="bytes", shards=10, processes=4, digits=2):
    """Make dataset `name` in folder. The options are those of the command line."""
    try:
        options = argparse.Namespace(file=file, tokenizer=tokenizer, shards=shards, processes=processes,
                                     digits=digits)
        DATASETS[name](folder, options)
    except UserError as error:
        raise UserError(str(error)) from error


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("--digits", type=int, help=f"of addition: of each number, 1 to {MOST_DIGITS}; 2")
    parser.add_argument(
        "--tokenizer",
        choices=text.TOKENIZERS,
        help="of a text; bytes, but gpt2 for openwebtext and fineweb, olmo for dolma",
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        help="of text: a file, one document; give it as often as you like",
    )
    parser.add_argument("--shards", type=int, help="of fineweb and dolma: how many of their 103 files; 10")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="of openwebtext and dolma: how many encode at once",
    )
    options = parser.parse_args(arguments)
    takers = {"digits": ("addition",), "shards": ("fineweb", "dolma"), "file": ("text",),
              "tokenizer": set(DATASETS) - {"addition"}}
    for flag, takes in takers.items():
        if getattr(options, flag) not in (None, []) and options.name not in takes:
            sys.exit(f"error: {options.name} takes no --{flag}")
    options.digits = 2 if options.digits is None else options.digits
    if not 1 <= options.digits <= MOST_DIGITS:
        sys.exit(f"error: --digits must be 1 to {MOST_DIGITS}, the digits of each of the two numbers")
    options.shards = 10 if options.shards is None else options.shards
    if not 1 <= options.shards <= 103 or options.processes < 1:
        sys.exit("error: --shards must be 1 to 103, --processes at least 1")
    name, standard = options.name, STANDARD.get(options.name, "bytes")
    options.tokenizer = options.tokenizer or standard
    suffix = "" if options.digits == 2 else str(options.digits)
    suffix += "" if options.tokenizer == standard else f"-{options.tokenizer}"
    folder = os.path.join("data", name + suffix)
    try:
        with locked(folder):
            make(**(vars(options) | {"folder": folder}))
        data = load(os.path.basename(folder))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{folder}: {data.meta['kind']}, train {data.train.shape}, val {data.val.shape}, vocabulary of "
        f"{data.meta['vocab_size']}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
