"""Pathways are values: checked when made, and counted as their weights are."""

import copy
from dataclasses import FrozenInstanceError, replace

import numpy
import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import MismatchError, PathwaysError, UnknownNameError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape
from hf_sparse_pathways.pathways.names import POOLED
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from tests.architectures import build, random_masks, tiny_llama

MODEL = tiny_llama()
MASKS = random_masks(MODEL)


def _pathways(**controls):
    pathways = Pathways.from_masks(MODEL, MASKS)
    return pathways.with_controls(
        {name: Pathway.from_keep(masks) for name, masks in controls.items()}
    )


def _custom(*widths):
    """Return pathways of a base whose blocks differ in every width, with half of each kept."""
    blocks = tuple(
        BlockShape(name=f"layers.{i}", d_in=d_in, d_ff=d_ff, d_out=d_out, branches=branches)
        for i, (d_in, d_ff, d_out, branches) in enumerate(widths)
    )
    base = BaseModel(name="", revision=None, model_type="custom", blocks=blocks)
    keep = [torch.arange(block.d_ff) < index + 1 for index, block in enumerate(blocks)]
    return Pathways(base=base, by_domain={"code": Pathway.from_keep(keep)})


def _state(pathways):
    groups = (pathways.by_domain, pathways.controls)
    return [
        {name: [mask.tolist() for mask in pathway.keep] for name, pathway in group.items()}
        for group in groups
    ]


def _ones(index=None, **changes):
    masks = [torch.ones(48, dtype=torch.bool) for _ in range(3)]
    if index is not None:
        masks[index] = changes["mask"]
    return masks


BAD_MASKS = {
    "too few": _ones()[:2],
    "too many": [*_ones(), torch.ones(48, dtype=torch.bool)],
    "none": [],
    "short": _ones(1, mask=torch.ones(47, dtype=torch.bool)),
    "long": _ones(1, mask=torch.ones(49, dtype=torch.bool)),
    "row": _ones(1, mask=torch.ones(1, 48, dtype=torch.bool)),
    "scalar": _ones(1, mask=torch.tensor(True)),
    "floats": _ones(1, mask=torch.ones(48)),
    "integers": _ones(1, mask=torch.ones(48, dtype=torch.int64)),
    "bytes": _ones(1, mask=torch.ones(48, dtype=torch.uint8)),
    "indices": _ones(1, mask=torch.arange(48)),
    "nothing kept": _ones(1, mask=torch.zeros(48, dtype=torch.bool)),
    "of nothing": _ones(1, mask=torch.ones(0, dtype=torch.bool)),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_that_do_not_fit_are_refused_by_domain(kind):
    with pytest.raises(MismatchError, match="'law'"):
        Pathways.from_masks(MODEL, {"code": _ones(), "law": BAD_MASKS[kind]})


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_control_masks_are_checked_too(kind):
    with pytest.raises(MismatchError, match="'pooled'"):
        _pathways(pooled=BAD_MASKS[kind])


BAD_NAMES = [
    "", " ", "../x", "a/b", "a\\b", ".", "..", ".hidden", "-x", "+x", " x", "a\nb", "a\n", "a\tb",
    "a\0", "\x1b[31m", "\u202ex", "a:b", "a,b", "a=b", "x" * 65, POOLED, 5, None, ("a",), "\ud83d",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_bad_domain_name_is_refused(name):
    with pytest.raises(PathwaysError, match="cannot be a domain's name"):
        Pathways.from_masks(MODEL, {name: _ones()})


@pytest.mark.parametrize(
    "name", ["a", "x" * 64, "C++", "law_2", "médecine", "法律", "v1.2 -x", "0"]
)
def test_a_good_domain_name_is_taken(name):
    assert Pathways.from_masks(MODEL, {name: _ones()}).domains == [name]


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.clone])
def test_masks_may_be_anything_like_a_tensor(convert):
    given = tuple(map(convert, MASKS["code"]))
    pathways = Pathways.from_masks(MODEL, {"code": given})
    assert [mask.tolist() for mask in pathways["code"].keep] == [m.tolist() for m in MASKS["code"]]


@pytest.mark.parametrize("kind", ["tensor", "numpy"])
def test_masks_are_copied(kind):
    given = [mask.clone() if kind == "tensor" else mask.numpy().copy() for mask in MASKS["code"]]
    pathways = Pathways.from_masks(MODEL, {"code": given})
    for mask in given:
        mask[:] = ~mask if kind == "tensor" else numpy.logical_not(mask)
    assert all(map(torch.equal, pathways["code"].keep, MASKS["code"]))


def test_values_are_frozen():
    pathways = _pathways()
    for value, name in (
        (pathways, "by_domain"),
        (pathways["code"], "blocks"),
        (pathways["code"].blocks[0], "keep"),
        (pathways.base, "name"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)


def test_sparsity_is_the_fraction_removed():
    pathways = _pathways(random=MASKS["law"])
    for name, masks in (("code", MASKS["code"]), ("random", MASKS["law"])):
        removed = [(~mask).sum().item() for mask in masks]
        assert pathways.sparsity(name) == pytest.approx(sum(removed) / (3 * 48))
        expected = pytest.approx([count / 48 for count in removed])
        assert pathways.sparsity(name, per_block=True) == expected
    full = Pathways.from_masks(MODEL, {"all": _ones()})
    assert full.sparsity("all") == 0.0
    assert full.flops("all") == 1.0


def test_sparsity_weighs_blocks_by_their_width():
    pathways = _custom((4, 10, 4, 1), (4, 90, 4, 1))
    assert pathways.sparsity("code") == pytest.approx(1 - 3 / 100)
    assert pathways.sparsity("code", per_block=True) == pytest.approx([0.9, 1 - 2 / 90])


def test_flops_weigh_neurons_by_their_weights():
    pathways = _custom((4, 10, 6, 1), (8, 20, 8, 2))
    by_hand = (1 * (4 + 6) + 2 * (2 * 8 + 8)) / (10 * (4 + 6) + 20 * (2 * 8 + 8))
    assert pathways.flops("code") == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "architecture", ["llama", "phi3", "gpt2", "gpt2_odd", "opt", "deepseek_v3", "moshi", "falcon"]
)
def test_flops_are_the_multiply_adds_of_the_kept_weights(architecture):
    """Gated, fused and plain layouts: count the elements of the leaves that belong to neurons."""
    model = build(architecture)
    masks = random_masks(model, keep=0.3)
    pathways = Pathways.from_masks(model, masks)
    for domain, keep in masks.items():
        kept = dense = 0
        for block, mask in zip(find_blocks(model), keep, strict=True):
            elements = sum(leaf.weight.numel() for leaf in (*block.incoming, block.outgoing))
            dense += elements
            kept += elements // len(mask) * int(mask.sum())
        assert pathways.flops(domain) == pytest.approx(kept / dense, rel=1e-12)


