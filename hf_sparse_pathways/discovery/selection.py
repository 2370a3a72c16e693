"""From a profile to pathways: which neurons stay, and what makes good the rest.

Per domain: gather what is known of the blocks, rank their neurons, divide the budget, and then
repair each block, either all at once from the profile's Gram matrices (one-shot), or one after the
other on what the pruned blocks before really give (sequential).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.allocation import check_multiple
from hf_sparse_pathways.discovery.arms import Arm, FindGroups, FindThreshold, PruneBlock
from hf_sparse_pathways.discovery.clustering import ClusteredTask, Clustering
from hf_sparse_pathways.discovery.common_repair import repair_together
from hf_sparse_pathways.discovery.drafts import Draft
from hf_sparse_pathways.discovery.evidence import gather_evidence
from hf_sparse_pathways.discovery.expert_selection import (
    AUTO_SCORE,
    ExpertGoal,
    check_block_options,
    keep_experts,
)
from hf_sparse_pathways.discovery.goal import Goal, check_division, make_goals, mean_goal
from hf_sparse_pathways.discovery.grouping import Grouped, Grouping
from hf_sparse_pathways.discovery.margins import TARGET_ERROR, check_target
from hf_sparse_pathways.discovery.planning import make_draft
from hf_sparse_pathways.discovery.precision import calibration_precision
from hf_sparse_pathways.discovery.probes import Seen
from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.recipe import OBS, Recipe, make_recipe
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.discovery.scores import ScoreFunction
from hf_sparse_pathways.discovery.sequential import prune_sequentially
from hf_sparse_pathways.discovery.skipping import find_threshold
from hf_sparse_pathways.discovery.weights import check_in_memory
from hf_sparse_pathways.discovery.windows import Batch, make_batches
from hf_sparse_pathways.errors import (
    PathwaysError,
    UnknownNameError,
    UnsupportedModelError,
    named,
)
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, Kept
from hf_sparse_pathways.ffn.layouts import outgoing_weight
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.names import POOLED
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

logger = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Windows per forward pass."""

WITHOUT_GRAMS = "wanda"
"""The method where a profile holds no Gram matrices and none is given."""


