"""Copies of what a pass needs of a leaf's weights: kept rows or columns, or a packed whole.

A leaf holds its copies by key. A copy is made again when the weights have changed; ``residents``
decides which keys may have any.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.additions import needed_input
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank
from hf_sparse_pathways.ffn.forms import NATIVE, Form, Product, Rows, Sums
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.stored import Stored, is_int8, stored_tensor

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf

WHOLE = -1
"""Key of a copy of the whole leaf, which is worth having in other forms than plain."""

Key = int | tuple[int, ...]
"""What is resident or not: a pathway's index, ``WHOLE``, or the pathways of a mixed batch."""


@dataclass(frozen=True)
class Columns:
    """Key of an outgoing leaf's copy for one pathway of a mixed batch.

    Attributes:
        mixture: The key of the batch.
        pathway: The pathway.
    """

    mixture: tuple[int, ...]
    pathway: int


@dataclass(frozen=True)
class Shared:
    """Key of an outgoing leaf's copy of which all experts of a pathway read columns in place.

    Attributes:
        pathway: The pathway.
    """

    pathway: int


Own = Key | Columns | Shared
"""Key of one copy of a leaf; of an expert's it is its number in ``Members``."""

_INDEX_BYTES = 8

_SCALE_BYTES = 4

_MAKING = threading.Lock()


@dataclass(frozen=True)
class KeptWeights:
    """A leaf's kept rows ``(kept, d_in)`` or columns ``(d_out, kept)``, in ``linear``'s order.

    Refit and bias are added in; the bypass of an outgoing leaf is apart.

    Attributes:
        form: The form of the product.
        product: Multiplies by the matrix.
        bias: Added to the product.
        bypass: In the dtype and on the device of the weight.
        stamp: Identifies the weights that it was made of.
    """

    form: Form
    product: Product
    bias: Tensor | None
    bypass: LowRank | None
    stamp: tuple[object, ...]

    def fits(self, stamp: tuple[object, ...], form: Form) -> bool:
        """Whether it was made of these weights, in this form."""
        return self.stamp == stamp and self.form is form

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product with ``(..., inputs)``, without the bypass."""
        return self.product(x, self.bias)

    def with_bypass(self, x: Tensor, block_input: Tensor | None) -> Tensor:
        """Return the product, and what the bypass makes of the block's input."""
        return self.bypassed(self(x), block_input)

    def bypassed(self, output: Tensor, block_input: Tensor | None) -> Tensor:
        """Return a product with what the bypass makes of the block's input."""
        return output if self.bypass is None else output + self.bypass(needed_input(block_input))


def kept_weights(leaf: "PathwayLeaf", key: Own, form: Form) -> KeptWeights:
    """Return a leaf's copy, made again if the weights have changed since."""
    if torch.compiler.is_compiling():  # they are held, and were looked at before the graph runs
        return leaf.copies[key]
    stamp = _stamp(leaf.weight) if leaf.bias is None else _stamp(leaf.weight) + _stamp(leaf.bias)
    copy = leaf.copies.get(key)
    if copy is None or not copy.fits(stamp, form):
        with _MAKING:  # two threads with one pathway would make two copies
            copy = leaf.copies.get(key)
            if copy is None or not copy.fits(stamp, form):
                leaf.copies.pop(key, None)
                copy = leaf.copies[key] = _copy(leaf, key, form, stamp)
    return copy


def _source(leaf: "PathwayLeaf", key: Own, form: Form) -> int | Shared | None:
    """Return the key of the copy of which a member's own reads rows or columns in place, if any.

    All groups of a pathway read what stands under its own number, and experts with one refit the
    whole leaf with it.
    """
    if form is not NATIVE or not isinstance(key, int) or key == WHOLE:
        return None
    owner, shared = leaf.state.members.owner(key), leaf.state.members.shared(key)
    if owner is not None:
        return owner if Stored.of(leaf).known else None
    return None if shared is None or leaf.neuron_dim == 0 else Shared(shared)


