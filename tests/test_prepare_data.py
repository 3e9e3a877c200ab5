"""The addition data, the file format, and what is said of damaged files."""

import glob
import json
import os
import shlex
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import prepare_data
from conftest import REPOSITORY
from helpers import begin, call, decoded, ended
from prepare_data import load, write_dataset
from storage.addition import ADDITION_TOKENS, IGNORE, addition_pairs, addition_rows, addition_task
from storage.files import UserError, read_json, replacing, typed, write_json, write_whole
from training.config import make_config, parse_command_line


def text(tokens):
    return "".join(ADDITION_TOKENS[t] if 0 <= t < 13 else "." for t in tokens)


def test_a_row_is_the_question_and_its_zero_padded_answer():
    row = addition_rows([53, 43, 7], [21, 59, 0]).astype(int)
    assert [text(x) for x in row[:, 0]] == ["53+21=?????", "43+59=?????", "07+00=?????"]
    assert [text(y) for y in row[:, 1]] == ["......00074", "......00102", "......00007"]


def test_all_pairs_none_twice_and_the_split_is_what_it_always_was(workplace):
    data = load("addition")  # made on first use
    assert data.meta["sha256"] == {
        "train": "dea3967fdeef3dc967e7221d2fdb49055145c9fc86d2bde69055cca2c15cf2cf",
        "val": "2a264df73270ba13020f4558b083da1a35e6ce637885fb7e281bfa84874614cb"}
    assert data.train.shape == (8000, 2, 11) and data.val.shape == (2000, 2, 11)
    questions = [text(row) for row in np.concatenate([data.train, data.val])[:, 0].astype(int)]
    assert len(set(questions)) == 10_000
    for split in (data.train, data.val):
        for x, y in split.astype(int):
            question = text(x)
            assert int(text(y)[6:]) == int(question[:2]) + int(question[3:5])


