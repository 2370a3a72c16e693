"""SparseGPT: which weights of a linear map go, and what the others become for it.

With ``y = W x`` and H = E[x x^T], let U be the upper Cholesky factor of H^-1. Row j of U is, from
its diagonal on, the first row of the inverse of H without the columns before j, over the root of
that inverse's first entry. So columns are worked off from the left: a weight that goes costs
``(w_j / U_jj)^2``, and all columns to its right are adjusted by least squares::

    W_:,k -= e_j U_jk,    e_j = (w_j - what stays of w_j) / U_jj,    k > j

Columns come in blocks, after each of which the columns beyond are adjusted by one product. An
unstructured pattern removes the cheapest weights of a block at once; N:M keeps, of every M columns
and in every row, the N dearest.

Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", arXiv:2301.00774, algorithm 1. Ours: the count is exact where blocks are not even, and
weights of inputs that are always zero go first.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.precision import full_precision
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.shares import is_number

UNSTRUCTURED = "unstructured"
"""The pattern that asks for a fraction only."""

DAMPING = 0.01
"""Added to H's diagonal, in units of its mean."""

BLOCK = 128
"""Columns of a block, at most."""


@dataclass(frozen=True)
class Pattern:
    """Which weights of a matrix may be zero together.

    Attributes:
        sparsity: Fraction of the weights that go, in [0, 1).
        group: M of N:M; 1 where only the fraction counts.
    """

    sparsity: float
    group: int = 1

    @property
    def kept(self) -> int:
        """N of N:M."""
        return round(self.group * (1.0 - self.sparsity))

    def check_columns(self, columns: int) -> None:
        """Check that so many columns are whole groups.

        Raises:
            PathwaysError: They are not.
        """
        if columns % self.group:
            raise PathwaysError(
                f"Pattern {self} needs a multiple of {self.group} columns, but a weight has "
                f"{columns}. Choose pattern={UNSTRUCTURED!r}."
            )

    def __str__(self) -> str:
        return UNSTRUCTURED if self.group == 1 else f"{self.kept}:{self.group}"


def parse_pattern(pattern: str, sparsity: float) -> Pattern:
    """Return the pattern of a name, ``"unstructured"`` or ``"N:M"``, at a sparsity.

    Raises:
        PathwaysError: There is no such pattern, or it removes another fraction.
    """
    if not is_number(sparsity):
        raise PathwaysError(f"Weights are removed by one sparsity for all, got {sparsity!r}.")
    if not 0.0 <= sparsity < 1.0:
        raise PathwaysError(f"sparsity has to be in [0, 1), got {sparsity!r}.")
    if pattern == UNSTRUCTURED:
        return Pattern(float(sparsity))
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", str(pattern))
    kept, group = (int(match[1]), int(match[2])) if match else (1, 1)
    if kept >= group:
        raise PathwaysError(
            f"There is no pattern {pattern!r}. Choose {UNSTRUCTURED!r}, or 'N:M', which keeps N "
            "weights of every M, as in '2:4'."
        )
    own = 1.0 - kept / group
    if not math.isclose(own, sparsity, abs_tol=1e-6):
        raise PathwaysError(
            f"Pattern {pattern} removes {own:g} of the weights, not {sparsity:g}: choose "
            f"sparsity={own:g}, or pattern={UNSTRUCTURED!r}."
        )
    return Pattern(own, group)


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """What is known of a linear map's input; all maps of one input share it.

    Attributes:
        upper: U, upper triangular, float64 ``(d_in, d_in)``.
        dead: Inputs that are always zero, bool ``(d_in,)``.
    """

    upper: Tensor
    dead: Tensor

    @classmethod
    @full_precision()
    def of(cls, gram: Tensor, damping: float = DAMPING) -> "InverseFactor":
        """Factor the inverse of second moments. Pure.

        Args:
            gram: H up to a factor, symmetric, ``(d_in, d_in)``.
            damping: Added to its diagonal, in units of its mean.
        """
        moments = gram.to(torch.float64, copy=True)
        diagonal = moments.diagonal()
        dead = diagonal <= 0
        diagonal += damping * diagonal.mean()
        diagonal[dead] = 1.0
        # With H = R R^T and R upper triangular, H^-1 = R^-T R^-1: U is R's inverse.
        root = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)
        one = torch.eye(len(root), dtype=root.dtype, device=root.device)
        return cls(torch.linalg.solve_triangular(root, one, upper=True), dead)


@full_precision()
def prune_weights(
    weight: Tensor, inputs: InverseFactor, pattern: Pattern, *, block: int = BLOCK
) -> Tensor:
    """Return a weight with a pattern of zeros, adjusted to it. Pure.

    Args:
        weight: ``(d_out, d_in)``; float64 is worked on as such, all else as float32.
        inputs: Of the map's input.
        pattern: Which weights may go together.
        block: Columns between products, rounded down to whole groups.

    Raises:
        PathwaysError: The columns are not whole groups of the pattern.
    """
    rows, columns = weight.shape
    pattern.check_columns(columns)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    turned = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    upper = inputs.upper.to(turned)
    saving = upper.diagonal().square().reciprocal().masked_fill(inputs.dead.to(upper.device), 0.0)
    step = max(pattern.group, block - block % pattern.group)
    for start in range(0, columns, step):
        own = slice(start, min(start + step, columns))
        count = _until(pattern, rows * own.stop) - _until(pattern, rows * start)
        errors = _prune_block(turned[own], upper[own, own], saving[own], pattern, count)
        turned[own.stop :].addmm_(upper[own, own.stop :].T, errors, alpha=-1)
    return turned.T.contiguous()


def _until(pattern: Pattern, weights: int) -> int:
    """Return how many of so many weights go."""
    return round(pattern.sparsity * weights)


def _prune_block(
    own: Tensor, upper: Tensor, saving: Tensor, pattern: Pattern, count: int
) -> Tensor:
    """Prune a block's columns, in place; return their errors ``(columns, d_out)``.

    Args:
        own: The columns, each one as a row in memory, ``(columns, d_out)``.
        upper: Their part of U.
        saving: ``1 / U_jj^2``.
        pattern: Which weights may go together.
        count: How many of the block go.
    """
    gone = torch.zeros_like(own, dtype=torch.bool)
    if pattern.group == 1:
        cost = own.square() * saving[:, None]
        gone.view(-1)[cost.flatten().topk(count, largest=False).indices] = True
    errors = torch.zeros_like(own)
    for column, weights in enumerate(own):
        if pattern.group > 1 and column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            cost = own[group].square() * saving[group, None]
            chosen = cost.topk(pattern.group - pattern.kept, dim=0, largest=False).indices
            gone[group].scatter_(0, chosen, True)
        removed = weights * gone[column]
        torch.div(removed, upper[column, column], out=errors[column])
        weights -= removed
        own[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
    return errors
