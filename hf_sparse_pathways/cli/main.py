"""``sparse-pathways``: from text to a model with pathways, one command per step.

Nothing heavy is imported before a command runs, so that help is instant. An error is one line on
stderr and exit status 1 (with SPARSE_PATHWAYS_TRACEBACK set, its traceback); wrong usage is 2.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from hf_sparse_pathways.cli.launch import check_sharing, name_process
from hf_sparse_pathways.display import plain
from hf_sparse_pathways.tokens import hide_tokens
from hf_sparse_pathways.version import __version__

app = typer.Typer(
    name="sparse-pathways",
    help="Run a Hugging Face causal LM with only the FFN neurons that a domain needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    "profile",
    "analyze",
    "build",
    "heal",
    "train-router",
    "distil",
    "evaluate",
    "compare",
    "route-report",
    "generate",
    "serve",
    "benchmark",
    "info",
    "export",
    "report",
    "push",
    "remove-domain",
    "rename-domain",
):
    module = import_module(f"hf_sparse_pathways.cli.{command.replace('-', '_')}")
    app.command(command)(module.run)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-pathways {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Run a Hugging Face causal LM with only the FFN neurons that a domain needs."""


def main() -> None:
    """Run a command."""
    try:
        check_sharing(sys.argv[1:])
        app()
    except SystemExit as stopped:
        if stopped.code == 130:  # Typer turns KeyboardInterrupt into this, without a word
            sys.stderr.write(f"{' '.join([_interrupted(sys.argv[1:]), *_notes(stopped)])}\n")
        raise
    except Exception as error:
        if os.environ.get("SPARSE_PATHWAYS_TRACEBACK"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        told = " ".join(line.strip() for line in lines[:3])
        notes = _notes(error)
        if notes and not told.endswith("."):
            told += "."
        told = plain(hide_tokens(" ".join([told, *notes])))
        sys.stderr.write(f"error{name_process()}: {told}\n")
        sys.exit(1)


def _interrupted(arguments: Sequence[str]) -> str:
    """Say what an interrupted command leaves; what it keeps elsewhere is in the error's notes."""
    if arguments[:1] == ["compare"]:
        return (
            "interrupted; finished steps are kept in the output folder, and the same command goes "
            "on from there."
        )
    return "interrupted; no output is left half-written."


def _notes(error: BaseException | None) -> list[str]:
    """Return the notes of an error, and of those that led to it."""
    notes: list[str] = []
    while error is not None:
        notes += getattr(error, "__notes__", ())
        error = error.__cause__ or error.__context__
    return notes


if __name__ == "__main__":
    main()
