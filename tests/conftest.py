"""Fixtures of the whole suite."""

import functools
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hf_sparse_pathways.discovery import profiling
from hf_sparse_pathways.ffn import verdicts
from hf_sparse_pathways.ffn.forms import PACKED
from hf_sparse_pathways.native import library
from tests.hub.endpoint import SERVER
from tests.hub.store import Hub


@functools.cache
def no_packing(dtype=torch.float32):
    """Say why weights cannot be packed here; None if they can, even if the result were wrong."""
    problem = verdicts.find_problem(PACKED, (16, 8), dtype)
    return problem if problem and "do not work here" in problem else None


@functools.cache
def no_compiler():
    """Say why no library in C can be compiled here; None if one can, even if not the kernel."""
    try:
        command = [*library._find_compiler(), "-shared", "-fPIC", "-xc", "-", "-o", os.devnull]
        source = "#include <stdlib.h>\nvoid *none(void) { return NULL; }"
        subprocess.run(command, input=source, check=True, text=True, capture_output=True)
    except (library.NativeError, OSError, subprocess.SubprocessError) as error:
        return f"no C compiler works here: {error}"


MISSING = {"needs_packing": no_packing, "needs_compiler": no_compiler}


def pytest_collection_modifyitems(items):
    """Skip tests of what this machine does not have; what it has and is wrong makes them fail."""
    for item, (name, find) in itertools.product(items, MISSING.items()):
        for mark in item.iter_markers(name):
            problem = find(*mark.args)
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
