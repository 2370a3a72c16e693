"""The forms in which a leaf's weights are multiplied: plain, packed for oneDNN, or in place.

A form makes of a matrix ``(outputs, inputs)`` something that is called with the inputs and a bias.
What is not plain is used only after a test in this process (``verdicts``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.ffn import packing
from hf_sparse_pathways.ffn.stored import Stored
from hf_sparse_pathways.native.product import INPUT_DTYPES, linear_rows, sum_rows


@dataclass(frozen=True)
class Plain:
    """A matrix that torch multiplies."""

    weight: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``linear`` of ``(..., inputs)``."""
        return functional.linear(x, self.weight, bias)


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that the kernel in C multiplies where they lie.

    Attributes:
        weight: ``(any, inputs)``, each row contiguous.
        rows: Which of its rows, int64; None for all.
        scale: A factor per output, float32; None for 1.
    """

    weight: Tensor
    rows: Tensor | None = None
    scale: Tensor | None = None

    def at(self, index: Tensor) -> "Rows":
        """Return some of the rows, of the same matrix."""
        rows = index if self.rows is None else self.rows.index_select(0, index)
        return Rows(self.weight, rows, None if self.scale is None else self.scale[index])

    @classmethod
    def of(cls, stored: Stored, rows: Tensor | None = None) -> "Rows":
        """Take some rows of a matrix, or all."""
        scale = stored.scale if stored.scale is None or rows is None else stored.scale[rows]
        return cls(stored.values, rows, scale)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``linear`` of ``(..., inputs)``."""
        return linear_rows(x, self.weight, self.rows, self.scale, bias)


@dataclass(frozen=True)
class Sums:
    """Columns of a matrix, multiplied as rows of its transpose where they lie.

    Attributes:
        transposed: ``(any, outputs)``, each row contiguous.
        rows: Which of its rows, int64; None for all.
        scale: A factor per output, float32; None for 1.
    """

    transposed: Tensor
    rows: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, stored: Stored) -> "Sums":
        """Take all columns of a matrix, copied once."""
        return cls(stored.values.T.contiguous(), None, stored.scale)

    def at(self, index: Tensor) -> "Sums":
        """Return some of the columns, of the same copy."""
        rows = index if self.rows is None else self.rows.index_select(0, index)
        return Sums(self.transposed, rows, self.scale)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``linear`` of ``(..., columns)``."""
        return sum_rows(x, self.transposed, self.rows, self.scale, bias)


Product = Plain | packing.Packed | Rows | Sums


@dataclass(frozen=True)
class Form:
    """One way of multiplying.

    Attributes:
        label: What is multiplied, for messages.
        dtypes: Of the values.
        make: Makes it of a matrix, whose values it may share.
        size: Most bytes that the values take, of rows, columns and the bytes of one.
        worth: How many times as fast as plain weights it has to be; less if it saves memory.
        traceable: Whether ``torch.compile`` can hold it in a graph.
    """

    label: str
    dtypes: tuple[torch.dtype, ...]
    make: Callable[[Stored], Product]
    size: Callable[[int, int, int], int]
    worth: float = 1.0
    traceable: bool = True


def _bytes(rows: int, columns: int, itemsize: int) -> int:
    return rows * columns * itemsize


def _plain(stored: Stored) -> Plain | Rows:
    return Plain(stored.values) if stored.scale is None else Rows.of(stored)


def _packed(stored: Stored) -> packing.Packed | Plain:
    return packing.pack(stored.values) if stored.known else Plain(stored.values)


def _rows(stored: Stored) -> Rows | Plain:
    if not stored.known:
        return Plain(stored.values)
    return Rows.of(Stored(stored.values.contiguous(), stored.scale))


PLAIN = Form("plain weights", (), _plain, _bytes)

PACKED = Form("packed weights", packing.DTYPES, _packed, packing.packed_bytes, traceable=False)

NATIVE = Form("weights read in place", (*INPUT_DTYPES, torch.int8), _rows, _bytes, worth=0.9)
