"""A pathway before its blocks are repaired: how many neurons of each block stay, or which."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_sparse_pathways.discovery.allocation import (
    ALLOCATIONS,
    BlockCosts,
    Budget,
    check_widths,
    resolve_allocation,
)
from hf_sparse_pathways.discovery.evidence import Evidence
from hf_sparse_pathways.discovery.goal import Goal
from hf_sparse_pathways.discovery.obs import rank_by_obs
from hf_sparse_pathways.discovery.passes import full_precision
from hf_sparse_pathways.discovery.percentile import keep_above
from hf_sparse_pathways.discovery.removal import Removal
from hf_sparse_pathways.discovery.repair import NO_REPAIR, BlockTask, Repair, repair
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import Window, count_tokens
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.pathways.pathway import POOLED

SENSITIVITY_TOKENS = 2048
"""Validation tokens on which each block is pruned alone by ``allocation="sensitivity"``."""

LEAST_RISE = 1e-5
"""Of the loss, in nats per token: smaller ones are noise."""

TRIAL_TOKENS = 2048
"""Validation tokens on which ``allocation="auto"`` compares its candidates."""


@dataclass(frozen=True)
class Draft:
    """One pathway before its blocks are repaired.

    Attributes:
        evidence: What is known of the domain.
        widths: Neurons kept of each block, if they are ranked when the block's turn comes.
        masks: The keep masks, if they are settled.
        repairs: Which compensation is computed.
        provenance: What was decided, and why.
    """

    evidence: Evidence
    widths: list[int]
    masks: list[Tensor] | None
    repairs: Repair
    provenance: dict[str, Any]

    @full_precision()
    def block(self, index: int, task: BlockTask | None) -> BlockPathway:
        """Choose and repair one block; without a task from the profile alone."""
        if task is None and self.repairs.needs_grams:
            task = self.evidence.task(index)
        keep = self._choose(index, task) if self.masks is None else self.masks[index]
        return BlockPathway(keep=keep) if task is None else repair(task, keep, self.repairs)

    def _choose(self, index: int, task: BlockTask | None) -> Tensor:
        """Rank one block's neurons; with a bypass once more, knowing what it does."""
        width = self.widths[index]
        keep = self.evidence.removal(index, task).keep(width)
        if task is None or not self.repairs.bypass_rank or bool(keep.all()):
            return keep
        bypass = repair(task, keep, self.repairs).bypass
        known = None if bypass is None else bypass.inner
        return rank_by_obs(task, self.repairs, known).keep(width)


def make_draft(evidence: Evidence, goal: Goal) -> Draft:
    """Decide how many neurons of each block stay, or which."""
    recipe = evidence.recipe
    text = dict(evidence.domain.provenance)
    provenance = {**recipe.described(), **goal.described(), "text": text}
    if goal.percentile is not None:
        scores = [evidence.scores(index) for index in range(len(evidence.blocks))]
        above = keep_above(scores, goal.percentile, goal.pool)
        repairs = NO_REPAIR if all(bool(keep.all()) for keep in above) else recipe.repair
        provenance["allocation"] = "percentile"
        return Draft(evidence, [], above, repairs, provenance)
    removals = [evidence.removal(index) for index in range(len(evidence.blocks))]
    fractions = goal.sparsity
    if isinstance(fractions, tuple):
        parts = zip(_costs(evidence, removals), fractions, strict=True)
        widths = [
            ALLOCATIONS["uniform"]([cost], _budget(evidence, [index], fraction))[0]
            for index, (cost, fraction) in enumerate(parts)
        ]
        chosen = "given"
    else:
        widths, chosen = _allocate(evidence, removals, float(fractions or 0.0))
    provenance["allocation"] = chosen
    masks = None
    whole = all(w == len(r.order) for r, w in zip(removals, widths, strict=True))
    if whole or recipe.score is not None or recipe.order == "one-shot":
        masks = [r.keep(w) for r, w in zip(removals, widths, strict=True)]
    repairs = NO_REPAIR if whole else recipe.repair
    return Draft(evidence, widths, masks, repairs, provenance)


def _costs(evidence: Evidence, removals: Sequence[Removal]) -> list[BlockCosts]:
    return [
        BlockCosts(d_ff=shape.d_ff, flops_per_neuron=shape.flops_per_neuron, error=removal.error)
        for shape, removal in zip(evidence.profile.base.blocks, removals, strict=True)
    ]


