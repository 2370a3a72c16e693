"""Weights laid out for oneDNN's matrix product.

``linear`` hands oneDNN (or BLAS) a plain matrix, which is read row by row or brought into blocks
anew at every call; a matrix that was packed once streams from memory faster. PyTorch's operators
for it are private: ``verdicts`` tests whether they may be used.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.timing import matrices, time_ratio

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that oneDNN multiplies, where the processor can."""

_BLOCK = 64
"""oneDNN pads both sides of a packed matrix to multiples that divide this."""

_MANY_ROWS = 4

_LEAST_SIZE = 20
"""Matrices of less than two to this power entries are multiplied too quickly for it to matter."""

_WORTH = 1.05
"""Ratio from which on repeating a row pays."""


@dataclass(frozen=True)
class Packed:
    """A packed matrix.

    Attributes:
        weight: The opaque tensor.
        least_rows: Rows that an input needs for the faster of oneDNN's kernels.
    """

    weight: Tensor
    least_rows: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``linear`` of ``(..., inputs)``."""
        if self.least_rows > 1 and x.numel() == x.shape[-1]:
            rows = x.reshape(1, -1).expand(self.least_rows, -1)
            return _product(rows, self.weight, bias)[:1].view(*x.shape[:-1], -1)
        return _product(x, self.weight, bias)


def pack(weight: Tensor) -> Packed:
    """Return a matrix ``(outputs, inputs)`` packed. Pure."""
    packed = _pack(weight)
    size, threads = weight.numel().bit_length(), torch.get_num_threads()
    return Packed(packed, _least_rows(size, weight.dtype, threads))


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return output


def packed_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Return how many bytes a packed matrix takes at most."""
    return _padded(rows) * _padded(columns) * itemsize


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@functools.lru_cache(maxsize=256)
@torch.inference_mode()
def _least_rows(size: int, dtype: torch.dtype, threads: int) -> int:  # noqa: ARG001
    """Return how many rows a vector is best repeated to, for matrices of ``2 ** size`` entries.

    oneDNN has another kernel for one row, which on some processors reads the weights more slowly.
    """
    if size < _LEAST_SIZE:
        return 1
    side = 2 ** (size // 2)
    weights = [_pack(weight) for weight in matrices((2**size // side, side), dtype)]
    x = torch.ones(1, side, dtype=dtype)

    def run(rows: int) -> None:
        for weight in weights:
            Packed(weight, rows)(x)

    return _MANY_ROWS if time_ratio(lambda: run(1), lambda: run(_MANY_ROWS)) > _WORTH else 1
