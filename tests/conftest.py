"""Fixtures of the whole suite."""

import pytest
import torch

from hf_sparse_pathways.ffn import packing


def pytest_collection_modifyitems(items):
    """Skip tests of packed weights where this build of torch has no operators for them."""
    problem = packing._find_problem((16, 8), torch.float32)
    if problem:
        for item in items:
            if "needs_packing" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="module")
def packing_pays():
    """Let packed weights count as faster than plain ones, whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        packing._judge.cache_clear()
        patch.setattr(packing, "measure_gain", lambda shape, dtype: 2.0)  # noqa: ARG005
        yield
    packing._judge.cache_clear()
