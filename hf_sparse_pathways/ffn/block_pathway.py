"""What a pathway keeps of one FFN block, and what it adds so that the rest is missed less.

With keep mask K, activation a and block input x, the block's output ``W a + b`` becomes
``(W_K + delta) a_K + b + bias + outer (inner x)``. All additions are optional: ``delta`` is a
least-squares refit of the kept columns (in full, or as a low-rank patch), ``bias`` the mean of what
is missing, and the last term the linear bypass. Healing may also change the kept rows of the
incoming leaves, from which the activation is made.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.errors import MismatchError


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix as the product of two thin ones.

    Attributes:
        outer: ``(d_out, rank)``.
        inner: ``(rank, width)``.
    """

    outer: Tensor
    inner: Tensor

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return int(self.inner.shape[0])

    def product(self) -> Tensor:
        """Return the matrix, float32 ``(d_out, width)``."""
        return self.outer.float() @ self.inner.float()

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply ``(..., width)`` to ``(..., d_out)``."""
        return functional.linear(functional.linear(x, self.inner), self.outer)

    def to(self, like: Tensor) -> "LowRank":
        """Return a copy with the dtype and device of a tensor."""
        return LowRank(self.outer.to(like), self.inner.to(like))


def as_matrix(matrix: Tensor | LowRank) -> Tensor:
    """Return a matrix whole, float32."""
    return matrix.product() if isinstance(matrix, LowRank) else matrix.float()


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPathway:
    """What a pathway keeps of one FFN block.

    Attributes:
        keep: Keep mask ``(d_ff,)``, bool, True = kept.
        delta: Added to the kept columns of the outgoing leaf's weight, ``(d_out, kept)`` in
            ascending order of the neurons; or as ``LowRank``.
        bias: Added to the output, ``(d_out,)``.
        bypass: A linear map from the block's input to its output, of width d_in.
        incoming: Added to the kept rows of each incoming leaf's weight, ``(rows, d_in)`` in
            ascending order of the rows (of a fused leaf: the gate's, then up's); empty if none is.
    """

    keep: Tensor
    delta: Tensor | LowRank | None = None
    bias: Tensor | None = None
    bypass: LowRank | None = None
    incoming: tuple[Tensor | LowRank | None, ...] = ()

    @property
    def kept(self) -> int:
        """Number of kept neurons."""
        return int(self.keep.sum())

    @property
    def compensated(self) -> bool:
        """Whether anything is added to what the kept activation gives."""
        return not (self.delta is None and self.bias is None and self.bypass is None)

    @property
    def full_delta(self) -> Tensor | None:
        """The refit as one matrix ``(d_out, kept)``, or None."""
        return None if self.delta is None else as_matrix(self.delta)

    def parts(self) -> dict[str, Tensor]:
        """Return all tensors by name, as they are stored."""
        named: dict[str, Tensor | LowRank | None] = {
            "keep": self.keep,
            "delta": self.delta,
            "bias": self.bias,
            "bypass": self.bypass,
            **{f"incoming{index}": delta for index, delta in enumerate(self.incoming)},
        }
        parts: dict[str, Tensor] = {}
        for name, value in named.items():
            if isinstance(value, LowRank):
                parts |= {f"{name}_outer": value.outer, f"{name}_inner": value.inner}
            elif value is not None:
                parts[name] = value
        return parts

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor]) -> "BlockPathway":
        """Build from what ``parts`` returned.

        Raises:
            MismatchError: A part is missing or unknown.
        """
        found: dict[str, Tensor | LowRank] = {}
        for name, tensor in parts.items():
            stem, _, half = name.rpartition("_")
            if half == "outer" and f"{stem}_inner" in parts:
                found[stem] = LowRank(tensor, parts[f"{stem}_inner"])
            elif half != "inner" or f"{stem}_outer" not in parts:
                found[name] = tensor
        incoming = [found.pop(f"incoming{index}", None) for index in range(MOST_INCOMING)]
        while incoming and incoming[-1] is None:
            incoming.pop()
        pairs = isinstance(found.get("bypass"), LowRank | None)
        if set(parts) - set(PARTS) or found.keys() - _FIELDS or not pairs or "keep" not in found:
            raise MismatchError(f"A block's pathway cannot hold exactly {sorted(parts)}.")
        return cls(**found, incoming=tuple(incoming))  # type: ignore[arg-type]

    def check(self, name: str, d_in: int, d_ff: int, d_out: int, branches: int) -> None:
        """Check that every part fits a block; ``branches`` are its incoming rows per neuron.

        Raises:
            MismatchError: One does not; the message says which.
        """
        keep = self.keep
        if keep.dtype != torch.bool or tuple(keep.shape) != (d_ff,):
            raise MismatchError(
                f"the mask of {name} is {keep.dtype} {tuple(keep.shape)}; it has to be torch.bool "
                f"({d_ff},)."
            )
        if not keep.any():
            raise MismatchError(f"the mask of {name} keeps no neuron; keep at least one.")
        _check_matrix(f"the refit of {name}", self.delta, d_out, self.kept)
        _check_matrix(f"the bypass of {name}", self.bypass, d_out, d_in)
        if self.bias is not None and tuple(self.bias.shape) != (d_out,):
            raise MismatchError(
                f"the bias of {name} is {tuple(self.bias.shape)}; it has to be ({d_out},)."
            )
        for index, delta in enumerate(self.incoming):
            fused = len(self.incoming) == 1 and branches == 2 and _rows(delta) != self.kept
            rows = self.kept * (2 if fused else 1)
            _check_matrix(f"the change of {name}'s incoming leaf {index}", delta, rows, d_in)


MOST_INCOMING = 2
"""Incoming leaves that a block can have."""

_FIELDS = {"keep", "delta", "bias", "bypass"}
_MATRICES = ("delta", "bypass", *(f"incoming{index}" for index in range(MOST_INCOMING)))

PARTS = (
    "keep",
    "bias",
    *(f"{name}{half}" for name in _MATRICES for half in ("", "_outer", "_inner")),
)
"""Names of all tensors that a block's pathway can hold."""


def _rows(matrix: Tensor | LowRank | None) -> int:
    if matrix is None:
        return 0
    return int((matrix.outer if isinstance(matrix, LowRank) else matrix).shape[0])


def _check_matrix(what: str, matrix: Tensor | LowRank | None, rows: int, columns: int) -> None:
    if matrix is None:
        return
    if isinstance(matrix, LowRank):
        shape = (*matrix.outer.shape[:1], *matrix.inner.shape[1:])
        fits = matrix.outer.shape[1:] == matrix.inner.shape[:1]
    else:
        shape, fits = tuple(matrix.shape), True
    if not fits or shape != (rows, columns):
        raise MismatchError(f"{what} is {tuple(shape)}; it has to be ({rows}, {columns}).")
