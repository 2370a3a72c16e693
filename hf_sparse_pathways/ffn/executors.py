"""How an FFN block computes one pathway's kept neurons.

An executor is a pair of functions, one for the incoming leaves and one for the outgoing leaf;
everything between them (activation function, gating, dropout) is the block's own code.

- ``masked``: the block computes densely and the activation is multiplied by the keep mask. It is
  the reference, differentiable in every weight, and serves any mixture of rows.
- ``compact``: the kept rows and columns are copied out once per pathway; the block then computes
  them alone. The copies are remade when the weights have changed, and are not differentiable, so
  a forward pass that records gradients is masked instead.
- ``sliced``: the kept rows and columns are views of the weights where a pathway's neurons stand in
  few runs (``permute``) and its compensation leaves the weights as they are; else copies.

To add one, write the two functions, register them in ``EXECUTORS``, and ``tests/test_exactness.py``
compares it with zeroed weights on every architecture.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, as_matrix
from hf_sparse_pathways.ffn.slices import Sliced
from hf_sparse_pathways.ffn.state import needed_input

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf

_MAKING = threading.Lock()

AUTO_EXECUTOR = "compact"
"""What ``"auto"`` means: the fastest executor that is exact for every model."""


class Executor(Protocol):
    """Functions that compute a choice of pathway; ``x`` has any leading dimensions.

    ``pathway`` is an index, and for ``masked`` also a tensor with one index per row.
    """

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Map ``(..., d_model)`` to ``(..., d_ff)``, or to the kept neurons only."""

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Map the activation that ``incoming`` led to back to ``(..., d_model)``.

        ``block_input`` is what ``incoming`` was given; it is there if a pathway has a bypass.
        """

    def copy_bytes(self, leaf: "PathwayLeaf", pathway: int) -> int:
        """Return how many bytes of copies of a leaf's weights a pathway needs."""

    def make_copies(self, leaf: "PathwayLeaf", pathway: int) -> None:
        """Make those that are not there or out of date."""


class Masked:
    """Multiply the activation by the keep mask."""

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Compute every neuron, the kept ones with their change."""
        place = (leaf.position, leaf.rows_per_neuron)
        return leaf.state.add_incoming(leaf.dense(x), x, place, pathway)

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Zero the removed neurons, and add the compensation."""
        state = leaf.state
        masked = x if state.masked_outside else state.mask(x, pathway)
        return state.add(leaf.dense(masked), masked, block_input, pathway)

    def copy_bytes(self, leaf: "PathwayLeaf", pathway: int) -> int:  # noqa: ARG002
        """Return 0: nothing is copied."""
        return 0

    def make_copies(self, leaf: "PathwayLeaf", pathway: int) -> None:
        """Do nothing."""


class Compact:
    """Compute with copies of the kept rows and columns, into which the compensation is folded."""

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Compute the kept neurons alone."""
        kept = kept_weights(leaf, pathway)
        return functional.linear(x, kept.weight, kept.bias)

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Sum over the kept neurons; a bypass adds two thin products of the block's input."""
        kept = kept_weights(leaf, pathway)
        output = functional.linear(x, kept.weight, kept.bias)
        if kept.bypass is not None:
            output = output + kept.bypass(needed_input(block_input))
        return output

    def copy_bytes(self, leaf: "PathwayLeaf", pathway: int) -> int:
        """Return the bytes of a leaf's copy."""
        return copy_bytes(leaf, pathway)

    def make_copies(self, leaf: "PathwayLeaf", pathway: int) -> None:
        """Make a leaf's copy."""
        kept_weights(leaf, pathway)


_COMPACT = Compact()

EXECUTORS: Mapping[str, Executor] = {
    "masked": Masked(),
    "compact": _COMPACT,
    "sliced": Sliced(_COMPACT),
}
"""A plain dictionary: Dynamo cannot trace a look-up in a mapping proxy."""


def resolve_executor(name: str) -> str:
    """Return the executor that a name stands for.

    Raises:
        UnknownNameError: Neither ``"auto"`` nor registered.
    """
    if name == "auto":
        return AUTO_EXECUTOR
    if name not in EXECUTORS:
        raise UnknownNameError("executor", name, ["auto", *EXECUTORS])
    return name


