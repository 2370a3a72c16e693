"""A block's tokens with the groups of neurons that each has: one product per group present.

Pairs of a token and one of its groups are sorted by the group. The incoming leaves return for every
token what all tokens have, then its k groups in the order of their logits, so that all are equally
wide and what the block does between its leaves is its own code. The outgoing leaf weights each
group and adds up what it gives. A step of decoding so reads no weights but those that it needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.copies import kept_weights
from hf_sparse_pathways.ffn.forms import Form

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


def select_groups(state: "BlockState", pathway: int, x: Tensor) -> Selection:
    """Return which groups compute a block's input ``(..., d_in)``.

    Args:
        state: The block's.
        pathway: A pathway with groups.
        x: The input.
    """
    groups, weights = state.groups(pathway, x.device)(x.flatten(0, -2))
    first, chosen = state.members.grouped[pathway], groups.shape[1]
    order, present = groups.flatten().argsort(stable=True), groups.flatten().bincount().tolist()
    pairs, start = [], 0
    for number, count in enumerate(present):
        if count:
            own = order[start : start + count]
            pairs.append(Pairs(first + 1 + number, own // chosen, own % chosen))
            start += count
    return Selection(first, tuple(pairs), weights)


def selected_incoming(leaf: "PathwayLeaf", x: Tensor, selection: Selection, form: Form) -> Tensor:
    """Return what each token has of the neurons, its groups in their order."""
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
    leaf: "PathwayLeaf", x: Tensor, selection: Selection, form: Form, block_input: Tensor | None
) -> Tensor:
    """Sum over what each token has, its groups weighted."""
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
