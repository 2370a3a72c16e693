"""Measurements as values that render as tables and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One arm's perplexity on one domain's text.

    Attributes:
        domain: Whose text.
        role: ``dense``, ``pathway``, ``pooled``, ``random`` or ``other``.
        pathway: Name of the pathway that ran; None for dense.
        perplexity: exp of the mean loss in nats per token.
        ratio: Perplexity over the dense model's on the same tokens.
        flops: FFN FLOPs as a fraction of dense.
        tokens: Scored tokens.
        documents: Documents they come from.
        excluded: Documents left out because the pathways were calibrated on them.
    """

    domain: str
    role: str
    pathway: str | None
    perplexity: float
    ratio: float
    flops: float
    tokens: int
    documents: int
    excluded: int

    @property
    def label(self) -> str:
        """What a table calls this arm."""
        named = {"dense": "dense", "pathway": f"pathway {self.pathway}", "other": None}
        return named.get(self.role, self.role) or f"other domain: {self.pathway}"


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """What ``evaluate`` measured.

    Attributes:
        base: Name of the base model.
        rows: One per domain and arm.
    """

    base: str
    rows: tuple[QualityRow, ...]

    def of(self, domain: str) -> tuple[QualityRow, ...]:
        """Return the rows of one domain's text."""
        return tuple(row for row in self.rows if row.domain == domain)

    @property
    def domains(self) -> list[str]:
        """The domains whose text was measured."""
        return list(dict.fromkeys(row.domain for row in self.rows))

    def table(self, domain: str) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of one domain's table."""
        rows = [
            [row.label, f"{row.flops:.0%}", format_figure(row.perplexity), f"{row.ratio:.3g}"]
            for row in self.of(domain)
        ]
        return ["model", "FFN FLOPs", "perplexity", "ratio to dense"], rows

    def caption(self, domain: str) -> str:
        """Say what one domain's table was measured on."""
        first = self.of(domain)[0]
        left_out = f"; {first.excluded} calibration documents left out" if first.excluded else ""
        return (
            f"{domain}: perplexity on {first.tokens} tokens of {first.documents} held-out "
            f"documents{left_out}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Render one Markdown table per domain."""
        parts = []
        for domain in self.domains:
            parts.append(f"**{self.caption(domain)}**\n\n{markdown_table(*self.table(domain))}")
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.to_markdown()


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
            f"{self.sparsity:.0%}); ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f}, "
            f"{len(self.dense)} rounds)"
        )


def describe_switch(samples: Sequence[float]) -> str:
    """Say what switching domains costs, from samples in seconds."""
    low, middle, high = (1000 * quantile(samples, q) for q in (0.25, 0.5, 0.75))
    return (
        f"switching between two resident domains: {middle:.2f} ms per step, median of "
        f"{len(samples)} (quartiles {low:.2f} to {high:.2f})"
    )


def summarise(quality: QualityReport, speeds: Sequence[SpeedReport]) -> str:
    """Render quality and speed as one Markdown table with a row per domain.

    A cell shows perplexity and, in brackets, its ratio to dense.
    """
    header = ["text", "dense", "own pathway", "pooled", "random mask", "other domains' pathways"]
    by_domain = {speed.domain: speed for speed in speeds}
    rows = []
    for domain in quality.domains:
        measured = quality.of(domain)
        cells = [
            ", ".join(_cell(row) for row in measured if row.role == role) or "-"
            for role in ("dense", "pathway", "pooled", "random", "other")
        ]
        speed = by_domain[domain]
        low, middle, high = (quantile(speed.ratios, q) for q in (0.25, 0.5, 0.75))
        rows.append([domain, *cells, f"{middle:.2f}x ({low:.2f}-{high:.2f})"])
    return markdown_table([*header, "`generate()` speed"], rows)


def _cell(row: QualityRow) -> str:
    figure = format_figure(row.perplexity)
    return figure if row.role == "dense" else f"{figure} ({row.ratio:.2f})"


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return a quantile by linear interpolation."""
    ranked = sorted(values)
    place = fraction * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def format_figure(value: float) -> str:
    """Render a figure with four significant digits, without an exponent below a million."""
    return f"{value:.4g}" if value < 1e4 or value >= 1e6 else f"{value:.0f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table with the first column on the left and figures on the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines.extend("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join(lines)