@dataclass(frozen=True)
class KeptWeights:
    """A leaf's kept rows ``(kept, d_in)`` or columns ``(d_out, kept)``, in ``linear``'s order.

    Refit and bias are added in; the bypass of an outgoing leaf is apart. ``stamp`` identifies the
    weights that were copied.
    """

    weight: Tensor
    bias: Tensor | None
    bypass: LowRank | None
    stamp: tuple[object, ...]


def kept_weights(leaf: "PathwayLeaf", pathway: int) -> KeptWeights:
    """Return a leaf's copy for a pathway, made again if the weights have changed since."""
    if torch.compiler.is_compiling():
        return _copy_kept(leaf, pathway, ())
    stamp = _stamp(leaf.weight) if leaf.bias is None else _stamp(leaf.weight) + _stamp(leaf.bias)
    copy = leaf.copies.get(pathway)
    if copy is None or copy.stamp != stamp:
        with _MAKING:  # two threads with one pathway would make two copies
            copy = leaf.copies.get(pathway)
            if copy is None or copy.stamp != stamp:
                leaf.copies.pop(pathway, None)
                copy = leaf.copies[pathway] = _copy_kept(leaf, pathway, stamp)
    return copy


def copy_bytes(leaf: "PathwayLeaf", pathway: int) -> int:
    """Return how many bytes a leaf's copy for a pathway takes."""
    own = leaf.state.pathways[pathway]
    width = leaf.weight.numel() // leaf.state.d_ff  # of a neuron's rows, or of its column
    values = own.kept * width
    if leaf.neuron_dim == 0:
        values += 0 if leaf.bias is None else own.kept * leaf.rows_per_neuron
    else:
        values += 0 if own.bias is None else own.bias.numel()
        values += 0 if own.bypass is None else own.bypass.outer.numel() + own.bypass.inner.numel()
    return values * leaf.weight.element_size()


def _stamp(tensor: Tensor) -> tuple[object, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.dtype, tensor.device)


def _copy_kept(leaf: "PathwayLeaf", pathway: int, stamp: tuple[object, ...]) -> KeptWeights:
    with torch.inference_mode(False), torch.no_grad():
        weight, index = leaf.whole_weight(), leaf.kept_index(pathway)
        bias = leaf.bias
        if bias is not None and leaf.neuron_dim == 0:
            bias = bias[index]
        kept = _selected(weight, leaf.neuron_dim, index)
        if leaf.neuron_dim == 0:
            changes = leaf.state.pathways[pathway].incoming
            delta = changes[leaf.position] if leaf.position < len(changes) else None
            return KeptWeights(_changed(kept, delta), bias, None, stamp)
        return _compensated(kept, bias, leaf.state.pathways[pathway], stamp)


def _selected(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return rows or columns of a matrix, contiguous.

    For two-byte types torch's selection of columns has no vector code on the CPU; gathering them as
    integers takes a third to a half of the time.
    """
    if dim == 1 and weight.device.type == "cpu" and weight.element_size() == 2:
        bits = weight.view(torch.int16)
        return bits.gather(1, index.expand(len(weight), -1)).view(weight.dtype)
    return weight.index_select(dim, index).contiguous()


def _changed(weight: Tensor, delta: Tensor | LowRank | None) -> Tensor:
    """Add a change to weights, in float32."""
    if delta is None:
        return weight
    return (weight.float() + as_matrix(delta).to(weight.device)).to(weight.dtype)


def _compensated(
    weight: Tensor, bias: Tensor | None, pathway: BlockPathway, stamp: tuple[object, ...]
) -> KeptWeights:
    """Fold a pathway's compensation into the kept columns, in float32 where it is added."""
    weight = _changed(weight, pathway.delta)
    if pathway.bias is not None:
        added = pathway.bias.to(weight.device).float()
        bias = (added if bias is None else bias.float() + added).to(weight.dtype)
    bypass = None if pathway.bypass is None else pathway.bypass.to(weight)
    return KeptWeights(weight, bias, bypass, stamp)
