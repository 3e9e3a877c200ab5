"""Tasks: what a circuit is a circuit of. Pairs of prompts that differ in one fact, so that what the fact
travels through can be found.

    clean      When Mary and John went to the store, John gave a drink to       -> " Mary", not " John"
    corrupted  When Mary and John went to the store, Paul gave a drink to       -> either

The corrupted twin has the same number of tokens, and what is not the fact stays where it was: replace an
activation of the clean run by its twin's, and only the fact is lost. How well the model still knows it is the
metric, at the position(s) of the answer:

    logit difference        mean logit of the right tokens - mean logit of the wrong ones
    probability difference  sum of the probabilities of the right tokens - sum of those of the wrong ones
                            (Greater Than)

    python analyze.py circuit --task=ioi --n=5                 prints five pairs
    python analyze.py circuit                                  prints what there is

Source: the paper's section on circuits (arXiv 2512.05865). Notable: pairs are a function of (task, n, seed).
prompts.py writes them; a task of your own is a function there and a line in TASKS here.
"""

import random
from typing import NamedTuple

import torch

from circuits import prompts
from storage import text
from storage.addition import ADDITION_TOKENS
from storage.files import UserError


class Pair(NamedTuple):
    """One clean prompt, its corrupted twin, and the question. Token ids throughout."""

    clean: list  # (T,)
    corrupted: list  # (T,), equal length
    positions: list  # where the logits are asked for the token that belongs next (for addition: there)
    right: list  # for each position, the tokens that count for
    wrong: list  # for each position, the tokens that count against

    @property
    def key(self):
        """What tells pairs apart, whatever their labels."""
        return tuple(self.clean), tuple(self.corrupted)


class Vocabulary(NamedTuple):
    """What a task must know about a model's tokens."""

    name: str  # 'gpt2', 'bytes', 'addition', or anything else
    size: int  # number of token ids
    encode: object  # str -> list of token ids; None where tokens are no text
    decode: object  # the other way round


def vocabulary(name, size=None):
    """The Vocabulary of a tokenizer, by its name (storage/text.py), or of 'addition'; any other needs its
    size, and only `copy` fits it. Raises UserError if a tokenizer cannot be fetched.
    """
    if name == "addition":
        return Vocabulary(name, len(ADDITION_TOKENS), lambda words: [ADDITION_TOKENS.index(c) for c in words],
                          lambda ids: "".join(ADDITION_TOKENS[i] for i in ids))
    if name in text.TOKENIZERS:
        tokens = text.tokenizer(name)

        def encode(words):
            return [int(i) for i in tokens.encode(words.encode())]

        return Vocabulary(name, tokens.vocab_size, encode, tokens.decode)
    return Vocabulary(name or "of its own", size, None, None)


PROBABILITY, LOGIT = "probability difference", "logit difference"
# vocabularies of words; what does not split as a task needs is left out by the task
WORDS_OF = ("gpt2", "olmo", "olmo2")
TASKS = {  # name: (prompts, the vocabularies it can be posed in, None being any; metric)
    "ioi": (prompts.ioi, WORDS_OF, LOGIT),
    "ioi_long": (prompts.ioi_long, WORDS_OF, LOGIT),
    "greater_than": (prompts.greater_than, WORDS_OF, PROBABILITY),
    "docstring": (prompts.docstring, ("bytes", *WORDS_OF), LOGIT),
    "copy": (prompts.copy, ("bytes", "gpt2", None), LOGIT),
    "addition": (prompts.addition, ("addition",), LOGIT),
    "carry": (prompts.carry, ("addition",), LOGIT),
    "quote": (prompts.quote, ("bytes",), LOGIT),
    "bracket": (prompts.bracket, ("bytes",), LOGIT),
}


def fitting(vocabulary_name):
    """Names of the tasks that can be posed in a vocabulary."""
    names = []
    for name, (_, fits, _) in TASKS.items():
        fits_any = None in fits and vocabulary_name != "addition"
        if vocabulary_name in fits or fits_any:
            names.append(name)
    return names


def make_pairs(task, n, seed, vocabulary):
    """n Pairs of a task, and its metric ('logit difference' or 'probability difference').

    vocabulary: a Vocabulary, the model's. Raises UserError if there is no such task, or if it cannot be posed
    in this vocabulary.
    """
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}. There are {', '.join(TASKS)}")
    if task not in fitting(vocabulary.name):
        raise UserError(f"the task {task} cannot be posed in the vocabulary {vocabulary.name!r}. "
                        f"What fits it: {', '.join(fitting(vocabulary.name))}")
    make_prompts, _, metric = TASKS[task]
    pairs = []
    made = make_prompts(vocabulary, n, random.Random(f"{task} {seed}"))
    for clean, corrupted, right, wrong, *positions in made:
        if len(clean) != len(corrupted) or clean == corrupted:
            raise UserError(
                f"{task}: the clean and the corrupted prompt of a pair must differ and have the same number "
                f"of tokens, not {len(clean)} and {len(corrupted)}: {clean}, {corrupted}"
            )
        if positions:
            pairs.append(Pair(clean, corrupted, positions[0], right, wrong))
        else:
            pairs.append(Pair(clean, corrupted, [len(clean) - 1], [right], [wrong]))
    return pairs, metric


def batches(pairs, size, device="cpu"):
    """Yield (clean (b, T), corrupted (b, T), pairs), at most `size` pairs of one length: prompts of different
    lengths cannot share a batch.
    """
    groups = {}
    for pair in pairs:
        groups.setdefault(len(pair.clean), []).append(pair)
    for group in groups.values():
        for part in (group[i:i + size] for i in range(0, len(group), size)):
            clean, corrupted = ([pair.clean for pair in part], [pair.corrupted for pair in part])
            yield torch.tensor(clean, device=device), torch.tensor(corrupted, device=device), part


def metric_of(logits, pairs, metric):
    """(B,): how well each pair's answer is known, the mean over its positions. logits (B, T, V)."""
    values = []
    for row, pair in zip(logits, pairs):
        row, mean = row[pair.positions], torch.mean  # (answers, V)
        if metric == PROBABILITY:
            row, mean = row.softmax(-1), torch.sum
        found = [mean(at[right]) - mean(at[wrong]) for at, right, wrong in zip(row, pair.right, pair.wrong)]
        values.append(torch.stack(found).mean())
    return torch.stack(values)
