"""Quality beside dense and honest partners, as values that render as tables and JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.measure.figures import format_figure, markdown_table


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
            [
                row.label,
                f"{row.flops:.1%}",
                format_figure(row.perplexity),
                row.ratio_text,
                f"{row.bits_per_byte:.3f}",
                f"{row.divergence:.3f}",
                f"{row.agreement:.1%}",
                f"{row.cosine:.3f}",
            ]
            for row in self.of(domain)
        ]
        header = ["model", "FFN FLOPs", "perplexity", "ratio to dense (95 %)", "bits/byte"]
        return [*header, "KL", "top-1", "cosine"], rows

    def matrix(self) -> tuple[list[str], list[list[str]]]:
        """Return perplexity ratios as a table: a row per text, a column per pathway."""
        names = list(dict.fromkeys(row.pathway or "" for row in self._pathway_rows()))
        rows = []
        for domain in self.domains:
            ratios = {row.pathway: row.ratio for row in self.of(domain) if row.role != "random"}
            random = [row.ratio for row in self.of(domain) if row.role == "random"]
            cells = [format_figure(ratios[name]) if name in ratios else "-" for name in names]
            rows.append([domain, *cells, *(format_figure(ratio) for ratio in random)])
        random_column = ["random"] if any(row.role == "random" for row in self.rows) else []
        return ["text", *names, *random_column], rows

    def _pathway_rows(self) -> list[QualityRow]:
        """Return the rows of pathways, the domains' first."""
        order = {"pathway": 0, "other": 1, "pooled": 2}
        rows = [row for row in self.rows if row.role in order]
        return sorted(rows, key=lambda row: row.role == "pooled")

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
        """Render one Markdown table per domain, and with several the matrix of all."""
        parts = [
            f"**{self.caption(domain)}**\n\n{markdown_table(*self.table(domain))}"
            for domain in self.domains
        ]
        header, rows = self.matrix()
        if len(rows) > 1 and len(header) > 2:
            title = "**Perplexity ratio to dense: text (rows) by pathway (columns)**"
            parts.append(f"{title}\n\n{markdown_table(header, rows)}")
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.to_markdown()
