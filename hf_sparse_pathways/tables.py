"""Tables as values, and as HTML for notebooks and for the report page.

Names of models and domains, text sources and methods are anybody's words: they are escaped, and
stay text whatever is in them. Markdown is not used here, since readers of it let HTML through.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_SHORT = 24
_LONGEST_FIGURES = 32
"""Characters of figures with an interval; what is longer is text."""

_LEFT, _RIGHT = "text-align:left", "text-align:right"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with what it shows.

    Attributes:
        title: What it shows.
        note: How to read it; may be empty.
        header: Column names.
        rows: Cells; the first of a row names it.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_html(self) -> Markup:
        """Render it; what is too wide scrolls, for the keyboard too."""
        sides = [self._side(place) for place in range(len(self.header))]
        head = Markup("").join(
            Markup('<th scope="col" style="{}">{}</th>').format(side, name)
            for side, name in zip(sides, self.header, strict=True)
        )
        body = Markup("\n").join(_row(row, sides) for row in self.rows)
        note = Markup("<br>{}").format(as_html(self.note)) if self.note else ""
        return Markup(
            '<figure style="margin:1em 0"><figcaption><strong>{title}</strong>{note}</figcaption>\n'
            '<div role="region" aria-label="{title}" tabindex="0" style="overflow-x:auto">\n'
            "<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></figure>"
        ).format(title=self.title, note=note, head=head, body=body)

    def _side(self, place: int) -> str:
        """Return the side that a column stands on: names and text on the left."""
        text = place == 0 or any(len(row[place]) > _LONGEST_FIGURES for row in self.rows)
        return _LEFT if text else _RIGHT


class ShownAsTables(ABC):
    """What a notebook shows as tables."""

    @abstractmethod
    def sections(self) -> Iterable[Table]:
        """Return the tables."""

    def _repr_html_(self) -> str:
        """Render the tables, as a notebook asks for it."""
        return Markup("\n").join(table.to_html() for table in self.sections())


def as_html(text: str) -> Markup:
    """Render a sentence: what stands between backticks as code, and all of it as text."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )


def _row(cells: Sequence[str], sides: Sequence[str]) -> Markup:
    return Markup("<tr>{}{}</tr>").format(
        Markup('<th scope="row" style="{}">{}</th>').format(sides[0], cells[0]),
        Markup("").join(map(_cell, cells[1:], sides[1:])),
    )


def _cell(text: str, side: str) -> Markup:
    """Render a cell; what is as short as figures with an interval stays on one line."""
    style = f"{side};white-space:nowrap" if len(text) <= _SHORT else side
    return Markup('<td style="{}">{}</td>').format(style, text)
