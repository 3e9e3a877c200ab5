"""The tasks: equal lengths, one fact changed, answers that are one token each, the same pairs for the same
seed, refusals that name what fits.
"""

import collections
import os

import pytest

import analyze
from circuits import prompts, tasks
from circuits.tasks import LOGIT, TASKS, fitting, make_pairs, vocabulary
from conftest import REPOSITORY
from helpers import call
from storage.addition import addition_rows
from storage.files import UserError

# OLMo's vocabulary cannot be had without network, GPT-2's from a cache
needs_gpt2 = pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"),
                                reason="TIKTOKEN_CACHE_DIR does not lead to GPT-2's vocabulary")
NAMES = ("bytes", "addition", pytest.param("gpt2", marks=needs_gpt2))


@pytest.mark.parametrize("name", NAMES)
def test_pairs_have_equal_lengths_differ_and_ask_for_single_tokens(name):
    tokens = vocabulary(name)
    for task in (task for task, (_, fits, _) in TASKS.items() if name in fits):
        pairs, metric = make_pairs(task, 60, 1, tokens)
        assert len(pairs) == 60 and metric in (tasks.LOGIT, tasks.PROBABILITY)
        for pair in pairs:
            assert len(pair.clean) == len(pair.corrupted) and pair.clean != pair.corrupted
            assert len(pair.positions) == len(pair.right) == len(pair.wrong) >= 1
            for position, right, wrong in zip(pair.positions, pair.right, pair.wrong):
                assert 0 <= position < len(pair.clean) and right and wrong and not set(right) & set(wrong)
                assert all(0 <= token < tokens.size for token in [*right, *wrong])
        assert len({tuple(pair.clean) for pair in pairs}) > 40
        assert pairs == make_pairs(task, 60, 1, tokens)[0] != make_pairs(task, 60, 2, tokens)[0]
        if name == "bytes":
            assert max(len(pair.clean) for pair in pairs) <= 128  # the text experiment's context


@needs_gpt2
def test_in_ioi_only_the_giver_changes_and_both_orders_are_there():
    show, orders = vocabulary("gpt2").decode, collections.Counter()
    for task in ("ioi", "ioi_long"):
        for pair in make_pairs(task, 100, 1, vocabulary("gpt2"))[0]:
            changed = [i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupted)) if a != b]
            (giver,), (receiver,), text = pair.wrong[0], pair.right[0], show(pair.clean)
            assert len(changed) == 1
            assert pair.clean[changed[0]] == giver
            assert pair.corrupted[changed[0]] not in pair.clean
            assert pair.clean.count(giver) == 2 and pair.clean.count(receiver) == 1 and text.endswith(" to")
            orders[task, pair.clean.index(giver) < pair.clean.index(receiver)] += 1
            assert task == "ioi" or len(pair.clean) > 45
    assert min(orders.values()) > 30


@needs_gpt2
def test_greater_than_counts_every_year_that_splits_and_no_other():
    encode, show = vocabulary("gpt2").encode, vocabulary("gpt2").decode
    for pair in make_pairs("greater_than", 50, 1, vocabulary("gpt2"))[0]:
        start = int(show(pair.clean).split("the year 17")[1][:2])
        right, wrong = ([int(show([token])) for token in group[0]] for group in (pair.right, pair.wrong))
        assert max(wrong) == start < min(right) and "the year 1701 to" in show(pair.corrupted)
        splits = [year for year in range(1, 100)
                  if [show([t]) for t in encode(f" 17{year:02d}")] == [" 17", f"{year:02d}"]]
        assert sorted(right + wrong) == splits


def test_words_that_split_are_left_out():
    def encode(text):
        return [0, 1] if "a" in text.lower() else [0]

    assert prompts.one_token(["Bob", "Anna", "Tim"], encode) == ["Bob", "Tim"]


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "bytes"])
def test_docstring_asks_for_the_third_argument_and_the_twin_never_names_it(name):
    show = vocabulary(name).decode
    pairs, _ = make_pairs("docstring", 2000, 1, vocabulary(name))
    assert name == "bytes" or not any(pair.right[0][0] in pair.corrupted for pair in pairs)
    for pair in pairs[:50]:
        clean, corrupted = show(pair.clean), show(pair.corrupted)
        arguments = clean[clean.index("(") + 1:clean.index(")")].removeprefix("self, ").split(", ")
        answer = show(pair.right[0]).strip()
        assert arguments[2] == answer if name == "gpt2" else arguments[2][0] == answer
        assert clean.split(":param ")[1].startswith(arguments[0])
        assert clean.split(":param ")[2].startswith(arguments[1])
        assert arguments[2] not in corrupted.split(")")[0]


def test_bytes_tasks_close_what_was_opened():
    show = vocabulary("bytes").decode
    for pair in make_pairs("bracket", 50, 1, vocabulary("bytes"))[0]:
        opened = [c for c in show(pair.clean) if c in "(["]
        assert len(opened) == 2
        assert opened[0] != opened[1]
        assert opened[1] + show(pair.right[0]) in ("()", "[]")
        assert opened[0] + show(pair.wrong[0]) in ("()", "[]")
        assert [c for c in show(pair.corrupted) if c in "(["] == opened[::-1]
    for pair in make_pairs("quote", 50, 1, vocabulary("bytes"))[0]:
        assert show(pair.clean).count(show(pair.right[0])) == 1
        assert show(pair.corrupted).count(show(pair.wrong[0])) == 1


