"""A domain's experts as a plain checkpoint of the base's architecture."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnsupportedModelError
from tests.architectures import prompt
from tests.moe.architectures import build_moe
from tests.moe.oracles import expert_pathways

IDS = prompt(2, 9)
NAMES = ("mixtral", "olmoe", "gpt_oss", "granitemoe", "qwen3_moe_mixed", "phimoe")


def _pathways(dense, kinds):
    """Return pathways of experts that keep all of the FFN blocks beside them."""
    drawn = expert_pathways(dense, kinds)
    whole = [torch.ones(block.d_ff, dtype=torch.bool) for block in drawn.base.blocks]
    plain = sp.Pathways.from_masks(dense, dict.fromkeys(kinds, whole))
    return plain.with_experts({kind: drawn[kind].experts for kind in kinds})


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_plain_checkpoints_compute_the_pathway(name, tmp_path):
    dense = build_moe(name)
    kinds = ("experts", "neurons", "both")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, _pathways(dense, kinds))
    for kind in kinds:
        exported = sp.export(model, kind, tmp_path / kind)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert type(plain) is type(dense)
        assert plain.num_parameters() < dense.num_parameters()
        difference = plain(IDS).logits - model(IDS, domain=kind).logits
        assert difference.abs().max().item() <= 5e-5
        assert len(exported.facts.fields) == (2 if kind == "both" else 1)
    assert torch.equal(model(IDS, domain=None).logits, dense(IDS).logits)


def test_unequal_groups_have_no_plain_form(tmp_path):
    dense = build_moe("deepseek_v3")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, _pathways(dense, ("experts",)))
    with pytest.raises(UnsupportedModelError, match="groups"):
        sp.export(model, "experts", tmp_path / "x")


def test_layers_that_differ_have_no_plain_form(tmp_path):
    dense = build_moe("mixtral")
    paths = _pathways(dense, ("experts",))
    first, second = paths["experts"].experts
    wider = sp.KeptExperts(keep=torch.ones_like(second.keep))
    paths = paths.with_experts({"experts": [first, wider]})
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    with pytest.raises(UnsupportedModelError, match="one number for all"):
        sp.export(model, "experts", tmp_path / "x")
