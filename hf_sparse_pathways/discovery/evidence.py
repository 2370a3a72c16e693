"""Everything that is known of one domain's FFN blocks when their neurons are ranked."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.obs import rank_by_obs
from hf_sparse_pathways.discovery.precision import full_precision
from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.recipe import Recipe
from hf_sparse_pathways.discovery.removal import Removal
from hf_sparse_pathways.discovery.repair import BlockTask, Repair
from hf_sparse_pathways.discovery.scores import NEED_SALIENCY, Saliency, ScoreInput, check_scores
from hf_sparse_pathways.discovery.sensitivity import measure_metrics, measure_saliency
from hf_sparse_pathways.discovery.statistics import check_statistics
from hf_sparse_pathways.discovery.weights import weight_digest
from hf_sparse_pathways.errors import PathwaysError, named
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.layouts import incoming_weights, outgoing_weight


class Memory:
    """What was computed from one domain's statistics and one model, for the next call.

    Args:
        state: What every result depends on; with another state nothing is recalled.
    """

    def __init__(self, state: object = None) -> None:
        self.state = state
        self._known: dict[Any, Any] = {}

    def recall(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what a key stands for, computed the first time."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


_MEMORIES: WeakKeyDictionary[nn.Module, WeakKeyDictionary[DomainProfile, Memory]]
_MEMORIES = WeakKeyDictionary()


def memory_of(model: nn.Module, domain: DomainProfile, state: object) -> Memory:
    """Return the memory that lives as long as a model and a domain's statistics do."""
    memories = _MEMORIES.setdefault(model, WeakKeyDictionary())
    if domain not in memories or memories[domain].state != state:
        memories[domain] = Memory(state)
    return memories[domain]


@dataclass(frozen=True)
class Evidence:
    """One domain's (or the pooled) statistics with the model and profile that they belong to.

    Attributes:
        name: The domain's name.
        domain: Its statistics.
        model: The dense model.
        profile: The profile of all domains.
        recipe: How neurons are ranked.
        metrics: One per block, or empty where errors are measured as they are.
        saliency: One per block, or empty if the method does not need it.
        memory: Of what was computed from the same statistics before.
    """

    name: str
    domain: DomainProfile
    model: nn.Module
    profile: Profile
    recipe: Recipe
    metrics: tuple[Tensor, ...] = ()
    saliency: tuple[Saliency, ...] = ()
    memory: Memory = field(default_factory=Memory)

    @cached_property
    def blocks(self) -> tuple[FfnBlock, ...]:
        """The model's FFN blocks."""
        return find_blocks(self.model)

    @property
    def ranking(self) -> Repair:
        """The compensation that ``obs`` reckons with: with the usual ridge, whatever the repair's.

        The repair's may be chosen on validation text, which takes a ranking.
        """
        return replace(self.recipe.repair, ridge=Repair.ridge)

    def metric(self, index: int) -> Tensor | None:
        """Return a block's metric, or None."""
        return self.metrics[index] if self.metrics else None

    def task(self, index: int) -> BlockTask:
        """Return a block as the dense model computes it on the calibration text."""
        if not self.domain.grams:
            raise PathwaysError(
                f"Domain {self.name!r}: repair and {named('method', 'obs')} need Gram matrices, "
                f"and the profile holds none. Take it again with {named('grams', True)}, or choose "
                f"a score, as {named('method', 'wanda')}, with {named('compensation', 'none')}."
            )
        block = self.blocks[index]
        return BlockTask(
            weight=outgoing_weight(block.outgoing),
            gram=self.domain.grams[index].load(),
            metric=self.metric(index),
        )

    def removal(
        self, index: int, task: BlockTask | None = None, *, most: int | None = None
    ) -> Removal:
        """Return in which order a block's neurons are removed.

        Args:
            index: The block.
            task: For ``obs``: other second moments than the profile's.
            most: How many of those are removed at most, which is quicker; all by default.
        """
        if self.recipe.score is not None:
            return Removal.by_scores(self.scores(index))
        if task is not None:
            return rank_by_obs(task, self.ranking, most=most)
        key = ("removal", index, self.ranking.bias)
        return self.memory.recall(key, lambda: rank_by_obs(self.task(index), self.ranking))

    @full_precision()
    def scores(self, index: int) -> Tensor:
        """Return one score per neuron of a block, larger means keep, float64 ``(d_ff,)``."""
        if self.recipe.score is None:
            return self.removal(index).scores
        block = self.blocks[index]
        check_statistics(self.name, block.name, self.domain.blocks[index])
        given = ScoreInput(  # all of it copied: a user's function may write into it
            statistics=self.domain.blocks[index].copy(),
            down=outgoing_weight(block.outgoing).clone(),
            generator=_generator(self.recipe.seed, self.name, index),
            incoming=incoming_weights(block.incoming, block.d_ff),
            positive_by_domain=torch.stack(
                [other.blocks[index].positive_fraction for other in self.profile.by_domain.values()]
            ),
            saliency=self.saliency[index] if self.saliency else None,
        )
        return check_scores(self.recipe.method, self.recipe.score(given), block.d_ff)


def gather_evidence(
    model: nn.Module, profile: Profile, pooled: Mapping[str, DomainProfile], recipe: Recipe
) -> dict[str, Evidence]:
    """Return the evidence of every domain and of the pooled text, measuring what is missing.

    The pooled text's metric is the mean of the domains'.
    """
    metrics: dict[str, tuple[Tensor, ...]] = {}
    saliency: dict[str, tuple[Saliency, ...]] = {}
    state = (weight_digest(model), recipe.seed, recipe.precision)
    for name, domain in profile.by_domain.items():
        memory = memory_of(model, domain, state)
        if recipe.score is None and domain.windows:
            measure = partial(measure_metrics, model, domain.windows, seed=recipe.seed, label=name)
            metrics[name] = memory.recall("metrics", measure)
        elif any(recipe.score is score for score in NEED_SALIENCY) and domain.windows:
            compute = partial(measure_saliency, model, domain.windows, label=name)
            saliency[name] = memory.recall("saliency", compute)
    for name in pooled:
        if metrics:
            metrics[name] = tuple(map(_mean, zip(*metrics.values(), strict=True)))
        if saliency:
            saliency[name] = tuple(map(_sum, zip(*saliency.values(), strict=True)))
    everything = {**profile.by_domain, **pooled}
    return {
        name: Evidence(
            name=name,
            domain=domain,
            model=model,
            profile=profile,
            recipe=recipe,
            metrics=metrics.get(name, ()),
            saliency=saliency.get(name, ()),
            memory=memory_of(model, domain, state),
        )
        for name, domain in everything.items()
    }


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


def _sum(parts: Sequence[Saliency]) -> Saliency:
    signed, absolute = parts[0].signed, parts[0].absolute
    for part in parts[1:]:
        signed, absolute = signed + part.signed, absolute + part.absolute
    return Saliency(signed=signed, absolute=absolute)


def _generator(seed: int, domain: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{domain}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
