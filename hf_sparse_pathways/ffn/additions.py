"""What pathways add to the leaves of a masked block: their compensation, on each device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank
from hf_sparse_pathways.ffn.runs import Run


@dataclass(frozen=True)
class Addition:
    """A pathway's compensation in one dtype and on one device, as the masked executor adds it.

    Attributes:
        kept: The kept neurons, int64 ``(kept,)``.
        delta: As in ``BlockPathway``.
        bias: As in ``BlockPathway``.
        bypass: As in ``BlockPathway``.
    """

    kept: Tensor
    delta: Tensor | LowRank | None
    bias: Tensor | None
    bypass: LowRank | None

    @classmethod
    def of(cls, pathway: BlockPathway, kept: Tensor, like: Tensor) -> "Addition":
        """Take a pathway's compensation over to the dtype and device of a tensor.

        Its kept neurons are given, since finding them breaks a graph that is being traced.
        """
        return cls(
            kept=kept.to(like.device),
            delta=None if pathway.delta is None else pathway.delta.to(like),
            bias=None if pathway.bias is None else pathway.bias.to(like),
            bypass=None if pathway.bypass is None else pathway.bypass.to(like),
        )

    def __call__(self, activation: Tensor, block_input: Tensor | None) -> Tensor:
        """Return what is added to the output, ``(..., d_out)`` or ``(d_out,)``."""
        terms = []
        if self.delta is not None:
            kept = activation.index_select(-1, self.kept)
            if isinstance(self.delta, LowRank):
                terms.append(self.delta(kept))
            else:
                terms.append(functional.linear(kept, self.delta))
        if self.bias is not None:
            terms.append(self.bias)
        if self.bypass is not None:
            terms.append(self.bypass(needed_input(block_input)))
        return sum(terms[1:], start=terms[0])


@dataclass(frozen=True)
class IncomingAddition:
    """A pathway's change of an incoming leaf's kept rows, in one dtype and on one device.

    Attributes:
        rows: The rows, int64.
        delta: The change of their weights, ``(rows, d_in)``.
        width: Rows of the leaf, as far as this process holds it.
    """

    rows: Tensor
    delta: Tensor | LowRank
    width: int

    def cut(self, held: Run) -> "IncomingAddition":
        """Return the part for a leaf that holds a run of all rows. Pure."""
        limits = torch.tensor(held, device=self.rows.device)
        part = slice(*torch.searchsorted(self.rows, limits).tolist())
        if isinstance(self.delta, LowRank):
            delta: Tensor | LowRank = LowRank(self.delta.outer[part], self.delta.inner)
        else:
            delta = self.delta[part]
        return IncomingAddition(self.rows[part] - held[0], delta, held[1] - held[0])

    def __call__(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        """Return what is added to the leaf's output, ``(..., width)``."""
        change = self.product(x)
        nothing = change.new_zeros(*change.shape[:-1], self.width)
        return nothing.index_copy(-1, self.rows, change)

    def product(self, x: Tensor) -> Tensor:
        """Return what is added to the changed rows alone, ``(..., rows)``."""
        if isinstance(self.delta, LowRank):
            return self.delta(x)
        return functional.linear(x, self.delta)


def needed_input(block_input: Tensor | None) -> Tensor:
    """Return a block's input, which its bypass needs.

    Raises:
        UnsupportedModelError: The incoming leaf did not run before the outgoing one.
    """
    return _needed(block_input, "a linear bypass")


def needed_route(known: Any) -> Any:
    """Return where a block's tokens go, which pathways with clusters need.

    Raises:
        UnsupportedModelError: The incoming leaf did not run before the outgoing one.
    """
    return _needed(known, "clusters of tokens")


def _needed(known: Any, what: str) -> Any:
    if known is None:
        raise UnsupportedModelError(
            f"A pathway has {what}, but the block's incoming leaf was not called before its "
            "outgoing leaf, so the block's input is not known. Build the pathways without for this "
            "model."
        )
    return known


def spread(masks: Tensor, activation: Tensor) -> Tensor:
    """Bring one row of values per row of the batch, ``(rows, n)``, to an activation's shape.

    Nothing is copied per token, unless the block has flattened its input.
    """
    rows, length = masks.shape[0], activation.shape[0]
    if activation.dim() == 2 and length % rows == 0:
        return masks.repeat_interleave(length // rows, dim=0)
    if activation.dim() > 2 and length == rows:
        return masks.view(rows, *([1] * (activation.dim() - 2)), -1)
    raise PathwaysError(
        f"Domains were given for {rows} rows, but an FFN block received an input of shape "
        f"{tuple(activation.shape)}. Give one domain per row of the batch."
    )


def add_to_rows(
    output: Tensor,
    rows: Tensor,
    addition: Addition | IncomingAddition,
    activation: Tensor,
    block_input: Tensor | None,
) -> Tensor:
    """Add something of a pathway to its own rows of a batch. Pure.

    Args:
        output: ``(batch, ..., d_out)``.
        rows: bool, one entry per row of the output's first dimension, and trailing ones.
        addition: What is added.
        activation: What it is made of, ``(batch, ..., d_ff)``, or the input of an incoming leaf.
        block_input: ``(batch, ..., d_in)``.
    """
    if torch.compiler.is_compiling():  # which rows these are is not known while tracing
        return output + torch.where(rows, addition(activation, block_input), 0)
    selected = rows.flatten().nonzero().flatten()
    theirs = None if block_input is None else block_input.index_select(0, selected)
    added = addition(activation.index_select(0, selected), theirs)
    added = added.expand(len(selected), *output.shape[1:])
    return output.index_add(0, selected, added.to(output.dtype))  # autocast may have cast one
