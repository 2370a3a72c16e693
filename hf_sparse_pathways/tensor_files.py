"""Tensors of safetensors files, whose header is looked at before any of them is read.

The header becomes tensors of the same names, dtypes and shapes on the device ``meta``, which take
no memory: what checks a value's shapes checks a header's. Tensors that nobody chose are never in
memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_sparse_pathways.display import plain
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.limits import MOST_DIMENSIONS, MOST_HEADER_BYTES
from hf_sparse_pathways.reading import open_regular

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of what this package writes, as safetensors calls them."""

_MOST_VALUES = 2**62
"""A shape has fewer, also with ones in place of its zeros: its strides fit into 64 bits."""


class TensorFile:
    """A safetensors file that is open.

    Attributes:
        header: Name -> a tensor without memory, of the dtype and shape of the one in the file.
        metadata: The texts beside them.
    """

    def __init__(self, path: Path, opened: Any) -> None:
        self._path, self._opened = path, opened
        self.metadata: Mapping[str, str] = opened.metadata() or {}
        self.header = {name: self._describe(name) for name in opened.keys()}  # noqa: SIM118

    def _describe(self, name: str) -> Tensor:
        part = self._opened.get_slice(name)
        dtype, shape = _DTYPES.get(part.get_dtype()), tuple(part.get_shape())
        flat = len(shape) <= MOST_DIMENSIONS
        if dtype is None or not flat or math.prod(max(1, size) for size in shape) > _MOST_VALUES:
            raise ArtefactError(
                f"{self._path.name}: {name!r:.200} is {part.get_dtype()} {shape!s:.200}, which "
                "is nothing that this version reads."
            )
        return without_memory(dtype, *shape)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors.

        Raises:
            ArtefactError: The file is shorter than it was.
        """
        return {name: self._opened.get_tensor(name) for name in names}


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Raises:
        ArtefactError: It is missing or no regular file, its header is damaged or larger than may
            be, or it is shorter than its header says.
    """
    _check_header_size(path)
    try:
        # Of a file that is mapped, and cut while it is in use, a read would end the process.
        opened: Any = safe_open(path, framework="pt", backend="pread")
        with opened as file:
            yield TensorFile(path, file)
    except (SafetensorError, OSError) as error:
        told = plain(str(error))
        raise ArtefactError(f"{path.name} is not a safetensors file: {told:.500}") from error


def _check_header_size(path: Path) -> None:
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER_BYTES:
        raise ArtefactError(
            f"{path.name} is not a safetensors file, or has a header of {size} bytes; "
            f"{MOST_HEADER_BYTES} may be."
        )


def without_memory(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor as a header has it."""
    return torch.empty(shape, dtype=dtype, device="meta")


def check_header(header: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that a header has tensors of some names, dtypes and shapes, and no others.

    Args:
        header: As in ``TensorFile``.
        expected: Name -> a tensor of the dtype and shape, on any device.

    Raises:
        ArtefactError: It does not; the message names a tensor.
    """
    for name in (*expected, *header):
        found, wanted = header.get(name), expected.get(name)
        if _told(found) != _told(wanted):
            raise ArtefactError(f"{name!r} is {_told(found)}; it has to be {_told(wanted)}.")


def _told(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
