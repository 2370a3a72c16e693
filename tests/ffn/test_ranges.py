"""Excerpts of matrices in a file equal what indexing the whole gives, however they are read."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_sparse_pathways.ffn import ranges
from hf_sparse_pathways.ffn.ranges import Excerpt
from hf_sparse_pathways.ffn.runs import find_runs

MASKS = {
    "one run": torch.arange(90).clamp(20, 70) == torch.arange(90),
    "few": torch.arange(90) % 30 < 11,
    "many": torch.rand(90, generator=torch.Generator().manual_seed(0)) < 0.5,
    "first and last": (torch.arange(90) == 0) | (torch.arange(90) == 89),
    "all": torch.ones(90, dtype=torch.bool),
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges") / "m.safetensors"
    tensors = {
        "rows": torch.randn(90, 13).to(request.param),
        "columns": torch.randn(17, 90).to(request.param),
        "bias": torch.randn(90).to(request.param),
    }
    save_file(tensors, path)
    return path, tensors


def _excerpt(path, name, keep, dtype):
    source = safe_open(path, "pt", backend="pread").get_slice(name)
    return Excerpt(source, int(name == "columns"), find_runs(keep), dtype)


class _Spy:
    """A lazy slice that notes the shapes of what is read."""

    def __init__(self, source, asked):
        self.source, self.asked, self.get_shape = source, asked, source.get_shape

    def __getitem__(self, key):
        part = self.source[key]
        self.asked.append(part.shape)
        return part


@pytest.mark.parametrize("buffer", [1, 100, 1 << 20])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["rows", "columns", "bias"])
def test_it_is_what_indexing_gives(saved, name, mask, buffer, monkeypatch):
    monkeypatch.setattr(ranges, "_BUFFER_BYTES", buffer)
    path, tensors = saved
    keep = MASKS[mask]
    expected = tensors[name][:, keep] if name == "columns" else tensors[name][keep]
    for dtype in (None, tensors[name].dtype, torch.float64):
        excerpt = _excerpt(path, name, keep, dtype)
        assert excerpt.get_shape() == list(expected.shape)
        found = excerpt[...]
        assert found.dtype == (dtype or tensors[name].dtype)
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
        assert found.is_contiguous()
        assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_many_runs_never_read_the_whole(saved, name, monkeypatch):
    path, tensors = saved
    width = tensors[name].shape[1] * tensors[name].element_size()
    monkeypatch.setattr(ranges, "_BUFFER_BYTES", 4 * width)
    excerpt = _excerpt(path, name, MASKS["many"], torch.float32)
    assert torch.equal(
        Excerpt(_Spy(excerpt.source, asked := []), excerpt.dim, excerpt.runs)[...], excerpt[...]
    )
    assert max(shape[0] for shape in asked) == 4


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_of_few_runs_nothing_else_is_read(saved, name):
    keep = MASKS["few"]
    excerpt = _excerpt(saved[0], name, keep, None)
    asked = []
    Excerpt(_Spy(excerpt.source, asked), excerpt.dim, excerpt.runs)[...]
    assert sum(rows * columns for rows, columns in asked[1:]) == excerpt[...].numel()


def test_only_the_whole_excerpt_can_be_read(saved):
    with pytest.raises(TypeError, match="whole"):
        _excerpt(saved[0], "rows", MASKS["few"], torch.float32)[0]
