"""Settings: a dataclass, a config file over its defaults, the command line over both, and a message for every
mistake.

    python train.py config/addition.py --learning_rate=1e-3

nanoGPT runs its config files with `exec` and accepts any name; a typo is silently ignored. Here a config file
is read, not run: lines `name = value` with plain Python values. An unknown name, a value of the wrong type or
out of range stops before anything is built, and the message names the nearest setting that exists. One name
is no setting: `base`, another config file, of which this one says only what differs.

This file knows no setting by name; settings.py's dataclass is handed in.
"""

import ast
import difflib
import inspect
import math
import os
import re
import textwrap

from storage.files import CONFIGS, UserError

# what ast.literal_eval raises: TypeError of {[]: 1}, the last two of what is nested too deep
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
EXAMPLES = {int: "1000", float: "1e-3", bool: "True or False", str: "auto"}


def described(config_class):
    """All settings of a dataclass in words, for --help: its fields, their defaults, the comments beside and
    above them. A comment `# --- words` begins a group.
    """
    lines, said = [], []
    for line in inspect.getsource(config_class).splitlines():
        line = line.strip()
        field = re.fullmatch(r"(\w+): \w+ = (.+?)(?:  # (.*))?", line)
        if line.startswith("# --- "):
            lines += ["", line.removeprefix("# --- ") + ":"]
        elif line.startswith("# "):
            said.append(line[2:])
        elif field:
            name, default, beside_it = field.groups()
            words = " ".join([*said, *([beside_it] if beside_it else [])])
            said = []
            lines += textwrap.wrap(words, 100, initial_indent=f"  --{name}={default}".ljust(34) + "  ",
                                   subsequent_indent=" " * 36) or [f"  --{name}={default}"]
    return "\n".join(lines).strip()


def parse_command_line(arguments, config_class, limits):
    """`[FILE.py] [--key=value ...]` -> the file's path or None, and a dict of the settings that were given.

    config_class: a dataclass; limits: {key: (words, test)}, see `check`. Raises UserError.
    """
    path, values = None, {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            if not equals:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            try:
                value = text if config_class.__annotations__.get(key) is str else ast.literal_eval(text)
            except NO_LITERAL:
                value = text  # no Python literal: `check` will say what is expected
            values[key] = check(key, value, "on the command line", config_class, limits)
        elif path is None:
            path = os.path.expanduser(argument)
        else:
            raise UserError(
                f"one config file at a time, not both {path} and {argument}. Settings are written "
                "--key=value"
            )
    return path, values


def read_config_file(path, config_class, limits, inside=()):
    """The settings in a config file, as a dict. Nothing in it is executed. Raises UserError, with the line's
    number.

    `base = 'config/other.py'` takes over the settings of another file; the file's own win. inside: files that
    led here.
    """
    if os.path.realpath(path) in inside:
        raise UserError(f"{path} is its own base: a file that it names as its base leads back to it")
    values, base = {}, {}
    for key, node, where in lines_of(path):
        value = plain_value(key, node, where)
        if key == "base":
            if not isinstance(value, str):
                raise UserError(
                    f"base {where} is {value!r}: it takes another config file, such as 'config/stdlib.py'"
                )
            base = read_config_file(
                beside(path, value), config_class, limits, (*inside, os.path.realpath(path))
            )
        else:
            values[key] = check(key, value, where, config_class, limits)
    return base | values


def beside(path, other):
    """Where another config file lies that the one at path names: as it is written, from the current folder;
    else in the folder of the file that names it.
    """
    other = os.path.expanduser(other)
    neighbour = os.path.join(os.path.dirname(path), os.path.basename(other))
    return other if os.path.exists(other) or not os.path.exists(neighbour) else neighbour


def lines_of(path):
    """[(name, syntax tree of its value, where it stands)] of the lines `name = value` in a config file.

    Raises UserError.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors put a mark at the beginning
            statements = ast.parse(f.read()).body
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder. Name a config file: "
                        "python train.py config/addition.py") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no config file {path}.{file_like(path)}") from error
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{path} is no config file: it is not even text") from error
    lines = []
    for node in statements:
        where = f"in {path}, line {node.lineno}"
        if is_docstring(node):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            raise UserError(f"{where}: a config file holds comments and lines `name = value`, nothing else")
        lines.append((targets[0].id, node.value, where))
    return lines


def is_docstring(node):
    """Is this statement a string, and nothing else?"""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def plain_value(key, node, where):
    """The Python value that a syntax tree stands for, if it is plain. Raises UserError."""
    try:
        return ast.literal_eval(node)
    except NO_LITERAL as error:
        raise UserError(f"{key} {where}: write a plain value, such as 3, 1e-3, True or 'text'") from error


def file_like(path):
    """` Did you mean config/addition.py?`, or nothing if no file has a name like this one's.

    Looked for in its folder and in config/.
    """
    folder, name = os.path.split(path.replace("\\", "/"))
    if not name.endswith(".py"):
        name += ".py"
    for place in dict.fromkeys((folder, "config", CONFIGS)):
        files = os.listdir(place or ".") if os.path.isdir(place or ".") else []
        files = [file for file in files if file.endswith(".py")]
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.7)
        if near:
            return f" Did you mean {os.path.join(place, near[0])}?"
    return ""


def one_of(words):
    """("'a', 'b' or 'c'", test) of "a b c": a limit, for `check`."""
    *others, last = map(repr, words.split())
    return f"{', '.join(others)} or {last}", words.split().__contains__


def check(key, value, where, config_class, limits):
    """Return value, an int made a float where a float is wanted; raise UserError if key, type or range is
    wrong.

    limits[key] = (words, test): test(value) says whether the value makes sense, words complete "it must be
    ...".
    """
    types = config_class.__annotations__
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
        message = f"unknown setting {key} {where}."
        if near:
            message += f" Did you mean {near[0]}?"
        raise UserError(f"{message} `python train.py --help` lists all settings")
    wanted = types[key]
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{key} {where} is {value}: it must be less than 2^63")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{key} {where} is {value!r}: it must be a finite number")
    if type(value) is not wanted:
        raise UserError(f"{key} {where} is {value!r}: it takes {wanted.__name__}, such as {EXAMPLES[wanted]}")
    words, test = limits.get(key, ("", lambda _: True))
    if not test(value):
        raise UserError(f"{key} {where} is {value!r}: it must be {words}")
    return value
