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
from hf_sparse_pathways.native.product import INPUT_DTYPES, linear_rows


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
    """

    weight: Tensor
    rows: Tensor | None = None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``linear`` of ``(..., inputs)``."""
        return linear_rows(x, self.weight, self.rows, None, bias)


Product = Plain | packing.Packed | Rows


@dataclass(frozen=True)
class Form:
    """One way of multiplying.

    Attributes:
        label: What is multiplied, for messages.
        dtypes: Of the weights.
        make: Makes it of a matrix, whose entries it may share.
        size: Most bytes that it takes, of rows, columns and the bytes of an entry.
        traceable: Whether ``torch.compile`` can hold it in a graph.
    """

    label: str
    dtypes: tuple[torch.dtype, ...]
    make: Callable[[Tensor], Product]
    size: Callable[[int, int, int], int]
    traceable: bool = True


def _bytes(rows: int, columns: int, itemsize: int) -> int:
    return rows * columns * itemsize


def _rows(weight: Tensor) -> Rows:
    return Rows(weight.contiguous())


PLAIN = Form("plain weights", (), Plain, _bytes)

PACKED = Form("packed weights", packing.DTYPES, packing.pack, packing.packed_bytes, traceable=False)

NATIVE = Form("weights read in place", INPUT_DTYPES, _rows, _bytes)
