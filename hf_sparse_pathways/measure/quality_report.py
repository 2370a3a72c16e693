"""Quality beside dense and honest partners, as values that render as tables and JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.limits import MOST_ROWS
from hf_sparse_pathways.measure.figures import Section, format_figure, markdown_table
from hf_sparse_pathways.measure.reading import read_report
from hf_sparse_pathways.pathways.description import check_names
from hf_sparse_pathways.tables import ShownAsTables

FEW = 5
"""Documents below which an interval over resampled documents is hardly one."""

_FIGURES = (
    "perplexity",
    "ratio",
    "bits_per_byte",
    "divergence",
    "agreement",
    "cosine",
    "flops",
)

_IN_MATRIX = ("pathway", "other", "pooled")


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One arm's quality on one domain's text.

    Attributes:
        domain: Whose text.
        role: ``dense``, ``pathway``, ``tuned`` (the dense model tuned as the pathway was healed),
            ``pooled``, ``random`` or ``other``.
        pathway: Name of the pathway that ran; None for dense.
        perplexity: exp of the mean loss in nats per token.
        ratio: Perplexity over the dense model's on the same tokens.
        interval: 95 % interval of the ratio over resampled documents; None with one document.
        bits_per_byte: Loss in bits over the text's length in UTF-8 bytes.
        divergence: Mean KL divergence from the dense model's predictions, nats per token.
        agreement: Fraction of tokens after which both prefer the same successor.
        cosine: Mean cosine of the hidden states before the head with the dense model's.
        cosine_per_layer: The same behind each decoder layer that has an FFN block.
        flops: FFN FLOPs as a fraction of dense.
        tokens: Scored tokens.
        documents: Documents they come from.
        excluded: Documents left out because the pathways were calibrated on them.
        sparsity: Fraction of neurons removed; None where they are chosen while the model runs.
        set: Label of the pathways that it belongs to; None for dense, and with one set only.
        experts: Fraction of the routed experts' weights that is kept, if pathways keep some.
    """

    domain: str
    role: str
    pathway: str | None
    perplexity: float
    ratio: float
    interval: tuple[float, float] | None
    bits_per_byte: float
    divergence: float
    agreement: float
    cosine: float
    cosine_per_layer: tuple[float, ...]
    flops: float
    tokens: int
    documents: int
    excluded: int
    sparsity: float | None = None
    set: str | None = None
    experts: float | None = None

    def check_names(self) -> None:
        """Check that the names can stand in a table and a card.

        Raises:
            ArtefactError: One has control characters or markup.
        """
        given = (self.domain, self.role, self.pathway, self.set)
        check_names(name for name in given if name is not None)

    @property
    def label(self) -> str:
        """What a table calls this arm."""
        named = {
            "dense": "dense",
            "pathway": f"pathway {self.pathway}",
            "tuned": "dense, tuned equally",
            "other": None,
        }
        return named.get(self.role, self.role) or f"other domain: {self.pathway}"

    @property
    def ratio_text(self) -> str:
        """The ratio with its interval."""
        if self.interval is None or self.role == "dense":
            return f"{self.ratio:.3g}"
        return f"{self.ratio:.3g} ({self.interval[0]:.3g}-{self.interval[1]:.3g})"


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """How ``evaluate`` measured.

    Attributes:
        max_tokens: Most tokens per domain.
        max_length: Most tokens per window, as it was used.
        batch_size: Windows per forward pass.
        seed: Of windows, random masks and resampling.
        seen: What was done with documents that the pathways were calibrated on.
        controls: Whether the pathways' partners were measured too.
        dtype: Of the model.
        adapters: Names of the adapters that were active in the model; its dense rows are without.
        versions: Package -> version.
    """

    max_tokens: int
    max_length: int
    batch_size: int
    seed: int
    seen: str
    controls: bool
    dtype: str
    adapters: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def check_names(self) -> None:
        """Check that the names can stand in a card; see ``QualityRow.check_names``."""
        given = (self.seen, self.dtype, *self.adapters)
        check_names((*given, *self.versions, *self.versions.values()))

    def __str__(self) -> str:
        done = {"exclude": "excluded", "include": "included", "refuse": "refused"}
        parts = [
            f"at most {self.max_tokens} tokens per domain",
            f"windows of at most {self.max_length}",
            f"{self.batch_size} windows at a time",
            f"seed {self.seed}",
            f"calibration documents {done.get(self.seen, self.seen)}",
            "with controls" if self.controls else "no controls",
            self.dtype,
            *(f"{name} {version}" for name, version in self.versions.items()),
        ]
        return f"Settings: {', '.join(parts)}."