def test_with_controls_is_pure():
    pathways = _pathways()
    before = _state(pathways)
    more = pathways.with_controls({"pooled": Pathway.from_keep(MASKS["law"])})
    assert _state(pathways) == before
    assert list(more.controls) == ["pooled"]
    again = more.with_controls({"random": Pathway.from_keep(MASKS["code"])})
    assert list(again.controls) == ["pooled", "random"]
    assert list(more.controls) == ["pooled"]
    assert again.domains == pathways.domains


def test_subset_is_pure_and_keeps_controls_and_the_given_order():
    pathways = _pathways(pooled=MASKS["law"])
    before = _state(pathways)
    assert pathways.subset(["law", "code"]).domains == ["law", "code"]
    small = pathways.subset(["law"])
    assert small.domains == ["law"]
    assert list(small.controls) == ["pooled"]
    assert _state(pathways) == before
    for unknown in ("cod", "pooled"):
        with pytest.raises(UnknownNameError):
            pathways.subset([unknown])


def test_merged_is_pure_and_the_other_wins():
    first = _pathways(pooled=MASKS["law"])
    second = Pathways.from_masks(MODEL, {"law": _ones(), "finance": _ones()})
    before = _state(first), _state(second)
    merged = first.merged(second)
    assert (_state(first), _state(second)) == before
    assert merged.domains == ["code", "law", "finance"]
    assert merged.sparsity("law") == 0.0
    assert first.sparsity("law") > 0.0
    assert list(merged.controls) == ["pooled"]


def test_pathways_of_different_models_do_not_merge():
    other = build("gpt2")
    with pytest.raises(MismatchError, match=r"\(llama with .*\(gpt2 with"):
        _pathways().merged(Pathways.from_masks(other, random_masks(other)))


def test_check_fits_shows_both_shapes():
    pathways = _pathways()
    pathways.check_fits(MODEL)
    pathways.check_fits(copy.deepcopy(MODEL))
    for other in ("gpt2", "mistral"):
        with pytest.raises(MismatchError, match=rf"\(llama with .*\({other} with"):
            pathways.check_fits(build(other))


@pytest.mark.parametrize("name", ["d_in", "d_ff", "d_out", "branches", "name"])
def test_every_part_of_a_shape_matters(name):
    base = _pathways().base
    blocks = list(base.blocks)
    value = "other" if name == "name" else getattr(blocks[2], name) + 1
    blocks[2] = replace(blocks[2], **{name: value})
    with pytest.raises(MismatchError, match="First difference"):
        base.check_same(replace(base, blocks=tuple(blocks)))


def test_fewer_blocks_do_not_fit():
    base = _pathways().base
    for one, other in ((base, replace(base, blocks=base.blocks[:2])), (base, base)):
        if one == other:
            one.check_same(other)
            continue
        for left, right in ((one, other), (other, one)):
            with pytest.raises(MismatchError, match=r"3 FFN blocks"):
                left.check_same(right)


def test_the_name_of_the_base_does_not_matter():
    base = _pathways().base
    base.check_same(replace(base, name="elsewhere", revision="abc"))


def test_the_base_is_the_same_with_pathways_and_without_a_head():
    dense = build("llama")
    pathways = Pathways.from_masks(dense, MASKS)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    assert BaseModel.of(model) == pathways.base
    assert BaseModel.of(dense.base_model).blocks == pathways.base.blocks


def test_unknown_domains_are_refused_with_a_hint():
    pathways = _pathways(pooled=MASKS["law"])
    assert pathways["pooled"].blocks[0].kept == int(MASKS["law"][0].sum())
    for call in (pathways.__getitem__, pathways.sparsity, pathways.flops):
        with pytest.raises(UnknownNameError, match=r"Did you mean 'code'\?"):
            call("cod")


def test_repr_names_domains_and_what_they_keep():
    shown = repr(_pathways())
    assert "code" in shown
    assert "3 FFN blocks" in shown
    assert f"{1 - _pathways().sparsity('law'):.0%}" in shown
    assert "no domains" in repr(_pathways().subset([]))


def test_a_block_counts_its_neurons():
    block = BlockPathway(keep=torch.tensor([True, False, True]))
    shape = BlockShape(name="x", d_in=5, d_ff=3, d_out=7, branches=2)
    assert block.kept == 2
    assert shape.flops(block) == 2 * (2 * 5 + 7)
    bypass = LowRank(torch.zeros(7, 4), torch.zeros(4, 5))
    with_bypass = BlockPathway(keep=block.keep, bypass=bypass)
    assert shape.flops(with_bypass) == 2 * (2 * 5 + 7) + 4 * (5 + 7)
