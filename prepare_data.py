"""Every dataset, and how it is made.

    python prepare_data.py addition                   two-digit addition, all 10,000 sums, made in a second
    python prepare_data.py addition --digits=3        three digits, 20,000 sums: data/addition3
    python prepare_data.py stdlib                     the Python standard library's source, 11 MB, offline
    python prepare_data.py stdlib --tokenizer=gpt2    the same in GPT-2's tokens: data/stdlib-gpt2
    python prepare_data.py python                     standard library and installed packages, 120 MB, offline
    python prepare_data.py text --file=A --file=B     your own files; --as=NAME: data/NAME, not data/text
    python prepare_data.py shakespeare                tiny Shakespeare, 1 MB, by URL
    python prepare_data.py openwebtext --processes=8  what GPT-2 was trained on, rebuilt: 9 billion tokens;
                                                      90 GB of disk; needs `datasets`
    python prepare_data.py fineweb --shards=10        ready GPT-2 tokens, 100 million (200 MB) a shard; needs
                                                      `huggingface_hub`
    python prepare_data.py dolma --shards=2           a sample of OLMo's training data: 103 files of 160 MB
                                                      and about 90 million tokens; needs `datasets`

A dataset is a folder data/<name>/ of rows (a question and its answer) or of one long stream of tokens (text):
storage/dataset.py has the format. `load` opens one, and makes it first where that needs no network.

Notable: a split is made once, always the same, and never overlaps.
"""

import argparse
import os
import re
import sys

import numpy as np
from tqdm import tqdm

from storage import corpora, python_source, text
from storage.addition import ADDITION_TOKENS, addition_rows, answers_for
from storage.dataset import open_dataset, write_dataset
from storage.download import download
from storage.files import UserError, locked, take_every_sign, typed


def load(name):
    """Open dataset `name`, a dataset.Dataset; one that can be made offline is made on first use.

    Raises UserError if it is unknown or damaged.
    """
    require(name)
    folder = os.path.join("data", name)
    if not is_made(name):
        with locked(folder):
            if not is_made(name):  # no other process has made it while we waited
                print(f"making {folder} ...")
                options = command_line().parse_args(OFFLINE[name])
                DATASETS[options.name][0](folder, options)
    return open_dataset(folder, how_to_make(name))


def is_made(name):
    return os.path.exists(os.path.join("data", name, "meta.json"))


def require(name):
    """Raise UserError if dataset `name` neither is there nor can be made without network."""
    if name not in OFFLINE and not is_made(name):
        known = name.partition("-")[0] in DATASETS
        advice = f"Make it: {how_to_make(name)}" if known else (
            f"Datasets that can be made: {', '.join(DATASETS)}, for instance: {how_to_make('addition')}. "
            "One of your own: docs/data.md")
        raise UserError(f"there is no dataset data/{name}. {advice}")


def how_to_make(name):
    """The command that makes dataset `name`."""
    base, _, tokenizer = name.partition("-")
    words = OFFLINE.get(name) or [base, *([f"--tokenizer={tokenizer}"] if tokenizer else [])]
    return typed("python", "prepare_data.py", *words)


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

    def encoded(split, side):
        for document in tqdm(side, desc=f"{split}, {tokens.name}", unit="document", disable=None):
            yield from text.encode_in_parts(document, tokens)

    write_dataset(folder, encoded("train", train), encoded("val", val), kind="stream",
                  vocab_size=tokens.vocab_size, tokenizer=tokens.name,
                  documents={"train": len(train), "val": len(val)}, **meta)


def make_stdlib(folder, options):
    """The Python standard library of the interpreter that runs this; its version is in meta.json, for another
    one is another text.
    """
    write_text(folder, text.stdlib_documents(), options.tokenizer, python=sys.version.split()[0])


def make_python(folder, options):
    """The source of the standard library and of the installed packages, without twins."""
    documents, packages = python_source.collect()
    write_text(folder, documents, options.tokenizer, python=sys.version.split()[0], packages=packages)


def make_text(folder, options):
    """The files given with --file."""
    command = typed("python", "prepare_data.py", *sys.argv[1:])
    if os.path.exists(os.path.join(folder, "meta.json")):
        before = open_dataset(folder, command).meta.get("made_by", "not made by this command")
        if before != command:
            raise UserError(f"{folder} holds another text ({before}). Give this one a name: --as=NAME, or "
                            f"delete {folder} first")
    write_text(folder, text.file_documents(options.file), options.tokenizer, made_by=command)


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
    write_dataset(folder, **corpora.fineweb(options.shards))


def make_dolma(folder, options):
    shards = os.path.join("data", "dolma", "shards")  # one, whatever the tokenizer
    write_dataset(folder, **corpora.dolma(shards, options.shards, options.tokenizer, options.processes))


