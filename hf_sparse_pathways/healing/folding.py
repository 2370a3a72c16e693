"""From a trained student back to a pathway: what was learnt becomes part of the kept weights.

A change of the outgoing leaf is added to the block's ``delta``, changes of the incoming leaves to
its ``incoming``. Nothing is left to be computed at run time: the compact executor copies the sum.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, SharedColumns
from hf_sparse_pathways.healing.adapters import lora_change
from hf_sparse_pathways.healing.settings import HealingSettings
from hf_sparse_pathways.healing.students import Student, StudentLeaf, base_weight

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
        changes = [
            _stored(_change(student, frozen, leaf, earlier, settings.train), dtype)
            for leaf, earlier in zip(leaves, _earlier(pathway, len(leaves)), strict=True)
        ]
        incoming = () if all(change is None for change in changes[:-1]) else tuple(changes[:-1])
        folded.append(replace(pathway, delta=changes[-1], incoming=incoming))
    return tuple(folded)


def add_changes(first: Change | None, second: LowRank) -> Change:
    """Return the sum of two changes, low-rank as long as that is smaller. Pure."""
    if isinstance(first, Tensor):
        return first.float() + second.product()
    together = second
    if first is not None:
        outer = torch.cat([first.outer.float(), second.outer.float()], 1)
        together = LowRank(outer, torch.cat([first.inner.float(), second.inner.float()], 0))
    rows, columns = together.outer.shape[0], together.inner.shape[1]
    small = together.rank * (rows + columns) < rows * columns
    return together if small else together.product()


def _earlier(pathway: BlockPathway, leaves: int) -> tuple[Change | None, ...]:
    """Return a pathway's changes so far, one per leaf, the outgoing one last."""
    missing = leaves - 1 - len(pathway.incoming)
    assert not isinstance(pathway.delta, SharedColumns)  # experts are not healed
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
