"""Gram matrices: what the neurons of an FFN block do together, and with the block's input.

Per block one symmetric matrix is kept, the sum over tokens of z z^T with z = [a, x, 1] (activation,
block input, one), or without x where no bypass is wanted. Its parts are the second moments
E[a a^T], E[x a^T], E[x x^T] and the means that least squares needs. As a sum it merges with that of
other tokens, and it can be left on disk until a block is worked on: an 8B model's matrices do not
fit into memory together.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_sparse_pathways.discovery.precision import bfloat16_products
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import check_finite, give_usual_mode
from hf_sparse_pathways.reading import open_regular
from hf_sparse_pathways.tensor_files import check_header, open_tensors, without_memory

GRAM_NAME = re.compile(r"[0-9a-f]{24}\.safetensors")
"""Name of a matrix's file."""

_STRIPES = 4
"""The upper triangle is computed in this many stripes of rows, which saves 3/8 of the products."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moments of one FFN block over a domain's tokens.

    Attributes:
        total: Sum of z z^T, float32, symmetric, ``(d_ff + d_in + 1,) * 2``; d_in may be 0.
        d_ff: Number of neurons.
    """

    total: Tensor
    d_ff: int

    @classmethod
    def of_upper(cls, upper: Tensor, d_ff: int) -> "Gram":
        """Build from the upper triangle; what lies below it is not read. Pure."""
        upper = upper.triu()
        return cls(upper + upper.triu(1).T, d_ff)

    @property
    def has_input(self) -> bool:
        """Whether the block's input is part of z."""
        return len(self.total) > self.d_ff + 1

    @property
    def tokens(self) -> float:
        """Number of tokens, padding excluded."""
        return float(self.total[-1, -1])

    def load(self) -> "Gram":
        """Return itself; what is on disk has the same method."""
        return self


class GramSource(Protocol):
    """A Gram matrix in memory or on disk."""

    def load(self) -> Gram:
        """Return it in memory."""


@dataclass(frozen=True)
class SumOfGrams:
    """The Gram matrix of several token streams together, added when it is loaded.

    If one of them holds no inputs, neither does the sum.
    """

    sources: tuple[GramSource, ...]

    def load(self) -> Gram:
        """Return the sum."""
        first, *rest = self.sources
        gram = first.load()
        if not rest:
            return gram
        total, with_input = gram.total.clone(), gram.has_input
        for source in rest:
            more = source.load()
            if more.has_input != with_input:
                total, with_input = _without_input(total, gram.d_ff), False
                more = Gram(_without_input(more.total, gram.d_ff), gram.d_ff)
            total += more.total
        return Gram(total, gram.d_ff)


def _without_input(total: Tensor, d_ff: int) -> Tensor:
    """Return the moments of the activation and one alone."""
    index = torch.cat([torch.arange(d_ff), torch.tensor([len(total) - 1])])
    return total[index][:, index]


def merge_grams(mine: Sequence[GramSource], theirs: Sequence[GramSource]) -> tuple[GramSource, ...]:
    """Return the matrices of both token streams together, block by block. Pure."""
    return tuple(SumOfGrams(pair) for pair in zip(mine, theirs, strict=True))


def files_of(source: GramSource) -> list[Path]:
    """Return the files that a source still has to read."""
    if isinstance(source, SumOfGrams):
        return [path for part in source.sources for path in files_of(part)]
    return [source.path] if isinstance(source, GramFile) else []


class GramAccumulator:
    """Adds up a block's Gram matrix, in place.

    With d_in 0 the block's input is left out; not ``mixed``, what the activation does together with
    the input and with one stays zero. Products are float32 over at most ``workspace``
    tokens at a time, and so is the sum: tests show it equal to float64 in six digits, far below the
    sampling error of the moments. Of bfloat16 activations the products are those of bfloat16
    numbers (``bfloat16_products``): theirs lose nothing, inputs are what the FFN's first product
    rounds them to, and targets and weights are rounded.
    """

    def __init__(self, d_in: int, d_ff: int, targets: int = 0, *, mixed: bool = True) -> None:
        size = d_ff + d_in + 1
        self.d_ff = d_ff
        self._parts = [(0, size)] if mixed else [(0, d_ff), (d_ff, size)]
        self.upper = torch.zeros(size, size, dtype=torch.float32)
        self.cross = torch.zeros(targets, size, dtype=torch.float32)

    def add(
        self,
        activation: Tensor,
        block_input: Tensor | None,
        workspace: Tensor,
        *,
        target: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            activation: ``(tokens, d_ff)``.
            block_input: ``(tokens, d_in)``; None where it is left out.
            workspace: float32, at least ``d_ff + d_in + 1`` wide, overwritten.
            target: ``(tokens, targets)``, whose products with z add to ``cross``.
            weights: Square roots of the tokens' weights, ``(tokens, 1)``.
        """
        size = len(self.upper)
        self.upper = self.upper.to(workspace.device)
        self.cross = self.cross.to(workspace.device)
        rows = len(workspace)
        for start in range(0, len(activation), rows):
            part = slice(start, start + rows)
            z = workspace[: len(activation[part]), :size]
            z[:, : self.d_ff] = activation[part]
            if block_input is not None:
                z[:, self.d_ff : -1] = block_input[part]
            z[:, -1] = 1.0
            goal = None if target is None else target[part].float()
            if weights is not None:
                z *= weights[part]
                goal = None if goal is None else goal * weights[part]
            with bfloat16_products(activation):
                self._multiply(z, goal)

    def _multiply(self, z: Tensor, target: Tensor | None) -> None:
        if target is not None:
            self.cross.addmm_(target.T, z)
        for start, stop in self._parts:
            width = -(-(stop - start) // _STRIPES)
            for stripe in range(start, stop, width):
                columns, rest = slice(stripe, min(stripe + width, stop)), slice(stripe, stop)
                self.upper[columns, rest].addmm_(z[:, columns].T, z[:, rest])

    def gram(self) -> Gram:
        """Return the symmetric matrix on the CPU."""
        return Gram.of_upper(self.upper.cpu(), self.d_ff)


@dataclass(frozen=True)
class GramFile:
    """A Gram matrix in a file of its own, named by its content.

    Attributes:
        path: The file.
        sha256: Of its content, checked when it is loaded.
        d_ff: Number of neurons.
        size: Rows of the matrix.
    """

    path: Path
    sha256: str
    d_ff: int
    size: int

    def load(self) -> Gram:
        """Read the matrix.

        Raises:
            ArtefactError: The file is missing, corrupt, of another shape, or holds NaN.
        """
        try:
            if _sha256(self.path) != self.sha256:
                raise ArtefactError(
                    f"{self.path} is not the file that the profile describes (SHA-256 differs): "
                    "it is truncated or corrupt. Take the profile again."
                )
            with open_tensors(self.path) as file:
                shape = (self.size, self.size)
                check_header(file.header, {"total": without_memory(torch.float32, *shape)})
                total = file.read(["total"])["total"]
        except (OSError, ArtefactError) as error:
            raise ArtefactError(f"{self.path} cannot be read: {error}") from error
        check_finite(str(self.path), total)
        return Gram(total, self.d_ff)


def write_gram(gram: Gram, folder: Path) -> GramFile:
    """Write a matrix into a folder under a name made of its content; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".gram.")
    os.close(handle)
    try:
        save_file({"total": gram.total.contiguous()}, temporary)
        digest = _sha256(Path(temporary))
        path = folder / f"{digest[:24]}.safetensors"
        give_usual_mode(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return GramFile(path=path, sha256=digest, d_ff=gram.d_ff, size=len(gram.total))


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