def test_copy_is_induction_and_its_twin_has_nothing_to_copy():
    for pair in make_pairs("copy", 50, 1, vocabulary("a model of 40 tokens", 40))[0]:
        last = pair.clean[-1]
        assert pair.clean[pair.clean.index(last) + 1] == pair.right[0][0] and pair.corrupted.count(last) == 1
        assert pair.right[0][0] not in pair.corrupted and pair.wrong[0][0] in pair.corrupted


def test_sums_are_right_and_written_as_the_model_reads_them():
    show = vocabulary("addition").decode
    for task in ("addition", "carry"):
        for pair in make_pairs(task, 100, 1, vocabulary("addition"))[0]:
            sums = []
            for prompt, digits in ((pair.clean, pair.right), (pair.corrupted, pair.wrong)):
                a, b = int(show(prompt)[:2]), int(show(prompt)[3:5])
                assert prompt == addition_rows([a], [b])[0, 0].tolist()
                expected = f"{a + b:05d}"
                asked = [expected[position - 6] for position in pair.positions]
                assert asked == [str(digit[0]) for digit in digits]
                sums.append((a, b))
            if task == "carry":
                (a, b), (c, d) = sums
                assert (a // 10, b // 10, (a + b) % 10) == (c // 10, d // 10, (c + d) % 10)
                assert a + b == c + d + 10
                assert a + b < 100


@pytest.mark.parametrize("task, name, words", [
    ("ioi", "bytes", "ioi cannot be posed in the vocabulary 'bytes'. What fits it: docstring, copy, quote"),
    ("iou", "bytes", "no task 'iou'. There are ioi, ioi_long"),
    ("uneven", "bytes", "uneven: the clean and the corrupted prompt of a pair must differ and have the same "
                        "number of tokens, not 1 and 2"),
    ("copy", "tiny", "needs 24 different tokens"),
])
def test_a_task_that_cannot_be_posed_says_so(monkeypatch, task, name, words):
    monkeypatch.setitem(TASKS, "uneven", (lambda *_: iter([([1], [1, 2], 3, 4)]), ("bytes",), LOGIT))
    with pytest.raises(UserError, match=words):
        make_pairs(task, 1, 1, vocabulary(name, 20))


def test_the_command_prints_pairs_and_what_there_is():
    def command(*arguments):
        return call(analyze.main, "circuit", *arguments)

    assert "bracket" in command().stdout
    printed = command("--task=quote", "--n=3").stdout
    assert printed.count("clean ") == printed.count("corrupted ") == printed.count("right ") == 3
    assert "--n must be at least 1" in command("--task=quote", "--n=-1").stderr
    assert "invalid choice: 'olmo'" in command("--task=ioi", "--vocabulary=olmo").stderr


def test_the_task_that_the_docs_add_works(monkeypatch):
    with open(os.path.join(REPOSITORY, "docs/circuits.md"), encoding="utf-8") as f:
        code = next(block.partition("```")[0] for block in f.read().split("```python\n")
                    if "def triple" in block)
    assert len(code.splitlines()) <= 20
    monkeypatch.setattr(tasks, "TASKS", dict(TASKS))
    function, line = code.split("\n\n")
    exec(function, vars(prompts))
    exec(line, vars(tasks))
    pairs, metric = make_pairs("triple", 20, 1, vocabulary("bytes"))
    assert metric == "logit difference" and "triple" in fitting("bytes")
    for pair in pairs:
        prompt = bytes(pair.clean).decode()
        assert prompt.count(chr(pair.right[0][0])) == 3
        assert len(pair.clean) == len(pair.corrupted)
        assert pair.right != pair.wrong
    del prompts.triple


@needs_gpt2
def test_words_of_another_vocabulary_fit_by_how_they_split():
    """OLMo's tokenizers are other BPEs of the same kind: what splits as the task needs is used, and a task
    that nothing fits says so.
    """
    gpt2 = vocabulary("gpt2")
    assert fitting("olmo") == fitting("olmo2") == ["ioi", "ioi_long", "greater_than", "docstring", "copy"]
    assert fitting("addition") == ["addition", "carry"] and fitting("of somebody's own") == ["copy"]
    assert len(make_pairs("ioi", 5, 1, gpt2._replace(name="olmo"))[0]) == 5
    # no year in two tokens
    by_three = gpt2._replace(name="olmo2", encode=lambda words: [ord(c) for c in words])
    with pytest.raises(UserError, match="splits 1701 into 17 and 01"):
        make_pairs("greater_than", 5, 1, by_three)


def test_gpt2s_vocabulary_out_of_reach_is_a_message(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(SystemExit, match="cannot be fetched .ConnectionError.. tiktoken downloads it"):
        analyze.main(["circuit", "--task=ioi"])
