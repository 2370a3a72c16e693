"""The kernel anew for every test, and a cache of its own."""

import functools
import shutil
from pathlib import Path

import pytest

from hf_sparse_pathways.native import library


@pytest.fixture(autouse=True)
def _load_anew():
    library.find_kernel.cache_clear()
    yield
    library.find_kernel.cache_clear()


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory):
    """What compiles as the library does, but each command once."""
    compile_it = library._compile

    @functools.cache
    def compiled(compiler, flags):
        return compile_it(compiler, flags, tmp_path_factory.mktemp("kernel"))

    return lambda compiler, flags, folder: Path(
        shutil.copy(compiled(tuple(compiler), tuple(flags)), folder)
    )


@pytest.fixture
def own_cache(monkeypatch, tmp_path, compile_once):
    monkeypatch.setattr(library, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "_compile", compile_once)
    return tmp_path / "home" / "hf_sparse_pathways"
