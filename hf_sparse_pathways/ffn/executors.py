"""How an FFN block computes one pathway's kept neurons.

An executor is a pair of functions, one for the incoming leaves and one for the outgoing leaf;
everything between them (activation function, gating, dropout) is the block's own code.

- ``masked``: the block computes densely and the activation is multiplied by the keep mask. It is
  the reference, differentiable in every weight, and serves any mixture of rows.
- ``compact``: the kept rows and columns are copied out once per pathway; the block then computes
  them alone. The copies are remade when the weights have changed, and are not differentiable, so
  a forward pass that records gradients is masked instead.
- ``packed``: as ``compact``, with the copies packed for oneDNN (``packing``). A dense pass uses
  packed copies of the whole leaves.
- ``packed-all``: the other linear leaves (attention, head) are packed too, in every pass.

``execution`` says which of them a model uses. To add one, write the two functions, register them
in ``EXECUTORS``, and ``tests/test_exactness.py`` compares it with zeroed weights on every
architecture.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from hf_sparse_pathways.ffn.copies import kept_weights
from hf_sparse_pathways.ffn.state import needed_input

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf


class Executor(Protocol):
    """Two functions that compute a choice of pathway; ``x`` has any leading dimensions.

    ``pathway`` is for ``masked`` an index, or a tensor with one index per row; else the key of the
    leaf's copies.
    """

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Map ``(..., d_model)`` to ``(..., d_ff)``, or to the kept neurons only."""

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Map the activation that ``incoming`` led to back to ``(..., d_model)``.

        ``block_input`` is what ``incoming`` was given; it is there if a pathway has a bypass.
        """


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


class Compact:
    """Compute with copies of the kept rows and columns, into which the compensation is folded."""

    def __init__(self, *, packed: bool = False) -> None:
        self.packed = packed

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Compute the kept neurons alone."""
        return kept_weights(leaf, pathway, packed=self.packed)(x)

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Sum over the kept neurons; a bypass adds two thin products of the block's input."""
        kept = kept_weights(leaf, pathway, packed=self.packed)
        output = kept(x)
        if kept.bypass is not None:
            output = output + kept.bypass(needed_input(block_input))
        return output


MASKED = Masked()

EXECUTORS: Mapping[str, Executor] = {
    "masked": MASKED,
    "compact": Compact(),
    "packed": Compact(packed=True),
    "packed-all": Compact(packed=True),
}
"""A plain dictionary: Dynamo cannot trace a look-up in a mapping proxy."""
