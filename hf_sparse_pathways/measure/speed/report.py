"""What a benchmark measured, as values; ``tables`` renders them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.speed.arms import DENSE, Arm, ResidentCopies
from hf_sparse_pathways.measure.speed.execution import Execution
from hf_sparse_pathways.measure.speed.shares import TimeShares
from hf_sparse_pathways.measure.speed.switching import SwitchCost
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
        """Return the time saved over the same-kernel dense arm as a fraction of the ceiling's.

        1 is the ceiling, 0 no speed-up; None where nothing was removed.
        """
        possible = 1.0 - 1.0 / self.ceiling(arm)
        if possible <= 0.0:
            return None
        return (1.0 - 1.0 / quantile(self.ratios(arm.label, arm.partner), 0.5)) / possible


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """Everything that a benchmark measured.

    Attributes:
        base: The model.
        dtype: Of its weights.
        device: Where it ran.
        threads: Torch's.
        weights: Bytes of all weights.
        auto: What ``executor="auto"`` chose, and why.
        arms: What was timed, in the order of the tables.
        unavailable: Executor -> why it was not timed.
        notes: What else was left out, and why.
        timings: One entry per workload.
        switches: One entry per executor that keeps copies.
        copies: Resident bytes by executor and pathway.
        seconds: That all of it took.
    """

    base: str
    dtype: str
    device: str
    threads: int
    weights: int
    auto: Execution
    arms: tuple[Arm, ...]
    unavailable: Mapping[str, str]
    notes: tuple[str, ...]
    timings: tuple[Timing, ...]
    switches: tuple[SwitchCost, ...]
    copies: tuple[ResidentCopies, ...]
    seconds: float

    def arm(self, label: str) -> Arm:
        """Return an arm by its label.

        Raises:
            UnknownNameError: There is none.
        """
        for arm in self.arms:
            if arm.label == label:
                return arm
        raise UnknownNameError("arm", label, [arm.label for arm in self.arms])

    def timing(self, kind: str, size: int) -> Timing:
        """Return a workload's timing.

        Args:
            kind: ``"decode"``, ``"prefill"`` or ``"ffn"``.
            size: The batch of a decode, or else the tokens of the pass.

        Raises:
            UnknownNameError: It was not timed.
        """
        for timing in self.timings:
            own = timing.workload
            if (own.kind, own.batch if kind == "decode" else own.tokens) == (kind, size):
                return timing
        labels = [timing.workload.label for timing in self.timings]
        raise UnknownNameError("workload", f"{kind} {size}", labels)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: every round's figure, and what the tables show."""
        values = asdict(self)
        for timing, written in zip(self.timings, values["timings"], strict=True):
            written["label"] = timing.workload.label
            written["rates"] = {arm: list(rates) for arm, rates in timing.rates.items()}
            written["summary"] = {arm.label: _summary(timing, arm) for arm in self.arms}
            for arm, shares in timing.shares.items():
                written["shares"][arm]["rest"] = shares.rest
        return values


def _summary(timing: Timing, arm: Arm) -> dict[str, Any]:
    return {
        "tokens_per_second": asdict(Spread.of(timing.rates[arm.label])),
        "ratio_to_dense": asdict(Spread.of(timing.ratios(arm.label))),
        "ratio_to_same_kernel_dense": asdict(Spread.of(timing.ratios(arm.label, arm.partner))),
        "ceiling": timing.ceiling(arm),
        "fraction_of_ceiling": timing.reached(arm),
    }