@pytest.mark.parametrize("digits, rows, T", [(1, 100, 9), (3, 20_000, 13), (4, 20_000, 15)])
def test_other_numbers_of_digits(workplace, digits, rows, T):
    data = load(f"addition{digits}")  # made on first use
    assert data.train.shape == (rows * 4 // 5, 2, T) and data.val.shape == (rows // 5, 2, T)
    assert addition_task(data.meta) == (digits, 5)
    everything = np.concatenate([data.train, data.val])
    a, b = addition_pairs(everything, digits)
    assert len(set(zip(a, b))) == rows and max(a.max(), b.max()) == 10**digits - 1
    assert (everything == addition_rows(a, b, digits, 5)).all()
    for x, y in everything[:50].astype(int):
        question, answer = text(x), text(y)[-5:]
        assert len(question) == T and question.endswith("=?????")
        assert int(answer) == sum(int(number) for number in question[:2 * digits + 1].split("+"))


def test_the_dataset_says_what_its_task_is(workplace):
    task = addition_task(load("addition").meta)
    assert task == (2, 5) and task.first == 6 and task.length == 11
    assert addition_task({"kind": "rows", "task": {"name": "sorting"}}) is None
    assert addition_task({"kind": "stream", "vocab_size": 256}) is None


def test_batches_of_rows_and_of_a_stream(workplace):
    x, y = load("addition").batch("val", [5, 0], 11)
    assert x.shape == y.shape == (2, 11) and x.dtype == np.int64
    assert (y[:, :6] == -1).all() and (y[:, 6:] >= 0).all()
    write_dataset("data/stream", np.arange(100, dtype=np.uint16), np.arange(20, dtype=np.uint16),
                  kind="stream", vocab_size=100)
    data = load("stream")
    x, y = data.batch("train", [0, 91], 8)
    assert x.tolist() == [list(range(8)), list(range(91, 99))] and (y == x + 1).all()
    assert data.starts("train", 8) == 92
    with pytest.raises(UserError, match="too few for block_size=20"):
        data.starts("val", 20)


def test_damage_is_named(workplace):
    load("addition")
    path = workplace / "data/addition/val.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="val.bin has 87998 bytes instead of 88000: it is truncated"):
        load("addition")
    path.write_bytes(b"\1" + whole[1:])
    with pytest.raises(UserError, match="wrong sha256.*python prepare_data.py addition"):
        load("addition")
    path.unlink()
    with pytest.raises(UserError, match="0 bytes"):
        load("addition")


def test_a_token_outside_the_vocabulary_is_named(workplace):
    write_dataset("data/odd", np.full(50, 7), np.full(50, 7), kind="stream", vocab_size=8)
    write_json("data/odd/meta.json", read_json("data/odd/meta.json") | {"vocab_size": 7})
    with pytest.raises(UserError, match="holds token 7, but its vocabulary has only 7"):
        load("odd").batch("train", [0], 8)


GOOD = np.full((10, 2, 3), IGNORE)  # int64: 1 1 1 -> asked at the last
GOOD[:, 0] = GOOD[:, 1, 2] = 1
ASKS_NOTHING = GOOD * [[[1], [0]]] + [[[0], [IGNORE]]]


@pytest.mark.parametrize("kind, val, vocab_size, message", [
    ("stream", np.array([1, 66_000]), 300, "val holds 66000.*from 0 to vocab_size - 1 = 299"),
    ("stream", iter([np.arange(50), np.array([300])]), 300, "val holds 300"),
    ("stream", np.array([1.0, 1.9]), 300, "val is of float64.*wants a numpy array of integers"),
    ("stream", np.array([1, IGNORE]), 300, "val holds 65535"),
    ("rows", np.where(GOOD == IGNORE, -100, GOOD), 300, "val holds -100.*65535 .storage.addition.IGNORE"),
    ("rows", GOOD, 65_536, "vocab_size=65536 is too large for rows"),
    ("stream", np.array([5]), 300, "val asks nothing.*two tokens or more"),
    ("rows", ASKS_NOTHING, 300, "val asks nothing.*a target that is not 65535"),
    ("rows", GOOD[:, 0], 300, r"val is of int64 and of shape \(10, 3\).*\(N, 2, T\)"),
    ("row", GOOD, 300, "no kind='row'"),
])
def test_what_is_no_dataset_is_refused_and_the_old_one_stays(workplace, kind, val, vocab_size, message):
    write_dataset("data/mine", GOOD, GOOD, kind="rows", vocab_size=2)
    train = GOOD if kind == "rows" else np.arange(50)
    with pytest.raises(UserError, match=f"data/mine: .*{message}"):
        write_dataset("data/mine", train, val, kind=kind, vocab_size=vocab_size)
    assert sorted(os.listdir("data/mine")) == ["meta.json", "train.bin", "val.bin"]
    assert (load("mine").val == GOOD).all()


def test_a_large_vocabulary_takes_four_bytes(workplace):
    """And a stream may come in pieces, a vocab_size may be numpy's."""
    tokens = np.array([0, 70_000, 100_351, 5])
    write_dataset("data/big", iter([tokens[:1], tokens[1:]]), tokens[:2], kind="stream",
                  vocab_size=np.int64(100_352), tokenizer="olmo2")
    data = load("big")
    assert data.train.dtype == np.uint32 and data.train.tolist() == tokens.tolist()
    x, y = data.batch("train", [0], 3)
    assert x.tolist() == [[0, 70_000, 100_351]] and y.tolist() == [[70_000, 100_351, 5]]


@pytest.mark.parametrize("arguments, message", [
    ("nothing", "addition"),
    ("addition --tokenizer=gpt2", "unrecognized arguments: --tokenizer=gpt2"),
    ("addition --digits=5", "--digits: invalid choice: 5"),
    ("dolma --shards=120", "--shards: invalid choice: 120"),
    ("text", "required: --file"),
    ("text --file=gone.txt --as=new", "--file=gone.txt: No such file"),
    ("text --file=empty.txt --as=new", "is empty"),
    ("text --file=windows.txt --as=new", "Save it as UTF-8"),
    ("text --file=a.txt --as=addition3", "--as=addition3 is no name for a dataset of yours"),
    ("text --file=a.txt --as=../x", "is no name"),
    ("text --file=a.txt --as=~", "--as=~ is no name"),
    ("text --file=a.txt --as=mine", "data/mine holds another text (not made by this command)"),
    ("text --file=a.txt", "data/text holds another text (python prepare_data.py text --file=b.txt)"),
])
def test_what_cannot_be_made_is_refused_in_words(workplace, monkeypatch, arguments, message):
    tokens = np.zeros(100, dtype=np.uint16)
    write_dataset("data/mine", tokens, tokens, kind="stream", vocab_size=1)
    write_dataset("data/text", tokens, tokens, kind="stream", vocab_size=256,
                  made_by="python prepare_data.py text --file=b.txt")
    (workplace / "a.txt").write_text("This is a.\n\n" * 300)
    (workplace / "empty.txt").write_text(" \n")
    (workplace / "windows.txt").write_text("text\n", encoding="utf-16")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments.split()])
    done = call(prepare_data.main, *arguments.split())
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(glob.glob("data/*/meta.json")) == ["data/mine/meta.json", "data/text/meta.json"]
    assert len(load("mine").train) == len(load("text").train) == 100


