"""Some rows or columns of a matrix in a file, read without the rest.

Few runs are read as ranges. Many are read through a buffer of a few megabytes, from which the
wanted entries are copied, so that the whole matrix is never in memory. Both read into memory of
their own; only one run of rows that is wanted as it is stays a view of the mapped file, as the
loaded weights of a dense model are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.runs import MOST_RUNS, Run

_BUFFER_BYTES = 2 << 20


@dataclass(frozen=True)
class Excerpt:
    """Some rows or columns of a tensor in a file: a stand-in for a lazy slice of safetensors.

    Attributes:
        mapped: The whole tensor, lazily, as a view of the mapped file; or a tensor.
        copied: The same, of which ranges are read into memory.
        dim: The dimension that is cut.
        runs: What is kept of it, ascending.
        dtype: The dtype that the excerpt is going to have.
    """

    mapped: Any
    copied: Any
    dim: int
    runs: Sequence[Run]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """Return the shape, as a lazy slice does."""
        shape = list(self.mapped.get_shape())
        shape[self.dim] = sum(stop - start for start, stop in self.runs)
        return shape

    def get_dtype(self) -> Any:
        """Return the stored dtype, as a lazy slice does."""
        return self.mapped.get_dtype()

    def __getitem__(self, key: object) -> Tensor:
        """Read the excerpt; ``[...]`` is all that is asked of it."""
        if key is not Ellipsis:
            raise TypeError(f"An excerpt is read whole, with [...]; got [{key!r}].")
        if self.dim == 0 and len(self.runs) == 1 and _NAMES.get(self.get_dtype()) == self.dtype:
            start, stop = self.runs[0]
            return self.mapped[start:stop]
        if len(self.runs) <= 2 * MOST_RUNS:  # of a fused matrix there are two for each
            parts = [_part(self.copied, self.dim, run) for run in self.runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)
        return self._read_buffered()

    def _read_buffered(self) -> Tensor:
        """Read all rows, a few at a time, and keep the entries that are wanted."""
        whole = list(self.mapped.get_shape())
        index = torch.cat([torch.arange(start, stop) for start, stop in self.runs])
        first = self.copied[0:1]
        rows = max(1, _BUFFER_BYTES // (first.numel() * first.element_size()))
        excerpt = torch.empty(self.get_shape(), dtype=first.dtype)
        for start in range(0, whole[0], rows):
            stop = min(start + rows, whole[0])
            if self.dim == 1:
                excerpt[start:stop] = self.copied[start:stop].index_select(1, index)
                continue
            low, high = torch.searchsorted(index, torch.tensor([start, stop])).tolist()
            if low < high:
                wanted = index[low:high] - start
                excerpt[low:high] = self.copied[start:stop].index_select(0, wanted)
        return excerpt


_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in safetensors files."""


def _part(source: Any, dim: int, run: Run) -> Tensor:
    start, stop = run
    part: Tensor = source[start:stop] if dim == 0 else source[:, start:stop]
    return part.contiguous()
