"""Neurons of FFN blocks picked from prompts, in models that have routed experts beside."""

import pytest
import torch

import hf_sparse_pathways as sp
from tests.architectures import prompt
from tests.modeling.test_generate import _generate
from tests.moe.architectures import build_moe
from tests.moe.oracles import expert_pathways

IDS = prompt(3, 40)


@pytest.fixture(scope="module")
def dense():
    return build_moe("qwen3_moe_mixed")


def test_all_experts_are_there_for_what_was_picked(dense):
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, expert_pathways(dense, ("both",)))
    plain = {"both": model.pathways["both"].blocks}
    keep = {name: [block.keep for block in blocks] for name, blocks in plain.items()}
    whole = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, keep))
    expected = _generate(whole, IDS, domain="prompt")
    assert torch.equal(_generate(model, IDS, domain="prompt"), expected)
    assert not torch.equal(_generate(model, IDS, domain="both"), expected)


@pytest.mark.parametrize("kind", ["experts", "both"])
def test_rows_of_domains_keep_their_own(dense, kind):
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, expert_pathways(dense, ("both", kind)))
    found = _generate(model, IDS, domain=["prompt", kind, "prompt"])
    assert torch.equal(found[1:2], _generate(model, IDS[1:2], domain=kind))
    for row in (0, 2):
        ids = IDS[row : row + 1]
        assert torch.equal(found[row : row + 1], _generate(model, ids, domain="prompt"))


def test_there_have_to_be_blocks():
    dense = build_moe("mixtral")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, expert_pathways(dense, ("both",)))
    assert not model.picks_neurons
    with pytest.raises(sp.PathwaysError, match="picks neurons of FFN blocks"):
        _generate(model, IDS, domain="prompt")
