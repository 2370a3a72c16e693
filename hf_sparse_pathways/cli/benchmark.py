"""``sparse-pathways benchmark``: time ``generate`` dense and sparse, alternating."""

import json
from typing import Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse
from hf_sparse_pathways.measure.speed_report import describe_switch


def run(  # noqa: PLR0913
    folder: opt.Folder,
    domain: Annotated[
        list[str], typer.Option("--domain", help="Domain to time; all of them if not given.")
    ] = [],  # noqa: B006
    sparsity: Annotated[
        float | None, typer.Option(help="Time random masks of this sparsity instead.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per call.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    executor: Annotated[str, typer.Option(help="auto, masked, compact or sliced.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    dtype: opt.Dtype = "auto",
    as_json: opt.Json = False,
) -> None:
    """Time greedy generation at batch 1, dense and sparse in turn, and switching domains."""
    model, _ = load_sparse(folder, dtype, executor)
    import torch

    from hf_sparse_pathways.measure.speed import benchmark

    if threads is not None:
        torch.set_num_threads(threads)
    reports, switch = benchmark(
        model,
        domain,
        sparsity=sparsity,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
    )
    if as_json:
        record = {
            "generate": [report.to_dict() for report in reports],
            "switch_seconds": switch,
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype),
        }
        typer.echo(json.dumps(record, indent=2))
        return
    for report in reports:
        typer.echo(str(report))
    if switch:
        typer.echo(describe_switch(switch))
