"""From a profile to pathways: which neurons stay, and what makes good the rest.

Per domain: gather what is known of the blocks, rank their neurons, divide the budget, and then
repair each block, either all at once from the profile's Gram matrices (one-shot), or one after the
other on what the pruned blocks before really give (sequential).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from hf_sparse_pathways.discovery.allocation import (
    ALLOCATIONS,
    BlockCosts,
    Budget,
    check_widths,
    resolve_allocation,
)
from hf_sparse_pathways.discovery.evidence import Evidence, gather_evidence
from hf_sparse_pathways.discovery.passes import calibration_precision
from hf_sparse_pathways.discovery.percentile import check_percentile, keep_above
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.recipe import OBS, Recipe, make_recipe
from hf_sparse_pathways.discovery.removal import Removal
from hf_sparse_pathways.discovery.repair import BlockTask, repair
from hf_sparse_pathways.discovery.scores import ScoreFunction
from hf_sparse_pathways.discovery.sequential import Arm, prune_sequentially
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import Batch, Window, count_tokens, make_batches
from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import POOLED, Pathway, Pathways

logger = logging.getLogger(__name__)

DEFAULT_SPARSITY = 0.3

BATCH_SIZE = 8
"""Windows per forward pass."""

TRIAL_TOKENS = 4096
"""Validation tokens on which ``allocation="auto"`` compares its candidates."""


def select(  # noqa: PLR0913
    model: nn.Module,
    profile: Profile,
    *,
    sparsity: float | Sequence[float] | None = None,
    percentile: float | None = None,
    pool: str = "layer",
    method: str | ScoreFunction | None = None,
    score: str | ScoreFunction | None = None,
    allocation: str | Callable[..., list[int]] | None = None,
    compensation: str | None = None,
    order: str = "auto",
    multiple: int = 1,
    precision: str = "model",
    seed: int = 0,
) -> Pathways:
    """Choose and repair each domain's neurons. The model is left as it was.

    With two domains or more, the ``pooled`` control is made in the same way from all domains' text
    together (in sequential order from as many tokens as a domain has, in equal parts).

    Args:
        model: The profiled model.
        profile: Its activation profile.
        sparsity: Fraction of the FFN's FLOPs to remove, in [0, 1): over all blocks, or one per
            block. By default 0.3.
        percentile: Instead of a sparsity: remove neurons that score below this percentile of the
            domain's scores, in [0, 100).
        pool: What the percentile is taken over, ``"layer"`` (one FFN block) or ``"model"``.
        method: ``"obs"``, a name in ``SCORES``, or a function of a ``ScoreInput``. By default
            ``"obs"`` if the profile holds Gram matrices, else ``"wanda"``; with a percentile
            ``"mean_abs"``, as in the paper.
        score: The same, for a score.
        allocation: ``"uniform"``, ``"depth"``, ``"water_filling"``, ``"sensitivity"``, ``"auto"``
            (what has the least loss on validation text), or a function from ``BlockCosts`` and a
            ``Budget`` to widths. By default ``"auto"`` for ``"obs"``, else ``"uniform"``.
        compensation: Parts of ``none``, ``bias``, ``refit``, ``patch:RANK``, ``bypass:RANK``,
            joined by ``+``. By default ``"refit+bias"`` for ``"obs"``, ``"bias"`` for ``"flap"``,
            else ``"none"``.
        order: ``"sequential"``, ``"one-shot"``, or ``"auto"``: sequential for ``"obs"`` where the
            model's layers can be run one at a time.
        multiple: Widths are rounded down to multiples of this.
        precision: Of the model's products while it runs over calibration text: ``"model"``,
            ``"bfloat16"``, or ``"fastest"``, which is bfloat16 where the processor is built for it.
        seed: For scores that draw numbers, and labels that are drawn.

    Raises:
        MismatchError: The profile was taken from another model.
        PathwaysError: A number is out of range, both rules were given, or the profile lacks what
            the method needs.
        UnknownNameError: An unknown method, allocation, order, precision or pool.
        UnsupportedModelError: ``order="sequential"``, but the layers cannot be run one at a time.
    """
    if method is not None and score is not None:
        raise PathwaysError("Give a method or a score, not both: a score is a method.")
    whole = all(domain.grams for domain in profile.by_domain.values())
    usual = (OBS if whole else "wanda") if percentile is None else "mean_abs"
    recipe = make_recipe(
        method or score or usual,
        allocation=allocation,
        compensation=compensation,
        order=order,
        multiple=multiple,
        precision=precision,
        seed=seed,
    )
    goal = make_goal(sparsity, percentile, pool, len(profile.base.blocks))
    profile.base.check_same(BaseModel.of(model))
    dense = _dense(model)
    pooled = {POOLED: profile.pooled()} if len(profile.by_domain) > 1 else {}
    with calibration_precision(dense, recipe.precision):
        evidence = gather_evidence(dense, profile, pooled, recipe)
        drafts = [_draft(known, goal) for known in evidence.values()]
        pathways = _carry_out(dense, drafts, recipe)
    return Pathways(
        base=profile.base,
        by_domain={name: pathways[name] for name in profile.by_domain},
        controls={name: pathways[name] for name in pooled},
    )


def _dense(model: Any) -> nn.Module:
    """Return a model's dense form, whose leaves are its own."""
    dense: nn.Module = model.to_dense() if hasattr(model, "to_dense") else model
    return dense


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How much is removed.

    Attributes:
        sparsity: Fraction of FLOPs, over all blocks or one per block; None with a percentile.
        percentile: The paper's rule instead.
        pool: What the percentile is taken over.
    """

    sparsity: float | tuple[float, ...] | None
    percentile: float | None
    pool: str

    def described(self) -> dict[str, Any]:
        """Return the goal as JSON values."""
        if self.percentile is not None:
            return {"percentile": self.percentile, "pool": self.pool}
        several = isinstance(self.sparsity, tuple)
        return {"sparsity": list(self.sparsity) if several else self.sparsity}  # type: ignore[arg-type]


def make_goal(
    sparsity: float | Sequence[float] | None, percentile: float | None, pool: str, blocks: int
) -> Goal:
    """Return a checked goal.

    Raises:
        PathwaysError: A number is out of range, or both rules were given.
        UnknownNameError: An unknown pool.
    """
    if percentile is not None:
        if sparsity is not None:
            raise PathwaysError("Give a sparsity or a percentile, not both.")
        check_percentile(percentile, pool)
        return Goal(sparsity=None, percentile=percentile, pool=pool)
    wanted = DEFAULT_SPARSITY if sparsity is None else sparsity
    fractions = check_sparsity(wanted, blocks)
    one = isinstance(wanted, (int, float))
    return Goal(sparsity=fractions[0] if one else tuple(fractions), percentile=None, pool=pool)


def check_sparsity(sparsity: float | Sequence[float], blocks: int) -> list[float]:
    """Return one sparsity per block.

    Raises:
        PathwaysError: One is outside [0, 1), or their number is not that of the blocks.
    """
    if hasattr(sparsity, "tolist"):  # a tensor or an array
        sparsity = sparsity.tolist()
    fractions = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * blocks
    if len(fractions) != blocks:
        raise PathwaysError(
            f"{len(fractions)} sparsities were given for {blocks} FFN blocks. Give one per block, "
            "or a single one."
        )
    for value in fractions:
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not number or not 0.0 <= value < 1.0:
            raise PathwaysError(
                f"sparsity has to be in [0, 1), the fraction of neurons removed; got {value!r}."
            )
    return [float(value) for value in fractions]


@dataclass(frozen=True)
class _Draft:
    """One pathway before its blocks are repaired.

    Attributes:
        evidence: What is known of the domain.
        widths: Neurons kept of each block, if they are ranked when the block's turn comes.
        masks: The keep masks, if they are settled.
        provenance: What was decided, and why.
    """

    evidence: Evidence
    widths: list[int]
    masks: list[Tensor] | None
    provenance: dict[str, Any]

    def block(self, index: int, task: BlockTask | None) -> BlockPathway:
        """Choose and repair one block; without a task from the profile alone."""
        repairs = self.evidence.recipe.repair
        if task is None and repairs.needs_grams:
            task = self.evidence.task(index)
        if self.masks is not None:
            keep = self.masks[index]
        else:
            keep = self.evidence.removal(index, task).keep(self.widths[index])
        return BlockPathway(keep=keep) if task is None else repair(task, keep, repairs)


def _draft(evidence: Evidence, goal: Goal) -> _Draft:
    """Decide how many neurons of each block stay, or which."""
    provenance = {
        **evidence.recipe.described(),
        **goal.described(),
        "text": dict(evidence.domain.provenance),
    }
    if goal.percentile is not None:
        scores = [evidence.scores(index) for index in range(len(evidence.blocks))]
        return _Draft(evidence, [], keep_above(scores, goal.percentile, goal.pool), provenance)
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
    one_shot = evidence.recipe.order == "one-shot"
    masks = [r.keep(w) for r, w in zip(removals, widths, strict=True)] if one_shot else None
    if evidence.recipe.score is not None:  # does not change with the text that blocks see
        masks = [r.keep(w) for r, w in zip(removals, widths, strict=True)]
    return _Draft(evidence, widths, masks, provenance)


def _costs(evidence: Evidence, removals: Sequence[Removal]) -> list[BlockCosts]:
    return [
        BlockCosts(d_ff=shape.d_ff, flops_per_neuron=shape.flops_per_neuron, error=removal.error)
        for shape, removal in zip(evidence.profile.base.blocks, removals, strict=True)
    ]


def _budget(evidence: Evidence, blocks: Sequence[int], sparsity: float) -> Budget:
    rank = evidence.recipe.repair.bypass_rank
    shapes = [evidence.profile.base.blocks[index] for index in blocks]
    overhead = tuple(rank * (s.d_in + s.d_out) / s.flops_per_neuron for s in shapes)
    return Budget(kept=1.0 - sparsity, multiple=evidence.recipe.multiple, overhead=overhead)


def _allocate(
    evidence: Evidence, removals: Sequence[Removal], sparsity: float
) -> tuple[list[int], str]:
    """Return the blocks' widths, and by which allocation."""
    costs = _costs(evidence, removals)
    budget = _budget(evidence, range(len(costs)), sparsity)
    if evidence.recipe.allocation != "auto":
        name, function = resolve_allocation(evidence.recipe.allocation)
        return check_widths(name, function(costs, budget), costs), name
    if not evidence.metrics or sparsity == 0.0:
        return ALLOCATIONS["uniform"](costs, budget), "uniform"
    candidates = {name: ALLOCATIONS[name](costs, budget) for name in ("water_filling", "uniform")}
    trial = _sample(evidence.domain.validation, TRIAL_TOKENS)
    if not trial:
        return candidates["water_filling"], "water_filling"
    losses = {name: _try(evidence, removals, widths, trial) for name, widths in candidates.items()}
    best = min(losses, key=lambda name: losses[name])
    return candidates[best], best


