"""Arguments and options that several commands share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from hf_sparse_pathways.errors import PathwaysError

CALIBRATION_TOKENS = 16384

PROFILING = ("max_tokens", "router_tokens", "held_out", "max_memory")
"""Parameters that only say how a profile is taken, and nothing beside a saved one."""

Sources = Mapping[str, Path | str]
"""Domain -> a path, which may be a glob, or the address of a dataset on the Hub."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of a dense model.")]
Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="Folder or Hub id of a model with pathways.")
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--domain",
        metavar="NAME=PATH",
        help="A domain and its text: a file, folder or glob, or on the Hub "
        "hf://datasets/OWNER/NAME:SPLIT:COLUMN. Repeat for more domains.",
    ),
]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output in DIR.")]
MaxTokens = Annotated[int, typer.Option(help="Calibration tokens per domain.")]
RouterTokens = Annotated[
    int,
    typer.Option(min=0, help="Tokens per domain to tell it by; the model does not run over them."),
]
MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens per window. [512, or the model's positions]")
]
BatchSize = Annotated[int, typer.Option(help="Windows per forward pass.")]
TrainingTokens = Annotated[int, typer.Option(help="Training tokens per domain.")]
Accumulate = Annotated[int, typer.Option(help="Forward passes per step.")]
ValidationTokens = Annotated[int, typer.Option(help="Tokens on which the best state is chosen.")]
Validations = Annotated[int, typer.Option(help="How often that is measured.")]
HeldOut = Annotated[
    float, typer.Option(help="Fraction of each domain's documents kept for evaluation.")
]
MaxMemory = Annotated[
    str, typer.Option(help="Most memory for Gram matrices at a time: less means more passes.")
]
Precision = Annotated[
    str,
    typer.Option(help="While running over calibration text: model, bfloat16 or fastest."),
]
Seed = Annotated[int, typer.Option(help="Seed of splits, windows and random scores.")]
Dtype = Annotated[
    str, typer.Option(help="Weights' dtype: auto (as saved), float32, bfloat16 or float16.")
]
ReportFolder = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", help="Write JSON, Markdown and plots there."),
]
OverwriteReport = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier report in DIR.")
]
Plots = Annotated[bool, typer.Option(help="Draw pictures beside the JSON and Markdown.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, such as me/model.")]
License = Annotated[
    str | None, typer.Option(help="For the card: of the weights, as the Hub calls it.")
]
Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Of a repository made now.")
]
Revision = Annotated[str | None, typer.Option(help="Branch to push to. [main]")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")]
Message = Annotated[str | None, typer.Option(help="Title of the commit.")]


def refuse_beside(ctx: typer.Context, option: str, names: Sequence[str]) -> None:
    """Check that no option was given that another one makes void.

    Args:
        ctx: The command's.
        option: The other one, as it is written.
        names: The parameters that do nothing beside it.

    Raises:
        PathwaysError: Some of them were given.
    """
    sources = {name: ctx.get_parameter_source(name) for name in names}
    typed = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    given = [written.opts[0] for written in ctx.command.params if written.name in typed]
    if given:
        raise PathwaysError(f"With {option} these do nothing: {', '.join(given)}. Leave them out.")


def parse_texts(pairs: list[str], option: str = "--domain") -> Sources:
    """Turn ``NAME=PATH`` options into a dictionary.

    Args:
        pairs: What was given.
        option: The option, for messages.

    Raises:
        PathwaysError: One has no ``=``, or a name stands twice.
    """
    found = parse_pairs(pairs, option, "glob or folder")
    return {name: path if path.startswith("hf://") else Path(path) for name, path in found.items()}


def parse_pairs(pairs: list[str], option: str, place: str) -> dict[str, str]:
    """Turn ``NAME=PATH`` options into a dictionary.

    Args:
        pairs: What was given.
        option: The option, for messages.
        place: What a path is, for messages.

    Raises:
        PathwaysError: One has no ``=``, or a name stands twice.
    """
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path:
            raise PathwaysError(f"{option} {pair!r} does not fit; write {option} NAME=PATH.")
        if name in parsed:
            raise PathwaysError(f"{option} {name!r} was given twice; use one {place}.")
        parsed[name] = path
    return parsed


def parse_fraction(text: str) -> float:
    """Return ``0.3`` or ``30%`` as a fraction.

    Raises:
        ValueError: It is neither.
    """
    return float(text.removesuffix("%")) / 100.0 if text.endswith("%") else float(text)


def parse_sparsities(text: str) -> list[float]:
    """Return ``0.3`` or ``30%``, one or several with commas, as fractions.

    Raises:
        PathwaysError: One is neither.
    """
    try:
        return [parse_fraction(part.strip()) for part in text.split(",")]
    except ValueError:
        raise PathwaysError(
            f"--sparsity {text!r} does not fit; write 0.3 or 30%, or several with commas: "
            "0.2,0.3,0.5."
        ) from None
