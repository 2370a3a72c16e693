"""Fixtures of the whole suite."""

import pytest

from hf_sparse_pathways.ffn import packing


@pytest.fixture(scope="module")
def packing_pays():
    """Let packed weights count as faster than plain ones, whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        packing._judge.cache_clear()
        patch.setattr(packing, "measure_gain", lambda shape, dtype: 2.0)  # noqa: ARG005
        yield
    packing._judge.cache_clear()
