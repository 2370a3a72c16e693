"""How much of the FFN has to go for ``generate`` to be as fast as asked for.

Random pathways of some sparsity are timed against dense, alternately. What a sparsity saves is
measured, not modelled: the next one to be timed lies on the line between the two nearest timings
below and above the target (regula falsi), since the saving per neuron is not the same everywhere.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.speed import benchmark
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

_FIRST = 0.6
"""The sparsity that is timed first: it saves enough to be told from noise."""

_MOST = 0.95
"""The highest sparsity that is chosen."""

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


def sparsity_for_speedup(dense: Any, target: float, *, rounds: int = 7) -> SpeedupPlan:
    """Measure how much of the FFN has to go for ``generate`` to be faster by a ratio.

    Args:
        dense: A causal LM; it stays as it is.
        target: The wanted ratio to dense, above 1.
        rounds: Timed rounds per sparsity.

    Raises:
        PathwaysError: The ceiling is below the target.
    """
    timings = _Timings(target)
    while not timings.done:
        sparsity = timings.guess()
        timings.ratios[sparsity] = _speedup(dense, sparsity, rounds)
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
        ratios: Sparsity -> measured ratio.
    """

    target: float
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
            return _FIRST
        wanted = _saved(self.target)
        saved = {0.0: 0.0} | {s: _saved(ratio) for s, ratio in sorted(self.ratios.items())}
        above = next((s for s in saved if saved[s] >= wanted), None)
        if above is None:
            return min(_MOST, wanted / max(_saved(self.ceiling), 1e-6))
        below = max(s for s in saved if s < above)
        part = (wanted - saved[below]) / (saved[above] - saved[below])
        return below + part * (above - below)

    def check(self) -> None:
        """Check, as soon as more than one timing says so, that the target is within reach.

        Raises:
            PathwaysError: It is not.
        """
        most = _saved(self.ceiling)
        if len(self.ratios) >= _LEAST_TIMINGS and _saved(self.target) >= _MOST * most:
            raise PathwaysError(
                f"A speed-up of {self.target:.2f} is out of reach: without any FFN generate() "
                f"would be {self.ceiling:.2f}x as fast here. Ask for at most "
                f"{1.0 / (1.0 - 0.9 * most):.2f}."
            )


def _saved(ratio: float) -> float:
    """Return the fraction of the time that is saved at a ratio of speeds."""
    return 1.0 - 1.0 / ratio


def _speedup(dense: Any, sparsity: float, rounds: int) -> float:
    """Return the median ratio to dense that random pathways reach."""
    base = BaseModel.of(dense)
    everything = [torch.ones(block.d_ff, dtype=torch.bool) for block in base.blocks]
    pathways = Pathways(base=base, by_domain={"random": Pathway.from_keep(everything)})
    model = SparsePathwaysForCausalLM.from_dense(dense, pathways)
    reports, _ = benchmark(model, sparsity=sparsity, rounds=rounds)
    return quantile(reports[0].ratios, 0.5)
