"""Fixtures of the whole suite."""

import pytest
import torch

from hf_sparse_pathways.ffn import verdicts
from hf_sparse_pathways.ffn.forms import NATIVE, PACKED

NEEDED = {"needs_packing": PACKED, "needs_compiler": NATIVE}


def pytest_collection_modifyitems(items):
    """Skip tests of forms of weights that this machine does not have."""
    for mark, form in NEEDED.items():
        marked = [item for item in items if mark in item.keywords]
        problem = marked and verdicts.find_problem(form, (16, 8), torch.float32)
        for item in marked if problem else ():
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="module")
def every_form_pays():
    """Let every form of weights count as faster than plain ones, whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        verdicts._judge.cache_clear()
        patch.setattr(verdicts, "measure_gain", lambda form, shape, dtype: 2.0)  # noqa: ARG005
        yield
    verdicts._judge.cache_clear()
