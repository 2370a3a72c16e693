"""A permuted model computes what the original does, and their pathways are never mixed up."""

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.runs import find_runs
from tests.architectures import (
    ARCHITECTURES,
    build,
    compensate,
    prompt,
    random_masks,
    repaired,
    zeroed,
)
from tests.pathways.corruption import set_field

IDS = prompt()
TOLERANCE = 1e-5


def _close(left, right):
    assert (left - right).abs().max().item() <= TOLERANCE


def _sparse(name="llama", domains=("code", "law"), **arguments):
    dense = build(name)
    paths = sp.Pathways.from_masks(dense, random_masks(dense, domains))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


@pytest.mark.parametrize("executor", ["masked", "compact"])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_it_equals_the_original(name, compensated, executor):
    dense = build(name)
    masks = random_masks(dense)
    paths = compensate(dense, masks) if compensated else sp.Pathways.from_masks(dense, masks)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor=executor)
    before = copy.deepcopy(dense.state_dict())
    permuted = sp.permute(model)
    assert type(permuted) is type(model)
    _close(permuted(IDS).logits, dense(IDS).logits)
    for domain in masks:
        reference = repaired(dense, paths[domain]) if compensated else zeroed(dense, masks[domain])
        _close(permuted(IDS, domain=domain).logits, reference(IDS).logits)
        _close(model(IDS, domain=domain).logits, reference(IDS).logits)
        for block in permuted.pathways[domain].blocks:
            assert len(find_runs(block.keep)) == 1
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_pathway_is_copied_to_be_dropped(name, monkeypatch):
    model = _sparse(name)

    def refuse(*_):
        raise AssertionError("copied")

    monkeypatch.setattr(sp.BlockPathway, "__deepcopy__", refuse, raising=False)
    with pytest.raises(AssertionError):
        copy.deepcopy(model._attachment.blocks[0].state.pathways)
    sp.permute(model)
    model.to_dense()


@torch.no_grad()
def test_only_ffn_weights_are_copied():
    model = _sparse("gpt2")
    permuted = sp.permute(model)
    theirs = dict(model.named_parameters())
    for name, mine in permuted.named_parameters():
        moved = ("mlp.c_fc" in name) or ("mlp.c_proj.weight" in name)
        assert (mine is theirs[name]) != moved, name
    assert not hasattr(model.config, "neuron_order")
    assert model._shape.neuron_order is None


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "deepseek_v3", "bloom"])
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model = _sparse(name)
    permuted = sp.permute(model)
    permuted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.neuron_order == permuted.pathways.base.neuron_order
    assert loaded.pathways.base.neuron_order is not None
    for domain in (None, "code", ["law", "code"]):
        assert torch.equal(loaded(IDS, domain=domain).logits, permuted(IDS, domain=domain).logits)
        _close(loaded(IDS, domain=domain).logits, model(IDS, domain=domain).logits)


def test_pathways_of_one_order_are_refused_by_the_other(tmp_path):
    model = _sparse()
    permuted = sp.permute(model)
    for folder, one in (("base", model), ("permuted base", permuted)):
        one.to_dense().save_pretrained(tmp_path / folder)
    permuted.save_pretrained(tmp_path / "full")
    model.pathways.save_pretrained(tmp_path / "paths")
    permuted.pathways.save_pretrained(tmp_path / "permuted paths")
    load = sp.SparsePathwaysForCausalLM.from_pretrained
    mixed = [("base", "permuted paths"), ("permuted base", "paths"), ("full", "paths")]
    for base, paths in mixed:
        with pytest.raises(sp.PathwaysError, match=r"order.*other neurons.*sp\.permute"):
            load(tmp_path / base, pathways=tmp_path / paths)
    for one, other in ((model, permuted), (permuted, model)):
        with pytest.raises(sp.PathwaysError, match="other neurons"):
            one.set_pathways(other.pathways)
        with pytest.raises(sp.PathwaysError, match="other neurons"):
            one.pathways.merged(other.pathways)
        with pytest.raises(sp.PathwaysError, match="other neurons"):
            sp.SparsePathwaysForCausalLM.from_dense(one.to_dense(), other.pathways)
    again = load(tmp_path / "permuted base", pathways=tmp_path / "permuted paths")
    with torch.no_grad():
        _close(again(IDS, domain="law").logits, model(IDS, domain="law").logits)


