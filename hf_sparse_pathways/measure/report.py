"""What was measured, quality and speed together."""

from collections.abc import Sequence

from hf_sparse_pathways.measure.figures import format_figure, markdown_table, quantile
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow
from hf_sparse_pathways.measure.speed.pairs import GenerationSpeed


def summarise(quality: QualityReport, speeds: Sequence[GenerationSpeed]) -> str:
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