# ------------------------------------------------------------------------------------------------------------
# the command line

# {dataset: (what makes it, the options that it takes)}
DATASETS = {
    "addition": (make_addition, ["--digits"]),
    "stdlib": (make_stdlib, ["--tokenizer"]),
    "python": (make_python, ["--tokenizer"]),
    "text": (make_text, ["--tokenizer", "--file", "--as"]),
    "shakespeare": (make_shakespeare, ["--tokenizer"]),
    "openwebtext": (make_openwebtext, ["--tokenizer", "--processes"]),
    "fineweb": (make_fineweb, ["--shards"]),
    "dolma": (make_dolma, ["--tokenizer", "--shards", "--processes"]),
}
OPTIONS = {
    "--digits": {"type": int, "choices": range(1, 5), "help": "of each of the two numbers; 2"},
    "--tokenizer": {"choices": text.TOKENIZERS, "help": "bytes; of openwebtext gpt2, of dolma olmo"},
    "--file": {"action": "append", "required": True, "type": os.path.expanduser,
               "help": "one document; give it as often as you like"},
    "--as": {"dest": "called", "metavar": "NAME", "help": "the dataset is data/NAME, not data/text"},
    "--shards": {"type": int, "choices": range(1, 104), "default": 10, "metavar": "N",
                 "help": "how many of the 103 files; 10"},
    "--processes": {"type": int, "default": os.cpu_count(), "help": "how many encode at once"},
}
# made for this tokenizer, and named without it; others for bytes
STANDARD = {"openwebtext": "gpt2", "dolma": "olmo"}
# those that need no network, and what to type for them: train.py makes them on first use
OFFLINE = {"addition": ["addition"], "stdlib": ["stdlib"], "python": ["python"],
           "stdlib-gpt2": ["stdlib", "--tokenizer=gpt2"],
           **{f"addition{digits}": ["addition", f"--digits={digits}"] for digits in (1, 3, 4)}}
# what was made for a dataset: a config, and what must be said beside it
MADE_FOR = {"addition": "config/addition.py", "addition3": "config/addition3.py",
            "stdlib": "config/stdlib.py", "python": "config/python.py", "stdlib-gpt2": "config/gpt2_smoke.py",
            "openwebtext": "config/gpt2.py", "fineweb": "config/gpt2.py --dataset=fineweb",
            "dolma": "config/olmo_1b.py",
            "dolma-olmo2": "config/olmo_1b.py --init_from=allenai/OLMo-2-0425-1B --dataset=dolma-olmo2 "
                           "--out_dir=out/olmo2_1b"}


def command_line():
    """The parser of `python prepare_data.py`."""
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, options) in DATASETS.items():
        of_dataset = names.add_parser(name)
        for option in options:
            of_dataset.add_argument(option, **OPTIONS[option])
        of_dataset.set_defaults(digits=2, called=None, tokenizer=STANDARD.get(name, "bytes"))
    return parser


def name_of(options):
    """What the dataset that the command line asks for is called: addition3, dolma-olmo2, hamlet."""
    if options.called in {*DATASETS, *OFFLINE} or re.search("^[.~]|/", options.called or ""):
        raise UserError(f"--as={options.called} is no name for a dataset of yours. Choose another")
    name = options.called or options.name
    if options.digits != 2:
        name += str(options.digits)
    if options.tokenizer != STANDARD.get(options.name, "bytes"):
        name += f"-{options.tokenizer}"
    return name


def what_next(name, data):
    """What to type when dataset `name` is made, a list: the run that was made for it, or one of its kind."""
    if name in MADE_FOR:
        return [f"python train.py {MADE_FOR[name]}"]
    config, shape = "stdlib", []
    if data.meta["kind"] == "rows":
        config, shape = "addition", [f"--block_size={data.train.shape[2]}"]
    parent, child = f"out/{name}_dense", f"out/{name}_sparse"
    data = f"--dataset={name}"
    return [typed("python", "train.py", f"config/{config}_dense.py", data, *shape, f"--out_dir={parent}"),
            typed("python", "train.py", f"config/{config}.py", data, f"--init_from={parent}",
                  f"--out_dir={child}")]


def main(arguments):
    options = command_line().parse_args(arguments)
    try:
        name = name_of(options)
        folder = os.path.join("data", name)
        with locked(folder):
            DATASETS[options.name][0](folder, options)
        data = load(name)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    held_out = len(data.val) / (len(data.train) + len(data.val))
    print(f"{folder}: {data.meta['kind']}, train {data.train.shape}, val {data.val.shape}, "
          f"{100 * held_out:.3g} % held out, vocabulary of {data.meta['vocab_size']}")
    print("train on it:")
    for command in what_next(name, data):
        print(f"    {command}")


if __name__ == "__main__":
    take_every_sign()
    main(sys.argv[1:])