def test_permuting_again_changes_nothing_and_for_other_domains_makes_another_order():
    model = _sparse()
    once = sp.permute(model)
    twice = sp.permute(once)
    assert twice.config.neuron_order == once.config.neuron_order
    once.set_pathways(
        sp.Pathways.from_masks(once.to_dense(), random_masks(once, ("a", "b", "c"), seed=5))
    )
    other = sp.permute(once)
    assert other.config.neuron_order not in (None, twice.config.neuron_order)
    with torch.no_grad():
        _close(other(IDS).logits, model(IDS).logits)
        _close(other(IDS, domain="b").logits, once(IDS, domain="b").logits)


def test_the_same_masks_give_the_same_order():
    assert sp.permute(_sparse()).config.neuron_order == sp.permute(_sparse()).config.neuron_order


def test_controls_move_along():
    dense = build("llama")
    masks = random_masks(dense, ("a", "b", "c"))
    paths = sp.Pathways.from_masks(dense, {n: masks[n] for n in "ab"})
    paths = paths.with_controls({"pooled": sp.Pathway.from_keep(masks["c"])})
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    with torch.no_grad():
        _close(
            sp.permute(model)(IDS, domain="pooled").logits, zeroed(dense, masks["c"])(IDS).logits
        )


def test_what_cannot_be_permuted():
    model = _sparse()
    with pytest.raises(sp.PathwaysError, match=r"LlamaForCausalLM has none.*SparsePathways"):
        sp.permute(model.to_dense())
    model.set_pathways(sp.Pathways.from_masks(model, {}))
    with pytest.raises(sp.PathwaysError, match="has none"):
        sp.permute(model)
    adapted = _sparse()
    peft.get_peft_model(
        adapted, peft.LoraConfig(target_modules=["down_proj"], layers_to_transform=[1])
    )
    with pytest.raises(sp.PathwaysError, match=r"layers\.1\.mlp.*adapter"):
        sp.permute(adapted)
    tied = _sparse()
    tied.model.layers[0].mlp.up_proj.weight = tied.model.layers[2].mlp.up_proj.weight
    with pytest.raises(sp.PathwaysError, match=r"layers\.0\.mlp.*another module"):
        sp.permute(tied)


@torch.no_grad()
def test_a_block_with_a_part_as_wide_as_its_neurons_is_left_as_it_is():
    model = _sparse()
    model.model.layers[1].mlp.register_buffer("scale", torch.ones(48))
    permuted = sp.permute(model)
    same = [
        torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        for mine, theirs in zip(permuted.model.layers, model.model.layers, strict=True)
    ]
    assert same == [False, True, False]
    _close(permuted(IDS, domain="code").logits, model(IDS, domain="code").logits)


@torch.no_grad()
def test_trained_flags_dtype_and_executor_are_kept():
    model = _sparse(executor="masked").half()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    permuted = sp.permute(model)
    assert permuted.dtype == torch.float16
    assert permuted.config.executor == "masked"
    assert not permuted.model.layers[0].mlp.up_proj.weight.requires_grad
    assert permuted.model.layers[1].mlp.up_proj.weight.requires_grad


def test_a_damaged_order_in_the_description_is_an_error(tmp_path):
    sp.permute(_sparse()).pathways.save_pretrained(tmp_path)
    set_field(tmp_path / "pathways.json", ("base", "neuron_order"), 5)
    with pytest.raises(sp.PathwaysError, match="'5' is no name"):
        sp.Pathways.from_pretrained(tmp_path)
