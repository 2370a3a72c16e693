"""``sparse-pathways export``: one domain as an ordinary checkpoint of the base's architecture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_sparse_pathways.cli import options as opt
from hf_sparse_pathways.cli.loading import load_sparse, unfinished_work
from hf_sparse_pathways.cli.options import parse_texts
from hf_sparse_pathways.cli.profile import HELD_OUT, Sampling, calibration_texts, take_profile
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.memory import MAX_MEMORY
from hf_sparse_pathways.outputs import check_output

if TYPE_CHECKING:
    from hf_sparse_pathways.share.exporting import Export

WIDTHS = ("pad", "reselect")


def run(  # noqa: PLR0913
    ctx: typer.Context,
    folder: opt.Folder,
    domain: Annotated[str, typer.Option("--domain", help="The domain to export.")],
    output: opt.Output,
    widths: Annotated[
        str,
        typer.Option(
            help="pad: all as wide as the widest, with zeros; reselect: the same number of neurons "
            "in each, selected anew (needs --text or --profile)."
        ),
    ] = "pad",
    text: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The domain's text, to select from: as for build."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="A saved profile with the domain, instead of --text.")
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(min=1, help="Round widths up to multiples of this, such as 64.")
    ] = 1,
    bias: Annotated[
        str, typer.Option(help="Of the repair: keep, or drop where there is no place for it.")
    ] = "keep",
    max_tokens: opt.MaxTokens = opt.CALIBRATION_TOKENS,
    held_out: opt.HeldOut = HELD_OUT,
    max_memory: opt.MaxMemory = MAX_MEMORY,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    license: opt.License = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Push it to this Hub repository, too.")
    ] = None,
    private: opt.Private = None,
    revision: opt.Revision = None,
    create_pr: opt.CreatePr = False,
    message: opt.Message = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write one domain as a plain checkpoint, which needs nothing of this package.

    It is loaded again by Transformers alone and compared with the pathway before it is put there.
    """
    _check_widths(widths, text, profile)
    if text is None:
        opt.refuse_beside(ctx, "no --text", (*opt.PROFILING, "seed"))
    if push is None:
        opt.refuse_beside(ctx, "no --push", ("private", "revision", "create_pr", "message"))
    from hf_sparse_pathways.discovery.profiles import Profile
    from hf_sparse_pathways.modeling.baking import check_bias
    from hf_sparse_pathways.share.exporting import EXPORT_NAME, export
    from hf_sparse_pathways.share.plain_card import find_license

    check_bias(bias)
    check_output(output, overwrite, EXPORT_NAME)
    model, tokenizer = load_sparse(folder, dtype)
    sampling = Sampling(
        max_tokens=max_tokens,
        max_length=None,
        batch_size=8,
        held_out=held_out,
        seed=seed,
        precision="fastest",
        max_memory=max_memory,
    )
    texts = {} if text is None else parse_texts([f"{domain}={text}"])
    sources = calibration_texts(texts, held_out, seed, max_tokens)
    with unfinished_work("export", folder, dtype, output.absolute(), text, sampling) as work:
        taken = None if profile is None else Profile.from_pretrained(profile)
        if sources:
            taken = take_profile(model, tokenizer, sources, sampling, work, grams=True)
        done = export(
            model,
            domain,
            output,
            tokenizer=tokenizer,
            profile=taken,
            multiple_of=multiple_of,
            bias=bias,
            license=license or find_license(folder),
            overwrite=overwrite,
            repo_id=push,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
        )
    _print(done)


def _check_widths(widths: str, text: str | None, profile: Path | None) -> None:
    """Check that there is something to select from if neurons are selected anew, and only then.

    Raises:
        UnknownNameError: There is no such choice.
        PathwaysError: There is nothing, or too much.
    """
    if widths not in WIDTHS:
        raise UnknownNameError("widths", widths, WIDTHS)
    given = (text is not None) + (profile is not None)
    if widths == "reselect" and given != 1:
        raise PathwaysError(
            "--widths reselect chooses neurons anew, and a folder with pathways has no statistics: "
            "give the domain's text (--text PATH) or a profile (--profile DIR)."
        )
    if widths == "pad" and given:
        raise PathwaysError(
            "--text and --profile are for --widths reselect: leave them out, or add that."
        )


def _print(done: "Export") -> None:
    """Say what was exported, and how near it is."""
    facts = done.facts
    for field, (before, after) in facts.fields.items():
        typer.echo(f"{field}: {before} -> {after}")
    typer.echo("parameters: {:,} -> {:,}".format(*facts.parameters))
    if facts.padded:
        typer.echo(f"neurons that are zeros: {facts.padded:,}")
    if facts.dropped is not None:
        typer.echo(f"without the bias, {facts.dropped}")
    typer.echo(f"logits differ from the pathway's by {facts.error:.1e} of their size")
    typer.echo(f"{facts.domain} -> {done.folder}")
    if done.address is not None:
        typer.echo(done.address)
