"""What a pathway keeps of one FFN block, and what it adds so that the rest is missed less.

With keep mask K, activation a and block input x, the block's output ``W a + b`` becomes
``(W_K + delta) a_K + b + bias + outer (inner x)``. All additions are optional: ``delta`` is a
least-squares refit of the kept columns (in full, or as a low-rank patch), ``bias`` the mean of what
is missing, and the last term the linear bypass. Healing may also change the kept rows of the
incoming leaves, from which the activation is made.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.errors import MismatchError
from hf_sparse_pathways.ffn.neuron_groups import ALWAYS, GROUP_PARTS, NeuronGroups


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


@dataclass(frozen=True, eq=False)
class SharedColumns:
    """Some columns of a matrix that is the same for several experts, or groups of neurons.

    Attributes:
        matrix: ``(d_out, columns)``.
        keep: Which of its columns, bool ``(columns,)``.
    """

    matrix: Tensor
    keep: Tensor

    def product(self) -> Tensor:
        """Return the kept columns, float32 ``(d_out, kept)``."""
        return self.matrix[:, self.keep.to(self.matrix.device)].float()

    def to(self, like: Tensor) -> Tensor:
        """Return the kept columns with the dtype and device of a tensor."""
        return self.product().to(like)


@dataclass(frozen=True, eq=False)
class Skipping:
    """Which kept neurons are skipped for a token (``skipping.py``).

    Attributes:
        threshold: What the gate has to exceed, float32 ``(kept,)``.
        active: Share of the kept neurons that are not skipped, on calibration text, float32
            ``(1,)``.
    """

    threshold: Tensor
    active: Tensor


Matrix = Tensor | LowRank | SharedColumns
"""A change of weights, in one of the forms in which it is held."""


def as_matrix(matrix: Matrix) -> Tensor:
    """Return a matrix whole, float32."""
    return matrix.float() if isinstance(matrix, Tensor) else matrix.product()


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPathway:
    """What a pathway keeps of one FFN block.

    Attributes:
        keep: Keep mask ``(d_ff,)``, bool, True = kept.
        delta: Added to the kept columns of the outgoing leaf's weight, ``(d_out, kept)`` in
            ascending order of the neurons; or as ``LowRank``, or as ``SharedColumns`` of a matrix
            that its owner stores.
        bias: Added to the output, ``(d_out,)``.
        bypass: A linear map from the block's input to its output, of width d_in.
        incoming: Added to the kept rows of each incoming leaf's weight, ``(rows, d_in)`` in
            ascending order of the rows (of a fused leaf: the gate's, then up's); empty if none is.
        skipping: Which of the kept neurons are skipped token by token; None for none.
        groups: Which of the kept neurons each token has; None for all.
    """

    keep: Tensor
    delta: Matrix | None = None
    bias: Tensor | None = None
    bypass: LowRank | None = None
    incoming: tuple[Tensor | LowRank | None, ...] = ()
    skipping: Skipping | None = None
    groups: NeuronGroups | None = None

    @property
    def kept(self) -> int:
        """Number of kept neurons."""
        return int(self.keep.sum())

    @property
    def neurons(self) -> Tensor:
        """The kept neurons, int64, ascending."""
        return self.keep.nonzero().flatten()

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
            "delta": None if isinstance(self.delta, SharedColumns) else self.delta,
            "bias": self.bias,
            "bypass": self.bypass,
            **{f"incoming{index}": delta for index, delta in enumerate(self.incoming)},
        }
        if self.skipping is not None:
            named |= {name: getattr(self.skipping, name) for name in SKIPPING_PARTS}
        if self.groups is not None:
            named |= self.groups.parts()
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
        skipping, groups = (_pop_all(found, names) for names in (SKIPPING_PARTS, GROUP_PARTS))
        if skipping:
            found["skipping"] = Skipping(**skipping)  # type: ignore[assignment]
        if groups:
            found["groups"] = NeuronGroups.from_parts(groups)  # type: ignore[assignment]
        pairs = isinstance(found.get("bypass"), LowRank | None)
        if set(parts) - set(PARTS) or found.keys() - _FIELDS or not pairs or "keep" not in found:
            raise MismatchError(f"A block's pathway cannot hold exactly {sorted(parts)}.")
        return cls(**found, incoming=tuple(incoming))  # type: ignore[arg-type]

    def divided(self) -> "tuple[BlockPathway, ...]":
        """Return what every token has, then each group, as blocks of their own.

        What is added once stands with the former. Of a refit all have the same matrix.
        """
        assert self.groups is not None  # or there is nothing to divide
        group, neurons = self.groups.group, self.neurons
        parts = []
        for number in range(ALWAYS, self.groups.count):
            own = group == number
            keep = torch.zeros_like(self.keep)
            keep[neurons[own]] = True
            parts.append(BlockPathway(keep=keep, delta=_columns(self.delta, own)))
        return (replace(parts[0], bias=self.bias, bypass=self.bypass), *parts[1:])

    def check(self, name: str, d_in: int, d_ff: int, d_out: int, branches: int) -> None:
        """Check that every part fits a block; ``branches`` are its incoming rows per neuron.

        Of tensors on the device ``meta``, as a file's header gives them, it is not known how many
        neurons are kept; then some number has to fit.

        Raises:
            MismatchError: One does not; the message says which.
        """
        keep = self.keep
        if keep.dtype != torch.bool or tuple(keep.shape) != (d_ff,):
            raise MismatchError(
                f"the mask of {name} is {keep.dtype} {tuple(keep.shape)}; it has to be torch.bool "
                f"({d_ff},)."
            )
        self._check_dtypes(name)
        kept = range(1, d_ff + 1) if keep.is_meta else _exactly(self.kept)
        if not kept.start:
            raise MismatchError(f"the mask of {name} keeps no neuron; keep at least one.")
        outputs, inputs = _exactly(d_out), _exactly(d_in)
        if not isinstance(self.delta, SharedColumns):
            _check_matrix(f"the refit of {name}", self.delta, outputs, kept)
        _check_matrix(f"the bypass of {name}", self.bypass, outputs, inputs)
        if self.bias is not None and tuple(self.bias.shape) != (d_out,):
            raise MismatchError(
                f"the bias of {name} is {tuple(self.bias.shape)}; it has to be ({d_out},)."
            )
        self._check_by_token(name, d_in, kept)
        if len(self.incoming) > branches:
            raise MismatchError(
                f"{len(self.incoming)} incoming leaves of {name} are changed; it has at most "
                f"{branches}."
            )
        for index, delta in enumerate(self.incoming):
            fused = len(self.incoming) == 1 and branches == 2 and _rows(delta) not in kept
            rows = range(2 * kept.start, 2 * kept.stop, 2) if fused else kept
            _check_matrix(f"the change of {name}'s incoming leaf {index}", delta, rows, inputs)

    def check_leaves(self, name: str, leaves: int, *, fused: bool) -> None:
        """Check that the changed rows are those of a live block's incoming leaves.

        Widths alone do not tell two leaves from one with two rows per neuron.

        Args:
            name: The block's.
            leaves: Number of its incoming leaves.
            fused: Whether the one leaf has two rows per neuron.

        Raises:
            MismatchError: They are not.
        """
        rows = self.kept * (2 if fused else 1)
        changed = [_rows(delta) for delta in self.incoming if delta is not None]
        if len(self.incoming) > leaves or any(count != rows for count in changed):
            raise MismatchError(
                f"{name} has {leaves} incoming leaf or leaves of {rows} kept rows each, but "
                f"{changed} rows are changed. Use pathways that were made for this model."
            )

    def _check_by_token(self, name: str, d_in: int, kept: range) -> None:
        """Check what lets a token have some of the kept neurons."""
        if self.skipping is not None:
            self._check_skipping(name, self.skipping, kept)
        if self.groups is not None:
            self._check_groups(name, self.groups, d_in, kept)

    def _check_skipping(self, name: str, skipping: Skipping, kept: range) -> None:
        for part, sizes in (("threshold", kept), ("active", _exactly(1))):
            tensor: Tensor = getattr(skipping, part)
            if tensor.dim() != 1 or len(tensor) not in sizes or tensor.dtype != torch.float32:
                raise MismatchError(
                    f"{part} of {name} is {tensor.dtype} {tuple(tensor.shape)}; it has to be "
                    f"torch.float32 ({_told(sizes)},)."
                )
        active = skipping.active
        if not active.is_meta and not 0.0 <= float(active) <= 1.0:
            raise MismatchError(f"active of {name} is {float(active)}; it is a share, from 0 to 1.")

    def _check_groups(self, name: str, groups: NeuronGroups, d_in: int, kept: range) -> None:
        if self.skipping is not None or any(change is not None for change in self.incoming):
            raise MismatchError(
                f"{name} has groups of neurons, and neurons that tokens skip or changed incoming "
                "leaves: it can have groups alone."
            )
        groups.check(name, d_in, kept)

    def _check_dtypes(self, name: str) -> None:
        for part, tensor in self.parts().items():
            if part not in ("keep", *GROUP_PARTS) and tensor.dtype not in FLOATING:
                raise MismatchError(
                    f"{part} of {name} is {tensor.dtype}; it has to be one of "
                    f"{', '.join(map(str, FLOATING))}."
                )


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the parts of a block's pathway can be, except for its mask."""

