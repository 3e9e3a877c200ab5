"""Text as tokens: tokenizers, where documents come from, and how they are split.

    bytes   256 tokens, the bytes of UTF-8; token 0, which no text contains, stands before every document
    gpt2    50,257 tokens, OpenAI's byte pair encoding, through tiktoken; <|endoftext|> stands before each
    olmo    50,280 tokens, and olmo2 100,278, through Hugging Face's tokenizers; the same

A held-out set is made of whole documents: had a document one half on each side, the model could remember
names and phrases from the half that it trained on. Identical documents are taken once, so that none is on
both sides. Only a document that is nearly all of the text is cut.

Notable: which side a document is on hangs on a hash of its text, not on its place in a list: the same files
in any order, on any machine, are split alike.
"""

import hashlib
import os
import re
import sysconfig
from typing import Callable, NamedTuple

import numpy as np

from storage.download import hub_file
from storage.files import UserError

# ------------------------------------------------------------------------------------------------------------
# Tokenizers


class Tokenizer(NamedTuple):
    name: str
    vocab_size: int
    separator: int  # the token that stands before every document
    encode: Callable  # bytes -> list or array of token ids
    decode: Callable  # token ids -> str; bytes that are no UTF-8 become U+FFFD


TOKENIZERS = ("bytes", "gpt2", "olmo", "olmo2")
# whose tokenizer.json it is; all models of a generation share it
OLMO = {"olmo": "allenai/OLMo-1B-hf", "olmo2": "allenai/OLMo-2-0425-1B"}


def tokenizer(name):
    """The Tokenizer called 'bytes', 'gpt2', 'olmo' or 'olmo2'.

    Raises UserError if there is none such, or its vocabulary cannot be fetched.
    """
    if name == "bytes":
        return Tokenizer(name, 256, 0, encode=lambda text: np.frombuffer(text, dtype=np.uint8),
                         decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    if name == "gpt2":
        return gpt2_tokenizer()
    if name in OLMO:
        return olmo_tokenizer(name)
    raise UserError(f"there is no tokenizer {name!r}: it is one of {', '.join(TOKENIZERS)}")


def gpt2_tokenizer():
    """OpenAI's, through the package that they wrote for it, imported only here: it is slow to import."""
    try:
        import tiktoken

        bpe = tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, a proxy, a damaged cache: errors of many packages
        raise UserError("OpenAI's vocabulary for --tokenizer=gpt2 cannot be fetched "
                        f"({type(error).__name__}). tiktoken downloads it once and keeps it in the folder "
                        "that the environment variable TIKTOKEN_CACHE_DIR names: copy that folder from a "
                        "machine that has it, or make data of bytes: python prepare_data.py NAME "
                        "--tokenizer=bytes") from error
    return Tokenizer("gpt2", bpe.n_vocab, bpe.eot_token,
                     encode=lambda text: bpe.encode_ordinary(text.decode("utf-8", errors="replace")),
                     decode=lambda ids: bpe.decode(list(ids)))


def olmo_tokenizer(name):
    """OLMo's, through the packages that Hugging Face wrote for it, imported only here."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"--tokenizer={name} needs packages that are not installed: "
                        "pip install -r requirements-olmo.txt") from error
    bpe = tokenizers.Tokenizer.from_file(hub_file(OLMO[name], "tokenizer.json"))
    bpe.encode_special_tokens = True  # '<|endoftext|>' in a text is text, as with GPT-2's encode_ordinary
    return Tokenizer(
        name, bpe.get_vocab_size(), bpe.token_to_id("<|endoftext|>"),
        encode=lambda text: bpe.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids,
        decode=lambda ids: bpe.decode([int(i) for i in ids], skip_special_tokens=False))


def dtype_for(vocab_size):
    """In what token ids are stored: two bytes each while they fit, else four (OLMo 2)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


PART = 1 << 20  # bytes of a document that are encoded at once: a tokenizer takes many times their size
# Places that no token crosses, whatever the tokenizer: before the first space behind a word, and between two
# lines without white space where they meet. VISIBLE: bytes with which no white space of Unicode ends
VISIBLE = rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf]"
BORDER = re.compile(rb"(?<=%b)(?= )|(?<=%b\n)(?=[!-~\xc3-\xe0\xe4-\xf4])" % (VISIBLE, VISIBLE))