def select(  # noqa: PLR0913
    model: nn.Module,
    profile: Profile,
    *,
    sparsity: float | Sequence[float] | Mapping[str, float] | None = None,
    percentile: float | None = None,
    pool: str | None = None,
    method: str | ScoreFunction | None = None,
    score: str | ScoreFunction | None = None,
    allocation: str | Callable[..., list[int]] | None = None,
    compensation: str | None = None,
    ridge: str | float = "auto",
    order: str = "auto",
    multiple: int = 1,
    precision: str = "model",
    seed: int = 0,
    controls: bool = True,
    made: Mapping[str, Pathway] | None = None,
    clusters: int | Clustering = 1,
    skip: float = 0.0,
    mixture: int | Grouping | None = None,
    experts: float | None = None,
    expert_neurons: float | None = None,
    expert_score: str = AUTO_SCORE,
    target_error: float = TARGET_ERROR,
) -> Pathways:
    """Choose and repair each domain's neurons. The model is left as it was.

    With two domains or more, the ``pooled`` control is made in the same way from all domains' text
    together (in sequential order from as many tokens as a domain has, in equal parts).

    Args:
        model: The profiled model.
        profile: Its activation profile.
        sparsity: Fraction of the FFN's FLOPs to remove, in [0, 1): over all blocks, or one per
            block, or one per domain's name. By default 0.3.
        percentile: Instead of a sparsity: remove neurons that score below this percentile of the
            domain's scores, in [0, 100).
        pool: What the percentile is taken over, ``"layer"`` (one FFN block, the default) or
            ``"model"``.
        method: ``"obs"``, a name in ``SCORES``, or a function of a ``ScoreInput``. By default
            ``"obs"`` if the profile holds Gram matrices, else ``"wanda"``; with a percentile
            ``"mean_abs"``, as in the paper.
        score: The same, for a score.
        allocation: ``"uniform"``, ``"depth"``, ``"water_filling"``, ``"balanced"``,
            ``"sensitivity"``, ``"auto"`` (balanced or uniform, whichever has the least loss on
            validation text), or a function from ``BlockCosts`` and a ``Budget`` to widths. By
            default ``"auto"`` for ``"obs"``, else ``"uniform"``. ``"auto"`` needs the loss's
            metrics, which only ``"obs"`` measures: for other methods it is uniform.
        compensation: Parts of ``none``, ``bias``, ``refit``, ``patch:RANK``, ``bypass:RANK``, and
            with clusters ``shared`` (one refit for all their experts), joined by ``+``. By default
            ``"refit+bias"`` for ``"obs"``, ``"bias"`` for ``"flap"``, else ``"none"``.
        ridge: Of the least squares, in units of the mean second moment; ``"auto"``: what has the
            least loss on validation text.
        order: ``"sequential"``, ``"one-shot"``, or ``"auto"``: sequential for ``"obs"`` where the
            model's layers can be run one at a time.
        multiple: Widths are rounded down to multiples of this; a user's allocation has to return
            multiples.
        precision: Of the model's products while it runs over calibration text: ``"model"``,
            ``"bfloat16"``, or ``"fastest"``, as in ``profile``.
        seed: For scores that draw numbers, and labels that are drawn.
        controls: Whether to make the ``pooled`` control.
        made: Pathways of some domains that are there already; they are taken as they are.
        clusters: Into so many clusters each block's tokens are divided, by their likeness at the
            block's input, and each cluster gets neurons and a repair of its own: better for the
            same FLOPs, with so many times as much to store. Needs ``"obs"`` in sequential order.
            A ``Clustering`` says more than their number.
        skip: The share of the kept neurons that a token skips, in [0, 1): those whose gate, known
            before the rest of a neuron is computed, is small for it. More neurons are kept for the
            same FLOPs. No more than the sparsity asks for is skipped. Needs ``"obs"`` in sequential
            order.
        mixture: Into so many groups each block's neurons are divided, but for those that every
            token has; of the groups it has two, by a router. More neurons are kept for the same
            FLOPs. Needs ``"obs"`` in sequential order. A ``Grouping`` says more than their number.
        experts: In mixture-of-experts models, and of sgatlin layers, the share of every layer's
            routed experts that stays, in (0, 1]; never fewer than a token has. By default all.
        expert_neurons: The share of the neurons of each of these experts that stays, in (0, 1].
            By default all of them.
        expert_score: Which experts stay: ``"reap"``, those of the largest mean of weight times
            output norm over their tokens, ``"usage"``, those that most tokens are routed to,
            ``"added"``, those that add most over all tokens, or ``"auto"``: reap, and of sgatlin
            layers added.
        target_error: For ``domain="auto"``: share of a domain's prompts that may go to another of
            these domains, judged by held-out text, in (0, 1).

    Raises:
        MismatchError: The profile was taken from another model.
        PathwaysError: A number is out of range, both rules were given, the profile lacks what the
            method needs, or the blocks' widths and bypasses are together above the budget.
        UnknownNameError: An unknown method, allocation, order, precision or pool, or a domain in
            ``made`` that the profile does not have.
        UnsupportedModelError: ``order="sequential"``, but the layers cannot be run one at a time;
            or weights are offloaded.
    """
    goal = ExpertGoal(experts=experts, neurons=expert_neurons, score=expert_score)
    goal.check(profile)
    options = {
        "sparsity": sparsity,
        "percentile": percentile,
        "pool": pool,
        "method": method,
        "score": score,
        "allocation": allocation,
        "compensation": compensation,
        "ridge": ridge,
        "order": order,
        "multiple": multiple,
        "precision": precision,
        "seed": seed,
        "clusters": clusters,
        "skip": skip,
        "mixture": mixture,
        "target_error": target_error,
    }
    usual = OBS if method or score else usual_method(profile, percentile)
    recipe, goals = decide(profile.base, profile.domains, usual, options)
    profile.base.check_same(BaseModel.of(model))
    check_in_memory(model)
    dense = dense_of(model)
    pooled = {POOLED: profile.pooled()} if controls and len(goals) > 1 else {}
    goals[POOLED] = mean_goal(list(goals.values()))
    pathways = dict(made or {})
    for name in pathways:
        if name not in profile.domains:
            raise UnknownNameError("domain", name, profile.domains)
    missing_names = {*profile.domains, *pooled} - pathways.keys()
    if missing_names and not profile.base.blocks:
        pathways |= _without_blocks(profile, pooled)
    elif missing_names:
        with torch.inference_mode(False), calibration_precision(dense, recipe.precision):
            evidence = gather_evidence(dense, profile, pooled, recipe)
            missing = {name: known for name, known in evidence.items() if name not in pathways}
            drafts = [make_draft(known, goals[name]) for name, known in missing.items()]
            pathways |= _carry_out(dense, drafts, recipe)
    taken = {**profile.by_domain, **pooled}
    for name in missing_names:
        pathways[name] = keep_experts(dense, taken[name], pathways[name], goal)
    return Pathways(
        base=profile.base,
        by_domain={
            name: pathways[name]
            if name in (made or {})
            else replace(
                pathways[name], signature=profile.signature(name, target_error=target_error)
            )
            for name in profile.by_domain
        },
        controls={name: pathways[name] for name in pooled},
    )


