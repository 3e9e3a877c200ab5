"""Download a file so that it is whole: it goes on where it was cut off, is checked, and only then gets its
name.

    url -> path.part  (as much as has come so far)  -> checked -> path

Checked against a sha256 where one is known, against the size otherwise: the one that is pinned, or the one
that the server announced.

Notable: torch.hub's downloader begins from nothing when the line breaks, which hurts at 6 GB of gpt2-xl; this
one asks the server for the rest (HTTP Range).
"""

import http.client
import os
import re
import urllib.error
import urllib.request

from tqdm import tqdm

from storage.files import UserError, locked, sha256, write_whole

HUB = "https://huggingface.co"


def hub():
    """Where Hugging Face's hub is: HUB, or the mirror that HF_ENDPOINT names. Also for huggingface_hub, which
    reads that variable when it is imported and does not take an empty one for none. Raises UserError.
    """
    if not os.environ.get("HF_ENDPOINT"):
        os.environ.pop("HF_ENDPOINT", None)
    host = os.environ.get("HF_ENDPOINT", HUB)
    if not host.startswith(("https://", "http://")):
        raise UserError(f"HF_ENDPOINT={host} is no address. Write it with https://, as in {HUB}, or unset it")
    return host.rstrip("/")


def download(url, path, sha256_wanted=None, size=None):
    """Bring url to path, unless it is there already. Returns path.

    sha256_wanted, size: of the whole file, where known. Raises UserError if the line breaks, keeping what has
    come so far (the same command goes on from there), and if it is the wrong file, deleting it.
    """
    if not _is_there(path, sha256_wanted, size):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        part = path + ".part"
        open(part, "ab").close()
        try:
            with locked(part):  # a second process waits for the first, and then has the file
                if not _is_there(path, sha256_wanted, size):
                    _bring(url, path, part, sha256_wanted, size)
        finally:
            if os.path.exists(part) and not os.path.getsize(part):
                os.remove(part)
    return path


def _is_there(path, sha256_wanted, size):
    """Is the whole file at path? Raises UserError if it is another one."""
    if not os.path.exists(path) or size is not None and os.path.getsize(path) != size:
        return False
    if sha256_wanted and sha256(path) != sha256_wanted:
        raise UserError(f"{path} is not the file that was downloaded (wrong sha256). Delete it and type "
                        "the same command again")
    return True


def _bring(url, path, part, sha256_wanted, size):
    """`download` into part, which takes its place at path when it is whole."""
    by_hand = f"Without network here, bring {url} to {path} by hand"
    try:
        have = os.path.getsize(part) if os.path.exists(part) else 0
        announced = size if have and have == size else _fetch(url, part, os.path.basename(path))
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        # there is no such rest: what we hold is no beginning of this file
        if isinstance(error, urllib.error.HTTPError) and error.code == 416:
            os.remove(part)
            raise UserError(
                f"{url}: what came before does not belong to this file; it is deleted. Type the same "
                "command again"
            ) from error
        raise UserError(
            f"{url}: {error}. The same command goes on where this one stopped. {by_hand}"
        ) from error
    size, have = size or announced, os.path.getsize(part)
    if size is not None and have < size:
        raise UserError(
            f"{url}: {have} of {size} bytes came before the line broke. The same command goes on from "
            f"there. {by_hand}"
        )
    if size is not None and have > size or sha256_wanted and sha256(part) != sha256_wanted:
        os.remove(part)
        raise UserError(
            f"{url}: what came is not the file that it should be (wrong "
            f"{'size' if have != size else 'sha256'}); it is deleted. "
            f"Try again; if it happens twice, something between here and there changes the file. {by_hand}"
        )
    os.replace(part, path)


def sha256_of_hub(url, path):
    """The sha256 that Hugging Face states for a large file, kept beside it in path.sha256.

    url: of the file, .../resolve/main/NAME. The same with `raw` is the pointer that git keeps instead of a
    large file, three lines of text. Raises UserError.
    """
    kept = path + ".sha256"
    if not os.path.exists(kept):
        pointer = url.replace("/resolve/", "/raw/")
        try:
            with urllib.request.urlopen(pointer, timeout=60) as response:
                text = response.read(1000).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{pointer}: {error}. It states the sha256 that {url} must have") from error
        found = re.search(r"oid sha256:([0-9a-f]{64})\b", text)
        if not found:
            raise UserError(f"{pointer} states no sha256: it is no pointer to a large file")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_whole(kept, found[1].encode())
    with open(kept, encoding="utf-8") as f:
        return f.read()


def _fetch(url, part, name):
    """Append to `part` what is missing of url.

    Returns the size that the server announced for the whole file, or None.
    """
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "sparse-attention-post-training"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        goes_on = response.status == 206
        length = response.headers.get("Content-Length")
        begin = have if goes_on else 0
        size = begin + int(length) if length else None
        bar = tqdm(total=size, initial=begin, desc=name, unit="B", unit_scale=True, disable=None)
        if bar.disable:  # nobody watches: one line in the log
            print(f"downloading {url}" + (f", {size / 1e6:.1f} MB" if size else ""), flush=True)
        with bar, open(part, "ab" if goes_on else "wb") as f:
            while block := response.read(1 << 20):
                f.write(block)
                bar.update(len(block))
    return size
