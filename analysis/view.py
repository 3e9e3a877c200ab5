"""A page to look into a model: RUN/view.html, one file that any browser opens by double click.

    python analyze.py view out/addition                              three sums and one more
    python analyze.py view out/addition --prompt="36+28"             this sum
    python analyze.py view out/stdlib --prompt="print('a" --prompt="f(x"     two prompts

It shows the dense parent and the sparse model side by side, every open edge a line from the token that is
read, below, to the one that reads, above. Point at a token: what did it read? Click an edge: why is it open,
and what does the answer lose when it is cut? A slider keeps only the k best edges. `Tour` asks.

Everything is computed here (view_data.py) and written into the page as JSON; the page (view.html) only draws.
Notable: a prompt may say anything, </script> too. So the JSON has no <, > or &, the page's policy
(Content-Security-Policy) lets nothing in from outside, and tokens become text, never HTML.
"""

import json
import os

import torch
from tqdm import tqdm

import prepare_data
from analysis import view_data
from analysis.ask import parse_sum
from analysis.report_figures import example_sums, symbols
from analysis.view_data import Question
from models.checkpoint import (
    checkpoint_named,
    folder_of_answers,
    load_checkpoint,
    model_of,
    read_checkpoint,
    tokenizer_of,
)
from storage import text
from storage.addition import addition_rows, addition_task, token_names
from storage.files import UserError, write_whole
from training import hardware

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "view.html")
PLACE = "__DATA__"  # in the template, for the JSON
LONGEST = 128  # tokens: more are no page to read
MOST_BYTES = 3_000_000
SNIPPETS = (  # a quote and a bracket to be closed, two words to be ended
    'name = "main',
    "for i in range(10",
    "def f(a, b):\n    ret",
    "if x is not N",
)


# ------------------------------------------------------------------------------------------------------------
# questions


def text_question(prompt, tokens, block_size):
    """The Question of a prompt for a model of text. tokens: a Tokenizer. Raises UserError."""
    if not prompt:
        raise UserError('the prompt is empty. Type some text, for instance: --prompt="import "')
    ids = [int(i) for i in tokens.encode(prompt.encode("utf-8", "surrogateescape"))]
    most = min(block_size, LONGEST)
    if len(ids) > most:
        why = "this model's context has" if most == block_size else "the page has room for"
        raise UserError(f"the prompt has {len(ids)} tokens, {why} {most}. Type a shorter one, such as its "
                        f"end: --prompt={tokens.decode(ids[-most // 2:])!r}")
    return Question(prompt, ids, text.pieces(ids, tokens), [""] * len(ids), [len(ids) - 1], None)


def default_snippets(tokens, block_size):
    """The ends of SNIPPETS that fit into the context."""
    cut = [tokens.encode(snippet.encode())[-block_size:] for snippet in SNIPPETS]
    return [tokens.decode([int(i) for i in ids]) for ids in cut]


def sum_question(prompt, task, run):
    """The Question of a sum. Raises UserError if the prompt is none."""
    a, b = parse_sum(prompt, task, f"python analyze.py view {run} --prompt")
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
        raise UserError(f"{run} is a run on {dataset or 'other data'}, whose tokens are no words: view knows "
                        "addition and text. Try one of these: python analyze.py view out/addition")
    found = [sum_question(prompt, task, run) for prompt in prompts or default_sums(task)]
    return found, lambda token: symbols([token])[0], args["vocab_size"]


# ------------------------------------------------------------------------------------------------------------
# models


def models_of(checkpoint, path):
    """({'dense': its parent, 'sparse': the model}, what the page says of a parent that is gone, or '')."""
    device = hardware.pick_device("auto")
    sparse = model_of(checkpoint, path, device)
    parent = checkpoint.get("parent")
    try:
        dense = load_checkpoint(parent, device) if parent else None
    except UserError:
        dense = None
    if dense is not None and not dense.config.gated:
        return {"dense": dense, "sparse": sparse}, ""
    note = f"{parent or 'Its dense parent'} is no dense model that can be read here: the sparse model only"
    print(note)
    return {"sparse": sparse}, note


def gated_checkpoint(run):
    """(checkpoint, its path) of a gated run. Raises UserError if it has no gates."""
    path = checkpoint_named(run)
    checkpoint = read_checkpoint(path)
    if not checkpoint["model_args"].get("gated"):
        raise UserError(f"{run} is a dense run: it has no gates to look at. view needs its sparse child, "
                        "a gated run such as out/addition, and shows both")
    return checkpoint, path


# ------------------------------------------------------------------------------------------------------------
# the page


def tokens_named(models):
    """Ids of all tokens that occur as predictions in the data of a question's models."""
    found = set()
    for data in models.values():
        tops = [data["top"], *(cut[1] for cut in data["cuts"]), *(top for _, _, top in data["circuits"])]
        found |= {token for top in tops for places in top for token, _ in places}
    return found


def data_of_page(run, models, note, questions, word, vocab_size):
    """All that the page shows, plain values."""
    config, prompts, named = models["sparse"].config, [], set()
    progress = tqdm(questions, desc="prompts", unit="prompt", disable=None)
    for question in progress:
        stops = view_data.counts([view_data.edges_open(model, question) for model in models.values()])
        data = {name: view_data.data_of(model, question, vocab_size, stops)
                for name, model in models.items()}
        named |= tokens_named(data)
        prompts.append({"title": question.title, "pieces": question.pieces, "names": question.names,
                        "positions": question.positions, "expected": question.expected, "stops": stops,
                        "models": data})
    return {"run": run, "note": note, "layers": config.n_layer, "heads": config.n_head,
            "drawn": {"dense": view_data.DRAWN_DENSE, "sparse": view_data.DRAWN_SPARSE},
            "columns": view_data.EDGE, "words": {token: word(token) for token in sorted(named)},
            "prompts": prompts}


def escaped(data):
    """data as JSON that can stand in a <script> whatever it says: ASCII, without <, > and &."""
    words = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: emoji become \\u escapes
    for sign in "<>&":  # only strings can hold them
        words = words.replace(sign, f"\\u{ord(sign):04x}")
    return words


def page_of(data):
    """The whole page, a str."""
    with open(TEMPLATE, encoding="utf-8") as f:
        return f.read().replace(PLACE, escaped(data), 1)


def write_page(path, data):
    """Write the page. Raises UserError if it became too large."""
    content = page_of(data).encode()
    if len(content) > MOST_BYTES:
        raise UserError(f"the page would have {len(content) / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}. "
                        "Give fewer or shorter prompts: --prompt=...")
    write_whole(path, content)
    return len(content)


def add_arguments(parser):
    parser.add_argument("run", metavar="RUN", help="a gated run's folder, such as out/addition")
    parser.add_argument("--prompt", action="append", default=[],
                        help="a sum or a text; may be given several times")


def run(options, settings):
    """`analyze.py view`."""
    folder = options.run.rstrip("/")
    checkpoint, path = gated_checkpoint(folder)
    questions, word, vocab_size = questions_of(checkpoint, folder, options.prompt)
    models, note = models_of(checkpoint, path)
    torch.manual_seed(0)
    page = os.path.join(folder_of_answers(folder), "view.html")
    size = write_page(page, data_of_page(folder, models, note, questions, word, vocab_size))
    prompts = ", ".join(repr(question.title) for question in questions)
    print(f"{page} ({size / 1000:.0f} kB) shows {prompts}. Open it in a browser")