def test_a_dataset_that_is_not_there_is_named_with_the_command_that_makes_it(workplace):
    for name, command in (("additon", "addition"), ("openwebtext", "openwebtext")):
        with pytest.raises(UserError, match=f"no dataset data/{name}.*python prepare_data.py {command}"):
            load(name)
    assert prepare_data.how_to_make("addition3") == "python prepare_data.py addition --digits=3"
    assert prepare_data.how_to_make("stdlib-gpt2") == "python prepare_data.py stdlib --tokenizer=gpt2"


# ------------------------------------------------------------------------------------------------------------
# text


def test_stdlib_is_whole_files_and_none_on_both_sides(workplace):
    data = load("stdlib")  # made on first use
    train, val = decoded(data.train, data), decoded(data.val, data)
    assert len(train) == data.meta["documents"]["train"] > 300
    assert len(val) == data.meta["documents"]["val"] > 20
    assert not set(train) & set(val) and 0.05 < len(data.val) / len(data.train) < 0.2
    with open(json.__file__, "rb") as f:
        assert f.read() in train + val
    assert data.meta["tokenizer"] == "bytes"
    assert data.meta["vocab_size"] == 256
    assert data.meta["python"] == sys.version.split()[0]


def test_your_own_files_in_bytes_and_in_gpt2_tokens(workplace, monkeypatch):
    for i in range(20):
        (workplace / f"{i}.txt").write_text(f"Document number {i}.\n" * 50 + "\N{SNOWMAN}\n")
    files = [f"--file={i}.txt" for i in range(20)]
    prepare_data.main(["text", *files])
    data = load("text")
    found = decoded(data.train, data) + decoded(data.val, data)
    assert sorted(found) == sorted((workplace / f"{i}.txt").read_bytes() for i in range(20))
    assert data.meta["made_by"].startswith("python prepare_data.py")
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs OpenAI's vocabulary: set TIKTOKEN_CACHE_DIR")
    prepare_data.main(["text", "--tokenizer=gpt2", *files])
    data = load("text-gpt2")
    assert data.meta["vocab_size"] == 50257
    assert (np.asarray(data.train) == 50256).sum() == data.meta["documents"]["train"]
    import tiktoken

    pieces = tiktoken.get_encoding("gpt2").decode(np.asarray(data.val).tolist()).split("<|endoftext|>")[1:]
    assert all(piece.encode() in found for piece in pieces)


