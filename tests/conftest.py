"""Fixtures of the whole suite."""

import functools
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hf_sparse_pathways.discovery import profiling
from hf_sparse_pathways.ffn import verdicts
from hf_sparse_pathways.ffn.forms import NATIVE, PACKED
from tests.hub.endpoint import SERVER
from tests.hub.store import Hub

NEEDED = {"needs_packing": PACKED, "needs_compiler": NATIVE}


def pytest_collection_modifyitems(items):
    """Skip tests of forms of weights that this machine does not have."""
    find = functools.cache(verdicts.find_problem)
    for item, (name, form) in itertools.product(items, NEEDED.items()):
        for mark in item.iter_markers(name):
            problem = find(form, (16, 8), *mark.args or (torch.float32,))
            if problem:
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="module")
def no_background():
    """Leave out of profiles what the model itself writes, which takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "take_background", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def every_form_pays():
    """Let every form of weights count as faster than plain ones, whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        verdicts._judge.cache_clear()
        patch.setattr(verdicts, "measure_gain", lambda form, shape, dtype: 2.0)  # noqa: ARG005
        yield
    verdicts._judge.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub, nothing of it in the cache, and the token of an account called ``me``."""
    for path in Path(constants.HF_HUB_CACHE).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_of_me")
    SERVER.hub = Hub()
    return SERVER.hub
