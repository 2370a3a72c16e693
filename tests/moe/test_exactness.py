"""Oracles: expert pathways equal plain models that do not have the other experts and neurons."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnsupportedModelError
from tests.architectures import prompt
from tests.moe.architectures import MOE, build_moe
from tests.moe.oracles import KINDS, expert_pathways, pruned
from tests.survivors import survivors

IDS = prompt(3, 9)
TOLERANCE = 5e-5
EXECUTORS = ("masked", "compact")


@pytest.fixture(scope="module", params=sorted(MOE))
def case(request):
    """A dense model, the model with pathways, and the logits of plain models without the rest."""
    dense = build_moe(request.param)
    pathways = expert_pathways(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.max_resident_bytes = "1GB"
    with torch.no_grad():
        expected = {kind: pruned(dense, pathways[kind])(IDS).logits for kind in KINDS}
        expected[None] = dense(IDS).logits
    return dense, model, expected


def _difference(left, right):
    return (left - right).abs().max().item()


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_equals_the_model_without_the_rest(case, executor):
    _, model, expected = case
    model.set_executor(executor)
    for kind in KINDS:
        assert _difference(expected[kind], expected[None]) > 1e-2
        assert _difference(model(IDS, domain=kind).logits, expected[kind]) <= TOLERANCE, kind
    assert torch.equal(model(IDS, domain=None).logits, expected[None])
    assert bool(model.resident) == (executor == "compact")


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_rows_choose_their_own_experts(case, executor):
    _, model, expected = case
    model.set_executor(executor)
    for rows in (["both", None, "experts"], ["neurons", "both", "neurons"]):
        logits = model(IDS, domain=rows).logits
        for row, name in enumerate(rows):
            assert _difference(logits[row], expected[name][row]) <= TOLERANCE, name


@torch.no_grad()
def test_every_way_of_computing_experts(case):
    _, model, expected = case
    model.set_executor("compact")
    before = model.config._experts_implementation
    ways = ("eager", "batched_mm") if model._can_set_experts_implementation() else ()
    for way in ways:
        model.set_experts_implementation(way)
        for kind in KINDS:
            assert _difference(model(IDS, domain=kind).logits, expected[kind]) <= TOLERANCE, kind
    model.config._experts_implementation = before


def test_gradients_equal_those_without_the_rest(case):
    dense, model, _ = case
    reference = pruned(dense, model.pathways["both"])
    reference(IDS, labels=IDS, use_cache=False).loss.backward()
    model(IDS, labels=IDS, domain="both", use_cache=False).loss.backward()
    expected = reference.get_input_embeddings().weight.grad
    assert _difference(model.get_input_embeddings().weight.grad, expected) <= TOLERANCE
    model.zero_grad()


@torch.no_grad()
def test_saved_copied_and_pickled_is_equal(case, tmp_path):
    dense, model, _ = case
    model.set_executor("compact")
    logits = model(IDS, domain="both").logits
    for other in survivors(model, tmp_path):
        assert other.pathways.base == model.pathways.base
        assert _difference(other(IDS, domain="both").logits, logits) <= TOLERANCE
        assert _difference(other(IDS, domain="experts").logits, logits) > 1e-3
    plain = model.to_dense()
    assert type(plain) is type(dense)
    assert torch.equal(plain(IDS).logits, dense(IDS).logits)
    assert {type(module) for module in plain.modules()} == {type(m) for m in dense.modules()}


@torch.no_grad()
def test_copies_follow_the_weights(case):
    dense, model, expected = case
    model.set_executor("compact")
    assert _difference(model(IDS, domain="both").logits, expected["both"]) <= TOLERANCE
    experts = model._attachment.copies.experts[0].weight
    before = experts.clone()
    experts.mul_(0.5)
    changed = pruned(dense, model.pathways["both"])(IDS).logits
    assert _difference(changed, expected["both"]) > 1e-3
    assert _difference(model(IDS, domain="both").logits, changed) <= TOLERANCE
    experts.data.copy_(before)  # past autograd's counter
    assert _difference(model(IDS, domain="both").logits, expected["both"]) <= TOLERANCE


@torch.no_grad()
def test_too_little_memory_is_exact(case):
    _, model, expected = case
    model.set_executor("compact")
    model.max_resident_bytes = 1
    assert _difference(model(IDS, domain="both").logits, expected["both"]) <= TOLERANCE
    assert not model.resident
    model.max_resident_bytes = "1GB"


def test_replaced_experts_are_an_error():
    dense = build_moe("mixtral")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, expert_pathways(dense))
    model.model.layers[1].mlp.experts = copy.deepcopy(dense.model.layers[1].mlp.experts)
    with pytest.raises(UnsupportedModelError, match="was replaced by MixtralExperts"):
        model(IDS, domain="both")
    model(IDS, domain=None)


@torch.no_grad()
def test_low_rank_adapters_of_packed_experts_count():
    dense = build_moe("mixtral")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, expert_pathways(dense))
    before = model(IDS, domain="both").logits
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.5)
    with_adapter = adapted(IDS, domain="both").logits
    assert _difference(with_adapter, before) > 1e-3
    merged = adapted.merge_and_unload()
    assert _difference(merged(IDS, domain="both").logits, with_adapter) <= TOLERANCE


@pytest.mark.parametrize(
    "executor",
    [
        pytest.param("packed-all", marks=pytest.mark.needs_packing),
        pytest.param("indexed", marks=pytest.mark.needs_compiler),
    ],
)
@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "deepseek_v3"])
@pytest.mark.usefixtures("every_form_pays")
@torch.no_grad()
def test_routers_are_multiplied_by_torch_whatever_multiplies_the_rest(name, executor):
    dense = build_moe(name)
    pathways = expert_pathways(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, executor=executor)
    model.max_resident_bytes = "1GB"
    assert model.execution.executor == executor, model.execution.reason
    for kind in KINDS:
        expected = pruned(dense, pathways[kind])(IDS).logits
        assert _difference(model(IDS, domain=kind).logits, expected) <= TOLERANCE, kind