def _try(
    evidence: Evidence, removals: Sequence[Removal], widths: Sequence[int], trial: list[Window]
) -> float:
    """Return the loss on validation text of a one-shot pathway with given widths."""
    masks = [removal.keep(width) for removal, width in zip(removals, widths, strict=True)]
    draft = _Draft(evidence, list(widths), masks, {})
    pathways = [draft.block(index, None) for index in range(len(masks))]
    return mean_loss(evidence.model, trial, pathways, evidence.blocks)


def _sample(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Return windows from all over a list, of about a number of tokens together."""
    stride = max(1, count_tokens(windows) // tokens)
    return list(windows[::stride])


def _carry_out(model: nn.Module, drafts: Sequence[_Draft], recipe: Recipe) -> dict[str, Pathway]:
    """Repair all pathways' blocks, in the recipe's order."""
    order = recipe.order
    if order == "auto":
        has_text = all(draft.evidence.domain.windows for draft in drafts)
        order = "sequential" if has_text else "one-shot"
    blocks: Mapping[str, Sequence[BlockPathway]] = {}
    if order == "sequential":
        try:
            blocks = prune_sequentially(model, _arms(drafts))
        except UnsupportedModelError as error:
            if recipe.order == "sequential":
                raise
            logger.warning("Blocks are repaired at once, not one after the other: %s", error)
            order = "one-shot"
    if order == "one-shot":
        count = len(drafts[0].evidence.blocks)
        blocks = {
            draft.evidence.name: [draft.block(index, None) for index in range(count)]
            for draft in drafts
        }
    return {
        draft.evidence.name: Pathway(
            blocks=tuple(blocks[draft.evidence.name]),
            provenance={**draft.provenance, "order": order},
        )
        for draft in drafts
    }


def _arms(drafts: Sequence[_Draft]) -> list[Arm]:
    """Return the pathways to be made in sequence; the pooled one shares the domains' batches."""
    own: dict[str, list[Batch]] = {}
    for draft in drafts:
        if draft.evidence.name != POOLED:
            windows = draft.evidence.domain.windows
            if not windows:
                raise PathwaysError(
                    f"Domain {draft.evidence.name!r}: order='sequential' needs the text's tokens, "
                    "and the profile holds none. Take it again, or choose order='one-shot'."
                )
            own[draft.evidence.name] = list(make_batches(windows, BATCH_SIZE))
    arms = []
    for draft in drafts:
        name = draft.evidence.name
        batches = own[name] if name in own else _share(list(own.values()))
        arms.append(Arm(name=name, batches=batches, prune=_pruner(draft)))
    return arms


def _pruner(draft: _Draft) -> Callable[[int, BlockTask], BlockPathway]:
    def prune(index: int, task: BlockTask) -> BlockPathway:
        return draft.block(index, replace(task, metric=draft.evidence.metric(index)))

    return prune


def _share(domains: Sequence[Sequence[Batch]]) -> list[Batch]:
    """Return equal parts of all domains' batches, together as many as a domain has."""
    most = max(len(batches) for batches in domains)
    part = -(-most // len(domains))
    chosen: list[Batch] = []
    for batches in domains:
        stride = max(1, math.ceil(len(batches) / part))
        chosen.extend(batches[::stride])
    return chosen
