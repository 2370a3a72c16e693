"""What others wrote is shown as it is, and obeyed by nobody."""

import pytest

from hf_sparse_pathways.cli.tables import print_table
from hf_sparse_pathways.display import markdown_cell, plain
from hf_sparse_pathways.measure.figures import markdown_table

EVIL = ["\x1b[2J", "a\nb", "\r", "\u202e", "\u200b", "\x07", "\x9b31m", "\ud800", "\u2028", "\0"]


@pytest.mark.parametrize("text", ["", "code", "médecine 2", "|<x>|", "日本語"])
def test_plain_text_stays_as_it_is(text):
    assert plain(text) == text


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_a_terminal_obeys_nothing(text, capsys):
    assert plain(text).isprintable()
    print_table(f"title {text}", ["a", text], [["b", text]])
    assert capsys.readouterr().out.replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["a | b", "a\n# b", "a\r\n\n| x |", "<!-- /domains -->", "<img>"])
def test_a_cell_stays_a_cell(text):
    lines = markdown_table(["x", "y"], [[text, "1"]]).splitlines()
    assert len(lines) == 3
    assert lines[2].replace("\\|", "").count("|") == 3
    assert "<" not in lines[2].replace("\\<", "")
    assert markdown_cell("plain text, 1.5") == "plain text, 1.5"
