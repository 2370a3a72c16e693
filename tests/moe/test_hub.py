"""Expert pathways on a Hub: pushed, added beside others, renamed, removed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from tests.architectures import prompt, random_masks
from tests.moe.architectures import build_moe
from tests.moe.oracles import expert_pathways

REPO = "me/x"
IDS = prompt(2, 7)

pytestmark = pytest.mark.usefixtures("hub")


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_mixed"])
@torch.no_grad()
def test_domains_with_experts_come_and_go(name):
    dense = build_moe(name)
    plain = sp.Pathways.from_masks(dense, random_masks(dense, ("code",)))
    sp.SparsePathwaysForCausalLM.from_dense(dense, plain).push_to_hub(REPO)
    paths = expert_pathways(dense, ("both", "neurons"))
    sp.add_domains(paths, REPO)
    sp.rename_domain("both", "law", REPO)
    model = AutoModelForCausalLM.from_pretrained(REPO)
    assert sorted(model.domains) == ["code", "law", "neurons"]
    expected = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    for new, old in (("law", "both"), ("neurons", "neurons")):
        difference = model(IDS, domain=new).logits - expected(IDS, domain=old).logits
        assert difference.abs().max().item() <= 1e-5
    sp.remove_domains(["neurons"], REPO)
    again = sp.Pathways.from_pretrained(REPO)
    assert again.domains == ["code", "law"]
    assert sp.Pathways.from_pretrained(REPO, only="law")["law"].experts
