"""The lab sheets of docs/labs: every command and snippet runs, and prints the numbers of solutions.md.

A number in solutions.md is followed by a comment that says what it is and how far it may lie:

    3.00 <!-- 2..12 after "open edges" -->      the number that follows `open edges` in the output there

Training is chaotic in its last digits, so another processor gets other numbers: both must lie in the range.
"""

import contextlib
import io
import os
import re
import shlex

import pytest

from conftest import REPOSITORY
from helpers import MAIN, call, in_this_process
from training.judge import MISSED

LABS = os.path.join(REPOSITORY, "docs", "labs")
SHEETS = ("1-edges", "2-carry", "3-thermostat", "4-faithful")
NUMBER = r"-?[\d,]*\.?\d+"


def read(name):
    with open(os.path.join(LABS, f"{name}.md"), encoding="utf-8") as f:
        return f.read()


def tasks(page):
    """{number: text} of a page's `## 1. Title` sections; of solutions.md by `## 1.3`."""
    parts = re.split(r"^## ([\d.]+?)\.? .*$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def work_of(task):
    """What a task runs, in its order: ('python', snippet, statuses) or ('shell', command, statuses)."""
    for snippet, command in re.findall(r"```python\n([\s\S]*?)```|^    (python .*)$", task, re.MULTILINE):
        if snippet:
            yield "python", snippet, (0,)
        else:
            said = re.search(r"# exit status (0 or )?2", command)
            yield "shell", command, ((0, MISSED) if said[1] else (MISSED,)) if said else (0,)


def quoted(solution):
    """(number, low, high, the words it follows) of every checked number of a solution."""
    found = re.findall(rf'({NUMBER})(?: %)?\**\s*<!-- (\S+?)\.\.(\S+) after "(.*?)" -->', solution)
    return [(value(number), float(low), float(high), words) for number, low, high, words in found]


def value(number):
    return float(number.replace(",", ""))


def run(kind, code, names):
    """(exit status, output)"""
    if kind == "python":
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, names)
        return 0, out.getvalue()
    program, *arguments = shlex.split(code, comments=True)[1:]
    done = call(MAIN[program], *arguments)
    return done.returncode, done.stdout + done.stderr


def test_sheets_ask_six_to_ten_questions_with_short_snippets_and_solutions():
    solutions = tasks(read("solutions"))
    for sheet in SHEETS:
        asked = tasks(read(sheet))
        assert 6 <= len(asked) <= 10
        for number, text in asked.items():
            assert f"{sheet[0]}.{number}" in solutions and "?" in text
            for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                assert len([line for line in snippet.splitlines() if line]) <= 12, (sheet, number)


@pytest.mark.slow
def test_the_labs_do_what_their_solutions_say(workplace, monkeypatch):
    os.symlink(os.path.join(REPOSITORY, "config"), "config")
    in_this_process(monkeypatch)
    printed = {}
    for sheet in SHEETS:
        names = {"__name__": "lab"}
        for number, text in tasks(read(sheet)).items():
            for kind, code, expected in work_of(text):
                status, output = run(kind, code, names)
                assert status in expected, (sheet, number, code, output)
                printed.setdefault(f"{sheet[0]}.{number}", []).append(output)
                print(f"## {sheet[0]}.{number}\n{output}")  # `-s`: what to write in solutions.md
    checked = 0
    for task, solution in tasks(read("solutions")).items():
        for number, low, high, words in quoted(solution):
            measured = re.search(rf"{re.escape(words)}\s*({NUMBER})", "".join(printed.get(task, [])))
            assert measured, f"{task}: nothing printed after {words!r}"
            for one in number, value(measured[1]):
                assert low <= one <= high, (task, words, number, measured[1])
            checked += 1
    assert checked >= 40
