"""Fractions as users read them."""

import pytest

from hf_sparse_pathways.shares import format_share

SHARES = [
    (0.0, 0, "0%"),
    (1.0, 0, "100%"),
    (1.0, 1, "100.0%"),
    (0.3, 0, "30%"),
    (1 - 0.7, 1, "30.0%"),
    (0.999, 0, "99.9%"),
    (0.99951, 1, "99.95%"),
    (0.9999, 1, "99.99%"),
    (0.004, 0, "0.4%"),
    (0.00002, 1, "0.002%"),
    (0.1 + 0.2 + 0.7 - 1e-16, 0, "100%"),
    (1e-17, 1, "0.0%"),
]


@pytest.mark.parametrize(("share", "digits", "text"), SHARES)
def test_only_nothing_and_all_read_so(share, digits, text):
    assert format_share(share, digits) == text
