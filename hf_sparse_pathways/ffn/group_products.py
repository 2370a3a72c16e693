"""A block's tokens with the groups of neurons that each has: one product per group present.

Pairs of a token and one of its groups are sorted by the group. The incoming leaves return for every
token what all tokens have, then its k groups in the order of their logits, so that all are equally
wide and what the block does between its leaves is its own code. The outgoing leaf weights each
group and adds up what it gives. A step of decoding so reads no weights but those that it needs;
where they are read in place, one product of each leaf does for a single token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.copies import in_parts, kept_weights
from hf_sparse_pathways.ffn.forms import NATIVE, Form, Rows, Sums

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf
    from hf_sparse_pathways.ffn.state import BlockState


@dataclass(frozen=True, eq=False)
class Pairs:
    """The tokens that have one group.

    Attributes:
        member: The group, by its number in ``Members``.
        tokens: The tokens, int64.
        slots: Which of each one's groups it is, int64.
    """

    member: int
    tokens: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """Which groups compute the tokens of a block's input.

    Attributes:
        always: What every token has, by its number in ``Members``.
        pairs: One entry per group that has tokens.
        weights: Of each token's groups, float32 ``(tokens, k)``.
    """

    always: int
    pairs: tuple[Pairs, ...]
    weights: Tensor


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Which neurons compute the only token of a block's input.

    Attributes:
        pathway: The pathway.
        places: Of the neurons among the kept ones, int64: those of all tokens, then each group's.
        weights: Of the token's groups, float32 ``(1, k)``.
    """

    pathway: int
    places: Tensor
    weights: Tensor


Selected = Selection | TokenSelection


def select_groups(state: "BlockState", pathway: int, x: Tensor, form: Form) -> Selected:
    """Return which groups compute a block's input ``(..., d_in)``.

    Args:
        state: The block's.
        pathway: A pathway with groups.
        x: The input.
        form: In which weights are multiplied.
    """
    groups, weights = state.groups(pathway, x.device)(x.flatten(0, -2))
    if form is NATIVE and len(groups) == 1 and not torch.compiler.is_compiling():
        always, several = state.places(pathway, x.device)
        return TokenSelection(pathway, torch.cat([always, several[groups[0]].flatten()]), weights)
    first, chosen = state.members.grouped[pathway], groups.shape[1]
    order, present = groups.flatten().argsort(stable=True), groups.flatten().bincount().tolist()
    pairs, start = [], 0
    for number, count in enumerate(present):
        if count:
            own = order[start : start + count]
            pairs.append(Pairs(first + 1 + number, own // chosen, own % chosen))
            start += count
    return Selection(first, tuple(pairs), weights)


def selected_incoming(leaf: "PathwayLeaf", x: Tensor, selection: Selected, form: Form) -> Tensor:
    """Return what each token has of the neurons, its groups in their order."""
    if isinstance(selection, TokenSelection):
        return _token_incoming(leaf, x, selection)
    tokens, parts = x.flatten(0, -2), leaf.rows_per_neuron
    always = kept_weights(leaf, selection.always, form)(tokens)
    width, size = leaf.state.members.widths[selection.always : selection.always + 2]
    always = always.view(len(tokens), parts, width)
    chosen = selection.weights.shape[1]
    groups = always.new_empty(len(tokens), parts, chosen, size)
    for pairs in selection.pairs:
        output = kept_weights(leaf, pairs.member, form)(tokens[pairs.tokens])
        groups[pairs.tokens, :, pairs.slots] = output.view(-1, parts, size)
    output = torch.cat([always, groups.flatten(2)], -1).flatten(1)
    return output.view(*x.shape[:-1], output.shape[-1])


def selected_outgoing(
    leaf: "PathwayLeaf", x: Tensor, selection: Selected, form: Form, block_input: Tensor | None
) -> Tensor:
    """Sum over what each token has, its groups weighted."""
    if isinstance(selection, TokenSelection):
        return _token_outgoing(leaf, x, selection, block_input)
    tokens = x.flatten(0, -2)
    width, size = leaf.state.members.widths[selection.always : selection.always + 2]
    inputs = None if block_input is None else block_input.flatten(0, -2)
    always = kept_weights(leaf, selection.always, form)
    output = always.with_bypass(tokens[:, :width], inputs)
    groups = tokens[:, width:].view(*selection.weights.shape, size)
    for member, own, weighted in _weighted(groups, selection):
        product = kept_weights(leaf, member, form).product  # the bias was added once
        output.index_add_(0, own, product(weighted, None).to(output.dtype))
    return output.view(*x.shape[:-1], output.shape[-1])


def _weighted(groups: Tensor, selection: Selection) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each group with its tokens and their weighted activation."""
    for pairs in selection.pairs:
        place = pairs.tokens, pairs.slots
        weights = selection.weights[place].unsqueeze(1).to(groups.dtype)
        yield pairs.member, pairs.tokens, groups[place] * weights


def _token_incoming(leaf: "PathwayLeaf", x: Tensor, selection: TokenSelection) -> Tensor:
    """Return what a single token has of the neurons, its groups in their order."""
    kept = kept_weights(leaf, selection.pathway, NATIVE)
    parts, width = leaf.rows_per_neuron, leaf.state.members.widths[selection.pathway]
    rows = selection.places if parts == 1 else in_parts(selection.places, parts, width)
    if not isinstance(kept.product, Rows):
        return kept(x).index_select(-1, rows)
    return kept.product.at(rows)(x, None if kept.bias is None else kept.bias[rows])


def _token_outgoing(
    leaf: "PathwayLeaf", x: Tensor, selection: TokenSelection, block_input: Tensor | None
) -> Tensor:
    """Sum over what a single token has, its groups weighted."""
    kept, weights = kept_weights(leaf, selection.pathway, NATIVE), selection.weights
    width = leaf.state.members.widths[leaf.state.members.grouped[selection.pathway]]
    groups = x[..., width:].view(*x.shape[:-1], weights.shape[-1], -1)
    weighted = groups * weights.unsqueeze(-1).to(x.dtype)
    x = torch.cat([x[..., :width], weighted.flatten(-2)], -1)
    if not isinstance(kept.product, Sums):
        whole = x.new_zeros(*x.shape[:-1], leaf.state.members.widths[selection.pathway])
        return kept.with_bypass(whole.index_copy_(-1, selection.places, x), block_input)
    return kept.bypassed(kept.product.at(selection.places)(x, kept.bias), block_input)
