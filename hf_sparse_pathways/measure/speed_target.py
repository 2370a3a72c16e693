"""How much of the FFN has to go for ``generate`` to be as fast as asked for.

Random pathways of some sparsity, with a random bypass if one is asked for, are timed against dense,
alternately, by ``compact``: with the same kernels, so that what packing gains is not counted. What
a sparsity saves is measured, not modelled: the next one to be timed lies on the line between the
two nearest timings below and above the target (regula falsi), since the saving per neuron is not
the same everywhere.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_sparse_pathways.discovery.allocation import most_sparsity
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank
from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.speed.pairs import time_generation
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

_FIRST = 0.6
"""The sparsity that is timed first: it saves enough to be told from noise."""

_MOST = 0.95
"""The highest sparsity that is chosen, if the bypass leaves room for it."""

_LEAST_TIMINGS = 2
"""One alone may have been disturbed."""

_TIMINGS = 6
"""After these the best sparsity that was timed is taken."""

_FITS = (0.99, 1.02)
"""Measured ratio over target that ends the search."""


@dataclass(frozen=True, kw_only=True)
class SpeedupPlan:
    """Which sparsity makes ``generate`` as fast as asked for.

    Attributes:
        target: The wanted ratio to dense.
        sparsity: Fraction of the FFN's FLOPs to remove.
        measured: Ratio that random pathways of that sparsity reach, median.
        ceiling: Ratio at which the FFN costs nothing, by Amdahl's law from what was measured.
    """

    target: float
    sparsity: float
    measured: float
    ceiling: float

    def __str__(self) -> str:
        return (
            f"{self.target:.2f}x: {self.sparsity:.1%} of the FFN removed makes generate() "
            f"{self.measured:.2f}x as fast here (batch 1, {torch.get_num_threads()} threads); "
            f"without any FFN it would be {self.ceiling:.2f}x"
        )


def sparsity_for_speedup(
    dense: Any, target: float, *, bypass_rank: int = 0, multiple: int = 1, rounds: int = 7
) -> SpeedupPlan:
    """Measure how much of the FFN has to go for ``generate`` to be faster by a ratio.

    Args:
        dense: A causal LM; it stays as it is.
        target: The wanted ratio to dense, above 1.
        bypass_rank: Rank of the bypass that the pathways will have; 0 for none.
        multiple: Of the pathways' widths: it limits what can be removed.
        rounds: Timed rounds per sparsity.

    Raises:
        PathwaysError: The target is out of reach.
    """
    shapes = BaseModel.of(dense).blocks
    most = min(_MOST, most_sparsity(shapes, bypass_rank=bypass_rank, multiple=multiple))
    timings = _Timings(target, most)
    while not timings.done:
        sparsity = timings.guess()
        timings.ratios[sparsity] = _speedup(dense, sparsity, bypass_rank, rounds)
        timings.check()
    return SpeedupPlan(
        target=target,
        sparsity=timings.best,
        measured=timings.ratios[timings.best],
        ceiling=timings.ceiling,
    )


@dataclass
class _Timings:
    """What was timed on the way to a target.

    Attributes:
        target: The wanted ratio.
        most: The highest sparsity that may be timed.
        ratios: Sparsity -> measured ratio.
    """

    target: float
    most: float
    ratios: dict[float, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the last timing fits, no other sparsity is left, or enough was tried."""
        if len(self.ratios) < _LEAST_TIMINGS:
            return False
        low, high = _FITS
        last = list(self.ratios.values())[-1] / self.target
        return low <= last <= high or len(self.ratios) == _TIMINGS or self.guess() in self.ratios

    @property
    def best(self) -> float:
        """The least sparsity that reaches the target, or else the one that comes nearest."""
        reached = [s for s, ratio in self.ratios.items() if ratio >= _FITS[0] * self.target]
        return min(reached) if reached else max(self.ratios, key=self.ratios.__getitem__)

    @property
    def ceiling(self) -> float:
        """The ratio without any FFN, from the highest sparsity that was timed."""
        highest = max(self.ratios)
        return 1.0 / (1.0 - min(0.99, max(0.0, _saved(self.ratios[highest]) / highest)))

    def guess(self) -> float:
        """Return the sparsity to be timed next."""
        if not self.ratios:
            return min(_FIRST, 0.8 * self.most)
        wanted = _saved(self.target)
        saved = {0.0: 0.0} | {s: _saved(ratio) for s, ratio in sorted(self.ratios.items())}
        above = next((s for s in saved if saved[s] >= wanted), None)
        if above is None:
            return min(self.most, wanted / max(_saved(self.ceiling), 1e-6))
        below = max(s for s in saved if s < above)
        part = (wanted - saved[below]) / (saved[above] - saved[below])
        return below + part * (above - below)

    def check(self) -> None:
        """Check, as soon as more than one timing says so, that the target is within reach.

        Raises:
            PathwaysError: It is not.
        """
        within = self.most * _saved(self.ceiling)
        if len(self.ratios) < _LEAST_TIMINGS or _saved(self.target) < within:
            return
        most = math.floor(100.0 / (1.0 - 0.95 * within)) / 100.0
        raise PathwaysError(
            f"A speed-up of {self.target:.2f} is out of reach: without any FFN generate() would "
            f"be {self.ceiling:.2f}x as fast here, and at most {self.most:.1%} of it can go. "
            + (f"Ask for at most {most:.2f}." if most > 1.0 else "No speed-up is within reach.")
        )


def _saved(ratio: float) -> float:
    """Return the fraction of the time that is saved at a ratio of speeds."""
    return 1.0 - 1.0 / ratio


def _speedup(dense: Any, sparsity: float, bypass_rank: int, rounds: int) -> float:
    """Return the median ratio to dense that random pathways reach."""
    base = BaseModel.of(dense)
    generator = torch.Generator().manual_seed(0)
    blocks = tuple(_random_block(s, sparsity, bypass_rank, generator) for s in base.blocks)
    pathways = Pathways(base=base, by_domain={"random": Pathway(blocks=blocks)})
    model = SparsePathwaysForCausalLM.from_dense(dense, pathways, executor="compact")
    return quantile(time_generation(model, rounds=rounds)[0].ratios, 0.5)


def _random_block(
    shape: BlockShape, sparsity: float, bypass_rank: int, generator: torch.Generator
) -> BlockPathway:
    """Return random neurons and a random bypass that compute what a sparsity leaves, together."""
    width = (1.0 - sparsity) * shape.d_ff - shape.bypass_width(bypass_rank)
    keep = torch.randperm(shape.d_ff, generator=generator) < max(1, int(width + 1e-6))
    bypass = None
    if bypass_rank:
        inner = torch.randn(bypass_rank, shape.d_in, generator=generator) / shape.d_in**0.5
        outer = torch.randn(shape.d_out, bypass_rank, generator=generator) / bypass_rank**0.5
        bypass = LowRank(outer, inner)
    return BlockPathway(keep=keep, bypass=bypass)
