"""The Python source that lies on this machine anyway: standard library, and the packages of requirements.txt
with all that they bring along. More than 100 MB of real code, no network.

    python prepare_data.py python

Twins would make it worthless as a test: much code is vendored, generated or copied. So, the longest file
first, a file is left out if more than half of it stood in files before, counted in runs of SHINGLE lines:

    seen(file) = share of its runs of 5 lines that an earlier file has           left out if seen > 1/2

Files are the unit of the split: what is left has no twin, so no held-out file has one in training.

Notable:
- Packages are what importlib.metadata knows of the requirements, followed through what each requires. Another
  machine has other versions and so another text: versions and a sha256 of every package are in meta.json.
- Files are taken whole, with the headers of their licences.
"""

import hashlib
import os
import re
from importlib import metadata

from tqdm import tqdm

from storage import text
from storage.files import REPOSITORY, UserError

SHINGLE = 5  # lines
SEEN = 0.5  # of a file's shingles; more is a twin
LARGEST = 1_000_000  # bytes; larger files are tables
REQUIREMENTS = os.path.join(REPOSITORY, "requirements.txt")


def names_in(path):
    """The packages that a requirements file names, without versions and conditions."""
    with open(path, encoding="utf-8") as f:
        lines = [line.partition("#")[0].strip() for line in f]
    return [name_of(line) for line in lines if line and not line.startswith("-")]


def name_of(requirement):
    """`torch` of `torch==2.13.0; platform_system == 'Linux'`."""
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def installed(names):
    """{name: metadata.Distribution} of the packages and of all that they require, as far as installed."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()  # as PEP 503 compares names
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform, or of an extra that nobody asked for
        waiting += [name_of(line) for line in found[name].requires or [] if "extra ==" not in line]
    return dict(sorted(found.items()))


def files_of(distribution):
    """[(path in the package, bytes)] of its Python source."""
    paths = sorted(distribution.files or [], key=str)
    places = [(str(path), path.locate()) for path in paths if path.suffix == ".py" and ".." not in path.parts]
    return [(path, place.read_bytes()) for path, place in places
            if place.is_file() and place.stat().st_size <= LARGEST]


def shingles(content):
    """Hashes of all runs of SHINGLE lines, blank ones and indentation apart."""
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line]
    last = max(1, len(lines) - SHINGLE + 1)
    return {hash(b"\n".join(lines[i:i + SHINGLE])) for i in range(last)}


def without_twins(documents):
    """The documents (bytes) that are no twin of a longer one, the longest first."""
    kept, seen = [], set()
    longest_first = sorted(set(documents), key=lambda document: (-len(document), document))
    for document in tqdm(longest_first, desc="looking for twins", unit="file", disable=None):
        own = shingles(document)
        if len(own & seen) <= SEEN * len(own):
            kept.append(document)
            seen |= own
    return kept


def collect(requirements=REQUIREMENTS):
    """(documents, packages): the files to train on and hold out, as bytes; {package: {version, files, bytes,
    sha256}} of what was read, before twins were left out. Raises UserError if no package is installed.
    """
    packages, documents = {}, []
    sources = {"standard library": (None, [("", document) for document in text.stdlib_documents()])}
    found = installed(names_in(requirements))
    if not found:
        raise UserError("none of the packages is installed whose source this dataset is made of. First: "
                        "pip install -r requirements.txt")
    for name, distribution in found.items():
        sources[name] = distribution.version, files_of(distribution)
    for name, (version, files) in sources.items():
        digest = hashlib.sha256()
        for path, content in files:
            digest.update(path.encode() + b"\0" + content)
        packages[name] = {"version": version, "files": len(files),
                          "bytes": sum(len(content) for _, content in files), "sha256": digest.hexdigest()}
        documents += [content for _, content in files if content.strip() and b"\0" not in content]
    return without_twins(documents), packages
