"""Every code block of the README runs as it stands, on a tiny model."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse_pathways.cli.main import app
from tests.docs.blocks import find_blocks, read_page, run_commands, run_python

README = read_page("README.md")


@pytest.mark.usefixtures("workplace", "hub")
def test_commands_then_python(names, capsys):
    blocks = find_blocks(README)
    install, *commands = [block for language, block in blocks if language == "sh"]
    assert install.count("pip install") == 3
    printed = "".join(map(run_commands, commands))
    assert "perplexity" in printed
    assert "def main" in printed
    for language, block in blocks:
        if language == "python":
            run_python(block, names)
    assert names["out"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["model"].domains == ["code", "law"]
    printed = capsys.readouterr().out
    assert "random" in printed
    assert "pooled" in printed
    assert {"pathways.json", "pathways.safetensors"} <= {p.name for p in Path("adapter").iterdir()}
    assert not list(Path("adapter").glob("model*"))
    for name in ("full", "me/full"):
        assert AutoModelForCausalLM.from_pretrained(name).domains == ["code", "law"]


def test_every_command_is_named():
    table = README.partition("| command |")[2].partition("\n\n")[0]
    named = {word for row in table.splitlines() for word in re.findall(r"`([a-z-]+)`", row)}
    assert {command.name for command in app.registered_commands} <= named
