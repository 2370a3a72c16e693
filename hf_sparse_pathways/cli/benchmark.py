"""``sparse-pathways benchmark``: time every executor beside dense, alternating."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_model, parse_dtype
from hf_sparse_pathways.cli.options import parse_sparsities
from hf_sparse_pathways.cli.report_folder import load_plots_if_possible, write_report
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.outputs import check_output

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.speed.report import BenchmarkReport
    from hf_sparse_pathways.measure.speed.workloads import Workload


def run(  # noqa: PLR0913
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[FOLDER]",
            help="Folder or Hub id of a model with pathways, or with --sparsity of a dense one.",
        ),
    ] = None,
    domain: Annotated[
        list[str], typer.Option("--domain", help="Domain to time; repeat. [the first one]")
    ] = [],  # noqa: B006
    sparsity: Annotated[
        list[str], typer.Option(help="Time random masks of this sparsity, too; repeat.")
    ] = [],  # noqa: B006
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="LxDxF",
            help="Instead of FOLDER: a random Llama of L layers, d_model D and d_ff F.",
        ),
    ] = None,
    executor: Annotated[
        list[str], typer.Option(help="Executor to time, or auto; repeat. [all of them]")
    ] = [],  # noqa: B006
    batch: Annotated[
        list[int], typer.Option(min=1, help="Decode with this batch; repeat. [1, 4 and 8]")
    ] = [],  # noqa: B006
    prefill: Annotated[
        list[int], typer.Option(min=1, help="Prefill these tokens; repeat. [128 and 512]")
    ] = [],  # noqa: B006
    budget: Annotated[float, typer.Option(min=0, help="Seconds to measure for.")] = 240.0,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds. [3 to 25, as the budget allows]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts.")] = 16,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="New tokens per call. [8 to 64, as the budget allows]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    dtype: opt.Dtype = "auto",
    report_folder: opt.ReportFolder = None,
    plots: opt.Plots = True,
    overwrite: opt.OverwriteReport = False,
    as_json: opt.Json = False,
) -> None:
    """Time decoding and prefilling, dense and with every executor in turn, and switching domains.

    With --batch or --prefill only what they name is timed.
    """
    if report_folder is not None:
        check_output(report_folder, overwrite, "report.json", "--report")
    sparsities = [value for text in sparsity for value in parse_sparsities(text)]
    model = _load(folder, shape, dtype, with_pathways=bool(domain) or not sparsities)
    import torch

    from hf_sparse_pathways.measure.speed.benchmarking import benchmark
    from hf_sparse_pathways.measure.speed.timing import TimingSettings

    if threads is not None:
        torch.set_num_threads(threads)
    report = benchmark(
        model,
        domain,
        sparsities=sparsities,
        executors=executor,
        workloads=_workloads(batch, prefill, prompt_tokens),
        settings=TimingSettings(budget=budget, rounds=rounds, new_tokens=new_tokens),
    )
    if report_folder is not None:
        _write(report_folder, report, plots)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    from hf_sparse_pathways.measure.speed import tables

    for line in (*tables.headline(report), "", tables.READING):
        typer.echo(line)
    for section in tables.sections(report):
        typer.echo()
        print_table(f"{section.title}: {section.note}", section.header, section.rows)


def _load(folder: str | None, shape: str | None, dtype: str, *, with_pathways: bool) -> Any:
    """Load a model, or make a random one.

    Raises:
        PathwaysError: Neither or both were asked for, or a random one without random masks.
    """
    if (folder is None) == (shape is None):
        given = "neither" if folder is None else f"both {folder} and --shape {shape}"
        raise PathwaysError(f"Give FOLDER or --shape, not both; {given} was given.")
    if folder is not None:
        return load_model(folder, dtype)
    from hf_sparse_pathways.measure.speed.random_models import ModelShape, random_llama

    parsed = ModelShape.parse(shape or "")
    if with_pathways:
        raise PathwaysError(
            "A random model has no domains: give --sparsity, as in --sparsity 0.5, to time random "
            "masks, and no --domain."
        )
    return random_llama(parsed, parse_dtype(dtype))


def _workloads(
    batches: list[int], prefills: list[int], prompt_tokens: int
) -> "tuple[Workload, ...] | None":
    """Return what was asked for; None for the usual ones, as far as the model has positions."""
    from hf_sparse_pathways.measure.speed.workloads import PROMPT_TOKENS, plan_workloads

    if batches or prefills:
        return plan_workloads(batches, prefills, prompt_tokens=prompt_tokens)
    if prompt_tokens == PROMPT_TOKENS:
        return None
    return plan_workloads(prompt_tokens=prompt_tokens)


def _write(folder: Path, report: "BenchmarkReport", wanted: bool) -> None:
    """Write a report, with a picture if it is wanted and can be drawn."""
    plots = load_plots_if_possible() if wanted else None
    write_report(
        folder,
        "report",
        report.to_dict(),
        report.to_markdown,
        None if plots is None else {"plot": plots.plot_speed(report)},
    )
