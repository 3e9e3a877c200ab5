"""Files that are whole or not there at all, folders that one process has to itself, what goes from people to
programs and back, and the one error for people.

    write: to path.<random>.tmp, flushed to the disk, then renamed to path        whatever happens, path holds
    the old content or the new

Every mistake that a user can make ends as a `UserError`: its message says what is wrong, where, and what to
type instead. The programs print it as `error: ...` and exit with status 1. A bug keeps its traceback.

This file imports no other file of ours.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import shlex
import subprocess
import sys

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = os.path.join(REPOSITORY, "config")


class UserError(Exception):
    """Something that the user can put right. The message says what is wrong, and what to type instead."""


def sha256(path):
    """The sha256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def take_every_sign():
    """What a program does first: no arrow or umlaut ends it, whatever the terminal and the locale.

    What a terminal cannot show (cp1252) is written as a number, \\u2192. Where Python takes arguments and
    names of files for ASCII (LC_ALL=C with PYTHONUTF8=0), the program starts anew in UTF-8.
    """
    if sys.getfilesystemencoding() == "ascii":  # never on Windows
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def typed(*words):
    """A command, or a part of one, to print: a shell reads these words again, with all blanks and signs in
    them.
    """
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as temporary:` write to temporary, which then takes the place of path; if
    anything is raised it is removed, and path stays as it is.

    Every writer has a name of its own, and locks it: what a kill left behind is locked by nobody, and the
    next writer removes it.
    """
    for left in glob.glob(glob.escape(path) + ".*.tmp"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if fcntl:  # Windows removes no open file
                fcntl.flock(stack.enter_context(open(left, "r+b")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.remove(left)
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: os.path.exists(temporary) and os.remove(temporary))
        if fcntl:
            f = stack.enter_context(open(temporary, "xb"))
            with contextlib.suppress(OSError):  # of a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX)
        yield temporary
        os.replace(temporary, path)


def write_whole(path, content):
    """Write bytes to path, whole or not at all: to a temporary name first, then renamed."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def json_of(content, path, **options):
    """Plain values as JSON, a str. Raises UserError, which names path and key, where a number is not finite:
    JSON has no NaN. options: of json.dumps.
    """
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError as error:
        wrong = next(f"{key} is {x}" for key, x in numbers_of(content) if not math.isfinite(x))
        raise UserError(f"{path} cannot be written: {wrong}, no finite number") from error


def numbers_of(content, key=""):
    """Yield (key, such as `rows[2].loss`, number) of all floats in plain values."""
    if isinstance(content, float):
        yield key, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from numbers_of(value, f"{key}.{name}".lstrip("."))
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield from numbers_of(value, f"{key}[{number}]")


def write_json(path, content):
    """Write plain values to path as indented JSON, whole or not at all. Raises UserError, see `json_of`."""
    write_whole(path, (json_of(content, path, indent=1) + "\n").encode())


def read_json(path):
    """The content of a JSON file. Raises OSError if there is none, UserError if it is damaged."""
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def locked(folder, wait=True):
    """`with locked(folder):` no other process is in such a block of this folder, which is made if there is
    none, or of this file. Another one is waited for; with wait=False BlockingIOError.

    The lock ends with the process, even by kill -9. Windows, and file systems without locks, let everybody
    in.
    """
    if not os.path.isfile(folder):
        os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl:
            place = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, place)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                print(f"waiting for another process that works on {folder} ...", flush=True)
                fcntl.flock(place, fcntl.LOCK_EX)
            except OSError as error:
                print(f"note: {folder} cannot be locked ({error.strerror}): let no other process work there")
        yield


def draw_or_say(path, draw, *arguments):
    """draw(path, *arguments) draws a picture. If it cannot, say which and why: no result fails with its
    picture.
    """
    try:
        draw(path, *arguments)
    except Exception as error:  # matplotlib, Pillow, a full disk
        print(f"{path} could not be drawn: {type(error).__name__}: {error}", flush=True)
