"""What cannot be answered is answered with one sentence, status 1 and no traceback: every command's table."""

import re

import pytest

import analyze
from helpers import call

REFUSED = [
    ("", "no command"),
    ("reprot out/sums", "Did you mean report[?]"),
    ("report", "required: RUN"),
    ("report out/none", "out/none is no run's folder"),

    ("explain out/sums --shot=0.s0.+", "it takes no --shot=0.s0.[+]. Did you mean --shut[?]"),
    ("explain out/sums_dense", "out/sums_dense is a dense run on addition"),
    ("explain out/text 36+28", "out/text is a gated run on text: .* it needs a run on addition"),
    ("explain out/none 36+28", "there is no checkpoint out/none"),
    ("explain out/sums 36-28", "'36-28' is not a sum. Type two numbers from 0 to 99, for instance: "
                               "python analyze.py explain out/sums 33[+]49"),
    ("explain out/sums --shut=1.s2.s2", "there is no sum to ask for. Type two numbers"),
    ("explain out/sums 136+28", "136 is too large for this model. Type two numbers from 0 to 99"),
    ("explain out/sums 36+28 --shut=s2", "--shut=s2 names no edge: write layer.query.key"),
    ("explain out/heads 36+28 --shut=1.s2.s4", "layer.head.query.key, such as --shut=0.0.s0.a1"),
    ("explain out/sums 36+28 --shut=1.s2.s9", "--shut=1.s2.s9: no position is called 's9'"),
    ("explain out/sums 36+28 --shut=2.s2.s4", "the model's layers are 0 to 1, '2' is none of them"),
    ("explain out/sums 36+28 --shut=1.s4.s2", "s4 cannot read s2, which comes after it"),

    ("view out/sums_dense", "is a dense run: it has no gates to look at. view needs its sparse child"),
    ("view out/sums --prompt=36-28", "'36-28' is not a sum.* for instance: --prompt 33[+]49"),
    ("view out/text --prompt=", "the prompt is empty. Type some text, for instance: --prompt="),
    ("view out/text --prompt=" + 65 * "a", "the prompt has 65 tokens, this model's context has 64. Type "),
    ("view out/other", "out/other is a run on other, whose tokens are no words: only addition and text can"),

    ("graph out/sums", "say what to explain: --prompt=..., --opens or --tasks=..."),
    ("graph out/sums out/heads --opens", "several runs are compared with --tasks"),
    ("graph out/sums --prompt=1+2 --at=s9", "--at=s9: this prompt is answered at s4, s3, s2, s1, s0"),
    ("graph out/sums --prompt=1+2 --name=other", "has no other.pt. Train one first: python analyze.py "
                                                 "transcode out/sums --price=0.1 --name=other"),
    ("graph out/sums --opens=2", "--opens=2 names no edge: write layer.query.key"),
    ("graph out/sums --opens=9.s1.=", "--opens=9.s1.=: the model's layers are 0 to 1"),
    ("graph out/sums --opens --n=1", "--n must be at least 2"),
    ("graph out/sums_dense --opens", "--opens looks at the gates of two-digit addition"),
    ("graph out/sums_dense --tasks=carry", "out/sums_dense is a dense run: --tasks compares"),
    ("graph out/sums --tasks=carry --name=c", "has no c.pt. Train one first"),
    ("graph out/sums --tasks=carry --n=0", "--n must be at least 1"),

    ("transcode out/sums --steps=0", "must be at least 1"),
    ("transcode out/sums --price=-1", "--price and --revive must be 0 or more"),
    ("transcode out/sums --revive=inf", "--revive=inf: it must be a finite number"),

    ("sample out/none", "there is no out/none. A run on text: python train.py config/stdlib.py"),
    ("sample out", "no best.pt or last.pt in out"),
    ("sample out/sums", "does not write text .*trained on: addition"),
    ("sample out/text --tokens=0", "--tokens and --top_k must be at least 1"),
    ("sample out/text --seed=-1", "it must be from 0 to a million"),
    ("sample out/text --top_k=99999999999999999999", "--top_k=9+: it must be a finite number"),
    ("sample out/text --device=cuda:9", "device=cuda:9"),

    ("baselines out/sums --rules=topk", "there is no rule 'topk'"),
    ("baselines out/sums --budgets=x", "--budgets are numbers above 0"),
    ("baselines out/sums --budgets=1,nan", "--budgets are numbers above 0"),
    ("baselines out/sums_dense", "out/sums_dense is no gated run whose weights are all trained"),
    ("curve out/none", "out/none has no report yet"),
    ("circuit out/sums_dense out/sums", "say which task: --task="),
    ("circuit out/sums out/sums_dense --task=carry", "circuit compares a dense run with a sparse one"),
    ("bench --most_memory=nan", "--most_memory=nan: it must be a finite number"),
    *[(f"bench {flag} --device=cpu", "write numbers above 0")
      for flag in ("--open=x", "--open=0", "--open=nan", "--lengths=64,")],
]


@pytest.mark.parametrize("words, message", REFUSED)
def test_what_cannot_be_answered_is_one_sentence(models_to_ask, words, message):
    done = call(analyze.main, *words.split())
    assert done.returncode == 1 and re.search(message, done.stderr), done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
