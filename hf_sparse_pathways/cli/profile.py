"""``sparse-pathways profile``: take the activation profile of each domain's text."""

from pathlib import Path
from typing import Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import check_output, load_dense, written_whole
from hf_sparse_pathways.cli.options import parse_texts

MAX_TOKENS = 16384
HELD_OUT = 0.2


def run(  # noqa: PLR0913
    model: opt.Model,
    domain: opt.Texts,
    output: opt.Output,
    max_tokens: opt.MaxTokens = MAX_TOKENS,
    max_length: opt.MaxLength = None,
    batch_size: opt.BatchSize = 8,
    held_out: opt.HeldOut = HELD_OUT,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    overwrite: opt.Overwrite = False,
) -> None:
    """Profile a dense model's FFN neurons on each domain's text and save the statistics."""
    texts = parse_texts(domain)
    check_output(output, overwrite, "profile.json")
    calibration = calibration_texts(texts, held_out, seed)
    dense, tokenizer = load_dense(model, dtype)
    from hf_sparse_pathways.discovery.profiling import profile

    taken = profile(
        dense,
        tokenizer,
        calibration,
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
    )
    with written_whole(output) as folder:
        taken.save_pretrained(folder)
    typer.echo(f"{taken} -> {output}")


def calibration_texts(texts: dict[str, Path], held_out: float, seed: int) -> dict[str, Any]:
    """Read each domain's documents and set some aside, which ``evaluate`` will find again."""
    from hf_sparse_pathways.discovery.text import read_documents
    from hf_sparse_pathways.pathways.pathway import check_domain_name

    for name in texts:
        check_domain_name(name)
    documents = {name: read_documents(path, seed=seed) for name, path in texts.items()}
    if held_out == 0:
        return dict(documents)
    return {name: read.split(held_out, seed)[0] for name, read in documents.items()}
