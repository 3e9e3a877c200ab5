"""A page to look into a model: RUN/view.html, one file that any browser opens by double click.

    python analyze.py view out/addition                              three sums and one more
    python analyze.py view out/addition --prompt="36+28"             this sum
    python analyze.py view out/stdlib --prompt="print('a" --prompt="f(x"     two prompts

It shows the dense parent and the sparse model side by side, every open edge a line from the token that is
read, below, to the one that reads, above. Point at a token: what did it read? Click an edge: why is it open,
and what does the answer lose when it is cut? A slider keeps only the k best edges. `Tour` asks.

Where the runs have transcoders (`transcode`), `Features` shows what stands in the messages: which features
fire, what made them through which heads, and which of them open an edge.

Everything is computed here (data.py, features.py) and written into the page as JSON; the page
(page.html, features.js) only draws.
Notable: a prompt may say anything, </script> too. So the JSON has no <, > or &, the page's policy
(Content-Security-Policy) lets nothing in from outside, and tokens become text, never HTML.
"""

import os

from tqdm import tqdm

from analysis.graph import places_of
from analysis.questions import questions_of
from models.checkpoint import load_parent, model_of, read_checkpoint
from models.sources import checkpoint_named, folder_of_answers
from storage.files import UserError, json_of, write_whole
from training import parallel
from view import data as view_data
from view import features as view_features

HERE = os.path.dirname(os.path.abspath(__file__))
TEMPLATE, FEATURES = os.path.join(HERE, "page.html"), os.path.join(HERE, "features.js")
PLACE, PLACE_OF_FEATURES = "__DATA__", "__FEATURES__"  # in the template, for the JSON and for the other file
MOST_BYTES = 3_000_000


def models_of(checkpoint, path):
    """({'dense': its parent, 'sparse': the model}, what the page says of a parent that is gone, or '')."""
    device = parallel.pick_device("auto")
    sparse, dense, parent = model_of(checkpoint, path, device), None, checkpoint.get("parent")
    try:
        dense = load_parent(checkpoint, device) if parent else None
    except UserError as error:
        print(error)
    if dense is not None and not dense.config.gated:
        return {"dense": dense, "sparse": sparse}, ""
    note = f"{parent or 'Its dense parent'} is no dense model that can be read here: the sparse model only"
    print(note)
    return {"sparse": sparse}, note


def tokens_named(models):
    """Ids of all tokens that occur as predictions in the data of a question's models."""
    found = set()
    for data in models.values():
        tops = [data["top"], *(cut[1] for cut in data["cuts"]), *(top for _, _, top in data["circuits"])]
        found |= {token for top in tops for places in top for token, _ in places}
    return found


def data_of_page(run, models, note, questions, word, vocab_size, coders):
    """All that the page shows, plain values. coders: of `view_features.coders_of`, perhaps none."""
    config, prompts, named = models["sparse"].config, [], set()
    progress = tqdm(questions, desc="prompts", unit="prompt", disable=None)
    for question in progress:
        stops = view_data.counts([view_data.edges_open(model, question) for model in models.values()])
        data = {name: view_data.data_of(model, question, vocab_size, stops)
                for name, model in models.items()}
        named |= tokens_named(data)
        for name, (model, coder) in coders.items():
            data[name]["features"] = view_features.features_of(model, coder, question, word,
                                                               data[name]["edges"])
        prompts.append({"title": question.title, "pieces": question.pieces, "names": question.names,
                        "positions": question.positions, "expected": question.expected, "stops": stops,
                        "models": data})
    return {"run": run, "note": note, "layers": config.n_layer, "heads": config.n_head,
            "drawn": {"dense": view_data.DRAWN_DENSE, "sparse": view_data.DRAWN_SPARSE},
            "columns": view_data.EDGE, "node_columns": view_features.NODE, "link_columns": view_features.LINK,
            "words": {token: word(token) for token in sorted(named)},
            "prompts": prompts}


def escaped(data):
    """data as JSON that can stand in a <script> whatever it says: ASCII, without <, > and &."""
    words = json_of(data, "the page", separators=(",", ":"))  # ASCII: emoji become \\u escapes
    for sign in "<>&":  # only strings can hold them
        words = words.replace(sign, f"\\u{ord(sign):04x}")
    return words


def page_of(data):
    """The whole page, a str."""
    with open(TEMPLATE, encoding="utf-8") as page, open(FEATURES, encoding="utf-8") as features:
        whole = page.read().replace(PLACE_OF_FEATURES, features.read(), 1)
    return whole.replace(PLACE, escaped(data), 1)


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
    parser.add_argument("--name", default="transcoder", help="of the transcoders, as in `transcode`")


def run(options, settings):
    """`analyze.py view`."""
    folder = options.run.rstrip("/")
    path = checkpoint_named(folder)
    checkpoint = read_checkpoint(path)
    if not checkpoint["model_args"].get("gated"):
        raise UserError(f"{folder} is a dense run: it has no gates to look at. view needs its sparse child, "
                        "a gated run such as out/addition, and shows both")
    questions, word, vocab_size = questions_of(checkpoint, folder, options.prompt)
    models, note = models_of(checkpoint, path)
    places = places_of(checkpoint, path, folder)
    coders = view_features.coders_of({name: places[name] for name in models}, models, options.name)
    page = os.path.join(folder_of_answers(folder), "view.html")
    size = write_page(page, data_of_page(folder, models, note, questions, word, vocab_size, coders))
    prompts = ", ".join(repr(question.title) for question in questions)
    print(f"{page} ({size / 1000:.0f} kB) shows {prompts}. Open it in a browser")
