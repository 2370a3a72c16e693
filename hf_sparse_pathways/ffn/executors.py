"""How an FFN block computes one pathway's kept neurons.

An executor is a pair of functions, one for the incoming leaves and one for the outgoing leaf;
everything between them (activation function, gating, dropout) is the block's own code.

- ``masked``: the block computes densely and the activation is multiplied by the keep mask. It is
  the reference, differentiable in every weight, and serves any mixture of rows.
- ``compact``: the kept rows and columns are copied out once per pathway; the block then computes
  them alone. The copies are remade when the weights have changed, and are not differentiable, so
  a forward pass that records gradients is masked instead. For a batch of mixed pathways their
  union is copied (``mixtures``).
- ``sliced``: the kept rows and columns are views of the weights where a pathway's neurons stand in
  few runs (``permute``) and its compensation leaves the weights as they are; else copies.
- ``packed``: as ``compact``, with the copies packed for oneDNN (``packing``). A dense pass uses
  packed copies of the whole leaves.
- ``packed-all``: the other linear leaves (attention, head) are packed too, in every pass.
- ``indexed``: kept rows are multiplied where they lie, by a kernel in C (``native``); so is every
  whole leaf, in every pass. Only columns are copied, and rows that a pathway changes.

``execution`` says which of them a model uses. To add one, write the two functions, register them
in ``EXECUTORS``, and ``tests/test_exactness.py`` compares it with zeroed weights on every
architecture.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.additions import spread
from hf_sparse_pathways.ffn.copies import WHOLE, Columns, kept_weights
from hf_sparse_pathways.ffn.forms import NATIVE, PACKED, PLAIN, Form
from hf_sparse_pathways.ffn.group_products import (
    Selected,
    select_groups,
    selected_incoming,
    selected_outgoing,
)
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.mixtures import Mixture
from hf_sparse_pathways.ffn.routing import (
    Routing,
    grouped_incoming,
    grouped_outgoing,
    route,
    skip_in_groups,
)
from hf_sparse_pathways.ffn.sharding import check_gathered
from hf_sparse_pathways.ffn.slices import Sliced
from hf_sparse_pathways.ffn.state import BlockState

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf


class Executor(Protocol):
    """Two functions that compute a choice of pathway; ``x`` has any leading dimensions.

    ``pathway`` is for ``masked`` an index, or a tensor with one index per row; else the key of the
    leaf's copies, or a ``Mixture``.

    Attributes:
        form: Of its copies.
        everywhere: Whether leaves outside the FFN blocks have copies, in every pass.
    """

    form: Form
    everywhere: bool

    def route(self, state: BlockState, pathway: Any, x: Tensor) -> Any:
        """Return what ``pathway`` is for a block's input, where a pathway has clusters."""

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Map ``(..., d_model)`` to ``(..., d_ff)``, or to the kept neurons only."""

    def skip(self, state: BlockState, x: Tensor, up: Tensor | None, pathway: Any) -> Tensor:
        """Zero what each token skips of the activation, where a pathway does so."""

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Map the activation that ``incoming`` led to back to ``(..., d_model)``.

        ``block_input`` is what ``incoming`` was given; it is there if a pathway has a bypass.
        """


class Masked:
    """Multiply the activation by the keep mask."""

    form = PLAIN
    everywhere = False

    def route(self, state: BlockState, pathway: Any, x: Tensor) -> Any:
        """Return the member that computes all of a block's input, or one per row or token."""
        return state.choose_members(pathway, x)

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Compute every neuron, the kept ones with their change."""
        if leaf.state.shard is not None:
            check_gathered(leaf, x)
        place = (leaf.position, leaf.rows_per_neuron)
        return leaf.state.add_incoming(leaf.dense(x), x, place, pathway)

    def skip(self, state: BlockState, x: Tensor, up: Tensor | None, pathway: Any) -> Tensor:
        """Zero what each token skips; what is not kept is masked after."""
        return x if state.masked_outside else state.skip(x, up, pathway)

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Zero the removed neurons, and add the compensation."""
        state = leaf.state
        if state.shard is not None:
            check_gathered(leaf, x)
        masked = x if state.masked_outside else state.mask(x, pathway)
        return state.add(leaf.dense(masked), masked, block_input, pathway)


