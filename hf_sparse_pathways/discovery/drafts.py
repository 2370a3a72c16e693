"""A pathway before its blocks are repaired: how many neurons of each block stay, or which."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.evidence import Evidence
from hf_sparse_pathways.discovery.obs import rank_by_obs
from hf_sparse_pathways.discovery.removal import Removal
from hf_sparse_pathways.discovery.repair import BlockTask, Repair, repair
from hf_sparse_pathways.discovery.skipping import widest
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.ffn.block_pathway import BlockPathway


@dataclass(frozen=True)
class Draft:
    """One pathway before its blocks are repaired.

    Attributes:
        evidence: What is known of the domain.
        widths: Neurons kept of each block, if they are ranked when the block's turn comes.
        masks: The keep masks, if they are settled.
        repairs: Which compensation is computed.
        provenance: What was decided, and why.
        active: The share of tokens that a kept neuron is computed for; 1 where none is skipped.
    """

    evidence: Evidence
    widths: Sequence[int]
    masks: Sequence[Tensor] | None
    repairs: Repair
    provenance: dict[str, Any]
    active: float = 1.0

    def block(self, index: int, task: BlockTask | None) -> BlockPathway:
        """Choose and repair one block; without a task from the profile alone."""
        if task is None and self.repairs.needs_grams:
            task = self.evidence.task(index)
        keep = self.choose(index, task) if self.masks is None else self.masks[index]
        return BlockPathway(keep=keep) if task is None else repair(task, keep, self.repairs)

    def one_shot(self) -> list[BlockPathway]:
        """Return every block's pathway from the profile alone."""
        return [self.block(index, None) for index in range(len(self.evidence.blocks))]

    def loss(self, windows: Sequence[Window]) -> float:
        """Return the one-shot pathway's loss on a text, nats per token."""
        return mean_loss(self.evidence.model, windows, self.one_shot(), self.evidence.blocks)

    def choose(self, index: int, task: BlockTask | None) -> Tensor:
        """Rank one block's neurons; with a bypass once more, knowing what it does."""
        if task is not None and task.keep is not None:
            return task.keep
        width, d_ff = self.widths[index], self.evidence.blocks[index].d_ff
        most = d_ff - width
        if task is None or task.active is None:
            removal = self.evidence.removal(index, task, most=most)
        else:
            removal = self.evidence.removal(index, task)
            width = self._width(index, removal, task.active)
        keep = removal.keep(width)
        if task is None or not self.repairs.bypass_rank or bool(keep.all()):
            return keep
        bypass = repair(task, keep, self.repairs).bypass
        known = None if bypass is None else bypass.inner
        return rank_by_obs(task, self.evidence.ranking, known, most=d_ff - width).keep(width)

    def _width(self, index: int, removal: Removal, active: Tensor) -> int:
        """Return how many neurons stay for the cost that was planned, at the shares that are seen.

        Args:
            index: The block.
            removal: In which order its neurons go.
            active: The share of tokens that each is computed for.
        """
        shape = self.evidence.profile.base.blocks[index]
        costs = torch.tensor([shape.share(share) for share in active.tolist()])
        return widest(removal.order, costs, self.widths[index] * shape.share(self.active))
