"""``sparse-pathways report``: one HTML page of a folder and of what was measured of it."""

from pathlib import Path
from typing import Annotated

import typer

from hf_sparse_pathways.cli.report_folder import load_plots_if_possible
from hf_sparse_pathways.errors import PathwaysError


def run(  # noqa: PLR0913
    html: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")],
    folder: Annotated[
        str | None,
        typer.Argument(metavar="FOLDER", help="Folder or Hub id with pathways."),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="report.json of `evaluate --report`.")
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(metavar="FILE", help="report.json of `benchmark --report`.")
    ] = None,
    analysis: Annotated[
        Path | None, typer.Option(metavar="FILE", help="analysis.json of `analyze --output`.")
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw pictures beside the tables.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier page.")
    ] = False,
) -> None:
    """Write one page that needs nothing beside it: domains, neurons, quality, speed, analysis.

    Reports are named, not found: one that lies in a folder may be of pathways that were there
    before. One of other pathways is refused. Without FOLDER the page shows the analysis alone, as
    of a model that has no pathways.
    """
    if html.exists() and not overwrite:
        raise PathwaysError(f"{html} exists. Pass --overwrite to replace it.")
    from hf_sparse_pathways.files import read_json
    from hf_sparse_pathways.measure.analysis import Analysis
    from hf_sparse_pathways.measure.quality_report import QualityReport
    from hf_sparse_pathways.measure.speed.report import BenchmarkReport
    from hf_sparse_pathways.share.page import write_html_report

    try:
        write_html_report(
            folder,
            html,
            evaluation=QualityReport.from_dict(read_json(evaluation)) if evaluation else None,
            benchmark=BenchmarkReport.from_dict(read_json(benchmark)) if benchmark else None,
            analysis=Analysis.from_dict(read_json(analysis)) if analysis else None,
            plots=plots and load_plots_if_possible() is not None,
        )
    except OSError as error:
        raise PathwaysError(
            f"{html} cannot be written ({error.strerror}). Choose another --html."
        ) from error
    typer.echo(f"-> {html}")
