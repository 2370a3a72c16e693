"""A block's neurons in another order: its weights, and what pathways say of it.

Row i of the incoming leaves and column i of the outgoing leaf belong to neuron i alone, so moving
both to another place changes nothing but the order in which the block's output is summed.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, Matrix, SharedColumns
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, Kept


def reorder_pathway(part: Kept, order: Tensor) -> Kept:
    """Return a block's pathway for its neurons in another order. Pure.

    Args:
        part: The pathway.
        order: int64 ``(d_ff,)``, the neuron that stands at each place.
    """
    if isinstance(part, ClusteredBlock):
        experts = tuple(_reorder(expert, order) for expert in part.experts)
        shared = None if part.shared is None else part.shared[:, order]
        return replace(part, experts=experts, shared=shared)
    return _reorder(part, order)


def _reorder(part: BlockPathway, order: Tensor) -> BlockPathway:
    keep = part.keep[order]
    columns = (part.keep.cumsum(0) - 1)[order][keep]
    incoming = tuple(_reorder_rows(change, columns) for change in part.incoming)
    skipping = part.skipping
    if skipping is not None:
        skipping = replace(skipping, threshold=skipping.threshold[columns])
    delta = _reorder_columns(part.delta, columns)
    groups = None if part.groups is None else part.groups.at(columns)
    return replace(
        part, keep=keep, delta=delta, incoming=incoming, skipping=skipping, groups=groups
    )


def _reorder_columns(matrix: Matrix | None, columns: Tensor) -> Tensor | LowRank | None:
    assert not isinstance(matrix, SharedColumns)  # it belongs to the block
    if isinstance(matrix, LowRank):
        return LowRank(matrix.outer, matrix.inner[:, columns])
    return None if matrix is None else matrix[:, columns]


def _reorder_rows(matrix: Tensor | LowRank | None, neurons: Tensor) -> Tensor | LowRank | None:
    """Reorder the rows of kept neurons; of a fused leaf there are two for each."""
    if isinstance(matrix, LowRank):
        return LowRank(matrix.outer[_rows(neurons, len(matrix.outer))], matrix.inner)
    return None if matrix is None else matrix[_rows(neurons, len(matrix))]


def _rows(neurons: Tensor, rows: int) -> Tensor:
    """Return the rows of neurons in a matrix in which all have their first row, then the next."""
    return torch.cat([neurons + part for part in range(0, rows, len(neurons))])


@torch.no_grad()
def reorder_weights(block: FfnBlock, order: Tensor) -> dict[int, nn.Parameter]:
    """Return the parameters of a block's leaves for its neurons in another order. Pure.

    Args:
        block: A live block.
        order: As in ``reorder_pathway``.

    Returns:
        The new parameters, by the ``id`` of those that they stand for.
    """
    reordered: dict[int, nn.Parameter] = {}
    for leaf in block.incoming:
        weight, bias = leaf.get_parameter("weight"), leaf._parameters.get("bias")
        dim = 1 if isinstance(leaf, Conv1D) else 0
        rows = _rows(order, weight.shape[dim])
        reordered[id(weight)] = _selected(weight, dim, rows)
        if bias is not None:
            reordered[id(bias)] = _selected(bias, 0, rows)
    outgoing = block.outgoing.get_parameter("weight")
    dim = 0 if isinstance(block.outgoing, Conv1D) else 1
    reordered[id(outgoing)] = _selected(outgoing, dim, order)
    return reordered


def _selected(parameter: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def can_reorder(block: FfnBlock) -> bool:
    """Whether nothing but its leaves tells a block's neurons apart, as far as can be seen.

    A block with anything else that is d_ff wide is left as it is, which is always right.
    """
    if block.entangled is not None:
        return False
    known = {id(tensor) for leaf in block.leaves for tensor in _tensors(leaf)}
    others = (tensor for tensor in _tensors(block.parent) if id(tensor) not in known)
    return all(block.d_ff not in tensor.shape for tensor in others)


def _tensors(module: nn.Module) -> tuple[Tensor, ...]:
    return (*module.parameters(), *module.buffers())
