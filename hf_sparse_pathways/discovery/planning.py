"""What is decided before any block is repaired: the blocks' widths, and the ridge.

``allocation="auto"``, ``allocation="sensitivity"`` and ``ridge="auto"`` are decided on validation
text, by the loss of one-shot pathways: documents that no statistic was taken from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from hf_sparse_pathways.discovery.allocation import (
    BlockCosts,
    Budget,
    allocate,
    resolve_allocation,
)
from hf_sparse_pathways.discovery.drafts import Draft
from hf_sparse_pathways.discovery.evidence import Evidence
from hf_sparse_pathways.discovery.goal import Goal
from hf_sparse_pathways.discovery.percentile import keep_above
from hf_sparse_pathways.discovery.removal import Removal
from hf_sparse_pathways.discovery.repair import NO_REPAIR, Repair
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import Window, count_tokens, quarter
from hf_sparse_pathways.errors import PathwaysError, named, option

RIDGES = (Repair.ridge, 0.1, 0.001)
"""What ``ridge="auto"`` compares, in units of the mean second moment: usual, larger, smaller."""

AUTO = ("balanced", "uniform")
"""What ``allocation="auto"`` compares. Water-filling is not among them: one-shot pathways overrate
it, and in sequence it can be far behind both."""

TRIAL_TOKENS = (2048, 3072)
"""Least and most validation tokens on which candidates are compared: in between, a quarter of the
calibration text. On few tokens the noise between documents decides."""

LEAST_RISE = 1e-5
"""Of the loss, in nats per token: smaller ones are noise."""


def make_draft(evidence: Evidence, goal: Goal) -> Draft:
    """Decide how many neurons of each block stay, or which, and how the rest is made good."""
    recipe = evidence.recipe
    if recipe.grouping is not None and goal.percentile is not None:
        raise PathwaysError(
            f"{option('mixture')} divides what a sparsity leaves: give that, and no "
            f"{option('percentile')}."
        )
    plan = _Plan(evidence, active=_planned_active(evidence, goal))
    text = dict(evidence.domain.provenance)
    provenance = {**recipe.described(), **goal.described(), "text": text}
    if goal.percentile is not None:
        scores = [evidence.scores(index) for index in range(len(evidence.blocks))]
        masks: list[Tensor] | None = keep_above(scores, goal.percentile, goal.pool)
        widths: list[int] = []
        whole = all(bool(keep.all()) for keep in masks or ())
        provenance["allocation"] = "percentile"
    else:
        widths, provenance["allocation"] = plan.divide(goal.sparsity)
        whole = all(w == cost.d_ff for w, cost in zip(widths, plan.costs, strict=True))
        whole = whole and plan.active == 1.0
        settled = whole or recipe.score is not None or recipe.order == "one-shot"
        masks = plan.keep(widths) if settled else None
    repairs = NO_REPAIR if whole else recipe.repair
    if repairs.solves and recipe.ridge is None:
        ridge = plan.choose_ridge(plan.keep(widths) if masks is None else masks)
        repairs = replace(repairs, ridge=ridge)
        provenance["ridge"] = ridge
    return Draft(evidence, widths, masks, repairs, provenance, plan.active)


def _planned_active(evidence: Evidence, goal: Goal) -> float:
    """Return the share of tokens that a kept neuron shall be computed for.

    No more is skipped than the sparsity asks for if all neurons are kept.
    """
    skip = evidence.recipe.skip
    if not skip:
        return 1.0
    if not isinstance(goal.sparsity, float):
        raise PathwaysError(
            "Neurons are skipped by token towards one sparsity for all blocks: give that, or leave "
            f"out {option('skip')}."
        )
    rest = max(1.0 - shape.share(0.0) for shape in evidence.profile.base.blocks)
    return 1.0 - min(skip, goal.sparsity / rest)


@dataclass(frozen=True)
class _Plan:
    """One pathway's decisions, and what they are taken from."""

    evidence: Evidence
    active: float = 1.0
    losses: dict[tuple[float, ...], float] = field(default_factory=dict)

    @cached_property
    def removals(self) -> list[Removal]:
        """In which order each block's neurons go, on the dense model's activations."""
        return [self.evidence.removal(index) for index in range(len(self.evidence.blocks))]

    @cached_property
    def costs(self) -> list[BlockCosts]:
        """The blocks' sizes and error curves."""
        shapes = self.evidence.profile.base.blocks
        return [
            BlockCosts(d_ff=shape.d_ff, flops_per_neuron=shape.flops_per_neuron, error=r.error)
            for shape, r in zip(shapes, self.removals, strict=True)
        ]

    @cached_property
    def trial(self) -> list[Window]:
        """Validation text; empty if there is none."""
        domain = self.evidence.domain
        return _sample(domain.validation, quarter(domain.windows, TRIAL_TOKENS))

    def keep(self, widths: Sequence[int]) -> list[Tensor]:
        """Return the keep masks of some widths."""
        return [removal.keep(w) for removal, w in zip(self.removals, widths, strict=True)]

    def divide(self, sparsity: float | tuple[float, ...] | None) -> tuple[list[int], str]:
        """Return the blocks' widths, and by which allocation."""
        if not isinstance(sparsity, tuple):
            return self._allocate(float(sparsity or 0.0))
        parts = enumerate(zip(self.costs, sparsity, strict=True))
        widths = [
            allocate("uniform", [cost], self._budget([index], fraction))[0]
            if fraction
            else cost.d_ff
            for index, (cost, fraction) in parts
        ]
        return widths, "given"

    def choose_ridge(self, masks: Sequence[Tensor]) -> float:
        """Return the ridge of least loss on validation text; the usual one without such text."""
        usual, larger, smaller = RIDGES
        if not self.trial:
            return usual
        if self._loss(masks, larger) < self._loss(masks, usual):
            return larger  # over the ridge the loss has one minimum: the smaller is worse still
        return smaller if self._loss(masks, smaller) < self._loss(masks, usual) else usual

    def _allocate(self, sparsity: float) -> tuple[list[int], str]:
        recipe = self.evidence.recipe
        if sparsity == 0.0 and isinstance(recipe.allocation, str):
            return [cost.d_ff for cost in self.costs], "uniform"
        budget = self._budget(range(len(self.costs)), sparsity)
        if recipe.allocation == "sensitivity":
            return allocate("water_filling", self._measured_costs(), budget), "sensitivity"
        if recipe.allocation != "auto":
            name, _ = resolve_allocation(recipe.allocation)
            return allocate(recipe.allocation, self.costs, budget), name
        if not self.evidence.metrics:
            return allocate("uniform", self.costs, budget), "uniform"
        candidates = {name: allocate(name, self.costs, budget) for name in AUTO}
        if not self.trial:
            return candidates[AUTO[0]], AUTO[0]
        masks = {name: self.keep(widths) for name, widths in candidates.items()}
        best = min(AUTO, key=lambda name: self._loss(masks[name], recipe.repair.ridge))
        return candidates[best], best

    def _budget(self, blocks: Sequence[int], sparsity: float) -> Budget:
        rank, routes = self.evidence.recipe.repair.bypass_rank, self.evidence.recipe.routes
        shapes = [self.evidence.profile.base.blocks[index] for index in blocks]
        overhead = tuple(shape.bypass_width(rank) + shape.router_width(routes) for shape in shapes)
        for shape, neurons in zip(shapes, overhead, strict=True):
            if neurons and neurons > (1.0 - sparsity) * shape.d_ff - 1 + 1e-6:
                what = f"A bypass of rank {rank}" if rank else f"Routing with {routes} rows"
                raise PathwaysError(
                    f"{what} costs as much as {neurons:.1f} neurons of {shape.name}; at sparsity "
                    f"{sparsity:.3g} only {(1.0 - sparsity) * shape.d_ff:.1f} are left. Choose "
                    "less of it, or a smaller sparsity."
                )
        cost = max(shape.share(self.active) for shape in shapes)
        return Budget(
            kept=min(1.0, (1.0 - sparsity) / cost),
            multiple=self.evidence.recipe.multiple,
            overhead=tuple(neurons / cost for neurons in overhead),
        )

    def _measured_costs(self) -> list[BlockCosts]:
        """Return costs whose curves meet what halving each block alone does to the loss.

        Raises:
            PathwaysError: There is no validation text.
        """
        evidence = self.evidence
        if not self.trial:
            raise PathwaysError(
                f"Domain {evidence.name!r}: {named('allocation', 'sensitivity')} needs validation "
                "text, and every document was used for calibration. Give more documents, or fewer "
                f"{option('max_tokens')}."
            )
        dense = mean_loss(evidence.model, self.trial, None, evidence.blocks)
        halves = [max(1, cost.d_ff // 2) for cost in self.costs]
        draft = self._draft(self.keep(halves), evidence.recipe.repair)
        measured = []
        for index, cost in enumerate(self.costs):
            pathway, block = draft.block(index, None), evidence.blocks[index]
            rise = max(
                mean_loss(evidence.model, self.trial, [pathway], [block]) - dense, LEAST_RISE
            )
            half = float(cost.error[cost.d_ff - halves[index]])
            measured.append(replace(cost, error=cost.error * (rise / max(half, 1e-30))))
        return measured

    def _loss(self, masks: Sequence[Tensor], ridge: float) -> float:
        """Return the loss on validation text; of the plan's masks each width has one."""
        key = (ridge, *(int(keep.sum()) for keep in masks))
        if key not in self.losses:
            repairs = replace(self.evidence.recipe.repair, ridge=ridge)
            self.losses[key] = self._draft(masks, repairs).loss(self.trial)
        return self.losses[key]

    def _draft(self, masks: Sequence[Tensor], repairs: Repair) -> Draft:
        """Return a draft for trials, without the bypass, which not every profile allows."""
        return Draft(self.evidence, [], masks, replace(repairs, bypass_rank=0), {})


def _sample(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Return windows from all over a list, of about a number of tokens together."""
    stride = max(1, count_tokens(windows) // tokens)
    return list(windows[::stride])