MOST_INCOMING = 2
"""Incoming leaves that a block can have."""

SKIPPING_PARTS = ("threshold", "active")

_FIELDS = {"keep", "delta", "bias", "bypass", "skipping", "groups"}
_MATRICES = ("delta", "bypass", *(f"incoming{index}" for index in range(MOST_INCOMING)))

PARTS = (
    "keep",
    "bias",
    *SKIPPING_PARTS,
    *GROUP_PARTS,
    *(f"{name}{half}" for name in _MATRICES for half in ("", "_outer", "_inner")),
)
"""Names of all tensors that a block's pathway can hold."""


def _pop_all(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Take parts out that are there together, or not at all.

    Raises:
        MismatchError: Some are missing.
    """
    taken = {name: found.pop(name) for name in names if name in found}
    if taken and len(taken) < len(names):
        raise MismatchError(f"A block's pathway cannot hold {min(taken)} alone.")
    return taken


def _columns(matrix: Matrix | None, own: Tensor) -> Matrix | None:
    """Return some columns of a refit, given by a mask over them; nothing large is copied."""
    if isinstance(matrix, LowRank):
        return LowRank(matrix.outer, matrix.inner[:, own])
    return SharedColumns(matrix, own) if isinstance(matrix, Tensor) else matrix


def _rows(matrix: Tensor | LowRank | None) -> int:
    shape = () if matrix is None else _shape(matrix)
    return shape[0] if shape else 0


def _shape(matrix: Tensor | LowRank) -> tuple[int, ...]:
    """Return the shape of a matrix; () of two factors that do not make one.

    Their rank is at most what both widths come to: a refit's, and what healing adds to it.
    """
    if not isinstance(matrix, LowRank):
        return tuple(matrix.shape)
    outer, inner = tuple(matrix.outer.shape), tuple(matrix.inner.shape)
    thin = len(outer) == len(inner) == 2 and outer[1] == inner[0] <= outer[0] + inner[1]
    return (outer[0], inner[1]) if thin else ()


def _exactly(size: int) -> range:
    return range(size, size + 1)


def _check_matrix(what: str, matrix: Tensor | LowRank | None, rows: range, columns: range) -> None:
    if matrix is None:
        return
    shape = _shape(matrix)
    if len(shape) != 2 or shape[0] not in rows or shape[1] not in columns:
        factors = (matrix.outer, matrix.inner) if isinstance(matrix, LowRank) else (matrix,)
        given = " times ".join(str(tuple(factor.shape)) for factor in factors)
        fitting = ", ".join(_told(sizes) for sizes in (rows, columns))
        raise MismatchError(f"{what} is {given}; it has to be ({fitting}).")


def _told(sizes: range) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
