"""The dataset of installed packages: what is read, what is a twin, what meta.json says."""

import json
import os
import sys

import pytest

import prepare_data
from storage import python_source
from storage.files import UserError
from storage.python_source import collect, installed, names_in, shingles, without_twins


def code(first, last):
    """Lines of code, each like no other."""
    return "".join(f"value_{i} = compute({i}) + other({i * i})\n" for i in range(first, last)).encode()


def test_copies_and_near_copies_are_left_out():
    original = code(0, 100)
    changed = original.replace(b"value_50 ", b"renamed ")
    indented = b"\n".join(b"    " + line for line in original.splitlines()[:60])
    other = code(200, 250)
    kept = without_twins([other, changed, original, original, indented])
    assert len(kept) == 2
    assert other in kept
    assert (original in kept) != (changed in kept), "one of the two"


def test_a_file_that_shares_a_header_is_no_twin():
    licence = code(900, 910)
    assert len(without_twins([licence + code(0, 60), licence + code(100, 160)])) == 2


def test_a_part_of_a_longer_file_is_its_twin_whatever_the_order():
    whole, part = code(0, 100), code(20, 60)
    assert without_twins([part, whole]) == without_twins([whole, part]) == [whole]


def test_no_held_out_file_has_a_twin_in_training(tmp_path):
    (tmp_path / "requirements.txt").write_text("tqdm\n")  # and the standard library
    documents, packages = collect(tmp_path / "requirements.txt")
    assert {"standard library", "tqdm"} <= set(packages)
    train, val = python_source.text.split(documents[-300:])
    known = set().union(*(shingles(document) for document in train))
    for document in val:
        own = shingles(document)
        assert len(own & known) <= 0.5 * len(own) or len(own) < 3


def test_requirements_are_followed(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("-r other.txt\n# a comment\ntorch==2.13.0\nTQDM ; python_version > '3'  # bars\n\n")
    assert names_in(path) == ["torch", "TQDM"]
    found = installed(names_in(path))
    assert {"torch", "tqdm", "sympy", "mpmath"} <= set(found), "sympy is torch's, mpmath is sympy's"


def test_without_packages_it_says_what_to_install(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("no-such-package-anywhere\n")
    with pytest.raises(UserError, match="pip install -r requirements.txt"):
        collect(path)


def test_the_dataset_tells_its_packages(workplace, monkeypatch):
    documents, packages = [code(i, i + 40) for i in range(0, 4000, 40)], {"torch": {"version": "2.13.0"}}
    monkeypatch.setattr(python_source, "collect", lambda: (documents, packages))
    prepare_data.main(["python"])
    with open(os.path.join("data", "python", "meta.json")) as f:
        meta = json.load(f)
    assert meta["packages"] == packages
    assert meta["python"] == sys.version.split()[0]
    assert prepare_data.load("python").meta["kind"] == "stream"
