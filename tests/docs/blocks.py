"""The code blocks of a page, and how they are run."""

import re
import shlex
from pathlib import Path

from tests.cli.commands import run_well

ROOT = Path(__file__).parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What pages call the base; the tests put the folder ``base`` in its place."""


def read_page(name):
    """Return the text of a page, by its path in the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def find_blocks(text):
    """Return the language and content of every code block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_commands(block):
    """Run every line of a block as ``sparse-pathways`` would; return what they print."""
    printed = []
    for line in block.replace(MODEL, "base").replace("\\\n", "").strip().splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "sparse-pathways", line
        printed.append(run_well(*arguments))
    return "".join(printed)


def run_python(block, names):
    """Run a block where some names are known, in place."""
    exec(compile(block, "block", "exec"), names)