def encode_in_parts(text, tokens):
    """The token ids of one document (bytes), the separator first, as flat arrays, `dtype_for` the vocabulary.

    tokens: a Tokenizer. A long document without any BORDER is one part.
    """
    dtype, begin = dtype_for(tokens.vocab_size), 0
    yield np.array([tokens.separator], dtype)
    while begin < len(text):
        border = BORDER.search(text, begin + PART)
        end = border.start() if border else len(text)
        yield np.asarray(tokens.encode(text[begin:end]), dtype)
        begin = end


def encode_document(text, tokens):
    """The same in one array."""
    return np.concatenate(list(encode_in_parts(text, tokens)))


def pieces(ids, tokens):
    """How each token looks in one line, a list of strings: line ends, tabs and document marks are shown as
    signs.
    """
    signs = str.maketrans("\n\t\r\0", "↵→←∎")
    return [tokens.decode([i]).translate(signs) for i in ids]


# ------------------------------------------------------------------------------------------------------------
# Documents


def stdlib_documents():
    """The source files of the Python standard library that runs this, as bytes: 11 MB of real code that every
    machine has.

    Without its tests, which some systems do not install; without packages that were installed later; and
    without encodings/, tables of characters rather than code, which are so alike that a held-out one would be
    known from the others.
    """
    root = sysconfig.get_path("stdlib")
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "test", "tests", "idle_test",
                                            "encodings", "__pycache__"})
        for name in sorted(files):
            if name.endswith(".py"):
                with open(os.path.join(folder, name), "rb") as f:
                    yield f.read()


def file_documents(paths):
    """The given files, one document each, as bytes. Raises UserError if one is missing or empty."""
    for path in paths:
        try:
            with open(path, "rb") as f:
                content = f.read()
        except OSError as error:
            raise UserError(f"--file={path}: {error.strerror}") from error
        if is_blank(content):
            raise UserError(f"--file={path} is empty")
        if b"\0" in content:
            raise UserError(f"--file={path} holds zero bytes: it is no text, or text in UTF-16. Save it as "
                            "UTF-8")
        yield content


def is_blank(text):
    """Is there nothing but white space? `strip` would copy the text."""
    return not text or text.isspace()


def is_held_out(text, share):
    """Does a document (bytes) of a large collection belong to the held-out set?

    share: of the documents, from 0 to 1.
    """
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < share * 2**64


def place_to_cut(text, share):
    """Where a document (bytes) is cut, so that about `share` of it is behind the cut: after a blank line,
    else a line, else a space, if one is so near that at most half as much again is held out; else between two
    characters of UTF-8.
    """
    cut = int((1 - share) * len(text))
    near = cut - int(share * len(text) / 2)
    for ending in (b"\n\n", b"\n", b" "):
        if (place := text.rfind(ending, near, cut)) >= 0:
            return place + len(ending)
    while cut > near and text[cut] & 0xC0 == 0x80:  # not the first byte of a character
        cut -= 1
    return cut


def split(documents, share=0.1):
    """Two lists of documents (bytes), training and held out, the latter about `share` of all bytes. Documents
    are taken in the order of their hash.

    A single document is cut once, by `place_to_cut`; so is one beside which all others are too small to judge
    a model on. Raises UserError if there is no text.
    """
    documents = sorted({text for text in documents if not is_blank(text)},
                       key=lambda text: hashlib.sha256(text).digest())
    if not documents:
        raise UserError("there is no text to make a dataset of")
    wanted, held, train, val = share * sum(map(len, documents)), 0, [], []
    for text in documents:
        if held < wanted and held + len(text) <= 1.2 * wanted:
            val.append(text)
            held += len(text)
        else:
            train.append(text)
    if held < wanted / 2:  # those left are large: the smallest, or the end of the only one
        text = min(train, key=len)
        if len(train) > 1:
            train.remove(text)
            val.append(text)
        else:
            cut = place_to_cut(text, share)
            train, val = [text[:cut]], [*val, text[cut:]]
    return train, val
