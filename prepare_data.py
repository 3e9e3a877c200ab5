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
    python prepare_data.py fineweb --shards=10        ready GPT-2 tokens, 100 million (200 MB) a shard, by URL
    python prepare_data.py dolma --shards=2           a sample of OLMo's training data: 103 files of 160 MB
                                                      and about 90 million tokens; needs `datasets`

A dataset is a folder data/<name>/ of rows (a question and its answer) or of one long stream of tokens (text):
storage/dataset.py has the format. `load` opens one, and makes it first where that needs no network.

Notable: a split is made once, always the same, and never overlaps.
"""

import argparse
import os
import sys

import numpy as np
from tqdm import tqdm

from storage import corpora, python_source, text
from storage.addition import ADDITION_TOKENS, addition_rows, answers_for
from storage.dataset import open_dataset, write_dataset
from storage.download import download
from storage.files import UserError, locked, take_every_sign, typed


def how_to_make(name):
    """The command that makes dataset `name`."""
    if name in OFFLINE:
        base, options = OFFLINE[name]
    else:
        base, _, tokenizer = name.partition("-")
        options = {"tokenizer": tokenizer} if tokenizer else {}
    flags = [f"--{flag}={value}" for flag, value in options.items()]
    return typed("python", "prepare_data.py", base, *flags)


def load(name, root="data"):
    """Open dataset `name`, a dataset.Dataset; one that can be made offline is made on first use.

    Raises UserError if it is unknown or damaged.
    """
    folder = os.path.join(root, name)
    description = os.path.join(folder, "meta.json")
    require(name, root)
    if not os.path.exists(description):
        with locked(folder):
            if not os.path.exists(description):  # no other process has made it while we waited
                print(f"making {folder} ...")
                base, options = OFFLINE[name]
                make(base, folder, **options)
    return open_dataset(folder, how_to_make(name))


def require(name, root="data"):
    """Raise UserError if dataset `name` neither is there nor can be made without network."""
    if name not in OFFLINE and not os.path.exists(os.path.join(root, name, "meta.json")):
        raise UserError(f"there is no dataset {os.path.join(root, name)}. {advice(name)}")


def advice(name):
    """What to type for a dataset that is not there."""
    if name.partition("-")[0] in DATASETS:
        return f"Make it: {how_to_make(name)}"
    return f"Datasets that can be made: {', '.join(DATASETS)}, for instance: {how_to_make('addition')}. " \
           "One of your own: docs/data.md"


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
    if not options.file:
        raise UserError("text needs your files: python prepare_data.py text --file=A.txt --file=B.txt")
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
    shards = os.path.join(folder, "shards")
    write_dataset(folder, **corpora.fineweb(shards, options.shards, options.tokenizer))


def make_dolma(folder, options):
    shards = os.path.join(os.path.dirname(folder), "dolma", "shards")  # one, whatever the tokenizer
    write_dataset(folder, **corpora.dolma(shards, options.shards, options.tokenizer, options.processes))


DATASETS = {
    "addition": make_addition,
    "stdlib": make_stdlib,
    "python": make_python,
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
           "python": ("python", {}),
           "stdlib-gpt2": ("stdlib", {"tokenizer": "gpt2"})}
OFFLINE |= {f"addition{d}": ("addition", {"digits": d}) for d in range(1, MOST_DIGITS + 1) if d != 2}
# what was made for a dataset: a config, and what must be said beside it
MADE_FOR = {"addition": "config/addition.py", "addition3": "config/addition3.py",
            "stdlib": "config/stdlib.py", "python": "config/python.py", "stdlib-gpt2": "config/gpt2_smoke.py",
            "openwebtext": "config/gpt2.py", "fineweb": "config/gpt2.py --dataset=fineweb",
            "dolma": "config/olmo_1b.py",
            "dolma-olmo2": "config/olmo_1b.py --init_from=allenai/OLMo-2-0425-1B --dataset=dolma-olmo2 "
                           "--out_dir=out/olmo2_1b"}
# made for this tokenizer, and named without it; others for bytes
STANDARD = {"openwebtext": "gpt2", "fineweb": "gpt2", "dolma": "olmo"}


def make(name, folder, file=(), tokenizer="bytes", shards=10, processes=4, digits=2):
    """Make dataset `name` in folder. The options are those of the command line."""
    DATASETS[name](folder, argparse.Namespace(file=file, tokenizer=tokenizer, shards=shards,
                                              processes=processes, digits=digits))


def command_line():
    """The parser of `python prepare_data.py`."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("--digits", type=int, help=f"of addition: of each number, 1 to {MOST_DIGITS}; 2")
    parser.add_argument("--tokenizer", choices=text.TOKENIZERS,
                        help="of a text; bytes, but gpt2 for openwebtext and fineweb, olmo for dolma")
    parser.add_argument("--file", action="append", default=[], type=os.path.expanduser,
                        help="of text: a file, one document; give it as often as you like")
    parser.add_argument("--as", dest="called", metavar="NAME",
                        help="of text: the dataset is data/NAME; text. A second one wants another name")
    parser.add_argument("--shards", type=int, help="of fineweb and dolma: how many of their 103 files; 10")
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="of openwebtext and dolma: how many encode at once")
    return parser


TAKERS = {"digits": ("addition",), "shards": ("fineweb", "dolma"), "file": ("text",), "called": ("text",),
          "tokenizer": set(DATASETS) - {"addition"}}


def refuse_what_does_not_fit(options):
    """Raise UserError where the options contradict the dataset or are out of range; None: not given."""
    for flag, takers in TAKERS.items():
        given = getattr(options, flag) not in (None, [])
        if given and options.name not in takers:
            raise UserError(f"{options.name} takes no --{'as' if flag == 'called' else flag}")
    if options.digits is not None and not 1 <= options.digits <= MOST_DIGITS:
        raise UserError(f"--digits must be 1 to {MOST_DIGITS}, the digits of each of the two numbers")
    if options.shards is not None and not 1 <= options.shards <= 103:
        raise UserError("--shards must be 1 to 103")
    taken = {*DATASETS, *OFFLINE, "", ".", "..", "~"}
    if options.called in taken or "/" in (options.called or ""):
        raise UserError(f"--as={options.called} is no name for a dataset of yours. Choose another")
    if options.processes < 1:
        raise UserError("--processes must be at least 1")


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
        refuse_what_does_not_fit(options)
        standard = STANDARD.get(options.name, "bytes")
        name = options.called or options.name
        if options.digits not in (None, 2):
            name += str(options.digits)
        if options.tokenizer not in (None, standard):
            name += f"-{options.tokenizer}"
        folder = os.path.join("data", name)
        with locked(folder):
            make(options.name, folder, options.file, options.tokenizer or standard, options.shards or 10,
                 options.processes, options.digits or 2)
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
