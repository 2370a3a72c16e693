"""A comparison of methods as values that render as one table per sparsity, and as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from hf_sparse_pathways.measure.figures import Section, format_figure, markdown_table
from hf_sparse_pathways.measure.quality_report import QualityRow
from hf_sparse_pathways.measure.reading import read_report
from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.tables import ShownAsTables


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One method at one sparsity on one domain's text.

    Attributes:
        method: What the table calls it; ``dense`` for the partner of them all.
        sparsity: Fraction of the FFN's FLOPs that was to be removed.
        quality: What was measured.
    """

    method: str
    sparsity: float
    quality: QualityRow

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return a row from JSON values."""
        return read_report(cls, data, "a comparison")


@dataclass(frozen=True, kw_only=True)
class ComparisonReport(ShownAsTables):
    """What ``compare`` measured.

    Attributes:
        base: Name of the base model.
        rows: One per method, sparsity and domain.
        settings: What all of them were measured with, as JSON values.
    """

    base: str
    rows: tuple[ComparisonRow, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sparsities(self) -> list[float]:
        """The sparsities, in the rows' order."""
        return list(dict.fromkeys(row.sparsity for row in self.rows))

    @property
    def domains(self) -> list[str]:
        """The domains whose text was measured."""
        return list(dict.fromkeys(row.quality.domain for row in self.rows))

    def find(self, method: str, sparsity: float) -> dict[str, QualityRow]:
        """Return a method's rows by domain."""
        return {
            row.quality.domain: row.quality
            for row in self.rows
            if (row.method, row.sparsity) == (method, sparsity)
        }

    def geometric_mean(self, method: str, sparsity: float) -> float | None:
        """Return the geometric mean of a method's ratios; None if it lacks a domain."""
        rows = self.find(method, sparsity)
        if set(rows) != set(self.domains):
            return None
        return math.exp(sum(math.log(row.ratio) for row in rows.values()) / len(rows))

    def table(self, sparsity: float) -> tuple[list[str], list[list[str]]]:
        """Return one sparsity's table: a row per method, best first, a column per domain."""
        methods = dict.fromkeys(row.method for row in self.rows if row.sparsity == sparsity)
        methods.pop("dense", None)
        means = {method: self.geometric_mean(method, sparsity) for method in methods}
        rows = []
        for method in sorted(methods, key=lambda name: means[name] or math.inf):
            found, mean = self.find(method, sparsity), means[method]
            cells = [found[d].ratio_text if d in found else "-" for d in self.domains]
            flops = max(row.flops for row in found.values())
            shown = "-" if mean is None else format_figure(mean)
            rows.append([method, format_share(flops, 1), *cells, shown])
        return ["method", "FFN FLOPs", *self.domains, "geometric mean"], rows

    def caption(self, sparsity: float) -> str:
        """Say what one sparsity's table was measured on."""
        dense = self.find("dense", sparsity).values()
        tokens = min(row.tokens for row in dense)
        documents = min(row.documents for row in dense)
        perplexities = ", ".join(f"{row.domain} {format_figure(row.perplexity)}" for row in dense)
        return (
            f"{format_share(sparsity)} of the FFN FLOPs removed: perplexity ratio to dense (95 % "
            f"interval over documents) on at least {tokens} tokens of {documents} held-out "
            f"documents per domain; dense perplexity: {perplexities}"
        )

    def verdict(self, method: str, sparsity: float) -> str:
        """Say where another method does as well as one, or better; empty without that one."""
        own = self.find(method, sparsity)
        others = [
            row for row in self.rows if row.sparsity == sparsity and row.quality.domain in own
        ]
        better = [
            f"{row.method} on {row.quality.domain}"
            for row in others
            if row.method not in (method, "dense")
            and row.quality.ratio <= own[row.quality.domain].ratio
        ]
        if not own or len({row.method for row in others}) < 3:
            return ""
        if not better:
            return f"No other method of the table is as good as {method} on any domain."
        return f"As good as {method}, or better: {', '.join(better)}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def sections(self) -> list[Section]:
        """Return one table per sparsity, with a verdict on the pathways as its note."""
        found = []
        for sparsity in self.sparsities:
            header, rows = self.table(sparsity)
            title, note = self.caption(sparsity), self.verdict("pathway", sparsity)
            found.append(Section(title=title, note=note, header=header, rows=rows))
        return found

    def to_markdown(self) -> str:
        """Render one Markdown table per sparsity, with a verdict on the pathways."""
        parts = []
        for section in self.sections():
            parts += [section.title, markdown_table(section.header, section.rows), section.note]
        return "\n\n".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.to_markdown()
