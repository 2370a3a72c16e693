"""``sparse-pathways distil``: FFN blocks of a dense model as sparsely gated linear experts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_dense, unfinished_work
from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.outputs import check_output, written_whole
from hf_sparse_pathways.sgatlin.settings import SgatlinConfig

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.distillation import Distilled

REPORT = "distillation"
"""Name of the JSON and the Markdown beside the model."""

USUAL = SgatlinConfig()


def run(  # noqa: PLR0913
    model: opt.Model,
    text: Annotated[
        str,
        typer.Option(
            help="To learn from: a file, folder or glob, or hf://datasets/OWNER/NAME:SPLIT:COLUMN."
        ),
    ],
    blocks: Annotated[str, typer.Option(help="FFN blocks to replace, from 0: 2,15,28.")],
    output: opt.Output,
    experts: Annotated[int, typer.Option(help="Experts of each channel.")] = USUAL.n_experts,
    channels: Annotated[int, typer.Option(help="Channels.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts of a token in each channel.")] = USUAL.top_k,
    d_key: Annotated[int, typer.Option(help="Width of the routers' query.")] = USUAL.d_key,
    router: Annotated[
        str, typer.Option(help="product_dense, product_key or dense.")
    ] = USUAL.router,
    max_tokens: Annotated[int, typer.Option(help="Tokens to learn from.")] = 65_536,
    scored_tokens: Annotated[int, typer.Option(help="Held-out tokens to measure on.")] = 16_384,
    max_length: opt.MaxLength = None,
    steps: Annotated[int, typer.Option(help="Steps of each block by itself.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Of these, the first.")] = 3e-3,
    together: Annotated[int, typer.Option(help="Steps of all together; 0 for none.")] = 200,
    together_rate: Annotated[float, typer.Option(help="Of these, the highest.")] = 3e-4,
    batch_size: opt.BatchSize = 4,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Replace FFN blocks by sgatlin layers that do the same: each by itself, then all together.

    The output is a model of its own, with a report of what that costs beside the dense model. An
    interrupted run goes on where it stood when it is started again with the same options.
    """
    ffn = SgatlinConfig(
        n_experts=experts, n_channels=channels, top_k=top_k, d_key=d_key, router=router
    )
    numbers = parse_blocks(blocks)
    check_output(output, overwrite, f"{REPORT}.json")
    dense, tokenizer = load_dense(model, dtype)
    from hf_sparse_pathways.healing.distilling import EndToEnd
    from hf_sparse_pathways.healing.reconstruction import Reconstruction
    from hf_sparse_pathways.measure.distillation import distil

    settings: dict[str, Any] = {
        "blocks": numbers,
        "max_tokens": max_tokens,
        "scored_tokens": scored_tokens,
        "max_length": max_length,
        "reconstruction": Reconstruction(steps=steps, learning_rate=learning_rate, seed=seed),
        "end_to_end": EndToEnd(
            steps=together, learning_rate=together_rate, batch_size=batch_size, seed=seed
        ),
        "seed": seed,
    }
    source = text if text.startswith("hf://") else Path(text)
    with unfinished_work("distil", model, dtype, output.absolute()) as work:  # by settings therein
        made = distil(dense, tokenizer, source, ffn, **settings, work_folder=work)
        _write(made, tokenizer, output)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
        return
    for section in made.sections():
        print_table(section.title, section.header, section.rows)
    typer.echo(f"-> {output}")


def parse_blocks(text: str) -> list[int]:
    """Return ``2,15,28`` as numbers.

    Raises:
        PathwaysError: They are none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PathwaysError(
            f"--blocks {text!r} does not fit; write numbers from 0 with commas: 2,15,28."
        ) from None


def _write(made: "Distilled", tokenizer: Any, output: Path) -> None:
    """Write the model and its report, whole or not at all."""
    with written_whole(output) as partial:
        made.model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        values = json.dumps(made.to_dict(), indent=2, allow_nan=False)
        (partial / f"{REPORT}.json").write_text(f"{values}\n", encoding="utf-8")
        (partial / f"{REPORT}.md").write_text(f"{made.to_markdown()}\n", encoding="utf-8")
