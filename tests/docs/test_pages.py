"""Every code block of the documentation runs as it stands, on a tiny model."""

import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from tests.docs.blocks import ROOT, find_blocks, read_page, run_commands, run_python

PAGES = [path.name for path in sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = ("console", "py", "text")
"""Blocks that take hours, servers or other machines, and what is printed."""


@pytest.mark.usefixtures("built", "hub")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, names):
    tok = AutoTokenizer.from_pretrained("my-model")
    names |= {
        "model": AutoModelForCausalLM.from_pretrained("my-model"),
        "tok": tok,
        "inputs": tok("def return", return_tensors="pt"),
    }
    for language, block in find_blocks(read_page(f"docs/{page}")):
        if language == "sh":
            run_commands(block)
        elif language == "python":
            run_python(block, names)
        else:
            assert language in NOT_RUN


def test_every_page_is_in_the_navigation():
    assert sorted(re.findall(r"\w+\.md$", read_page("mkdocs.yml"), re.MULTILINE)) == PAGES


def test_every_public_name_is_in_the_api():
    named = re.findall(r"^::: hf_sparse_pathways\.(\w+)$", read_page("docs/api.md"), re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(sp.__all__)
