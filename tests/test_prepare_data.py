"""The addition data, the file format, and what is said of damaged files."""

import subprocess
import sys

import numpy as np
import pytest

import prepare_data
from conftest import REPOSITORY
from prepare_data import ADDITION_TOKENS, DataError, addition_rows, load, write_dataset


def text(tokens):
    return "".join(ADDITION_TOKENS[t] if 0 <= t < 13 else "." for t in tokens)


def test_a_row_is_the_question_and_its_zero_padded_answer():
    row = addition_rows([53, 43, 7], [21, 59, 0]).astype(int)
    assert [text(x) for x in row[:, 0]] == ["53+21=?????", "43+59=?????", "07+00=?????"]
    assert [text(y) for y in row[:, 1]] == ["......00074", "......00102", "......00007"]


def test_all_pairs_none_twice(workplace):
    data = load("addition")  # made on first use
    assert data.train.shape == (8000, 2, 11) and data.val.shape == (2000, 2, 11)
    questions = [text(row) for row in np.concatenate([data.train, data.val])[:, 0].astype(int)]
    assert len(set(questions)) == 10_000
    for split in (data.train, data.val):
        for x, y in split.astype(int):
            question = text(x)
            assert int(text(y)[6:]) == int(question[:2]) + int(question[3:5])


def test_the_split_is_always_the_same(workplace):
    first = load("addition").meta["sha256"]
    prepare_data.make_addition("again")
    assert load("again", root=".").meta["sha256"] == first


def test_batches_of_rows_and_of_a_stream(workplace):
    x, y = load("addition").batch("val", [5, 0], 11)
    assert x.shape == y.shape == (2, 11) and x.dtype == np.int64
    assert (y[:, :6] == -1).all() and (y[:, 6:] >= 0).all()
    write_dataset("data/stream", np.arange(100, dtype=np.uint16), np.arange(20, dtype=np.uint16), kind="stream", vocab_size=100)
    data = load("stream")
    x, y = data.batch("train", [0, 91], 8)
    assert x.tolist() == [list(range(8)), list(range(91, 99))] and (y == x + 1).all()
    assert data.starts("train", 8) == 92
    with pytest.raises(DataError, match="too few for block_size=20"):
        data.starts("val", 20)


def test_damage_is_named(workplace):
    load("addition")
    path = workplace / "data/addition/val.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="val.bin has 87998 bytes instead of 88000: it is truncated"):
        load("addition")
    path.write_bytes(b"\1" + whole[1:])
    with pytest.raises(DataError, match="wrong sha256.*python prepare_data.py addition"):
        load("addition")
    path.unlink()
    with pytest.raises(DataError, match="0 bytes"):
        load("addition")


def test_a_token_outside_the_vocabulary_is_named(workplace):
    write_dataset("data/odd", np.full(50, 7, np.uint16), np.full(50, 7, np.uint16), kind="stream", vocab_size=7)
    with pytest.raises(DataError, match="holds token 7, but its vocabulary has only 7"):
        load("odd").batch("train", [0], 8)


def test_an_unknown_dataset_is_named(workplace):
    with pytest.raises(DataError, match="no dataset data/additon.*python prepare_data.py addition"):
        load("additon")


def test_command_line(workplace):
    run = [sys.executable, f"{REPOSITORY}/prepare_data.py"]
    done = subprocess.run([*run, "addition"], capture_output=True, text=True)
    assert done.returncode == 0 and "train (8000, 2, 11)" in done.stdout
    done = subprocess.run([*run, "nothing"], capture_output=True, text=True)
    assert done.returncode != 0 and "addition" in done.stderr and "Traceback" not in done.stderr
