"""The kernel's library: compiled, kept, checked, and machines that cannot compile it."""

import os
import subprocess

import pytest
import torch

from hf_sparse_pathways.native import library
from hf_sparse_pathways.native.product import linear_rows
from tests.native.cases import in_float64, is_close, make_case


@pytest.mark.needs_compiler
def test_it_is_compiled_once_and_kept(own_cache, monkeypatch):
    library.load_kernel()
    kept = sorted(own_cache.iterdir())
    assert [path.suffix for path in kept] == [".sha256", ".so"]
    library.find_kernel.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("it was compiled again"))
    library.load_kernel()
    assert sorted(own_cache.iterdir()) == kept


@pytest.mark.needs_compiler
@pytest.mark.parametrize("damage", ["no library", "half of it", "no sum"])
def test_a_damaged_library_is_compiled_again(damage, own_cache):
    library.load_kernel()
    (kept,) = own_cache.glob("*.so")
    content = kept.read_bytes()
    kept.unlink()  # it is mapped: written to in place it would end the process
    if damage != "no library":
        kept.write_bytes(content[: 4096 if damage == "half of it" else None])
    if damage == "no sum":
        kept.with_suffix(".sha256").unlink()
    library.find_kernel.cache_clear()
    x, weight, rows, _, _ = make_case(9, 20, 2, torch.float32, torch.float32)
    assert is_close(linear_rows(x, weight, rows), in_float64(x, weight, rows, None, None))
    assert library._read_kept(kept) is not None


@pytest.mark.needs_compiler
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
@pytest.mark.parametrize("doubt", ["writable by the group", "writable by all", "of another user"])
def test_a_library_that_another_user_can_have_written_is_not_loaded(
    doubt, suffix, own_cache, monkeypatch
):
    before = os.umask(0)
    try:
        library.load_kernel()
    finally:
        os.umask(before)
    (kept,) = own_cache.glob("*.so")
    assert library._read_kept(kept), "nobody else may write it, whatever the mask"
    if doubt == "of another user":
        monkeypatch.setattr(library, "_user", lambda: os.geteuid() + 1)
    else:
        kept.with_suffix(suffix).chmod(0o620 if "group" in doubt else 0o602)
    assert library._read_kept(kept) is None


@pytest.mark.needs_compiler
def test_what_is_loaded_is_what_was_checked(own_cache, monkeypatch):
    library.load_kernel()
    library.find_kernel.cache_clear()
    load, loaded = library.ctypes.CDLL, []
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: loaded.append(path) or load(path))
    library.load_kernel()
    assert not [path for path in loaded if path.startswith(str(own_cache))]
    assert loaded


@pytest.mark.needs_compiler
def test_another_processor_or_source_has_a_library_of_its_own(monkeypatch, tmp_path):
    names = {library._digest(["cc"]), library._digest(["cc", "-O3"])}
    monkeypatch.setattr(library.platform, "machine", lambda: "vax")
    names.add(library._digest(["cc"]))
    source = tmp_path / "linear.c"
    source.write_text("other")
    monkeypatch.setattr(library, "_SOURCE", source)
    names.add(library._digest(["cc"]))
    assert len(names) == 4


@pytest.mark.needs_compiler
@pytest.mark.usefixtures("own_cache")
def test_a_folder_that_cannot_be_written_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(library, "HF_HOME", str(tmp_path / "home"))
    library.load_kernel()
    assert (tmp_path / "home").read_text() == "a file"


@pytest.mark.usefixtures("own_cache")
def test_without_a_compiler_the_reason_says_so(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library.shutil, "which", lambda _: None)
    with pytest.raises(library.NativeError, match="no C compiler"):
        library.load_kernel()


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "echo", 'gcc "'])
def test_a_compiler_that_fails_is_named(command, monkeypatch, own_cache):
    monkeypatch.setenv("CC", command)
    with pytest.raises(library.NativeError, match=command):
        library.load_kernel()
    assert not own_cache.exists() or not list(own_cache.iterdir())


@pytest.mark.needs_compiler
@pytest.mark.usefixtures("own_cache")
def test_flags_that_a_compiler_does_not_have_are_left_out(monkeypatch):
    compile_it, tried = library._compile, []

    def refuse(compiler, flags, folder):
        tried.append(set(flags))
        if "-fopenmp" in flags:
            raise subprocess.CalledProcessError(1, compiler, stderr=b"no -fopenmp here\n")
        return compile_it(compiler, flags, folder)

    monkeypatch.setattr(library, "_compile", refuse)
    library.load_kernel()
    assert ["-fopenmp" in flags for flags in tried] == [True, False]
    x, weight, rows, _, _ = make_case(9, 20, 2, torch.float32, torch.float32)
    assert is_close(linear_rows(x, weight, rows), in_float64(x, weight, rows, None, None))


def test_the_first_line_of_a_compilers_complaint_is_told():
    error = subprocess.CalledProcessError(1, "cc", stderr=b"linear.c:1: bad\nmore\n")
    assert library._describe(error) == "linear.c:1: bad"
    assert "cc" in library._describe(subprocess.CalledProcessError(1, "cc"))
