"""A block's tokens sorted by the expert that computes them, one product per expert present.

The incoming leaves return the tokens in sorted order, each with its own expert's neurons; what the
block does between its leaves is the same for every token. The outgoing leaf brings them back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.ffn.copies import Expert, kept_weights
from hf_sparse_pathways.ffn.forms import Form

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf
    from hf_sparse_pathways.ffn.state import BlockState


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert of one pathway computes each token of a block's input.

    Attributes:
        order: The tokens, those of one expert together, int64; None if there is one expert.
        groups: Each expert that has tokens, and the run of its tokens in that order.
        widths: How many neurons each of them keeps.
    """

    order: Tensor | None
    groups: tuple[tuple[Expert, slice], ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, state: "BlockState", pathway: int, x: Tensor) -> "Routing":
        """Route a block's input ``(..., d_in)``."""
        experts = state.router(pathway, x.device)(x).flatten()
        if len(experts) == 1:
            counts, order = {int(experts): 1}, None
        else:
            order = experts.argsort(stable=True)
            counted = experts.bincount().tolist()
            counts = {number: count for number, count in enumerate(counted) if count}
        first, start, groups = state.clustered[pathway], 0, []
        for number, count in counts.items():
            groups.append((Expert(pathway, number), slice(start, start + count)))
            start += count
        widths = tuple(state.members[first + number].kept for number in counts)
        return cls(order if len(groups) > 1 else None, tuple(groups), widths)

    def sort(self, x: Tensor) -> Tensor:
        """Return ``(tokens, ...)`` of ``(..., width)`` in the order of the experts."""
        flat = x.flatten(0, -2)
        return flat if self.order is None else flat.index_select(0, self.order)

    def restore(self, sorted_: Tensor) -> Tensor:
        """Return what ``sort`` has sorted, in the order of the tokens."""
        if self.order is None:
            return sorted_
        return torch.empty_like(sorted_).index_copy_(0, self.order, sorted_)


def grouped_incoming(leaf: "PathwayLeaf", x: Tensor, routing: Routing, form: Form) -> Tensor:
    """Return each token's kept neurons, in sorted order; zeros fill up narrower experts."""
    tokens, parts = routing.sort(x), leaf.rows_per_neuron
    widest = max(routing.widths)
    outputs = []
    for (expert, run), width in zip(routing.groups, routing.widths, strict=True):
        output = kept_weights(leaf, expert, form)(tokens[run])
        if width < widest:
            split = output.view(len(output), parts, width)
            output = functional.pad(split, (0, widest - width)).flatten(1)
        outputs.append(output)
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.view(*x.shape[:-1], -1)


def grouped_outgoing(
    leaf: "PathwayLeaf", x: Tensor, routing: Routing, form: Form, block_input: Tensor | None
) -> Tensor:
    """Sum over each token's kept neurons, and bring the tokens back into their order."""
    tokens = x.flatten(0, -2)
    inputs = None if block_input is None else routing.sort(block_input)
    outputs = [
        kept_weights(leaf, expert, form).with_bypass(
            tokens[run, :width], None if inputs is None else inputs[run]
        )
        for (expert, run), width in zip(routing.groups, routing.widths, strict=True)
    ]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return routing.restore(joined).view(*x.shape[:-1], -1)