def _read_in_place(
    leaf: "PathwayLeaf", member: int, source: int | Shared, stamp: tuple[object, ...]
) -> KeptWeights:
    """Return a member's part of another copy; called while copies are made."""
    copy = leaf.copies.get(source)
    if copy is None or not copy.fits(stamp, NATIVE):
        copy = leaf.copies[source] = _copy(leaf, source, NATIVE, stamp)
    own = leaf.state.members.all[member]
    index = own.neurons
    if isinstance(source, int):
        keep = leaf.state.members.all[source].keep
        index = (keep.cumsum(0) - 1)[index]
        if leaf.neuron_dim == 0:
            index = in_parts(index, leaf.rows_per_neuron, int(keep.sum()))
    index = index.to(leaf.weight.device)
    assert isinstance(copy.product, Rows | Sums)
    product = copy.product.at(index)
    if leaf.neuron_dim == 0:
        bias = None if copy.bias is None else copy.bias[index]
        return KeptWeights(NATIVE, product, bias, None, stamp)
    if isinstance(source, int):  # what is added once is there
        return KeptWeights(NATIVE, product, copy.bias, copy.bypass, stamp)
    return KeptWeights(NATIVE, product, _added_bias(leaf, own), _bypass(leaf, own), stamp)


def in_parts(neurons: Tensor, parts: int, width: int) -> Tensor:
    """Return the rows of neurons in a matrix that has several parts of so many rows."""
    return torch.cat([neurons + part * width for part in range(parts)])


def copy_keys(leaf: "PathwayLeaf", key: Key, form: Form) -> Iterator[Own]:
    """Yield the keys of all copies that a leaf has for a resident key."""
    if key == WHOLE:
        yield key
    elif not isinstance(key, tuple):
        members = leaf.state.members.of_pathway(key)
        source = _source(leaf, members[0], form)
        if source is not None:
            yield source
        yield from members
    elif leaf.neuron_dim == 1 and leaf.state.apart(key):
        yield from (Columns(key, pathway) for pathway in key if pathway >= 0)
    elif leaf.state.union(key).index is not None:
        yield key


def drop_copies(leaf: "PathwayLeaf", key: Key) -> None:
    """Drop all copies that a leaf has for a resident key."""
    theirs: set[object] = {key}
    if isinstance(key, int) and key != WHOLE:
        theirs = {Shared(key), *leaf.state.members.of_pathway(key)}
    for own in list(leaf.copies):
        if (own.mixture if isinstance(own, Columns) else own) in theirs:
            leaf.copies.pop(own, None)


def copy_bytes(leaf: "PathwayLeaf", key: Key, form: Form) -> int:
    """Return how many bytes a leaf's copies take; at most, if they are packed."""
    return sum(_bytes(leaf, own, form) for own in copy_keys(leaf, key, form))


def _bytes(leaf: "PathwayLeaf", key: Own, form: Form) -> int:
    source = _source(leaf, key, form)
    if source is not None and isinstance(key, int):
        return _bytes_in_place(leaf, leaf.state.members.all[key], source)
    rows, columns = linear_weight(leaf).shape
    itemsize, extra = leaf.weight.element_size(), 0
    index, own = _neurons(leaf, key)
    if index is not None and leaf.neuron_dim == 0:
        rows = len(index) * leaf.rows_per_neuron
        extra += 0 if leaf.bias is None else rows
    elif index is not None:
        columns = len(index)
    if own is not None and leaf.neuron_dim == 1:
        extra += _added_once(own)
    whole, extra = index is None, extra * itemsize
    if is_int8(leaf.weight):
        extra += rows * _SCALE_BYTES
        itemsize = 1
    if isinstance(key, Shared):
        return form.size(rows, columns, itemsize) + extra
    if form is NATIVE and _is_in_place(leaf, index, own):
        return (0 if whole else rows * _INDEX_BYTES) + extra
    return form.size(rows, columns, itemsize) + extra


def _bytes_in_place(leaf: "PathwayLeaf", own: BlockPathway, source: int | Shared) -> int:
    """Return what a part of another copy takes beside that: an index, and what is its own."""
    itemsize = leaf.weight.element_size()
    if leaf.neuron_dim == 0:
        each = _INDEX_BYTES + (0 if leaf.bias is None else itemsize)
        each += _SCALE_BYTES if is_int8(leaf.weight) else 0
        return own.kept * leaf.rows_per_neuron * each
    added = _added_once(own) * itemsize if isinstance(source, Shared) else 0
    return own.kept * _INDEX_BYTES + added


