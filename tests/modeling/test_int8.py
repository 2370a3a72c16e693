"""Pathways of models whose weights torchao has quantised to int8: kept rows stay int8."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn import forms
from hf_sparse_pathways.ffn.stored import Stored, is_int8, quantise
from hf_sparse_pathways.native import product
from tests.architectures import build, compensate, prompt, random_masks
from tests.clustered import clustered
from tests.grouped import grouped
from tests.skipping import skipping

torchao = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.usefixtures("every_form_pays")
NATIVE = pytest.param("indexed", marks=pytest.mark.needs_compiler)
CHOSEN = ("code", None, ["code", "law"])


@pytest.fixture(scope="module", params=["llama", "phi", "phi3"])
def quantised(request):
    dense = build(request.param)
    torchao.quantize_(dense, torchao.Int8WeightOnlyConfig())
    return dense


def _sparse(dense, repaired, executor):
    plain = build(dense.config.model_type)
    masks = random_masks(plain)
    paths = compensate(plain, masks) if repaired else sp.Pathways.from_masks(plain, masks)
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor=executor)


def _leaves(model):
    return [leaf for block in model._attachment.blocks for leaf in block.leaves.values()]


@pytest.mark.parametrize("inputs", [0, 10**6], ids=["tiles", "kernel"])
@pytest.mark.parametrize("executor", ["compact", "sliced", NATIVE])
@torch.no_grad()
def test_kept_rows_compute_what_the_mask_does(quantised, executor, inputs, monkeypatch):
    monkeypatch.setattr(product, "MOST_INPUTS", inputs)
    model = _sparse(quantised, False, executor)
    reference = _sparse(quantised, False, "masked")
    for domain in CHOSEN:
        found, expected = (m(prompt(), domain=domain).logits for m in (model, reference))
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    copies = [kept.product for leaf in _leaves(model) for kept in leaf.copies.values()]
    assert copies
    assert {kept.weight.dtype for kept in copies} == {torch.int8}


@pytest.mark.parametrize("inputs", [0, 10**6], ids=["tiles", "kernel"])
@pytest.mark.parametrize("executor", ["compact", "sliced", NATIVE])
@torch.no_grad()
def test_groups_compute_what_the_mask_does(quantised, executor, inputs, monkeypatch):
    monkeypatch.setattr(product, "MOST_INPUTS", inputs)
    plain = build(quantised.config.model_type)
    paths = grouped(sp.Pathways.from_masks(plain, random_masks(plain)))
    model, reference = (
        sp.SparsePathwaysForCausalLM.from_dense(quantised, paths, executor=name)
        for name in (executor, "masked")
    )
    assert model.execution.executor == executor, model.execution.reason
    for ids in (prompt(), prompt()[:1, :1]):
        for domain in ("code", ["code", "law"][: len(ids)]):
            found, expected = (m(ids, domain=domain).logits for m in (model, reference))
            assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    whole = _sparse(quantised, False, "masked")(prompt(), domain="code").logits
    assert (whole - reference(prompt(), domain="code").logits).abs().max() > 1e-3


@pytest.mark.parametrize("executor", ["compact", NATIVE])
@torch.no_grad()
def test_repaired_columns_are_rounded_no_worse_than_the_weights(quantised, executor):
    model = _sparse(quantised, True, executor)
    reference = _sparse(quantised, True, "masked")
    exact = _sparse(build(quantised.config.model_type), True, "masked")
    for domain in ("code", "law", ["code", "law"]):
        found, near, far = (m(prompt(), domain=domain).logits for m in (model, reference, exact))
        assert (found - near).square().mean() <= (near - far).square().mean()


@pytest.mark.parametrize("executor", ["compact", NATIVE])
@torch.no_grad()
def test_the_books_hold_int8(quantised, executor):
    model = _sparse(quantised, True, executor)
    plain = _sparse(build(quantised.config.model_type), True, executor)
    for own in (model, plain):
        own(prompt(), domain="code")
    taken = sum(
        tensor.nbytes
        for leaf in _leaves(model)
        for kept in leaf.copies.values()
        for tensor in (kept.product.weight, kept.product.scale)
        if tensor.data_ptr() != leaf.weight.qdata.data_ptr()
    )
    assert taken <= model.resident["code"] < 0.6 * plain.resident["code"]


@torch.no_grad()
def test_requantised_weights_are_noticed(quantised):
    model = _sparse(copy.deepcopy(quantised), False, "compact")
    model(prompt(), domain="code")
    weight = _leaves(model)[0].weight
    for change in (lambda q: q.neg_(), lambda q: q.data.add_(1)):
        change(weight.qdata)
        found = model(prompt(), domain="code").logits
        model.set_executor("masked")
        expected = model(prompt(), domain="code").logits
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
        model.set_executor("compact")


@pytest.mark.needs_compiler
@torch.no_grad()
def test_a_folder_is_quantised_as_it_is_loaded(tmp_path):
    dense = build("llama").to(torch.bfloat16)
    sp.SparsePathwaysForCausalLM.from_dense(
        dense, sp.Pathways.from_masks(dense, random_masks(dense)), executor="indexed"
    ).save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=config
    )
    assert model.execution.executor == "indexed"
    assert all(is_int8(leaf.weight) for leaf in _leaves(model))
    before = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for domain in CHOSEN:
        found, expected = (m(prompt(), domain=domain).logits for m in (model, before))
        assert (found - expected).abs().max() <= 0.1 * expected.abs().max()
    assert "attention and head" in model.resident


@torch.no_grad()
def test_other_quantisations_are_masked():
    dense = build("llama")
    torchao.quantize_(dense, torchao.Int8DynamicActivationInt8WeightConfig())
    paths = sp.Pathways.from_masks(build("llama"), random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="compact")
    expected = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="masked")
    assert not is_int8(_leaves(model)[0].weight)
    assert torch.equal(
        model(prompt(), domain="code").logits, expected(prompt(), domain="code").logits
    )
    assert not any(leaf.copies for leaf in _leaves(model))


@pytest.mark.parametrize("place", ["mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj", "lm_head"])
@pytest.mark.parametrize("executor", ["compact", NATIVE])
@torch.no_grad()
def test_what_is_quantised_after_attaching_is_noticed(executor, place):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor=executor)
    before = [model(prompt(), domain=domain).logits for domain in CHOSEN]
    config = torchao.Int8DynamicActivationInt8WeightConfig()
    torchao.quantize_(model, config, filter_fn=lambda _, name: name.endswith(place))
    found = [model(prompt(), domain=domain).logits for domain in CHOSEN]
    model.set_executor("masked")
    for own, old, domain in zip(found, before, CHOSEN, strict=True):
        expected = model(prompt(), domain=domain).logits  # which rounds activations: some flip
        assert (own - expected).square().mean() <= 0.5 * (own - old).square().mean()


@torch.no_grad()
def test_only_one_factor_per_output_is_known():
    leaf = torch.nn.Linear(32, 32)
    torchao.quantize_(leaf, torchao.Int8WeightOnlyConfig())
    assert is_int8(leaf.weight)
    weight = leaf.weight
    for name, value in [
        ("scale", weight.scale.view(1, 32)),
        ("zero_point", torch.ones(32, 1, dtype=torch.int8)),
        ("act_pre_scale", torch.ones(1)),
        ("qdata", weight.qdata.int()),
    ]:
        other = copy.deepcopy(weight)
        setattr(other, name, value)
        assert not is_int8(other), name


def test_rounding_error_is_half_a_step():
    weight = torch.randn(5, 40) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1e-30]])
    stored = quantise(weight)
    error = (stored.values.float() * stored.scale[:, None] - weight).abs()
    assert (error <= 0.51 * stored.scale[:, None]).all()
    assert stored.values.abs().amax(1).tolist() == [127, 127, 127, 0, 127]


def test_a_quantised_matrix_is_never_a_plain_product():
    stored = quantise(torch.randn(3, 4))
    assert isinstance(forms.PLAIN.make(stored), forms.Rows)
    assert isinstance(forms.PLAIN.make(Stored(torch.ones(3, 4))), forms.Plain)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kind", ["skipping", "shared"])
@torch.no_grad()
def test_neurons_by_token_are_read_in_int8(kind):
    plain = build("llama")
    if kind == "shared":
        paths = clustered(plain, shared=True, change_rows=False)
    else:
        paths = skipping(compensate(plain, random_masks(plain)), prompt(), plain)
    dense = build("llama")
    torchao.quantize_(dense, torchao.Int8WeightOnlyConfig())
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="masked")
    model.max_resident_bytes = "1GB"
    ids = prompt()[:1, :1]
    expected = model(ids, domain="code", use_cache=False).logits
    for executor in ("compact", "indexed"):
        model.set_executor(executor)
        for _ in range(2):  # the first pass shows the block's activation function
            found = model(ids, domain="code", use_cache=False).logits
        assert (found - expected).abs().max() <= 0.1 * expected.abs().max(), executor
