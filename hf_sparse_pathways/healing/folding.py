"""From a trained student back to a pathway: what was learnt becomes part of the kept weights.

A change of the outgoing leaf is added to the block's ``delta``, changes of the incoming leaves to
its ``incoming``. Nothing is left to be computed at run time: the compact executor copies the sum.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, as_matrix
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.healing.adapters import lora_change
from hf_sparse_pathways.healing.settings import HealingSettings
from hf_sparse_pathways.healing.students import Student, StudentLeaf, base_weight, kept_rows

Change = Tensor | LowRank


def fold(
    student: Student, frozen: nn.Module, settings: HealingSettings, dtype: torch.dtype
) -> tuple[BlockPathway, ...]:
    """Return the pathway that computes what a trained student does, one entry per FFN block.

    Args:
        student: The student.
        frozen: The dense model that it was made from.
        settings: What was trained.
        dtype: In which the changes are stored.
    """
    folded = []
    for pathway, leaves in zip(student.pathways, student.leaves, strict=True):
        changes = tuple(
            _stored(_change(student, frozen, leaf, earlier, settings.train), dtype)
            for leaf, earlier in zip(leaves, _earlier(pathway, len(leaves)), strict=True)
        )
        folded.append(_changed(pathway, changes))
    return tuple(folded)


def cut(
    tuned: Sequence[BlockPathway], pathways: Sequence[BlockPathway], blocks: Sequence[FfnBlock]
) -> tuple[BlockPathway, ...]:
    """Return pathways with a tuned dense model's changes of the neurons that they keep. Pure.

    Args:
        tuned: The dense model's changes, as ``fold`` returns them for what keeps everything.
        pathways: What is kept, with its own changes; one entry per FFN block.
        blocks: The FFN blocks.
    """
    made = []
    for whole, pathway, block in zip(tuned, pathways, blocks, strict=True):
        leaves = len(block.layout.incoming) + 1
        rows, kept = kept_rows(block, pathway.keep), pathway.keep.nonzero().flatten()
        parts = [_part(change, 0, rows) for change in _earlier(whole, leaves)[:-1]]
        parts.append(_part(whole.delta, 1, kept))
        sums = map(add_changes, _earlier(pathway, leaves), parts)
        made.append(_changed(pathway, tuple(sums)))
    return tuple(made)


def _changed(pathway: BlockPathway, changes: tuple[Change | None, ...]) -> BlockPathway:
    """Return a pathway with other changes, one per leaf, the outgoing one last."""
    incoming = () if all(change is None for change in changes[:-1]) else changes[:-1]
    return replace(pathway, delta=changes[-1], incoming=incoming)


def _part(change: Change | None, dim: int, index: Tensor) -> Change | None:
    """Return some rows (0) or columns (1) of a change."""
    if change is None:
        return None
    if isinstance(change, Tensor):
        return change.index_select(dim, index)
    if dim == 0:
        return LowRank(change.outer.index_select(0, index), change.inner)
    return LowRank(change.outer, change.inner.index_select(1, index))


def add_changes(first: Change | None, second: Change | None) -> Change | None:
    """Return the sum of two changes, low-rank as long as that is smaller. Pure."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return as_matrix(first) + as_matrix(second)
    outer = torch.cat([first.outer.float(), second.outer.float()], 1)
    together = LowRank(outer, torch.cat([first.inner.float(), second.inner.float()], 0))
    rows, columns = together.outer.shape[0], together.inner.shape[1]
    small = together.rank * (rows + columns) < rows * columns
    return together if small else together.product()


def _earlier(pathway: BlockPathway, leaves: int) -> tuple[Change | None, ...]:
    """Return a pathway's changes so far, one per leaf, the outgoing one last."""
    missing = leaves - 1 - len(pathway.incoming)
    return (*pathway.incoming, *[None] * missing, pathway.delta)


def _change(
    student: Student, frozen: nn.Module, leaf: StudentLeaf, earlier: Change | None, train: str
) -> Change | None:
    """Return by how much a leaf's weights differ from the base's."""
    if not leaf.trained:
        return earlier
    if train == "lora":
        return add_changes(earlier, lora_change(student, leaf.place))
    trained: Tensor = student.model.get_submodule(leaf.place).weight.detach()
    return (trained - base_weight(frozen, leaf)).cpu()


def _stored(change: Change | None, dtype: torch.dtype) -> Change | None:
    if isinstance(change, LowRank):
        return LowRank(change.outer.to(dtype), change.inner.to(dtype))
    return None if change is None else change.to(dtype)