def _budget(evidence: Evidence, blocks: Sequence[int], sparsity: float) -> Budget:
    rank = evidence.recipe.repair.bypass_rank
    shapes = [evidence.profile.base.blocks[index] for index in blocks]
    if sparsity == 0.0:
        rank = 0
    overhead = tuple(rank * (s.d_in + s.d_out) / s.flops_per_neuron for s in shapes)
    for shape, neurons in zip(shapes, overhead, strict=True):
        if neurons and neurons > (1.0 - sparsity) * shape.d_ff - 1:
            raise PathwaysError(
                f"A bypass of rank {rank} costs as much as {neurons:.1f} neurons of {shape.name}; "
                f"at sparsity {sparsity:.3g} only {(1.0 - sparsity) * shape.d_ff:.1f} are left. "
                "Choose a smaller rank or sparsity."
            )
    return Budget(kept=1.0 - sparsity, multiple=evidence.recipe.multiple, overhead=overhead)


def _allocate(
    evidence: Evidence, removals: Sequence[Removal], sparsity: float
) -> tuple[list[int], str]:
    """Return the blocks' widths, and by which allocation."""
    costs = _costs(evidence, removals)
    budget = _budget(evidence, range(len(costs)), sparsity)
    if evidence.recipe.allocation == "sensitivity":
        measured = _measured_costs(evidence, removals, costs)
        return ALLOCATIONS["water_filling"](measured, budget), "sensitivity"
    if evidence.recipe.allocation != "auto":
        name, function = resolve_allocation(evidence.recipe.allocation)
        return check_widths(name, function(costs, budget), costs), name
    if not evidence.metrics or sparsity == 0.0:
        return ALLOCATIONS["uniform"](costs, budget), "uniform"
    candidates = {name: ALLOCATIONS[name](costs, budget) for name in ("water_filling", "uniform")}
    trial = _sample(evidence.domain.validation, TRIAL_TOKENS)
    if not trial or evidence.name == POOLED:
        return candidates["water_filling"], "water_filling"
    losses = {name: _try(evidence, removals, widths, trial) for name, widths in candidates.items()}
    best = min(losses, key=lambda name: losses[name])
    return candidates[best], best


def _measured_costs(
    evidence: Evidence, removals: Sequence[Removal], costs: Sequence[BlockCosts]
) -> list[BlockCosts]:
    """Return costs whose curves meet what halving each block alone does to the validation loss.

    Raises:
        PathwaysError: There is no validation text.
    """
    trial = _sample(evidence.domain.validation, SENSITIVITY_TOKENS)
    if not trial:
        raise PathwaysError(
            f"Domain {evidence.name!r}: allocation='sensitivity' needs validation text, and every "
            "document was used for calibration. Give more documents, or fewer max_tokens."
        )
    dense = mean_loss(evidence.model, trial, None, evidence.blocks)
    repairs = replace(evidence.recipe.repair, bypass_rank=0)
    measured = []
    for index, (removal, cost) in enumerate(zip(removals, costs, strict=True)):
        half = max(1, cost.d_ff // 2)
        masks = [removal.keep(half) for _ in removals]
        draft = Draft(evidence, [], masks, repairs, {})
        block = [evidence.blocks[index]]
        loss = mean_loss(evidence.model, trial, [draft.block(index, None)], block)
        scale = max(loss - dense, LEAST_RISE) / max(float(cost.error[cost.d_ff - half]), 1e-30)
        measured.append(replace(cost, error=cost.error * scale))
    return measured


def _try(
    evidence: Evidence, removals: Sequence[Removal], widths: Sequence[int], trial: list[Window]
) -> float:
    """Return the loss on validation text of a one-shot pathway with given widths."""
    masks = [removal.keep(width) for removal, width in zip(removals, widths, strict=True)]
    repairs = replace(evidence.recipe.repair, bypass_rank=0)  # what the profile always allows
    draft = Draft(evidence, list(widths), masks, repairs, {})
    pathways = [draft.block(index, None) for index in range(len(masks))]
    return mean_loss(evidence.model, trial, pathways, evidence.blocks)


def _sample(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Return windows from all over a list, of about a number of tokens together."""
    stride = max(1, count_tokens(windows) // tokens)
    return list(windows[::stride])