def decide(
    base: BaseModel,
    domains: Sequence[str],
    usual: str,
    options: Mapping[str, Any],
) -> tuple[Recipe, dict[str, Goal]]:
    """Return how neurons are chosen and repaired, and how many of each domain.

    Args:
        base: The model.
        domains: Their names.
        usual: The method where the options have none.
        options: As those of ``select``, all of them that are about FFN blocks, and its
            ``target_error``.

    Raises:
        PathwaysError: A number is out of range, or two options contradict each other.
        UnknownNameError: A name is unknown.
    """
    if options["method"] is not None and options["score"] is not None:
        raise PathwaysError("Give a method or a score, not both: a score is a method.")
    check_block_options(base, options)
    own = {name: options[name] for name in _RECIPE}
    recipe = make_recipe(options["method"] or options["score"] or usual, **own)
    check_target(options["target_error"])
    sparsity, percentile, multiple = options["sparsity"], options["percentile"], recipe.multiple
    check_division(sparsity, percentile, options["allocation"], multiple)
    check_multiple(multiple, (block.d_ff for block in base.blocks))
    blocks = len(base.blocks) or 1
    goals = make_goals(sparsity, percentile, options["pool"], domains=domains, blocks=blocks)
    return recipe, goals


_RECIPE = tuple(name for name in signature(make_recipe).parameters if name != "method")


def _without_blocks(profile: Profile, pooled: Mapping[str, DomainProfile]) -> dict[str, Pathway]:
    """Return pathways of a model whose FFNs are routed experts alone."""
    taken = {**profile.by_domain, **pooled}
    return {
        name: Pathway(blocks=(), provenance={"method": "experts", "text": dict(own.provenance)})
        for name, own in taken.items()
    }


def usual_method(profile: Profile, percentile: float | None = None) -> str:
    """Return the method where none is given; where the profile decides against obs, that is said.

    Args:
        profile: The activation profile.
        percentile: Below which neurons are removed, if that is the rule.
    """
    if percentile is not None:
        return "mean_abs"
    if not profile.base.blocks or all(domain.grams for domain in profile.by_domain.values()):
        return OBS
    logger.warning(
        "The profile holds no Gram matrices, which %r needs: neurons are chosen by %r instead, and "
        "by default nothing repairs what is left. Take the profile with %s, or choose %s yourself.",
        OBS,
        WITHOUT_GRAMS,
        named("grams", True),
        named("method", WITHOUT_GRAMS),
    )
    return WITHOUT_GRAMS


