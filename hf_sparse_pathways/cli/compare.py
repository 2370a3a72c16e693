"""``sparse-pathways compare``: methods side by side at the same FLOPs, in one table."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_dense
from hf_sparse_pathways.cli.options import parse_sparsities, parse_texts
from hf_sparse_pathways.cli.profile import (
    HELD_OUT,
    Sampling,
    needs_inputs,
    split_texts,
    take_profile,
)
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.memory import MAX_MEMORY
from hf_sparse_pathways.outputs import check_output


def run(  # noqa: PLR0913
    model: opt.Model,
    domain: opt.Texts,
    output: opt.Output,
    sparsity: Annotated[
        str, typer.Option(help="Fractions of FFN FLOPs removed, with commas.")
    ] = "0.2,0.3,0.5",
    method: Annotated[
        list[str], typer.Option("--method", help="A method; repeat. [all that are usual]")
    ] = [],  # noqa: B006
    scored_tokens: Annotated[int, typer.Option(help="Held-out tokens per domain.")] = 16384,
    compensation: Annotated[
        str | None, typer.Option(help="Of the pathways: parts joined by +. [as in build]")
    ] = None,
    allocation: Annotated[str | None, typer.Option(help="Of the pathways. [auto]")] = None,
    max_tokens: opt.MaxTokens = opt.CALIBRATION_TOKENS,
    max_length: opt.MaxLength = None,
    batch_size: Annotated[int, typer.Option(help="Calibration windows per forward pass.")] = 8,
    held_out: opt.HeldOut = HELD_OUT,
    max_memory: opt.MaxMemory = MAX_MEMORY,
    precision: Annotated[
        str, typer.Option(help="Of all passes, scored ones too: model, bfloat16 or fastest.")
    ] = "fastest",
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
) -> None:
    """Measure pathways, controls and other methods on the same held-out text.

    Writes comparison.json and comparison.md. Finished steps are kept in the output folder, so that
    an interrupted comparison, or one with more methods or sparsities, goes on from there; the
    tables show everything that was measured on the same text.
    """
    from hf_sparse_pathways.discovery.goal import check_sparsity
    from hf_sparse_pathways.measure.comparison import Comparison, check_comparable, compare
    from hf_sparse_pathways.measure.contenders import DEFAULT_METHODS
    from hf_sparse_pathways.pathways.base import BaseModel

    chosen = {"compensation": compensation, "allocation": allocation}
    sparsities = parse_sparsities(sparsity)
    what = Comparison(
        sparsities=tuple(check_sparsity(sparsities, len(sparsities))),
        methods=tuple(method) or DEFAULT_METHODS,
        max_tokens=scored_tokens,
        max_length=max_length,
        precision=precision,
        options={name: value for name, value in chosen.items() if value is not None},
        seed=seed,
    )
    what.check()
    if not (output / "steps").is_dir():
        check_output(output, overwrite=True, marker="comparison.json")
    if not 0.0 < held_out < 1.0:
        raise PathwaysError("--held-out has to be in (0, 1): methods are compared on that text.")
    sampling = Sampling(
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        held_out=held_out,
        seed=seed,
        precision=precision,
        max_memory=max_memory,
        inputs=needs_inputs(compensation),
    )
    texts = split_texts(parse_texts(domain), held_out, seed, max_tokens + scored_tokens)
    dense, tokenizer = load_dense(model, dtype)
    check_comparable(BaseModel.of(dense))
    calibration = {name: split[0] for name, split in texts.items()}
    steps = output / "steps"
    profile = take_profile(dense, tokenizer, calibration, sampling, steps, grams=True)
    test: dict[str, Any] = {name: split[1] for name, split in texts.items()}
    report = compare(dense, tokenizer, profile, test, what, work=steps)
    _write(output, report)
    for share in report.sparsities:
        print_table(report.caption(share), *report.table(share))


def _write(output: Path, report: Any) -> None:
    from hf_sparse_pathways.files import write_atomically

    text = json.dumps(report.to_dict(), indent=1)
    write_atomically(output / "comparison.json", f"{text}\n".encode())
    write_atomically(output / "comparison.md", f"{report.to_markdown()}\n".encode())
