"""``sparse-pathways evaluate``: perplexity of every pathway beside its partners."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.launch import join_launch, leave_unless_first
from hf_sparse_pathways.cli.loading import load_sparse
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.report_folder import load_plots_if_possible, write_report
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.outputs import check_output

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.quality_report import QualityReport


def run(  # noqa: PLR0913
    folder: opt.Folder,
    domain: opt.Texts,
    pathways: Annotated[
        list[str],
        typer.Option(
            metavar="[LABEL=]DIR",
            help="Other pathways of the same base, measured beside; repeat. [label: DIR's name]",
        ),
    ] = [],  # noqa: B006
    controls: Annotated[
        bool, typer.Option(help="Measure pooled, random and other domains' pathways too.")
    ] = True,
    max_tokens: Annotated[int, typer.Option(help="Scored tokens per domain and arm.")] = 8192,
    max_length: opt.MaxLength = None,
    batch_size: opt.BatchSize = 4,
    seed: opt.Seed = 0,
    seen: Annotated[
        str, typer.Option(help="Calibration documents: exclude, include or refuse them.")
    ] = "exclude",
    dtype: opt.Dtype = "auto",
    report_folder: opt.ReportFolder = None,
    plots: opt.Plots = True,
    overwrite: opt.OverwriteReport = False,
    as_json: opt.Json = False,
) -> None:
    """Measure perplexity on each domain's held-out text; calibration documents are left out."""
    texts = parse_texts(domain)
    if report_folder is not None:
        check_output(report_folder, overwrite, "report.json", "--report")
    label = name_folder(folder)
    others = parse_sets(pathways, label)
    from hf_sparse_pathways.measure.quality import evaluate
    from hf_sparse_pathways.pathways.pathway import Pathways

    launch = join_launch()
    also = {name: Pathways.from_pretrained(source) for name, source in others.items()}
    model, tokenizer = load_sparse(folder, dtype)
    report = evaluate(
        model,
        tokenizer,
        texts,
        also=also,
        label=label,
        controls=controls,
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        seen=seen,
        accelerator=launch,
    )
    leave_unless_first(launch)
    if report_folder is not None:
        _write(report_folder, report, plots)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    for name in report.domains:
        print_table(report.caption(name), *report.table(name))


def name_folder(folder: str) -> str:
    """Return the last part of a folder's path or of a Hub id."""
    return Path(os.path.abspath(folder)).name


def parse_sets(given: Sequence[str], own: str) -> dict[str, str]:
    """Turn ``[LABEL=]DIR`` options into a dictionary; a folder that exists is no ``LABEL=DIR``.

    Args:
        given: The options.
        own: The label of the model's own pathways.

    Raises:
        PathwaysError: Two labels are equal, or a label or folder is empty.
    """
    sets: dict[str, str] = {}
    for option in given:
        label, separator, folder = option.partition("=")
        if not separator or Path(option).exists():
            label, folder = name_folder(option), option
        if not label or not folder:
            raise PathwaysError(
                f"--pathways {option!r} does not fit; write --pathways DIR or LABEL=DIR."
            )
        if label == own or label in sets:
            raise PathwaysError(
                f"Two sets of pathways are called {label!r}. Write --pathways LABEL={folder} with "
                "another label."
            )
        sets[label] = folder
    return sets


def _write(folder: Path, report: "QualityReport", wanted: bool) -> None:
    """Write a report, with pictures if they are wanted and can be drawn."""
    plots = load_plots_if_possible() if wanted else None
    write_report(
        folder,
        "report",
        report.to_dict(),
        lambda pictures: _render(report, pictures),
        None if plots is None else plots.draw_all(report),
    )


def _render(report: "QualityReport", pictures: Sequence[str]) -> str:
    parts = [f"# Quality of {report.base or 'a model without a name'}", report.to_markdown()]
    parts.extend(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    return "\n\n".join(parts) + "\n"
