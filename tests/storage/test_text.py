"""Splits that share nothing, and tokenizers that lose nothing."""

import os
import random

import numpy as np
import pytest

from storage import text
from storage.files import UserError


def test_bytes_come_back_and_documents_are_marked():
    tokens = text.tokenizer("bytes")
    source = "naïve \N{SNOWMAN}\n".encode()
    assert tokens.decode(tokens.encode(source)) == source.decode()
    assert text.encode_document(source, tokens).tolist() == [0, *source]
    assert tokens.decode(b"\xff") == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match="one of bytes, gpt2, olmo, olmo2"):
        text.tokenizer("gpt3")


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs OpenAI's vocabulary: set "
                                                                   "TIKTOKEN_CACHE_DIR")
def test_gpt2s_tokens():
    tokens = text.tokenizer("gpt2")
    # and the marker in a text is a text
    assert tokens.encode(b"Hello world<|endoftext|>")[:2] == [15496, 995]
    assert 50256 not in tokens.encode(b"<|endoftext|>")
    assert text.encode_document(b"Hello", tokens).tolist() == [50256, 15496]
    assert tokens.decode([15496, 995]) == "Hello world"


def test_a_split_hangs_on_the_texts_not_on_their_order():
    documents = [bytes([65 + i % 26]) * (10 + i) for i in range(200)]
    train, val = text.split(documents + documents)  # every one twice
    assert sorted(train + val) == sorted(documents)
    assert 0.08 < sum(map(len, val)) / sum(map(len, documents)) < 0.13
    random.Random(1).shuffle(documents)
    assert text.split(documents) == (train, val)


def test_few_documents_and_one():
    assert text.split([b"a" * 90, b"b" * 80]) == ([b"a" * 90], [b"b" * 80])  # the smaller
    one = b"first paragraph\nof it\n\nsecond\n\n" * 10
    (train,), (val,) = text.split([one])
    assert train + val == one and train.endswith(b"\n\n") and 0.03 < len(val) / len(one) < 0.2
    with pytest.raises(UserError, match="no text"):
        text.split([b" ", b""])


@pytest.mark.parametrize("one, ends", [
    (b"Title\n\n" + b"one line of a log\n" * 9000, b"log\n"),
    (b"verse\n" * 300 + b"\n" + b"verse\n" * 700, b"verse\n"),
    (b"verse\n" * 880 + b"\n" + b"verse\n" * 120, b"verse\n\n"),  # near enough
    (b"A title\n" + b"word " * 1000, b"word "),
    (b"A title\n" + b"x" * 4000, b"x"),
    ("Grüße\n".encode() + "\N{SNOWMAN}".encode() * 1000, "\N{SNOWMAN}".encode()),
])
def test_a_text_is_cut_near_the_end_at_the_strongest_boundary_there(one, ends):
    (train,), (val,) = text.split([one])
    assert train + val == one and train.endswith(ends)
    assert 0.09 < len(val) / len(one) < 0.15
    assert (train.decode() + val.decode()).encode() == one  # no character is cut


def test_small_files_beside_large_ones_are_not_all_that_is_held_out():
    title, book, other = b"Title", b"a line of a book\n" * 9000, b"a line of another\n" * 9000
    train, val = text.split([title, book])
    assert train[0] + val[1] == book and val[0] == title and 0.09 < len(val[1]) / len(book) < 0.15
    assert text.split([title, book, other]) == ([other], [title, book])


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_tokens_are_the_same_in_parts(monkeypatch, name):
    if name == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs OpenAI's vocabulary: set TIKTOKEN_CACHE_DIR")
    with open(text.__file__, "rb") as f:
        source = f.read()
    source += "Grüße,  \N{SNOWMAN} .\n\n Мир \r\nhier\N{NO-BREAK SPACE}\nда\n\u3000x\n".encode() * 50
    tokens = text.tokenizer(name)
    monkeypatch.setattr(text, "PART", 20)
    parts = list(text.encode_in_parts(source, tokens))
    assert len(parts) > 200
    assert np.concatenate(parts).tolist() == [tokens.separator, *tokens.encode(source)]


def test_held_out_documents_are_the_share_that_was_asked_for():
    held_out = sum(text.is_held_out(str(i).encode(), 0.05) for i in range(20_000))
    assert 900 < held_out < 1100
