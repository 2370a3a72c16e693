"""A pathway selected anew has one width, and is made as the one before."""

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.modeling.reselection import reselect
from tests.architectures import build, random_masks
from tests.texts import documents, tiny_tokenizer

TEXTS = {name: documents(name, count=12) for name in ("code", "law")}


def _profile(dense, **options):
    return sp.profile(dense, tiny_tokenizer(), TEXTS, max_tokens=160, max_length=32, **options)


@pytest.fixture(scope="module")
def case():
    """A dense model, its profile, and pathways of uneven widths."""
    dense = build("llama")
    profile = _profile(dense)
    paths = sp.select(
        dense, profile, sparsity=(0.2, 0.5, 0.35), ridge=0.02, seed=3, order="one-shot"
    )
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths), profile, paths


@pytest.mark.parametrize(("multiple", "width"), [(1, 31), (8, 32)])
def test_every_block_has_the_same_width(case, multiple, width):
    model, profile, before = case
    assert len({block.kept for block in before["code"].blocks}) == 3
    made = reselect(model, "code", profile, multiple_of=multiple)
    assert made.domains == ["code"]
    assert [block.kept for block in made["code"].blocks] == [width] * 3
    assert made.base == before.base
    for name in ("method", "order", "ridge", "seed", "compensation"):
        assert made["code"].provenance[name] == before["code"].provenance[name]


def test_it_equals_a_uniform_selection(case):
    model, profile, _ = case
    made = reselect(model, "code", profile)
    rule = {"allocation": "uniform", "ridge": 0.02, "seed": 3, "order": "one-shot"}
    one = profile.subset(["code"])
    uniform = sp.select(model.to_dense(), one, sparsity=1 - 31.2 / 48, **rule)["code"]
    for mine, theirs in zip(made["code"].blocks, uniform.blocks, strict=True):
        assert mine.keep.equal(theirs.keep)
        assert mine.delta.equal(theirs.delta)
        assert mine.bias.equal(theirs.bias)


def test_only_what_has_a_place_is_made():
    dense = build("qwen3")
    profile = _profile(dense, inputs=True)
    rule = {"sparsity": 0.3, "order": "one-shot", "compensation": "patch:4+bias+bypass:2"}
    paths = sp.select(dense, profile, ridge=0.02, **rule)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    made = reselect(model, "code", profile)["code"]
    assert made.provenance["compensation"] == "refit"
    assert all(block.bias is None and block.bypass is None for block in made.blocks)


def test_masks_of_ones_own_have_a_usual_way(case):
    dense, profile = build("llama"), case[1]
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    made = reselect(model, "law", profile)["law"]
    assert made.provenance["method"] == "obs"
    assert len({block.kept for block in made.blocks}) == 1


def test_refusals(case):
    model, profile, _ = case
    with pytest.raises(UnknownNameError, match="'lw'"):
        reselect(model, "lw", profile)
    with pytest.raises(UnknownNameError, match="'code'"):
        reselect(model, "code", profile.subset(["law"]))
    bloom = build("bloom")
    paths = sp.Pathways.from_masks(bloom, random_masks(bloom))
    with pytest.raises(UnsupportedModelError, match="BloomConfig"):
        reselect(sp.SparsePathwaysForCausalLM.from_dense(bloom, paths), "code", profile)