def _added_once(own: BlockPathway) -> int:
    """Return how many numbers a pathway's bias and bypass have."""
    bias = 0 if own.bias is None else own.bias.numel()
    return bias + (0 if own.bypass is None else own.bypass.outer.numel() + own.bypass.inner.numel())


def _neurons(leaf: "PathwayLeaf", key: Own) -> tuple[Tensor | None, BlockPathway | None]:
    """Return the neurons that a copy holds (None: all), and the pathway that changes them."""
    if isinstance(key, tuple):
        return leaf.state.union(key).index, None
    if key == WHOLE or isinstance(key, Shared):
        return None, None
    own = leaf.state.members.all[key.pathway if isinstance(key, Columns) else key]
    return own.neurons, own


def _stamp(weight: Tensor) -> tuple[object, ...]:
    tensor = stored_tensor(weight)
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.dtype, tensor.device)


def _is_in_place(leaf: "PathwayLeaf", index: Tensor | None, own: BlockPathway | None) -> bool:
    """Whether rows of the leaf's own weight are all that is needed."""
    contiguous = linear_weight(leaf).stride(-1) == 1
    return contiguous and (index is None or leaf.neuron_dim == 0) and _change(leaf, own) is None


def _change(leaf: "PathwayLeaf", own: BlockPathway | None) -> Tensor | LowRank | None:
    """Return what a pathway adds to an incoming leaf's kept rows."""
    if own is None or leaf.neuron_dim == 1:
        return None
    return own.incoming[leaf.position] if leaf.position < len(own.incoming) else None


def _copy(leaf: "PathwayLeaf", key: Own, form: Form, stamp: tuple[object, ...]) -> KeptWeights:
    with torch.inference_mode(False), torch.no_grad():
        index, own = _neurons(leaf, key)
        stored = Stored.of(leaf)
        if isinstance(key, Shared):
            block = leaf.state.pathways[key.pathway]
            sums = Sums.of(stored.changed(block.shared))  # type: ignore[union-attr]
            return KeptWeights(form, sums, None, None, stamp)
        if index is None:
            return KeptWeights(form, form.make(stored), leaf.bias, None, stamp)
        leaf.check_whole()
        source = _source(leaf, key, form)
        if isinstance(key, int) and source is not None:
            return _read_in_place(leaf, key, source, stamp)
        if leaf.neuron_dim == 0:
            rows = leaf.state.rows_of(index, leaf.rows_per_neuron).to(stored.values.device)
            bias = None if leaf.bias is None else leaf.bias[rows]
            if form is NATIVE and _is_in_place(leaf, index, own):
                return KeptWeights(form, Rows.of(stored, rows), bias, None, stamp)
            kept = stored.rows(rows).changed(_change(leaf, own))
            return KeptWeights(form, form.make(kept), bias, None, stamp)
        index = index.to(stored.values.device)
        columns = stored.columns(index)
        if own is None:
            return KeptWeights(form, form.make(columns), leaf.bias, None, stamp)
        changed = columns.changed(own.delta)
        by_token = own.skipping is not None or own.groups is not None
        by_rows = form is NATIVE and by_token and changed.known
        product = Sums.of(changed) if by_rows else form.make(changed)
        return KeptWeights(form, product, _added_bias(leaf, own), _bypass(leaf, own), stamp)


def _added_bias(leaf: "PathwayLeaf", own: BlockPathway) -> Tensor | None:
    """Return an outgoing leaf's bias with the pathway's, in the dtype of the weight."""
    if own.bias is None:
        return leaf.bias
    added = own.bias.to(leaf.weight.device).float()
    return (added if leaf.bias is None else leaf.bias.float() + added).to(leaf.weight.dtype)


def _bypass(leaf: "PathwayLeaf", own: BlockPathway) -> LowRank | None:
    """Return a pathway's bypass in the dtype and on the device that a leaf computes in."""
    like = torch.empty(0, dtype=leaf.weight.dtype, device=leaf.weight.device)
    return None if own.bypass is None else own.bypass.to(like)