class Compact:
    """Compute with copies of the kept rows and columns, into which the compensation is folded."""

    def __init__(self, form: Form = PLAIN, *, everywhere: bool = False) -> None:
        """Take the form of the copies, and whether other leaves than the FFN's have some."""
        self.form = form
        self.everywhere = everywhere

    def route(self, state: BlockState, pathway: Any, x: Tensor) -> Any:
        """Return the member that computes all tokens, or what each token has."""
        if pathway in state.members.grouped:
            return select_groups(state, pathway, x, self.form)
        return route(state, pathway, x) if pathway in state.members.clustered else pathway

    def incoming(self, leaf: "PathwayLeaf", x: Tensor, pathway: Any) -> Tensor:
        """Compute the kept neurons alone."""
        if isinstance(pathway, Mixture):
            return self._incoming_mixed(leaf, x, pathway.on(x.device))
        if isinstance(pathway, Routing):
            return grouped_incoming(leaf, x, pathway, self.form)
        if isinstance(pathway, Selected):
            return selected_incoming(leaf, x, pathway, self.form)
        return kept_weights(leaf, pathway, self.form)(x)

    def skip(self, state: BlockState, x: Tensor, up: Tensor | None, pathway: Any) -> Tensor:
        """Zero what each token skips of the kept neurons."""
        if isinstance(pathway, Routing):
            return skip_in_groups(state, x, up, pathway)
        if isinstance(pathway, Mixture | Selected) or pathway == WHOLE:
            return x
        return state.skip_kept(x, up, pathway)

    def outgoing(
        self, leaf: "PathwayLeaf", x: Tensor, pathway: Any, block_input: Tensor | None
    ) -> Tensor:
        """Sum over the kept neurons; a bypass adds two thin products of the block's input."""
        if isinstance(pathway, Routing):
            return grouped_outgoing(leaf, x, pathway, self.form, block_input)
        if isinstance(pathway, Selected):
            return selected_outgoing(leaf, x, pathway, self.form, block_input)
        if not isinstance(pathway, Mixture):
            return kept_weights(leaf, pathway, self.form).with_bypass(x, block_input)
        pathway = pathway.on(x.device)
        if leaf.state.apart(pathway.key):
            return self._outgoing_apart(leaf, x, pathway, block_input)
        union = leaf.state.union(pathway.key, x.device)
        masked = x.masked_fill(spread(pathway.removed_from(union), x), 0)
        if union.index is None:
            output = leaf.dense(masked)
        else:
            output = kept_weights(leaf, pathway.key, self.form)(masked)
        return leaf.state.add(output, masked, block_input, pathway.pathways)

    def _incoming_mixed(self, leaf: "PathwayLeaf", x: Tensor, mixture: Mixture) -> Tensor:
        """Compute the neurons that any row needs, for all rows; then each row's own change."""
        union = leaf.state.union(mixture.key, x.device)
        if union.index is None:
            output = leaf.dense(x)
        else:
            output = kept_weights(leaf, mixture.key, self.form)(x)
        for pathway, places, rows in zip(
            mixture.key, union.places, mixture.rows_of(len(x)), strict=True
        ):
            change = None
            if places is not None:
                change = leaf.state.change(pathway, leaf.position, leaf.rows_per_neuron, output)
            if change is not None and places is not None:
                wide = [places + part * union.width for part in range(leaf.rows_per_neuron)]
                theirs = output.index_select(0, rows)
                added = change.product(x.index_select(0, rows)).to(theirs.dtype)
                theirs.index_add_(-1, torch.cat(wide), added)
                output = output.index_copy(0, rows, theirs)
        return output

    def _outgoing_apart(
        self, leaf: "PathwayLeaf", x: Tensor, mixture: Mixture, block_input: Tensor | None
    ) -> Tensor:
        """Apply each pathway's own columns to its rows."""
        union = leaf.state.union(mixture.key, x.device)
        output = x.new_empty(*x.shape[:-1], linear_weight(leaf).shape[0])
        for pathway, places, rows in zip(
            mixture.key, union.places, mixture.rows_of(len(x)), strict=True
        ):
            theirs = x.index_select(0, rows)
            if places is None:
                output.index_copy_(0, rows, leaf.dense(theirs))
                continue
            kept = kept_weights(leaf, Columns(mixture.key, pathway), self.form)
            inputs = None if block_input is None else block_input.index_select(0, rows)
            theirs = theirs.index_select(-1, places)
            output.index_copy_(0, rows, kept.with_bypass(theirs, inputs))
        return output


MASKED = Masked()

_COMPACT = Compact()

EXECUTORS: Mapping[str, Executor] = {
    "masked": MASKED,
    "compact": _COMPACT,
    "sliced": Sliced(_COMPACT),
    "packed": Compact(PACKED),
    "packed-all": Compact(PACKED, everywhere=True),
    "indexed": Compact(NATIVE, everywhere=True),
}
"""A plain dictionary: Dynamo cannot trace a look-up in a mapping proxy."""


def has_own_dense(name: str) -> bool:
    """Say whether an executor computes dense passes with its own kernels, too.

    Args:
        name: A name in ``EXECUTORS``, or ``"auto"``, which leaves dense passes alone.
    """
    return name in EXECUTORS and EXECUTORS[name].form is not PLAIN
