"""Questions to a model: a prompt, its tokens, and where the model answers it. Of sums and of text.

`view`, `graph`, `opens` and `n80` ask them. A prompt that is none, or too long, is answered with a sentence.
"""

from typing import NamedTuple

import prepare_data
from analysis.ask import parse_sum
from analysis.report_figures import example_sums, symbols
from models.checkpoint import tokenizer_of
from storage import text
from storage.addition import addition_rows, addition_task, token_names
from storage.files import UserError, typed

LONGEST = 128  # tokens: more are no page to read
SNIPPETS = (  # a quote and a bracket to be closed, two words to be ended
    'name = "main',
    "for i in range(10",
    "def f(a, b):\n    ret",
    "if x is not N",
)


class Question(NamedTuple):
    """One prompt, and where the model answers it."""

    title: str
    ids: list  # token ids (T,)
    pieces: list  # what the page writes for each token
    names: list  # what its position is called, '' if nothing
    positions: list  # where the answer is read
    expected: str | None  # the right answer, of sums


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
