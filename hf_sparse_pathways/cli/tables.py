"""Tables on a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_sparse_pathways.display import plain


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with its first column on the left and the others on the right.

    Names in it may be those of a downloaded file, and what a terminal would obey is shown.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(escape(plain(name)), justify="right" if index else "left")
    for row in rows:
        table.add_row(*(escape(plain(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(escape(plain(title)), style="bold", highlight=False)
    console.print(table)
