"""Sizes of memory as users write them."""

import pytest

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.memory import parse_memory

SIZES = {
    "4GB": 4_000_000_000,
    "500 MB": 500_000_000,
    "2GiB": 2**31,
    "1.5k": 1500,
    " 3 tb ": 3 * 10**12,
    "1Kib": 1024,
    "12": 12,
    "12B": 12,
    "0.5MiB": 2**19,
    12: 12,
    1.5e9: 1_500_000_000,
}


@pytest.mark.parametrize("text", SIZES, ids=repr)
def test_sizes_are_read(text):
    assert parse_memory(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "GB", "4XB", "-1", 0, "0GB", "1e", None, True, [4]], ids=repr)
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(PathwaysError, match="'4GB', '500MB' or bytes"):
        parse_memory(text)
