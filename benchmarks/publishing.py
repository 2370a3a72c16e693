"""Where a benchmark's tables go: printed, and into its section of a Markdown page."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse_pathways.files import write_between
from hf_sparse_pathways.measure.figures import markdown_table


@dataclass(frozen=True)
class Section:
    """What stands between two markers of a page.

    Attributes:
        name: In the markers.
        target: Of the Makefile, which writes it.
    """

    name: str
    target: str

    @property
    def start(self) -> str:
        """The marker before it."""
        return f"<!-- {self.name}: written by `make {self.target}` -->"

    @property
    def end(self) -> str:
        """The marker behind it."""
        return f"<!-- /{self.name} -->"

    def read(self, page: str) -> str:
        """Return what stands there in the text of a page."""
        return page.partition(self.start)[2].partition(self.end)[0]

    def publish(self, text: str, page: Path | None) -> None:
        """Print a text, and write it into a page if one is given."""
        print(text)
        if page is not None:
            write_between(page, self.start, self.end, text)


def to_markdown(caption: str, sections: Iterable[Any]) -> str:
    """Return the tables of a report's sections below a caption, without headings."""
    parts = [caption]
    for one in sections:
        parts += [f"{one.title}. {one.note}".strip(), markdown_table(one.header, one.rows)]
    return "\n\n".join(parts)


def add_page(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the page."""
    parser.add_argument("--page", type=Path, help="a Markdown file to write the tables into")
