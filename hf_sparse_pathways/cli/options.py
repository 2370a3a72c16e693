"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from hf_sparse_pathways.errors import PathwaysError

CALIBRATION_TOKENS = 16384

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of a dense model.")]
Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="Folder or Hub id of a model with pathways.")
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--domain",
        metavar="NAME=PATH",
        help="A domain and its text: a file, folder or glob. Repeat for more domains.",
    ),
]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output in DIR.")]
MaxTokens = Annotated[int, typer.Option(help="Calibration tokens per domain.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens per window. [512, or the model's positions]")
]
BatchSize = Annotated[int, typer.Option(help="Windows per forward pass.")]
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
Plots = Annotated[bool, typer.Option(help="Draw pictures beside the JSON and Markdown.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_texts(pairs: list[str]) -> dict[str, Path]:
    """Turn ``NAME=PATH`` options into a dictionary; a path may be a glob.

    Raises:
        PathwaysError: One has no ``=``, or a name stands twice.
    """
    texts: dict[str, Path] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path:
            raise PathwaysError(f"--domain {pair!r} does not fit; write --domain NAME=PATH.")
        if name in texts:
            raise PathwaysError(f"--domain {name!r} was given twice; use one glob or folder.")
        texts[name] = Path(path)
    return texts
