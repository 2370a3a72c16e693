"""``sparse-pathways evaluate``: perplexity of every pathway beside its partners."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import check_output, load_sparse
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.report_folder import load_plots, write_report
from hf_sparse_pathways.cli.tables import print_table

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.quality_report import QualityReport


def run(  # noqa: PLR0913
    folder: opt.Folder,
    domain: opt.Texts,
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
    report_folder: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write JSON, Markdown and plots there."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier report in DIR.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Measure perplexity on each domain's held-out text; calibration documents are left out."""
    texts = parse_texts(domain)
    if report_folder is not None:
        check_output(report_folder, overwrite, "report.json", "--report")
        load_plots("leave out --report")
    model, tokenizer = load_sparse(folder, dtype)
    from hf_sparse_pathways.measure.quality import evaluate

    report = evaluate(
        model,
        tokenizer,
        texts,
        controls=controls,
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        seen=seen,
    )
    if report_folder is not None:
        write_report(
            report_folder,
            "report",
            report.to_dict(),
            lambda pictures: _render(report, pictures),
            load_plots().plot_quality(report),
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    for name in report.domains:
        print_table(report.caption(name), *report.table(name))


def _render(report: "QualityReport", pictures: Sequence[str]) -> str:
    parts = [f"# Quality of {report.base or 'a model without a name'}", report.to_markdown()]
    parts.extend(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    return "\n\n".join(parts) + "\n"
