"""What the paper's rule skips: how much, how alike between domains, and what that could save.

A domain skips the neurons whose mean |activation| lies below a percentile of the domain's, over one
FFN block (pool ``layer``) or over all (pool ``model``). Over one block the median skips half of it
by construction, whatever the model and the text: only pool ``model`` can differ between blocks.

Source: A. Young 2026, "Sparse Pathways", negative selection at p50 and speed-up 1 / (1 - fraction).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from hf_sparse_pathways.discovery.percentile import POOLS, check_percentile, keep_above
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.measure.model_size import ModelSize
from hf_sparse_pathways.measure.overlap import PairOverlap, compare_neurons

OVERLAP_SPARSITIES = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True, kw_only=True)
class SkippableFraction:
    """How many neurons each domain skips under one pool.

    Attributes:
        pool: ``layer`` or ``model``.
        per_domain: Domain -> fraction of all neurons.
        per_block: Domain -> the same of each FFN block.
        flops: Domain -> fraction of the FFN's FLOPs.
    """

    pool: str
    per_domain: dict[str, float]
    per_block: dict[str, tuple[float, ...]]
    flops: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PotentialSpeedup:
    """What skipping could save at most, in FLOPs: not measured, and no wall clock.

    Attributes:
        domain: Whose neurons are skipped.
        pool: ``layer`` or ``model``.
        paper: 1 / (1 - fraction of neurons), as if the model were nothing but FFN.
        amdahl: 1 / (1 - fraction of the whole model's FLOPs).
    """

    domain: str
    pool: str
    paper: float
    amdahl: float


@dataclass(frozen=True, kw_only=True)
class SkipOverlap:
    """All pairs of domains at one sparsity, the same in every block.

    Attributes:
        sparsity: Fraction of neurons that each domain skips.
        pairs: One per pair.
    """

    sparsity: float
    pairs: tuple[PairOverlap, ...]


def skip_masks(profile: Profile, percentile: float, pool: str) -> dict[str, list[Tensor]]:
    """Return what each domain skips, one bool mask ``(d_ff,)`` per block, True = skipped. Pure.

    Raises:
        PathwaysError: The percentile is outside [0, 100).
        UnknownNameError: An unknown pool.
    """
    check_percentile(percentile, pool)
    return {
        name: [~keep for keep in keep_above([b.mean_abs for b in domain.blocks], percentile, pool)]
        for name, domain in profile.by_domain.items()
    }


def measure_skippable(profile: Profile, percentile: float) -> tuple[SkippableFraction, ...]:
    """Return what every domain skips, under both pools. Pure."""
    shapes = profile.base.blocks
    neurons = sum(shape.d_ff for shape in shapes)
    dense = sum(shape.dense_flops for shape in shapes)
    found = []
    for pool in POOLS:
        counts = {
            name: [int(mask.sum()) for mask in masks]
            for name, masks in skip_masks(profile, percentile, pool).items()
        }
        found.append(
            SkippableFraction(
                pool=pool,
                per_domain={name: sum(skipped) / neurons for name, skipped in counts.items()},
                per_block={
                    name: tuple(n / shape.d_ff for n, shape in zip(skipped, shapes, strict=True))
                    for name, skipped in counts.items()
                },
                flops={
                    name: sum(
                        n * shape.flops_per_neuron for n, shape in zip(skipped, shapes, strict=True)
                    )
                    / dense
                    for name, skipped in counts.items()
                },
            )
        )
    return tuple(found)


def potential_speedups(
    skippable: Sequence[SkippableFraction], size: ModelSize
) -> tuple[PotentialSpeedup, ...]:
    """Return the speed-up that each domain's skipped neurons could give. Pure."""
    return tuple(
        PotentialSpeedup(
            domain=domain,
            pool=fractions.pool,
            paper=1.0 / (1.0 - fraction),
            amdahl=size.speedup(fractions.flops[domain]),
        )
        for fractions in skippable
        for domain, fraction in fractions.per_domain.items()
    )


def measure_overlap(
    profile: Profile, sparsities: Sequence[float] = OVERLAP_SPARSITIES
) -> tuple[SkipOverlap, ...]:
    """Return how alike the domains' skipped neurons are; no pairs with one domain. Pure."""
    found = []
    for sparsity in sparsities:
        masks = skip_masks(profile, 100.0 * sparsity, "layer")
        pairs = tuple(
            compare_neurons(first, second, masks[first], masks[second])
            for first, second in combinations(masks, 2)
        )
        found.append(SkipOverlap(sparsity=sparsity, pairs=pairs))
    return tuple(found)
