"""Files that are whole or absent: atomic writes, and reads that name what is wrong.

Both artefacts of the package (pathways, profiles) are a JSON file that describes and a safetensors
file that holds; the JSON carries the other's SHA-256, so that a mixed or truncated pair is noticed.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.limits import MOST_JSON_BYTES, MOST_TEXT_BYTES
from hf_sparse_pathways.reading import open_regular, parse_json, read_bytes
from hf_sparse_pathways.tensor_files import open_tensors


def write_atomically(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file beside its place, then rename it there.

    Args:
        path: Where; the folder is made if needed.
        content: What.
        private: Let nobody else read or write it, whatever is usual here.
    """
    _write_together({path: content}, private=private)


@cache
def code_digest() -> str:
    """Return a digest of the package's own code, by which results of other code are known."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def write_between(path: Path, start: str, end: str, content: str) -> None:
    """Put text between two markers of a text file, in place of what stood there.

    Raises:
        ArtefactError: The file cannot be read, or does not have each marker once, in this order.
    """
    text = read_bytes(path, MOST_TEXT_BYTES).decode()
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    if [text.count(start), rest.count(end), text.count(end)] != [1, 1, 1]:
        raise ArtefactError(f"{path} has to have {start!r} and then {end!r}, once each.")
    write_atomically(path, f"{before}{start}\n{content}\n{end}{after}".encode())


def _write_together(contents: dict[Path, bytes], *, private: bool = False) -> None:
    """Write every file beside its place before the first is renamed there."""
    staged: dict[Path, str] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, staged[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            if not private:
                give_usual_mode(staged[path])
        for path, temporary in staged.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in staged.values():
            Path(temporary).unlink(missing_ok=True)
        raise


def give_usual_mode(path: str) -> None:
    """Give a file that ``mkstemp`` made the mode that any other file would have."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write_pair(json_path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a description and its tensors; the tensors lie beside it as ``.safetensors``."""
    data = save(_apart(tensors))
    described = {**meta, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    _write_together({json_path.with_suffix(".safetensors"): data, json_path: as_json(described)})


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: contiguous, no two of them in one memory."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        place = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if place in seen else own
        seen.add(place)
    return apart


def as_json(value: dict[str, Any]) -> bytes:
    """Return a description as it is written."""
    return f"{json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)}\n".encode()


Choice = Callable[[dict[str, Any], Mapping[str, Tensor]], Iterable[str]]
"""Of a description and a file's header (``tensor_files``): the names of the tensors to be read. It
raises an error where the two do not fit."""


def read_pair(
    json_path: Path, tensors_path: Path, newest: int, choose: Choice
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what ``write_pair`` wrote.

    Args:
        json_path: The description.
        tensors_path: The tensors.
        newest: The newest format version that is understood.
        choose: Says which tensors are read. The others are never in memory.

    Raises:
        ArtefactError: A file is missing, corrupt or truncated, the two do not belong together, or
            the format is newer.
    """
    meta = read_json(json_path)
    _check_version(json_path, meta.get("format"), newest)
    before = _identity(tensors_path)
    if _digest(tensors_path) != meta.get("tensors_sha256"):
        raise ArtefactError(
            f"{tensors_path.name} is not the file that {json_path.name} describes (SHA-256 "
            "differs): it is truncated, corrupt, or from another save. Fetch or save both again."
        )
    with open_tensors(tensors_path) as file:
        tensors = file.read(choose(meta, file.header))
    if _identity(tensors_path) != before:
        raise ArtefactError(f"{tensors_path} was changed while it was read. Read it again.")
    return meta, tensors


def _check_version(path: Path, version: Any, newest: int) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtefactError(f"{path.name} has format {version!r}, which is no version.")
    if version > newest:
        raise ArtefactError(
            f"{path.name} has format {version}; this version of hf-sparse-pathways reads up "
            f"to {newest}. Upgrade hf-sparse-pathways."
        )


def _digest(path: Path) -> str:
    """Return a file's SHA-256, reading it a little at a time."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path) -> tuple[int, ...]:
    """Return what tells a file from one that was put in its place, or written to."""
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtefactError: The file is missing or too large, or is not one JSON object of finite
            numbers.
    """
    data = read_bytes(path, MOST_JSON_BYTES)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ArtefactError(f"{path.name} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path.name} holds a {type(value).__name__}, not a JSON object.")
    return value


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds finite numbers.

    Raises:
        ArtefactError: It holds NaN or an infinity.
    """
    if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())):
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ArtefactError(f"{name} holds {bad} values that are NaN or infinite.")
