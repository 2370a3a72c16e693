"""``sparse-pathways route-report``: where prompts of known and unknown text go."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.report_folder import load_plots_if_possible, write_report
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.outputs import check_output

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.routing_report import RoutingReport

QUALITY_PROMPTS = 32
"""Per text: behind each four passes are made."""


def run(  # noqa: PLR0913
    folder: opt.Folder,
    domain: opt.Texts,
    unknown: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="Text of no domain, as --domain. Repeat for more."),
    ] = [],  # noqa: B006
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, commas.")] = "8,32,64,128,512",
    max_prompts: Annotated[int, typer.Option(min=1, help="Prompts per text and length.")] = 200,
    quality: Annotated[
        bool, typer.Option("--quality", help="Measure perplexity behind the prompts, too.")
    ] = False,
    guard: Annotated[
        bool, typer.Option("--guard", help="Measure a guard on text that changes halfway, too.")
    ] = False,
    cost: Annotated[bool, typer.Option(help="Time deciding beside the prefill.")] = True,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    dtype: opt.Dtype = "auto",
    report_folder: opt.ReportFolder = None,
    plots: opt.Plots = True,
    overwrite: opt.OverwriteReport = False,
    as_json: opt.Json = False,
) -> None:
    """Measure domain=auto on documents that nothing was calibrated or validated on."""
    known, others = parse_texts(domain), parse_texts(unknown, "--unknown")
    counts = _parse_lengths(lengths)
    if report_folder is not None:
        check_output(report_folder, overwrite, "routing.json", "--report")
    from hf_sparse_pathways.measure.routing import measure_routing

    model, tokenizer = load_sparse(folder, dtype)
    _check_names(known, others, model.domains)
    report = measure_routing(
        model,
        tokenizer,
        {**known, **others},
        lengths=counts,
        max_prompts=max_prompts,
        quality_prompts=QUALITY_PROMPTS if quality else 0,
        guard=guard,
        cost=cost,
        seed=seed,
    )
    if report_folder is not None:
        _write(report_folder, report, plots)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    for section in report.sections():
        print_table(section.title, section.header, section.rows)


def _check_names(known: opt.Sources, others: opt.Sources, domains: Sequence[str]) -> None:
    for name in known:
        if name not in domains:
            raise UnknownNameError("domain", name, domains)
    for name in others:
        if name in domains:
            raise PathwaysError(f"--unknown {name!r} is a domain. Give its text with --domain.")


def _write(folder: Path, report: "RoutingReport", wanted: bool) -> None:
    """Write a report, with a picture if it is wanted and can be drawn."""
    drawing = load_plots_if_possible() if wanted else None
    write_report(
        folder,
        "routing",
        report.to_dict(),
        lambda pictures: "\n\n".join([report.to_markdown(), *map(_show, pictures)]) + "\n",
        drawing.draw_all(report) if drawing else None,
    )


def _show(picture: str) -> str:
    return f"![Where prompts went]({picture})"


def _parse_lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PathwaysError(f"--lengths {text!r} does not fit; write 8,64,512.") from None
