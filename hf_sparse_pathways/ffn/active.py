"""A few tokens of a pathway that skips neurons: what none of them needs is not read.

The gate is there when the next incoming leaf is called, which then reads the rows of the neurons
whose gate is large enough for any of the tokens, and gives zeros for the others; the outgoing leaf
reads their columns, as rows of the transpose. So it is where weights are read in place.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.ffn.copies import WHOLE, kept_weights
from hf_sparse_pathways.ffn.forms import NATIVE, Form, Rows, Sums

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.leaves import PathwayLeaf

FEW = 4
"""Tokens, at most: of more, together, nearly every neuron is needed."""


def find_active(leaf: "PathwayLeaf", gate: Tensor, pathway: Any, form: Form) -> Tensor | None:
    """Return which of the kept neurons any token needs, int64; None if all are to be computed.

    Args:
        leaf: The incoming leaf that is called after the gate's.
        gate: What that leaf has returned, ``(..., kept)``.
        pathway: What computes the block's input.
        form: In which weights are multiplied.
    """
    state = leaf.state
    if form is not NATIVE or not isinstance(pathway, int) or pathway == WHOLE:
        return None
    if torch.compiler.is_compiling():
        return None
    skipping = state.members.all[pathway].skipping
    if skipping is None or state.function is None or gate.shape[:-1].numel() > FEW:
        return None
    needed = state.function(gate).abs() > skipping.threshold.to(gate.device)
    return needed.flatten(0, -2).any(0).nonzero().flatten()


def active_incoming(leaf: "PathwayLeaf", x: Tensor, pathway: int, active: Tensor) -> Tensor:
    """Return the kept neurons' values ``(..., kept)``; those that are not needed may be zeros."""
    kept = kept_weights(leaf, pathway, NATIVE)
    if not isinstance(kept.product, Rows):
        return kept(x)
    values = kept.product.at(active)(x, None if kept.bias is None else kept.bias[active])
    output = values.new_zeros(*values.shape[:-1], leaf.state.members.widths[pathway])
    return output.index_copy_(-1, active, values)


def active_outgoing(
    leaf: "PathwayLeaf", x: Tensor, pathway: int, active: Tensor, block_input: Tensor | None
) -> Tensor:
    """Return the sum over what is needed of the kept activation ``(..., kept)``."""
    kept = kept_weights(leaf, pathway, NATIVE)
    if not isinstance(kept.product, Sums):
        return kept.with_bypass(x, block_input)
    output = kept.product.at(active)(x.index_select(-1, active), kept.bias)
    return kept.bypassed(output, block_input)
