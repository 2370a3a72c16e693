"""A report as a folder: its values as JSON, its tables as Markdown, its pictures as PNG."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure import plotting
from hf_sparse_pathways.outputs import written_whole

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.figure import Figure


def load_plots() -> "ModuleType":
    """Return the module that draws.

    Raises:
        PathwaysError: matplotlib is not installed.
    """
    try:
        return plotting.load_plots()
    except PathwaysError as error:
        raise PathwaysError(f"{error} Or pass --no-plots.") from error


def load_plots_if_possible() -> "ModuleType | None":
    """Return the module that draws; without matplotlib say so on stderr, and return None."""
    try:
        return load_plots()
    except PathwaysError as error:
        typer.echo(f"Written without pictures. {error}", err=True)
        return None


def write_report(
    folder: Path,
    name: str,
    values: Mapping[str, Any],
    render: Callable[[Sequence[str]], str],
    figures: "Mapping[str, Figure] | None",
) -> None:
    """Write ``NAME.json``, ``NAME.md`` and the figures, whole or not at all.

    Args:
        folder: Replaced if it exists; see ``check_output``.
        name: Of the two files.
        values: Plain JSON values.
        render: From the pictures' file names to Markdown.
        figures: None or empty for no pictures.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    with written_whole(folder) as partial:
        pictures = load_plots().save_figures(figures, partial) if figures else []
        (partial / f"{name}.md").write_text(render(pictures), encoding="utf-8")
        (partial / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
