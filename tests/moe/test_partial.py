"""One domain's experts loaded alone: equal to the plain model without the others, and smaller."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.ranges import Excerpt
from hf_sparse_pathways.modeling.partial import Loading
from tests.architectures import prompt
from tests.modeling.test_generate import FORMS, _generate
from tests.moe.architectures import build_moe
from tests.moe.oracles import expert_pathways, pruned

IDS = prompt(2, 9)


NAMES = ("mixtral", "deepseek_v3", "gpt_oss", "dbrx", "nemotron_h", "phimoe", "ernie4_5_moe")


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    dense = build_moe(request.param)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, expert_pathways(dense))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return dense, model, folder


@torch.no_grad()
@pytest.mark.parametrize("kind", ["experts", "both"])
def test_equals_the_model_without_the_rest(case, kind):
    dense, model, folder = case
    alone = AutoModelForCausalLM.from_pretrained(folder, domain=kind)
    expected = pruned(dense, model.pathways[kind])
    assert (alone(IDS).logits - expected(IDS).logits).abs().max().item() <= 5e-5
    assert alone.domains == [kind]
    form = FORMS["greedy"]
    assert torch.equal(_generate(alone, IDS, **form), _generate(expected, IDS, **form))
    shapes = {name: tensor.shape for name, tensor in dense.named_parameters()}
    routed = {name: p.shape for name, p in alone.named_parameters() if ".experts." in name}
    assert routed
    assert all(shape != shapes[name] for name, shape in routed.items())
    with pytest.raises(sp.PathwaysError, match="only"):
        alone(IDS, domain="neurons")


def test_other_experts_are_not_read(case, monkeypatch):
    _, model, folder = case
    seen = {}
    prepare = Loading.prepare

    def spied(*args):
        seen.update(prepare(*args))
        return seen

    monkeypatch.setattr(Loading, "prepare", spied)
    AutoModelForCausalLM.from_pretrained(folder, domain="experts")
    monkeypatch.undo()
    kept = {f".{number}." for number in model.pathways["experts"].experts[0].keep.nonzero()[:, 0]}
    routed = [name for name in seen if ".experts." in name]
    single = [name for name in routed if re.search(r"\.experts\.\d+\.", name)]
    assert routed
    if single:
        layer = single[0].split(".experts.")[0]
        assert {f".{name.split('.')[-3]}." for name in single if name.startswith(layer)} <= kept
    else:
        assert all(isinstance(seen[name], Excerpt) for name in routed)