def dense_of(model: Any) -> nn.Module:
    """Return a model's dense form, whose leaves are its own."""
    dense: nn.Module = model.to_dense() if hasattr(model, "to_dense") else model
    return dense


def _carry_out(model: nn.Module, drafts: Sequence[Draft], recipe: Recipe) -> dict[str, Pathway]:
    """Repair all pathways' blocks, in the recipe's order."""
    order = recipe.order
    if order == "auto":
        has_text = all(draft.evidence.domain.windows for draft in drafts)
        order = "sequential" if has_text else "one-shot"
    blocks: Mapping[str, Sequence[Kept]] = {}
    if order == "sequential":
        try:
            blocks = prune_sequentially(model, _arms(drafts))
        except UnsupportedModelError as error:
            if recipe.order == "sequential":
                routed = recipe.clustering or recipe.grouping
                way_out = "no clusters or groups" if routed else named("order", "one-shot")
                raise UnsupportedModelError(f"{error} Choose {way_out}.") from error
            logger.warning("Blocks are repaired at once, not one after the other: %s", error)
            order = "one-shot"
    if order == "one-shot":
        blocks = {draft.evidence.name: draft.one_shot() for draft in drafts}
    return {
        draft.evidence.name: Pathway(
            blocks=tuple(blocks[draft.evidence.name]),
            provenance={**draft.provenance, "order": order},
        )
        for draft in drafts
    }


def _arms(drafts: Sequence[Draft]) -> list[Arm]:
    """Return the pathways to be made in sequence; the pooled one shares the domains' batches."""
    own: dict[str, list[Batch]] = {}
    for name, domain in drafts[0].evidence.profile.by_domain.items():
        if not domain.windows:
            raise PathwaysError(
                f"Domain {name!r}: {named('order', 'sequential')} needs the text's tokens, and the "
                f"profile holds none. Take it again, or choose {named('order', 'one-shot')}."
            )
        own[name] = list(make_batches(domain.windows, BATCH_SIZE))
    arms = []
    for draft in drafts:
        name = draft.evidence.name
        batches = own[name] if name in own else _share(list(own.values()))
        arm = Arm(
            name=name,
            batches=batches,
            prune=_pruner(draft),
            inputs=draft.repairs.bypass_rank > 0,
            clustering=_clustering(draft),
            threshold=_threshold(draft),
            groups=_groups(draft),
        )
        arms.append(arm)
    return arms


def _clustering(draft: Draft) -> Clustering | None:
    clustering = draft.evidence.recipe.clustering
    if clustering is None or draft.masks is not None:  # nothing is removed
        return None
    clustering.check(draft.evidence.blocks)
    return clustering


def _threshold(draft: Draft) -> FindThreshold | None:
    if draft.active == 1.0 or draft.masks is not None:
        return None

    def find(index: int, seen: Seen) -> Tensor:
        weight = outgoing_weight(draft.evidence.blocks[index].outgoing)
        return find_threshold(seen, weight, draft.widths[index], draft.active)

    return find


def _groups(draft: Draft) -> FindGroups | None:
    grouping = draft.evidence.recipe.grouping
    if grouping is None or draft.masks is not None:  # nothing is removed
        return None

    def find(index: int, seen: Seen) -> Grouped | None:
        weight = outgoing_weight(draft.evidence.blocks[index].outgoing)
        order = draft.evidence.removal(index).order
        return grouping.fit(seen, weight, order, draft.widths[index])

    return find


def _pruner(draft: Draft) -> PruneBlock:
    def prune(index: int, task: BlockTask | ClusteredTask) -> Kept:
        metric = draft.evidence.metric(index)
        if not isinstance(task, ClusteredTask):
            return draft.block(index, replace(task, metric=metric))
        tasks = [replace(own, metric=metric) for own in task.tasks]
        if draft.repairs.shared:
            keeps = [draft.choose(index, own) for own in tasks]
            return repair_together(task, keeps, draft.repairs)
        experts = tuple(draft.block(index, own) for own in tasks)
        return ClusteredBlock(router=task.router, experts=experts)

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
