"""What a benchmark measured, as values that render as text and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn.execution import Execution
from hf_sparse_pathways.measure.figures import Section
from hf_sparse_pathways.measure.reading import read_report
from hf_sparse_pathways.measure.speed import tables
from hf_sparse_pathways.measure.speed.arms import Arm, ResidentCopies
from hf_sparse_pathways.measure.speed.results import Timing
from hf_sparse_pathways.measure.speed.switching import SwitchCost
from hf_sparse_pathways.tables import ShownAsTables


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport(ShownAsTables):
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
            written["summary"] = {arm.label: timing.summary(arm) for arm in self.arms}
            for arm, shares in timing.shares.items():
                written["shares"][arm]["rest"] = shares.rest
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return a report from JSON values.

        Raises:
            ArtefactError: A value is missing or of the wrong kind.
        """
        return read_report(cls, data, "a benchmark")

    def sections(self) -> list[Section]:
        """Return the tables."""
        return tables.sections(self)

    def to_markdown(self, pictures: Sequence[str] = ()) -> str:
        """Render everything.

        Args:
            pictures: File names of pictures to show.
        """
        return tables.to_markdown(self, pictures)

    def __str__(self) -> str:
        return self.to_markdown()
