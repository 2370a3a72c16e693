"""Compile the kernel with the system's C compiler, keep it, and load it.

The library lies in ``HF_HOME``, under a name that stands for source, command, processor and user;
another machine or user that shares the folder compiles its own. Since it is code, it is loaded only
if nobody else can have written it, and from a copy that nobody else can write. Nothing happens on
import, and where there is no compiler callers get the reason.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import write_atomically
from hf_sparse_pathways.reading import open_regular

_SOURCE = Path(__file__).with_name("linear.c")

_COMPILERS = ("cc", "gcc", "clang")

_FLAGS = ("-O3", "-fPIC", "-ffp-contract=fast", "-w")

_TRIED = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""Flags that not every compiler has, best first. Without OpenMP the kernel has one thread."""

_SECONDS = 120


class NativeError(RuntimeError):
    """The kernel cannot be had here; the text is a clause that says why."""


def load_kernel() -> Any:
    """Return the library, with ``linear`` and ``sum_rows``; ``linear.c`` says what they take.

    Raises:
        NativeError: There is no compiler, or what it makes does not load.
    """
    found = find_kernel()
    if isinstance(found, NativeError):
        raise found
    return found


@functools.cache
def find_kernel() -> Any:
    """Return the library, or the error that says why there is none; tried once in a process."""
    try:
        return _make_kernel()
    except NativeError as error:
        return error


def _make_kernel() -> Any:
    compiler = _find_compiler()
    problem = ""
    for flags in _TRIED:
        try:
            return _declare(_load(compiler, [*_FLAGS, *flags]))
        except (OSError, subprocess.SubprocessError) as error:
            problem = problem or _describe(error)
    raise NativeError(f"the kernel does not compile with {shlex.join(compiler)} ({problem})")


def _find_compiler() -> list[str]:
    """Return the command of a C compiler: that of ``CC``, or one on the path.

    Raises:
        NativeError: There is none, or ``CC`` is no command.
    """
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise NativeError(f"CC={os.environ['CC']!r} is no command ({error})") from None
    found = [name for name in _COMPILERS if shutil.which(name)]
    if not given and not found:
        raise NativeError(f"no C compiler was found (CC, {', '.join(_COMPILERS)})")
    return given or found[:1]


def _load(compiler: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL:
    """Load the library, compiled if it is not in the cache.

    Raises:
        OSError: The compiler is not there, or the library does not load.
        subprocess.SubprocessError: The compiler failed.
    """
    kept = Path(HF_HOME, "hf_sparse_pathways", f"linear-{_digest([*compiler, *flags])}.so")
    content = _read_kept(kept)
    with tempfile.TemporaryDirectory() as folder:
        if content is not None:
            place = Path(folder, "linear.so")
            place.write_bytes(content)
            return ctypes.CDLL(str(place))
        library = ctypes.CDLL(str(_compile(compiler, flags, Path(folder))))
        _keep(Path(library._name), kept)
    return library


def _compile(compiler: Sequence[str], flags: Sequence[str], folder: Path) -> Path:
    """Compile and link.

    It is linked without OpenMP's library: torch has one loaded, whose threads it then shares.
    """
    unlinked, library = folder / "linear.o", folder / "linear.so"
    run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=_SECONDS)
    run([*compiler, *flags, "-c", str(_SOURCE), "-o", str(unlinked)])
    run([*compiler, "-shared", str(unlinked), "-o", str(library)])
    return library


def _keep(library: Path, kept: Path) -> None:
    """Copy a library into the cache; a folder that cannot be written costs a second each time."""
    content = library.read_bytes()
    digest = hashlib.sha256(content).hexdigest().encode()
    with contextlib.suppress(OSError):
        write_atomically(kept, content, private=True)
        write_atomically(_sum_of(kept), digest, private=True)


def _read_kept(kept: Path) -> bytes | None:
    """Return a library from the cache as it was written: a part of one would end the process.

    None if there is none, or another user can have written it: it would run in this one's name.
    """
    try:
        content, digest = _read_own(kept), _read_own(_sum_of(kept))
    except (OSError, ArtefactError):
        return None
    return content if hashlib.sha256(content).hexdigest().encode() == digest else None


def _read_own(path: Path) -> bytes:
    """Read a file of this user's that no other may write.

    Raises:
        OSError: It cannot be read.
        ArtefactError: It is none.
    """
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
        if found.st_uid != _user() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ArtefactError(f"{path} can have been written by another user.")
        return file.read()


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _sum_of(kept: Path) -> Path:
    return kept.with_suffix(".sha256")


def _digest(command: Sequence[str]) -> str:
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else [platform.processor()]
    features = sorted({line for line in lines if line.lower().startswith(("flags", "features"))})
    machine = [platform.machine(), *(features or lines), str(_user())]
    decisive = [_SOURCE.read_text(), *command, *machine]
    return hashlib.sha256("\0".join(decisive).encode()).hexdigest()[:20]


def _declare(library: ctypes.CDLL) -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_long
    for product in (library.linear, library.sum_rows):
        product.argtypes = [pointer, ctypes.c_int, ctypes.c_ssize_t, pointer, pointer, pointer]
        product.argtypes += [pointer, ctypes.c_int, pointer, number, number, number, ctypes.c_int]
        product.restype = ctypes.c_int
    return library


def _describe(error: Exception) -> str:
    """Return the first line that says what went wrong."""
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
    text = (output or b"").decode(errors="replace").strip() or str(error)
    return text.splitlines()[0][:120]
