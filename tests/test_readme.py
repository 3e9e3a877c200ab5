"""What README.md and docs/ say is there: commands, links, functions, settings, pictures; and .ci/run runs the command that it gives."""

import importlib
import os
import re

import pytest

from conftest import REPOSITORY
from settings import Config

def read(name):
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as f:
        return f.read()


README = read("README.md")
PAGES = ["README.md", *(f"docs/{name}" for name in sorted(os.listdir(os.path.join(REPOSITORY, "docs"))) if name.endswith(".md"))]


def test_the_two_commands_stand_at_the_top():
    top = README[:2500]
    assert "pip install -r requirements.txt && python train.py config/addition.py" in top
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest -n 2 --dist worksteal " in top


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 16_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Links are relative to the page's own folder, as GitHub reads them."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert page != "README.md" or len(links) > 20
    for link in links:
        assert link.startswith("https://") or os.path.exists(os.path.join(REPOSITORY, os.path.dirname(page), link)), link


def test_every_page_is_reached_from_the_readme():
    assert not [page for page in PAGES[1:] if f"]({page})" not in README]


def test_every_equation_names_a_function_that_exists():
    named = re.findall(r"`([\w.]+)` in \[(\w+)\.py\]", README)
    assert len(named) > 8
    for name, module in named:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_every_setting_in_the_tables_exists():
    table = read("docs/settings.md").split("## Settings that matter")[1].split("## ")[0]
    names = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert len(names) >= 10 and set(names) <= set(Config.__annotations__)
    flags = re.findall(r"--(\w+)=", "\n".join(map(read, PAGES)))
    others = {"learning_rte", "seeds", "jobs", "threads", "digits", "T", "nproc_per_node", "tokenizer", "file", "shards", "processes", "prompt", "tokens", "temperature", "open", "model", "splash", "B", "H", "repeats", "most_memory", "task", "shut", "n", "gpus", "context", "measured", "include", "limit", "tasks"}  # a typo, and other programs' flags
    assert set(flags) - others <= set(Config.__annotations__) | {"index"}


def test_pictures_are_small():
    folder = os.path.join(REPOSITORY, "docs/images")
    for name in os.listdir(folder):
        assert os.path.getsize(os.path.join(folder, name)) < 300_000, name


def test_requirements_are_the_five_and_the_pin():
    with open(os.path.join(REPOSITORY, "requirements.txt"), encoding="utf-8") as f:
        assert f.read().split() == ["torch==2.13.0", "tiktoken", "numpy", "tqdm", "matplotlib"]


def test_our_files_import_each_other_in_one_direction_only():
    ours = {name[:-3] for name in os.listdir(REPOSITORY) if name.endswith(".py")}
    imports = {}
    for name in ours:
        with open(os.path.join(REPOSITORY, name + ".py"), encoding="utf-8") as f:
            imports[name] = set(re.findall(r"^(?:from|import) (\w+)", f.read(), re.M)) & ours
    for basic in ("noise", "tasks", "induction", "geco", "handover", "lora", "hardware", "text", "download", "configure", "figures", "graph"):
        assert imports[basic] == set()
    assert imports["prepare_data"] == {"text", "corpora", "download"} and imports["corpora"] == {"text", "download"} and imports["huggingface"] == {"download"} and imports["evaluate"] == imports["batches"] == {"hardware"}
    assert imports["gate"] == imports["gate_tiled"] == imports["gate_triton"] == {"noise"} and imports["gate_op"] == {"gate_tiled"}
    assert imports["circuit"] == {"graph", "tasks"}
    assert imports["settings"] == {"hardware", "configure"}
    assert imports["model"] == {"gate"} and imports["olmo"] == {"gate", "huggingface"} and imports["sharding"] == {"hardware"}
    assert imports["checkpoint"] == {"model", "olmo", "lora", "huggingface", "hardware"} and imports["resume"] == {"checkpoint", "prepare_data", "hardware"}
    assert imports["origin"] == {"checkpoint", "hardware", "huggingface", "lora", "resume", "settings", "sharding"}
    assert not any({"train", "analyze"} & found for found in imports.values())
