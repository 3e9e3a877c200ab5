"""What is typed: a prompt, a sum or a text, its tokens and where the model answers it; and an edge's name.

`explain`, `view` and `graph` read them. A prompt that is none, or too long, is answered with a sentence.
"""

import re
from typing import NamedTuple

import prepare_data
from analysis.conditions import PLACES
from models.checkpoint import tokenizer_of
from storage import text
from storage.addition import ADDITION_TOKENS, addition_rows, addition_task, token_names
from storage.files import UserError, typed

LONGEST = 128  # tokens: more are no page to read
SNIPPETS = (  # a quote and a bracket to be closed, two words to be ended
    'name = "main',
    "for i in range(10",
    "def f(a, b):\n    ret",
    "if x is not N",
)
# The paper's three kinds of sum. Of each number a d-digit model gets the last d digits: 53+21, 36+28, 43+59
SUMS = [(6253, 1421, "no carry"),
        (4136, 3528, "carry out of the units"),
        (5743, 8659, "carry into the {highest}")]


class Question(NamedTuple):
    """One prompt, and where the model answers it."""

    title: str
    ids: list  # token ids (T,)
    pieces: list  # what the page writes for each token
    names: list  # what its position is called, '' if nothing
    positions: list  # where the answer is read
    expected: str | None  # the right answer, of sums


def parse_sum(question, task, example):
    """`36+28` -> (36, 28). Raises UserError if it is no sum, or a number has too many digits."""
    most = 10**task.digits - 1
    hint = f"Type two numbers from 0 to {most}, for instance: {example} {most // 3}+{most // 2}"
    found = re.fullmatch(r"([0-9]+)\+([0-9]+)=?", "".join(question.split()))
    if not found:
        what = f"{question!r} is not a sum" if question else "there is no sum to ask for"
        raise UserError(f"{what}. {hint}")
    a, b = int(found[1]), int(found[2])
    if max(a, b) > most:
        raise UserError(f"{max(a, b)} is too large for this model. {hint}")
    return a, b


def parse_edge(words, config, task, option="--shut"):
    """`1.s2.s4` (layer.query.key) or `1.0.s2.s4` (layer.head.query.key) -> (layer, head, query, key).

    config: the model's; option: that had the words. Raises UserError if the model has no such edge.
    """
    names = token_names(task)
    first, last = names[-1], names[0]
    form, example = f"layer.query.key, such as {option}=0.{first}.{last}", f"{option}={words}"
    if config.n_head > 1:
        form = f"layer.head.query.key, such as {option}=0.0.{first}.{last}"
    parts = words.split(".")
    if config.n_head == 1 and len(parts) == 3:
        parts.insert(1, "0")
    if len(parts) != 4:
        raise UserError(f"{example} names no edge: write {form}")
    layer, head = (number_below(part, count, example, what) for part, count, what in
                   ((parts[0], config.n_layer, "layers"), (parts[1], config.n_head, "heads")))
    for name in parts[2:]:
        if name not in names:
            raise UserError(f"{example}: no position is called {name!r}, there are {' '.join(names)}")
    query, key = names.index(parts[2]), names.index(parts[3])
    if key > query:
        raise UserError(f"{example}: {parts[2]} cannot read {parts[3]}, which comes after it")
    return layer, head, query, key


def number_below(words, count, example, what):
    """The number in words, if it is one of the model's `count` layers or heads, else UserError."""
    if not words.isdecimal() or int(words) >= count:
        raise UserError(f"{example}: the model's {what} are 0 to {count - 1}, {words!r} is none of them")
    return int(words)


def text_question(prompt, tokens, block_size):
    """The Question of a prompt for a model of text. tokens: a Tokenizer. Raises UserError."""
    if not prompt:
        raise UserError('the prompt is empty. Type some text, for instance: --prompt="import "')
    ids = [int(i) for i in tokens.encode(prompt.encode("utf-8", "surrogateescape"))]
    most = min(block_size, LONGEST)
    if len(ids) > most:
        why = "this model's context has" if most == block_size else "the page has room for"
        end = typed(f"--prompt={tokens.decode(ids[-most // 2:])}")
        raise UserError(f"the prompt has {len(ids)} tokens, {why} {most}. Type a shorter one, such as its "
                        f"end: {end}")
    return Question(prompt, ids, text.pieces(ids, tokens), [""] * len(ids), [len(ids) - 1], None)


def default_snippets(tokens, block_size):
    """The ends of SNIPPETS that fit into the context."""
    cut = [tokens.encode(snippet.encode())[-block_size:] for snippet in SNIPPETS]
    return [tokens.decode([int(i) for i in ids]) for ids in cut]


def symbols(tokens):
    """Token ids of addition as the signs that they stand for."""
    return [ADDITION_TOKENS[t] for t in tokens]


def example_sums(task):
    """The sums to draw, of the paper's three kinds: [(a, b, kind)]."""
    highest = PLACES[task.digits]
    end = 10**task.digits
    return [(a % end, b % end, kind.format(highest=highest)) for a, b, kind in SUMS]


def sum_question(prompt, task):
    """The Question of a sum. Raises UserError if the prompt is none."""
    a, b = parse_sum(prompt, task, "--prompt")
    ids = addition_rows([a], [b], *task)[0, 0].tolist()
    positions = list(range(task.first, task.length))
    return Question(f"{a}+{b}", ids, symbols(ids), token_names(task), positions, f"{a + b:0{task.answers}d}")


def default_sums(task):
    """The sums of the report, and the one with a carry that runs through nines."""
    nines = 10**task.digits - 1
    return [f"{a}+{b}" for a, b, _ in example_sums(task)] + [f"{nines}+1"]


def questions_of(checkpoint, run, prompts):
    """(Questions, words: token id -> str, size of the vocabulary). prompts: from the command line, perhaps
    none. Raises UserError.
    """
    args, name = checkpoint["model_args"], tokenizer_of(checkpoint)
    if name in text.TOKENIZERS:
        tokens, block_size = text.tokenizer(name), args["block_size"]
        prompts = prompts or default_snippets(tokens, block_size)
        found = [text_question(prompt, tokens, block_size) for prompt in prompts]
        size = min(tokens.vocab_size, args["vocab_size"])
        return found, lambda token: text.pieces([token], tokens)[0], size
    dataset = checkpoint.get("data", {}).get("dataset")
    task = addition_task(prepare_data.load(dataset).meta) if dataset else None
    if task is None:
        raise UserError(f"{run} is a run on {dataset or 'other data'}, whose tokens are no words: only "
                        "addition and text can be asked. Try out/addition")
    found = [sum_question(prompt, task) for prompt in prompts or default_sums(task)]
    return found, lambda token: symbols([token])[0], args["vocab_size"]
