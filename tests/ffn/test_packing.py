"""Products with packed weights are those of ``linear``."""

import pytest
import torch
from torch.nn import functional

from hf_sparse_pathways.ffn import packing


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(own, marks=pytest.mark.needs_packing(own)) for own in packing.DTYPES[:2]],
)
@pytest.mark.parametrize("shape", [(1, 1), (13, 32), (65, 7), (128, 64)])
def test_packed_products_are_those_of_linear(shape, dtype):
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = packing.pack(weight.T.contiguous().T)
    assert torch.ops.mkldnn._nbytes(packed.weight) <= packing.packed_bytes(*shape, dtype.itemsize)
    for leading in [(1,), (5,), (2, 3), (2, 1, 4)]:
        x = torch.randn(*leading, shape[1]).to(dtype)
        for added in (bias, None):
            found = packed(x, added)
            expected = functional.linear(x, weight, added)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 0.02 * (1 + expected.abs().max())


@pytest.mark.needs_packing
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2,)])
def test_a_vector_may_be_repeated(leading, rows, monkeypatch):
    monkeypatch.setattr(packing, "_least_rows", lambda *_: rows)
    weight, bias, x = torch.randn(16, 8), torch.randn(16), torch.randn(*leading, 8)
    found = packing.pack(weight)(x, bias)
    assert found.shape == (*leading, 16)
    assert torch.allclose(found, functional.linear(x, weight, bias), atol=1e-5)
