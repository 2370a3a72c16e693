"""How messages name what a user can set."""

import pytest

from hf_sparse_pathways.errors import named, option


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("keep", "lora", "keep='lora' (--keep lora)"),
        ("dense_first", 0.5, "dense_first=0.5 (--dense-first 0.5)"),
        ("dense_partner", True, "dense_partner=True (--dense-partner)"),
        ("grams", False, "grams=False (--no-grams)"),
    ],
)
def test_a_setting_is_named_as_python_and_the_command_line_spell_it(argument, value, text):
    assert named(argument, value) == text


def test_an_argument_is_named_as_python_and_the_command_line_call_it():
    assert option("max_memory") == "max_memory (--max-memory)"
