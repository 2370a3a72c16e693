"""Everything that is known of one domain's FFN blocks when their neurons are ranked."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.obs import remove_by_obs
from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.recipe import Recipe
from hf_sparse_pathways.discovery.removal import Removal
from hf_sparse_pathways.discovery.repair import BlockTask, Repair, metric_root
from hf_sparse_pathways.discovery.scores import NEED_SALIENCY, Saliency, ScoreInput, check_scores
from hf_sparse_pathways.discovery.sensitivity import measure_metrics, measure_saliency
from hf_sparse_pathways.discovery.statistics import check_statistics
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.layouts import incoming_weights, outgoing_weight


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
    """

    name: str
    domain: DomainProfile
    model: nn.Module
    profile: Profile
    recipe: Recipe
    metrics: tuple[Tensor, ...] = ()
    saliency: tuple[Saliency, ...] = ()

    @cached_property
    def blocks(self) -> tuple[FfnBlock, ...]:
        """The model's FFN blocks."""
        return find_blocks(self.model)

    def metric(self, index: int) -> Tensor | None:
        """Return a block's metric, or None."""
        return self.metrics[index] if self.metrics else None

    def task(self, index: int) -> BlockTask:
        """Return a block as the dense model computes it on the calibration text."""
        if not self.domain.grams:
            raise PathwaysError(
                f"Domain {self.name!r}: repair and method='obs' need Gram matrices, and the "
                "profile holds none. Take it again with grams=True, or choose a score (method="
                "'wanda') with compensation='none'."
            )
        block = self.blocks[index]
        return BlockTask(
            weight=outgoing_weight(block.outgoing),
            gram=self.domain.grams[index].load(),
            metric=self.metric(index),
        )

    def removal(self, index: int, task: BlockTask | None = None) -> Removal:
        """Return in which order a block's neurons are removed.

        Args:
            index: The block.
            task: For ``obs``: other second moments than the profile's.
        """
        if self.recipe.score is None:
            return remove_for(task or self.task(index), self.recipe.repair)
        return Removal.by_scores(self.scores(index))

    def scores(self, index: int) -> Tensor:
        """Return one score per neuron of a block, larger means keep, float64 ``(d_ff,)``."""
        if self.recipe.score is None:
            return self.removal(index).scores
        block = self.blocks[index]
        check_statistics(self.name, block.name, self.domain.blocks[index])
        given = ScoreInput(
            statistics=self.domain.blocks[index],
            down=outgoing_weight(block.outgoing),
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
    for name, domain in profile.by_domain.items():
        if recipe.score is None and domain.windows:
            metrics[name] = measure_metrics(model, domain.windows, seed=recipe.seed, label=name)
        elif recipe.score in NEED_SALIENCY and domain.windows:
            saliency[name] = measure_saliency(model, domain.windows, label=name)
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
        )
        for name, domain in everything.items()
    }


def remove_for(task: BlockTask, how: Repair) -> Removal:
    """Rank a block's neurons by OBS, towards its target and under its metric.

    The weights that fit the target best with all neurons take the place of W; with a bias, which
    makes good the mean, the covariance takes that of the second moments.
    """
    d_ff = task.gram.d_ff
    moments, ridge = task.gram.activation, task.gram.activation.diagonal().mean() * how.ridge
    missing = None if task.missing is None else task.missing[:, :d_ff].double()
    if how.bias:
        mean = task.gram.activation_mean
        moments = moments - torch.outer(mean, mean)
        if task.missing is not None and missing is not None:
            missing -= torch.outer(task.missing[:, -1], mean).double()
    moments.diagonal().add_(ridge)
    weight = task.weight.double()
    if missing is not None:
        weight = weight + torch.linalg.solve(moments.double(), missing.T).T
    if task.metric is not None:
        weight = metric_root(task.metric) @ weight
    return remove_by_obs(weight.float(), moments)


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
