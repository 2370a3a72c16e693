"""Random models and masks have their shape and are the same every time."""

import pytest
import torch

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.speed.random_models import (
    ModelShape,
    random_llama,
    random_pathway,
)
from hf_sparse_pathways.pathways.base import BaseModel
from tests.architectures import tiny_llama


@pytest.mark.parametrize("text", ["", "16", "16x2048", "1x8x8x2", "0x64x64", "axbxc", "-1x8x8"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(PathwaysError, match="LAYERSxD_MODELxD_FF"):
        ModelShape.parse(text)


def test_heads_have_to_fit():
    with pytest.raises(PathwaysError, match="multiple of 8"):
        ModelShape.parse("2x36x48")
    assert ModelShape.parse("16x2048x8192").heads == 16
    assert ModelShape.parse("16x1024X8192").heads == 8
    assert ModelShape.parse("30x576x1536").heads == 9
    assert ModelShape.parse("2x8x48").heads == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_llama_is_the_same_every_time(dtype):
    state = torch.get_rng_state()
    shape = ModelShape.parse("2x32x48")
    one, other = random_llama(shape, dtype), random_llama(shape, dtype)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
    base = BaseModel.of(one)
    assert base.name == "random Llama 2x32x48"
    assert [(b.d_in, b.d_ff, b.d_out) for b in base.blocks] == [(32, 48, 32)] * 2
    assert one.get_input_embeddings().num_embeddings == 32000
    assert not one.training


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_random_masks_have_their_sparsity_and_differ_between_blocks(sparsity):
    base = BaseModel.of(tiny_llama())
    pathway = random_pathway(base, sparsity)
    kept = int((1 - sparsity) * 48 + 1e-6)
    assert [block.kept for block in pathway.blocks] == [kept] * 3
    again = random_pathway(base, sparsity)
    assert all(map(torch.equal, pathway.keep, again.keep))
    assert sparsity == 0.0 or not torch.equal(*pathway.keep[:2])


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_no_sparsity_is_refused(sparsity):
    with pytest.raises(PathwaysError, match="sparsity"):
        random_pathway(BaseModel.of(tiny_llama()), sparsity)
