"""What README.md and docs/ say is there: commands, links, functions, settings, pictures; and .ci/run runs the
command that it gives.
"""

import ast
import importlib
import os
import re

import pytest

from conftest import REPOSITORY
from training.config import Config


def read(name):
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as f:
        return f.read()


README = read("README.md")
PAGES = [
    "README.md",
    *(
        f"docs/{name}"
        for name in sorted(os.listdir(os.path.join(REPOSITORY, "docs")))
        if name.endswith(".md")
    ),
]


def test_the_two_commands_stand_at_the_top():
    top = README[:2500]
    assert "pip install -r requirements.txt && python train.py config/addition.py" in top
    assert (
        "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest -n 2 --dist "
        "worksteal "
        in top
    )


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 16_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Links are relative to the page's own folder, as GitHub reads them."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert page != "README.md" or len(links) > 20
    for link in links:
        assert link.startswith("https://") or os.path.exists(
            os.path.join(REPOSITORY, os.path.dirname(page), link)
        ), link


def test_every_page_is_reached_from_the_readme():
    assert not [page for page in PAGES[1:] if f"]({page})" not in README]


def test_every_equation_names_a_function_that_exists():
    named = re.findall(r"`([\w.]+)` in \[[\w./]+\]\(([\w/]+)\.py\)", README)
    assert len(named) > 8
    for name, module in named:
        found = importlib.import_module(module.replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_every_setting_in_the_tables_exists():
    table = read("docs/settings.md").split("## Settings that matter")[1].split("## ")[0]
    names = re.findall(
        r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert len(names) >= 10 and set(names) <= set(Config.__annotations__)
    flags = re.findall(r"--(\w+)=", "\n".join(map(read, PAGES)))
    # a typo, and other programs' flags
    others = {"learning_rte", "seeds", "jobs", "threads", "digits", "T", "nproc_per_node", "nnodes",
              "rdzv_backend", "rdzv_id", "rdzv_endpoint", "tokenizer", "file", "shards", "processes",
              "prompt", "tokens", "temperature", "open", "model", "B", "H", "repeats",
              "most_memory", "task", "shut", "n", "gpus", "context", "measured", "include", "limit", "tasks",
              "as", "changes", "steps", "at", "features", "price", "name",
              "rules", "budgets"}
    assert set(flags) - others <= set(Config.__annotations__) | {"index"}


def test_pictures_are_small():
    folder = os.path.join(REPOSITORY, "docs/images")
    for name in os.listdir(folder):
        assert os.path.getsize(os.path.join(folder, name)) < 300_000, name


def test_requirements_are_the_five_and_the_pin():
    with open(os.path.join(REPOSITORY, "requirements.txt"), encoding="utf-8") as f:
        assert f.read().split() == ["torch==2.13.0", "tiktoken", "numpy", "tqdm", "matplotlib"]


BELOW = {"geco": [], "gate": [], "storage": [], "fast": ["gate"], "model": ["gate", "fast", "storage"],
         "prepare_data": ["storage"], "models": ["gate", "fast", "model", "storage"],
         "circuits": ["gate", "model", "models", "storage"],
         "training": ["fast", "geco", "gate", "model", "prepare_data", "storage", "models"],
         "features": ["gate", "model", "models", "storage", "circuits"],
         "view": ["gate", "model", "storage", "models", "training", "circuits", "features", "analysis"],
         "analysis": ["fast", "gate", "model", "prepare_data", "storage", "models", "training", "circuits",
                      "features"],
         "train": ["geco", "fast", "gate", "model", "prepare_data", "storage", "models", "training"],
         "analyze": ["storage"]}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_what_is_below_it(room):
    folder = os.path.join(REPOSITORY, room)
    files = (
        [f"{room}/{name}" for name in os.listdir(folder) if name.endswith(".py")]
        if os.path.isdir(folder)
        else [f"{room}.py"]
    )
    for name in files:
        for node in ast.walk(ast.parse(read(name))):
            modules = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)]
            )
            imported = {module.split(".")[0] for module in modules} & set(BELOW)
            assert imported <= {room, *BELOW[room]}, f"{name} imports {imported}"


def test_text_files_are_utf8_whatever_the_locale_says():
    found = []
    for folder, _, names in os.walk(REPOSITORY):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), REPOSITORY)
            if name.endswith(".py") and not path.startswith((".", "tests")):
                found += [f"{path}: {ast.unparse(call)}" for call in ast.walk(ast.parse(read(path)))
                          if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                          and call.func.id == "open" and "encoding" not in [k.arg for k in call.keywords]]
    assert not [call for call in found if not re.search("'(r|w|x|a|r[+])b'", call)]


def test_the_root_holds_the_six_doors():
    assert {name for name in os.listdir(REPOSITORY) if name.endswith(".py")} == {
        f"{name}.py" for name in ("model", "gate", "geco", "train", "prepare_data", "analyze")
    }
