"""What was timed, as values that render as text and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.shares import format_share


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """Dense and sparse generation, timed alternately in one process.

    Attributes:
        domain: The pathway that ran.
        executor: How its neurons were computed.
        sparsity: Fraction of neurons removed.
        dense: Tokens per second of the dense arm, one per round.
        sparse: Tokens per second of the sparse arm, one per round.
    """

    domain: str
    executor: str
    sparsity: float
    dense: tuple[float, ...]
    sparse: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Sparse over dense, round by round."""
        return [sparse / dense for sparse, dense in zip(self.sparse, self.dense, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, medians and quartiles included."""
        return {
            **asdict(self),
            "dense_median": quantile(self.dense, 0.5),
            "sparse_median": quantile(self.sparse, 0.5),
            "ratio_median": quantile(self.ratios, 0.5),
            "ratio_quartiles": [quantile(self.ratios, 0.25), quantile(self.ratios, 0.75)],
        }

    def __str__(self) -> str:
        low, middle, high = (quantile(self.ratios, q) for q in (0.25, 0.5, 0.75))
        return (
            f"{self.domain}: dense {quantile(self.dense, 0.5):.1f} tokens/s, sparse "
            f"{quantile(self.sparse, 0.5):.1f} tokens/s ({self.executor}, sparsity "
            f"{format_share(self.sparsity)}); ratio {middle:.2f} (quartiles {low:.2f} to "
            f"{high:.2f}, {len(self.dense)} rounds)"
        )


def describe_switch(samples: Sequence[float]) -> str:
    """Say what switching domains costs, from samples in seconds."""
    low, middle, high = (1000 * quantile(samples, q) for q in (0.25, 0.5, 0.75))
    return (
        f"switching between two resident domains: {middle:.2f} ms per step, median of "
        f"{len(samples)} (quartiles {low:.2f} to {high:.2f})"
    )