@dataclass(frozen=True, kw_only=True)
class QualityReport(ShownAsTables):
    """What ``evaluate`` measured.

    Attributes:
        base: Name of the base model.
        rows: One per domain and arm.
        settings: How they were measured; reports that found the same are equal without.
    """

    base: str
    rows: tuple[QualityRow, ...]
    settings: QualitySettings | None = field(default=None, compare=False)

    def of(self, domain: str, label: str | None = None) -> tuple[QualityRow, ...]:
        """Return the rows of one domain's text: all, or those of one set of pathways."""
        rows = (row for row in self.rows if row.domain == domain)
        return tuple(row for row in rows if label is None or row.set == label)

    @property
    def domains(self) -> list[str]:
        """The domains whose text was measured."""
        return list(dict.fromkeys(row.domain for row in self.rows))

    @property
    def sets(self) -> list[str]:
        """The labels of the sets of pathways; none if there is one set only."""
        return list(dict.fromkeys(row.set for row in self.rows if row.set is not None))

    def table(self, domain: str) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of one domain's table."""
        several = bool(self.sets)
        kept = any(row.experts is not None for row in self.rows)
        rows = [
            [
                row.label,
                *([row.set or "-"] if several else []),
                f"{row.flops:.1%}",
                *([f"{1.0 if row.experts is None else row.experts:.1%}"] if kept else []),
                format_figure(row.perplexity),
                row.ratio_text,
                f"{row.bits_per_byte:.3f}",
                f"{row.divergence:.3f}",
                f"{row.agreement:.1%}",
                f"{row.cosine:.3f}",
            ]
            for row in self.of(domain)
        ]
        header = ["model", *(["set"] if several else []), "FFN FLOPs"]
        header += [*(["expert weights"] if kept else []), "perplexity"]
        return [*header, "ratio to dense (95 %)", "bits/byte", "KL", "top-1", "cosine"], rows

    def matrix(self, label: str | None = None) -> tuple[list[str], list[list[str]]]:
        """Return perplexity ratios as a table: a row per text, a column per pathway.

        Args:
            label: Of the pathways, where there are several sets.
        """
        names = self.columns(label)
        rows = []
        for domain in self.domains:
            own = self.of(domain, label)
            ratios = {row.pathway: row.ratio for row in own if row.role != "random"}
            random = [row.ratio for row in own if row.role == "random"]
            cells = [format_figure(ratios[name]) if name in ratios else "-" for name in names]
            rows.append([domain, *cells, *(format_figure(ratio) for ratio in random)])
        random_column = ["random"] if any(row.role == "random" for row in self.rows) else []
        return ["text", *names, *random_column], rows

    def columns(self, label: str | None = None) -> list[str]:
        """Return the names of the pathways in the matrix, the pooled one last."""
        rows = [row for row in self.rows if label is None or row.set == label]
        named = {row.pathway: row.role == "pooled" for row in rows if row.role in _IN_MATRIX}
        return sorted((name for name in named if name is not None), key=lambda name: named[name])

    def removed(self, label: str | None) -> dict[str, float]:
        """Return what each domain's own pathway of a set removes, where that was noted."""
        rows = (row for row in self.rows if (row.set, row.role) == (label, "pathway"))
        return {str(row.pathway): row.sparsity for row in rows if row.sparsity is not None}

    def describe(self, label: str) -> str:
        """Say how much a set of pathways removes."""
        removed = dict.fromkeys(f"{share:.0%}" for share in self.removed(label).values())
        return f"{label}, {', '.join(removed)} of the FFN neurons removed"

    def caption(self, domain: str) -> str:
        """Say what one domain's table was measured on."""
        rows = self.of(domain)
        first = rows[0]
        parts = [
            f"{domain}: perplexity on {first.tokens} tokens of {first.documents} held-out documents"
        ]
        if first.excluded:
            parts.append(f"{first.excluded} calibration documents left out")
        if first.documents < FEW and any(row.interval for row in rows):
            parts.append("few documents: the interval is a guess")
        if self.settings is not None and self.settings.adapters:
            named = ", ".join(map(repr, self.settings.adapters))
            parts.append(f"dense is without the adapter {named}, all other rows are with it")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return a report from JSON values.

        Raises:
            ArtefactError: A value is missing or of the wrong kind.
        """
        report = read_report(cls, data, "an evaluation")
        if len(report.rows) > MOST_ROWS:
            raise ArtefactError(f"This report of an evaluation has more than {MOST_ROWS} rows.")
        for row in report.rows:
            row.check_names()
        if report.settings is not None:
            report.settings.check_names()
        return report

    def sections(self) -> list[Section]:
        """Return one table per domain, and with several the matrix of all."""
        found = []
        for domain in self.domains:
            header, rows = self.table(domain)
            found.append(Section(title=self.caption(domain), note="", header=header, rows=rows))
        labels: list[str | None] = [*self.sets]
        for label in labels or [None]:
            header, rows = self.matrix(label)
            if len(rows) > 1 and len(header) > 2:
                title = "Perplexity ratio to dense: text (rows) by pathway (columns)"
                title = title if label is None else f"{self.describe(label)}. {title}"
                found.append(Section(title=title, note="", header=header, rows=rows))
        return found

    def to_markdown(self) -> str:
        """Render the tables as Markdown, and how was measured."""
        parts = [
            f"**{section.title}**\n\n{markdown_table(section.header, section.rows)}"
            for section in self.sections()
        ]
        if self.settings is not None:
            parts.append(str(self.settings))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.to_markdown()
