"""A block's tokens sorted by the expert that computes them, one product per expert present.

The incoming leaves return the tokens in sorted order, each with its own expert's neurons; what the
block does between its leaves is the same for every token. The outgoing leaf brings them back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.ffn.copies import kept_weights
from hf_sparse_pathways.ffn.forms import Form

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf
    from hf_sparse_pathways.ffn.state import BlockState


@dataclass(frozen=True, eq=False)
class Group:
    """The tokens of one expert.

    Attributes:
        member: The expert, by its number in ``Members``.
        run: Where its tokens stand when they are sorted.
        width: How many neurons it keeps.
    """

    member: int
    run: slice
    width: int


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert of one pathway computes each token of a block's input.

    Attributes:
        order: The tokens, those of one expert together, int64.
        groups: One entry per expert that has tokens.
    """

    order: Tensor
    groups: tuple[Group, ...]

    def sort(self, x: Tensor) -> Tensor:
        """Return ``(tokens, ...)`` of ``(..., width)`` in the order of the experts."""
        return x.flatten(0, -2).index_select(0, self.order)

    def restore(self, tokens: Tensor) -> Tensor:
        """Return what ``sort`` has sorted, in the order of the tokens."""
        return torch.empty_like(tokens).index_copy_(0, self.order, tokens)


def route(state: "BlockState", pathway: int, x: Tensor) -> int | Routing:
    """Return the member that computes all of a block's input ``(..., d_in)``, or who computes what.

    Args:
        state: The block's.
        pathway: A pathway with clusters.
        x: The input.
    """
    first, experts = state.members.clustered[pathway], state.router(pathway, x.device)(x)
    if experts.numel() == 1:  # a step of decoding, of which nothing shall be lost
        return first + int(experts)
    experts = experts.flatten()
    counts, groups, start = experts.bincount().tolist(), [], 0
    for number, count in enumerate(counts):
        if count:
            width = state.members.widths[first + number]
            groups.append(Group(first + number, slice(start, start + count), width))
            start += count
    if len(groups) == 1:
        return groups[0].member
    return Routing(experts.argsort(stable=True), tuple(groups))


def grouped_incoming(leaf: "PathwayLeaf", x: Tensor, routing: Routing, form: Form) -> Tensor:
    """Return each token's kept neurons, in sorted order; zeros fill up narrower experts."""
    tokens, parts = routing.sort(x), leaf.rows_per_neuron
    widest = max(group.width for group in routing.groups)
    outputs = []
    for group in routing.groups:
        output = kept_weights(leaf, group.member, form)(tokens[group.run])
        if group.width < widest:
            split = output.view(len(output), parts, group.width)
            output = functional.pad(split, (0, widest - group.width)).flatten(1)
        outputs.append(output)
    return torch.cat(outputs).view(*x.shape[:-1], -1)


def skip_in_groups(state: "BlockState", x: Tensor, up: Tensor | None, routing: Routing) -> Tensor:
    """Zero what each token skips of its own expert's neurons; tokens are in sorted order."""
    tokens = x.flatten(0, -2)
    factors = None if up is None else up.flatten(0, -2)
    parts = []
    for group in routing.groups:
        own = tokens[group.run, : group.width]
        factor = None if factors is None else factors[group.run, : group.width]
        part = state.skip_kept(own, factor, group.member)
        parts.append(functional.pad(part, (0, tokens.shape[1] - group.width)))
    return torch.cat(parts).view_as(x)


def grouped_outgoing(
    leaf: "PathwayLeaf", x: Tensor, routing: Routing, form: Form, block_input: Tensor | None
) -> Tensor:
    """Sum over each token's kept neurons, and bring the tokens back into their order."""
    tokens = x.flatten(0, -2)
    inputs = None if block_input is None else routing.sort(block_input)
    outputs = [
        kept_weights(leaf, group.member, form).with_bypass(
            tokens[group.run, : group.width], None if inputs is None else inputs[group.run]
        )
        for group in routing.groups
    ]
    return routing.restore(torch.cat(outputs)).view(*x.shape[:-1], -1)
