"""Let a model write, and show what it read: text generation, with the open edges of every token.

    python analyze.py sample out/stdlib --prompt="def read("            text
    python analyze.py sample out/stdlib --prompt="def read(" --edges    and, for every new token, the earlier
                                                                        tokens that it read

The next token is drawn from softmax(logits / temperature), restricted to the top_k likeliest. Gates are
deterministic, as in every evaluation: what `--edges` marks is all that the position could see, in any head of
any layer, before it chose.

Notable:
- An edge passes what layers below have gathered at the earlier token, so its text can carry news from further
  back. The model sees the last block_size tokens.
- Everything is computed anew for every token: a cache of keys and values would hide the method.
"""

import os
import shutil
import sys

import torch

from models.checkpoint import model_of, read_checkpoint, tokenizer_of
from models.sources import checkpoint_named, is_elsewhere
from storage import text
from storage.files import UserError
from training import parallel

READ = "\033[30;43m"  # black on yellow: a token that was read
NEW = "\033[1;36m"  # bold cyan: the token that reads
PLAIN = "\033[0m"


@torch.no_grad()
def generate(model, idx, tokens, temperature=0.8, top_k=50, vocab_size=None):
    """Yield, `tokens` times, the next token id and the (n_layer, H, T) edges that its position read.

    idx          (1, T0) token ids, at least one
    temperature  up to 1e-6, by which logits cannot be divided, takes the likeliest
    vocab_size   ids from there on are padding and never drawn

    An edge is True where it is open.
    """
    model.eval()
    for _ in range(tokens):
        idx, read = idx[:, -model.config.block_size:], []
        logits, _, _ = model(idx, record=lambda layer, gates: read.append(gates.open[0, :, -1] > 0))
        logits = logits[0, -1, :vocab_size].float()
        if temperature > 1e-6:
            lowest = logits.topk(min(top_k, len(logits))).values[-1]
            probabilities = (logits / temperature).masked_fill(logits < lowest, -torch.inf).softmax(-1)
            token = torch.multinomial(probabilities, 1)
        else:
            token = logits.argmax().view(1)
        yield token.item(), torch.stack(read)
        idx = torch.cat([idx, token[None]], dim=1)


def paint(words, color):
    """Words in a color; in brackets where no terminal is there to show it."""
    return f"{color}{words}{PLAIN}" if sys.stdout.isatty() else f"[{words}]"


def edges_line(context, new, read, tokens, width):
    """One line: the last tokens that fit into `width`, those that were read marked; then the new token."""
    *shown, chosen = text.pieces([*context, new], tokens)
    seen = read.any(dim=(0, 1)).tolist()  # by any head of any layer
    seen = [False] * (len(shown) - len(seen)) + seen  # what lies before the model's context was not read
    brackets = 0 if sys.stdout.isatty() else 2
    room = width - len(chosen) - brackets - len("  99999 edges, 9999 further left")
    first = len(shown)  # of the tokens in the line
    while first > 0 and (room := room - len(shown[first - 1]) - brackets * seen[first - 1]) >= 0:
        first -= 1
    line = "".join(paint(piece, READ) if was_read else piece
                   for piece, was_read in zip(shown[first:], seen[first:]))
    further = f", {sum(seen[:first])} further left" if any(seen[:first]) else ""
    return f"{line}{paint(chosen, NEW)}  {int(read.sum())} edges{further}"


def add_arguments(parser):
    parser.add_argument("run", help="a run's folder, a checkpoint, or OpenAI's gpt2, gpt2-medium, ...")
    parser.add_argument("--prompt", default="\n", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="choose among so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--edges", action="store_true",
                        help="mark, for every new token, the tokens that it read")


def run(options, settings):
    """`analyze.py sample`: the prompt and what the model writes behind it; with --edges a line a token."""
    if options.tokens < 1 or options.temperature < 0 or options.top_k < 1:
        raise UserError("--tokens and --top_k must be at least 1, --temperature at least 0")
    path = checkpoint_named(options.run)
    if not os.path.exists(path) and not is_elsewhere(path):
        raise UserError(f"there is no {options.run}. A run on text: python train.py config/stdlib.py; "
                        "another's weights: gpt2, or a folder")
    checkpoint = read_checkpoint(path)
    name = tokenizer_of(checkpoint)
    if name not in text.TOKENIZERS:
        raise UserError(f"{options.run} does not write text of a tokenizer that is known here "
                        f"(trained on: {name}). Choose a run on text, such as out/stdlib")
    tokens = text.tokenizer(name)
    device = parallel.pick_device(options.device)
    model = model_of(checkpoint, path, device)
    if options.edges:
        print(f"{paint('read', READ)} by some head of some layer before it chose "
              f"{paint('the next token', NEW)}; the number counts the edges of all heads")
    torch.manual_seed(options.seed)
    ids = [int(i) for i in tokens.encode(options.prompt.encode("utf-8", "surrogateescape"))]
    ids, new = ids or [tokens.separator], []
    idx = torch.tensor([ids], device=device)
    for token, read in generate(model, idx, options.tokens, options.temperature, options.top_k,
                                tokens.vocab_size):
        if options.edges:
            print(edges_line(ids + new, token, read, tokens, shutil.get_terminal_size().columns))
        new.append(token)
    if not options.edges:
        print(options.prompt + tokens.decode(new))
