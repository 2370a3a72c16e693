"""Some rows or columns of a matrix in a file, read without the rest.

The excerpt is filled through a buffer of a fraction of a megabyte, in the dtype that it is going to
have, so that nothing but the excerpt itself ever takes memory. Few runs are read as ranges; of many
the rows that hold them are read, and the wanted entries copied. (A view of the mapped file would
copy nothing, but the system maps large pieces around every page that is used.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.runs import MOST_RUNS, Run

_BUFFER_BYTES = 1 << 18


@dataclass(frozen=True)
class Excerpt:
    """Some rows or columns of a tensor in a file: a stand-in for a lazy slice of safetensors.

    Attributes:
        source: The whole tensor, as a lazy slice.
        dim: The dimension that is cut.
        runs: What is kept of it, ascending.
        dtype: The excerpt's dtype; None for the stored one.
    """

    source: Any
    dim: int
    runs: Sequence[Run]
    dtype: torch.dtype | None = None

    def get_shape(self) -> list[int]:
        """Return the shape, as a lazy slice does."""
        shape = list(self.source.get_shape())
        shape[self.dim] = sum(stop - start for start, stop in self.runs)
        return shape

    def get_dtype(self) -> Any:
        """Return the stored dtype, as a lazy slice does."""
        return self.source.get_dtype()

    def __getitem__(self, key: object) -> Tensor:
        """Read the excerpt; ``[...]`` is all that is asked of it."""
        if key is not Ellipsis:
            raise TypeError(f"An excerpt is read whole, with [...]; got [{key!r}].")
        first = self.source[0:1]
        excerpt = torch.empty(self.get_shape(), dtype=self.dtype or first.dtype)
        rows = max(1, _BUFFER_BYTES // (first.numel() * first.element_size()))
        if len(self.runs) > 2 * MOST_RUNS:  # of a fused matrix there are two for each
            self._gather(excerpt, rows)
        elif self.dim == 0:
            self._fill_rows(excerpt, rows)
        else:
            self._fill_columns(excerpt, rows)
        return excerpt

    def _fill_rows(self, excerpt: Tensor, most: int) -> None:
        done = 0
        for run in self.runs:
            for start, stop in _chunks(*run, most):
                excerpt[done : done + stop - start] = self.source[start:stop]
                done += stop - start

    def _fill_columns(self, excerpt: Tensor, most: int) -> None:
        for first, last in _chunks(0, len(excerpt), most):
            done = 0
            for start, stop in self.runs:
                part = self.source[first:last, start:stop]
                excerpt[first:last, done : done + stop - start] = part
                done += stop - start

    def _gather(self, excerpt: Tensor, most: int) -> None:
        """Read all rows, a few at a time, and keep the entries that are wanted."""
        index = torch.cat([torch.arange(start, stop) for start, stop in self.runs])
        for start, stop in _chunks(0, self.source.get_shape()[0], most):
            if self.dim == 1:
                excerpt[start:stop] = self.source[start:stop].index_select(1, index)
                continue
            low, high = torch.searchsorted(index, torch.tensor([start, stop])).tolist()
            if low < high:
                wanted = index[low:high] - start
                excerpt[low:high] = self.source[start:stop].index_select(0, wanted)


def _chunks(start: int, stop: int, most: int) -> Iterator[Run]:
    """Yield the parts of a run that are at most so long."""
    for first in range(start, stop, most):
        yield first, min(first + most, stop)
