"""``sparse-pathways evaluate``: perplexity of every pathway beside its partners."""

import json
from typing import Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.tables import print_table


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
        str, typer.Option(help="Calibration documents: exclude or include them.")
    ] = "exclude",
    dtype: opt.Dtype = "auto",
    as_json: opt.Json = False,
) -> None:
    """Measure perplexity on each domain's held-out text; calibration documents are left out."""
    texts = parse_texts(domain)
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
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    for name in report.domains:
        print_table(report.caption(name), *report.table(name))
