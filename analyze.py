"""Every question to a model or a run, one command each.

    python analyze.py report out/addition               numbers and figures; train.py calls this at its end
    python analyze.py explain out/addition              when does each edge open, and what is it for?
    python analyze.py circuit out/stdlib_dense out/stdlib --task=quote
    python analyze.py --help                            all commands
    python analyze.py circuit --help                    one of them

This file is the door: it reads the command line and knows nothing of models. What a command does, and which
files it writes into a run's folder, is said in its own file, which `COMMANDS` names. Such a file has two
functions:

    add_arguments(parser)     its part of the command line
    run(options, settings)    the answer; settings are the --key=value that are train.py's, of `seeds`

Everything is computed again from the checkpoint, by the code that judged the run while it trained
(training/evaluate.py).
"""

import argparse
import difflib
import importlib
import math
import os
import signal
import sys

import torch

from storage.files import UserError, take_every_sign, typed

COMMANDS = {  # name: (its file, what it answers)
    "report": ("analysis.report", "what became of these runs? numbers and figures"),
    "seeds": ("analysis.seeds", "does it work with other seeds? and without a part of the method?"),
    "explain": ("analysis.explain", "addition: when does each edge open, and what for? or one sum"),
    "curve": ("analysis.curve", "what does sparsity cost? edges over loss, for several runs"),
    "baselines": ("analysis.baselines", "what do other ways to cut as many edges cost?"),
    "circuit": ("analysis.circuit", "how much of a dense and of a sparse model does a task need?"),
    "transcode": ("analysis.transcode", "what do the MLPs compute? trains a transcoder, features for MLPs"),
    "graph": ("analysis.graphs", "which features, through which heads, made a model say this?"),
    "view": ("view.page", "a page to look into a model, in any browser"),
    "sample": ("analysis.sample", "text from a model, and what every token read"),
    "benchmark": ("analysis.benchmark", "TruthfulQA, PIQA, OpenBookQA, ARC-Easy, dense beside sparse"),
    "export": ("models.export", "take a model to transformers, TransformerLens or nanoGPT"),
    "bench": ("analysis.bench", "how fast is the gate on this machine?"),
}
MOVED = {  # a command that there was: how to type it now
    "ask": "explain RUN 36+28",
    "induction": "circuit RUN --task=induction",
    "tasks": "circuit --task=TASK",
    "opens": "graph RUN --opens",
    "n80": "graph RUN --tasks=TASK",
    "ablate": "seeds CONFIG --changes",
}


class Parser(argparse.ArgumentParser):
    """argparse, with one short line for a mistake. Status 1: 2 is that of a run that missed its target."""

    def error(self, message):
        self.exit(1, f"error: {message}. See: python {self.prog} --help\n")


def nearest(word, words):
    """` Did you mean X?`, or nothing."""
    near = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def parser_for(command):
    """The parser of the whole command line.

    Only the file of `command` is imported: the others would take seconds.
    """
    parser = Parser(prog="analyze.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, question) in COMMANDS.items():
        own = commands.add_parser(
            name, help=question, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == command:
            file = importlib.import_module(module)
            own.description = file.__doc__
            own.set_defaults(answer=file.run)
            file.add_arguments(own)
            parser.chosen = own
    return parser


def check_values(options, parser):
    """Exit for a number that nothing can be computed with; put the home folder in the place of a path's ~."""
    for name, value in vars(options).items():
        if name == "seed" and not 0 <= value <= 1_000_000:
            parser.error(f"--seed={value}: it must be from 0 to a million")
        if type(value) is float and not math.isfinite(value) or type(value) is int and abs(value) >= 2**63:
            parser.error(f"--{name}={value}: it must be a finite number")
        if name == "prompt":
            continue  # a text, which may begin with ~
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
        if isinstance(value, list):
            setattr(options, name, [os.path.expanduser(word) for word in value])


def main(arguments):
    # whatever a notebook or a person has set: pictures go into files. matplotlib reads it when it is imported
    os.environ["MPLBACKEND"] = "Agg"
    command = arguments[0] if arguments else ""
    if command in MOVED:
        now = MOVED[command]
        sys.exit(f"error: {command} is part of {now.split()[0]} now: python analyze.py {now}")
    if command not in COMMANDS and command not in ("-h", "--help"):
        what = f"there is no command {command!r}.{nearest(command, COMMANDS)}" if command else "no command."
        sys.exit(f"error: {what} There are {', '.join(COMMANDS)}. See: python analyze.py --help")
    parser = parser_for(command)
    options, settings = parser.parse_known_args(arguments)
    if settings and command != "seeds":  # which hands them to train.py
        near = nearest(settings[0].partition("=")[0], parser.chosen._option_string_actions)
        parser.chosen.error(f"it takes no {settings[0]}.{near}".rstrip("."))
    check_values(options, parser.chosen)
    try:
        status = options.answer(options, settings)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory: {str(error).splitlines()[0]} "
                 f"To compute on the CPU: CUDA_VISIBLE_DEVICES= {typed('python', 'analyze.py', *arguments)}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    take_every_sign()
    if hasattr(signal, "SIGPIPE"):  # as other tools do: `| head` ends the command, and that is no error
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main(sys.argv[1:])
