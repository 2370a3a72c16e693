"""One workload's figures: rates, ratios, ceilings, and what of them was reached."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.speed.arms import DENSE, Arm
from hf_sparse_pathways.measure.speed.shares import TimeShares
from hf_sparse_pathways.measure.speed.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles over rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Take them from samples."""
        low, median, high = (quantile(values, fraction) for fraction in (0.25, 0.5, 0.75))
        return cls(low=low, median=median, high=high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One workload's rounds.

    Attributes:
        workload: What was done.
        new_tokens: Per call of ``generate``; None where it was not called.
        rates: Arm's label -> tokens per second, one figure per round.
        shares: Label of a dense arm -> where its time goes. Empty for the FFN blocks alone, whose
            time is all the FFN's.
    """

    workload: Workload
    new_tokens: int | None
    rates: Mapping[str, Sequence[float]]
    shares: Mapping[str, TimeShares]

    def ratios(self, arm: str, partner: str = DENSE) -> list[float]:
        """Return one arm's speed over another's, round by round."""
        return [a / b for a, b in zip(self.rates[arm], self.rates[partner], strict=True)]

    def ceiling(self, arm: Arm) -> float:
        """Return the speed-up over the same-kernel dense arm if removed neurons cost nothing."""
        if self.workload.kind == "ffn":
            return 1.0 / (1.0 - arm.removed)
        return self.shares[arm.partner].ceiling(arm.removed)

    def reached(self, arm: Arm) -> float | None:
        """Return the speed-up over the same-kernel dense arm as a fraction of the ceiling.

        1 is the ceiling; no speed-up at all is 1 / ceiling. None where nothing was removed.
        """
        ceiling = self.ceiling(arm)
        if ceiling <= 1.0:
            return None
        return quantile(self.ratios(arm.label, arm.partner), 0.5) / ceiling

    def summary(self, arm: Arm) -> dict[str, Any]:
        """Return what the tables show of an arm, as plain JSON values."""
        return {
            "tokens_per_second": asdict(Spread.of(self.rates[arm.label])),
            "ratio_to_dense": asdict(Spread.of(self.ratios(arm.label))),
            "ratio_to_same_kernel_dense": asdict(Spread.of(self.ratios(arm.label, arm.partner))),
            "ceiling": self.ceiling(arm),
            "fraction_of_ceiling": self.reached(arm),
        }