def test_a_text_takes_three_times_its_size_in_memory(workplace):
    size = 8 << 20
    (workplace / "large.txt").write_bytes(b"One line of a large book.\n" * (size // 26))
    tracemalloc.start()
    try:
        said = call(prepare_data.main, "text", "--file=large.txt").stdout
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()
    assert "10 % held out" in said


def test_what_to_type_next_is_said_and_can_be_typed(workplace, monkeypatch):
    """Whatever a name holds. And a tilde is the home folder of a file."""
    (workplace / "mine.txt").write_text("To be, or not to be.\n\n" * 300)
    monkeypatch.setenv("HOME", str(workplace))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "text", "--file=~/mine.txt", "--as=it's my $text"])
    said = call(prepare_data.main, *sys.argv[1:]).stdout
    parent, child = said.split("train on it:\n")[1].splitlines()
    assert shlex.split(parent)[-2:] == ["--dataset=it's my $text", "--out_dir=out/it's my $text_dense"]
    assert shlex.split(child)[-2:] == ["--init_from=out/it's my $text_dense",
                                       "--out_dir=out/it's my $text_sparse"]
    assert shlex.split(load("it's my $text").meta["made_by"])[-1] == "--as=it's my $text"
    monkeypatch.chdir(REPOSITORY)
    for command in (parent, child, *(f"python train.py {made}" for made in prepare_data.MADE_FOR.values())):
        path, given = parse_command_line(shlex.split(command)[2:])
        config, _ = make_config(path, given)
        assert config.dataset in ("it's my $text", *prepare_data.MADE_FOR)
    monkeypatch.setattr(os, "name", "nt")  # whose shell knows no other quotes
    assert typed("python", "--as=my text") == 'python "--as=my text"'


def test_an_umlaut_is_one_where_the_locale_knows_ascii_only(workplace):
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, f"{REPOSITORY}/prepare_data.py", "text", "--file=grün.txt"]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "--file=grün.txt: No such file" in done.stderr


def test_the_dataset_that_the_docs_make_is_one(workplace):
    with open(os.path.join(REPOSITORY, "docs/data.md"), encoding="utf-8") as f:
        code = f.read().split("```python\n")[1].partition("```")[0]
    exec(code, {})
    x, y = load("subtraction").batch("val", range(161), 3)
    assert (y[:, :2] == -1).all()
    assert (y[:, 2] == (x[:, 0] - x[:, 1]) % 31).all()


def test_shakespeare_by_url(workplace, server, monkeypatch):
    play = ("ROMEO:\nBut soft, what light?\n\n" * 40).encode()
    (workplace / "served").mkdir()
    (workplace / "served/input.txt").write_bytes(play)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE", f"{server.url}/input.txt")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", server.sha256(play))
    server.cut_after = 100
    with pytest.raises(SystemExit, match="input.txt: invalid hash value.*Type the same command again"):
        prepare_data.main(["shakespeare"])
    server.cut_after = None
    prepare_data.main(["shakespeare"])
    data = load("shakespeare")
    assert decoded(data.train, data)[0] + decoded(data.val, data)[0] == play
    assert decoded(data.val, data)[0].startswith(b"ROMEO")
    asked = len(server.requests)
    prepare_data.main(["shakespeare"])
    assert len(server.requests) == asked  # it is there


def test_a_vocabulary_that_cannot_be_fetched_says_what_to_do(workplace, monkeypatch):
    def no_network(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(SystemExit,
                       match=r"cannot be fetched \(ConnectionError\).*TIKTOKEN_CACHE_DIR.*--tokenizer=bytes"):
        prepare_data.main(["stdlib", "--tokenizer=gpt2"])


def test_two_who_write_one_file_at_once_do_not_meet(workplace):
    with replacing("x") as one, replacing("x") as other:
        (workplace / one).write_text("one")
        (workplace / other).write_text("other")
    assert (workplace / "x").read_text() == "one"  # which was ready last
    assert os.listdir() == ["x"]


def test_what_a_kill_left_of_a_file_goes_with_the_next_writing(workplace):
    (workplace / "x.0123abcd.tmp").write_text("half")
    write_whole("x", b"whole")
    assert os.listdir() == ["x"]


def test_a_full_disk_leaves_no_half_dataset_and_the_old_one_whole(workplace, monkeypatch):
    before, calls = load("addition").meta, []

    def full(descriptor):  # for the second file
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="cannot write data/addition: .*No space left"):
        prepare_data.main(["addition"])
    assert load("addition").meta == before
    assert sorted(os.listdir("data/addition")) == ["meta.json", "train.bin", "val.bin"]


def test_processes_that_want_the_same_dataset_wait_for_the_first(workplace):
    code = "import prepare_data; print(prepare_data.load('addition').train.shape)"
    several = [begin(code, log=f"{number}") for number in range(3)]
    said = [ended(process, f"{number}").stdout for number, process in enumerate(several)]
    assert all("(8000, 2, 11)" in words for words in said)
    assert sum("making data/addition" in words for words in said) == 1
