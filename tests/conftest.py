"""Shared by all tests: our files on the import path, a folder of its own for every test, one thread for repeatable numbers."""

import os
import sys

import pytest
import torch

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPOSITORY)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder as the current one: data/ and out/ of a test land there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
