"""Figures and tables as text."""

from collections.abc import Sequence

from hf_sparse_pathways.display import markdown_cell
from hf_sparse_pathways.tables import Table


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
    """Render a Markdown table with the first column on the left and figures on the right.

    Names in the rows may be those of a saved file, so that nothing in a cell ends it.
    """
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines.extend("| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows)
    return "\n".join(lines)


class Section(Table):
    """One table of a report, which is written as Markdown, too."""

    def to_markdown(self) -> str:
        """Render title, note and table."""
        parts = [f"## {self.title}", self.note, markdown_table(self.header, self.rows)]
        return "\n\n".join(part for part in parts if part)
