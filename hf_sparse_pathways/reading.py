"""Reads within bounds: regular files of limited size, and JSON of limited depth and numbers.

What lies in a folder may have been written by anybody. A pipe in place of a file would never end, a
large one would fill the memory, and deep or doubtful JSON (a key twice, half a surrogate pair, a
number that is none) would fail far from here, or mean something else to another reader.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.limits import MOST_DEPTH

_MOST_DIGITS = 20
"""Of an integer: those of 64 bits, and a sign."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, through links too: the Hub's cache is made of them.

    Raises:
        ArtefactError: It cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ArtefactError(f"{path} cannot be read: it is a pipe or a device, not a file.")
    return file


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for somebody at the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file.

    Args:
        path: The file.
        most: Bytes that it may have; no more are read.

    Raises:
        ArtefactError: It cannot be read, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = b"" if size > most else file.read(size)
        except OSError as error:
            raise ArtefactError(f"{path} cannot be read: {error.strerror}.") from error
    if size > most:
        raise ArtefactError(f"{path} has more than the {most} bytes that such a file may have.")
    return data


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is no JSON, is nested too deeply, names a key twice, or holds a number that
            is not finite or has more than 64 bits, or text that is no Unicode.
    """
    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_short_integer,
            object_pairs_hook=_object,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_values(value)
    return value


NUMBER = (int, float)


def check_kinds(values: Mapping[str, Any], names: Iterable[str], *kinds: type[Any] | None) -> None:
    """Check of which types some JSON values are; true and false are no numbers.

    Args:
        values: Values by name.
        names: Which of them.
        kinds: What they may be; None stands for itself.

    Raises:
        KeyError: One is missing.
        TypeError: One is of another type; the message names it.
    """
    known = {type(None) if kind is None else kind for kind in kinds}
    for name in names:
        if type(values[name]) not in known:
            raise TypeError(f"{name} is {values[name]!r:.80}")


def _check_values(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        for text in level:
            if isinstance(text, str):
                text.encode()
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object names a key twice")
    return value


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def _short_integer(text: str) -> int:
    if len(text) > _MOST_DIGITS or not -(2**63) <= int(text) < 2**64:
        raise ValueError("an integer has more than 64 bits")
    return int(text)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
