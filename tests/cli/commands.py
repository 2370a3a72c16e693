"""Run the command line in this process."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest
from transformers.utils import logging

from hf_sparse_pathways.cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str


def run(*arguments, stdin=""):
    """Run ``sparse-pathways`` with arguments; whatever is no exit is raised."""
    logging.disable_progress_bar()  # Transformers' own, which it also shows without a terminal
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparse-pathways", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                status = 0
            except SystemExit as stopped:
                status = stopped.code or 0
    return Ran(status, out.getvalue(), err.getvalue())


def run_well(*arguments, stdin=""):
    """Run a command that has to succeed; return what it prints."""
    ran = run(*arguments, stdin=stdin)
    assert ran.status == 0, ran.err
    return ran.out


def assert_error(ran, *parts):
    """Check that a command failed with one line that holds some words."""
    assert ran.status == 1, (ran.status, ran.err)
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in ran.err + ran.out
    for part in parts:
        assert str(part) in lines[0]


def content(folder):
    """Return every path below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
