"""Packed weights are used only where they are there, equal and faster."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn import execution, packing
from tests.architectures import build, prompt, random_masks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _judge_anew():
    packing._judge.cache_clear()
    yield
    packing._judge.cache_clear()


def _sparse(**arguments):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


def _gain(monkeypatch, ratio):
    monkeypatch.setattr(packing, "measure_gain", lambda *_: ratio)


@pytest.mark.needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (13, 32), (65, 7), (128, 64)])
def test_packed_products_are_those_of_linear(shape, dtype):
    if dtype != torch.float32 and packing._find_problem(shape, dtype):
        pytest.skip("this processor packs float32 alone")
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = packing.pack(weight.T.contiguous().T)
    assert torch.ops.mkldnn._nbytes(packed.weight) <= packing.packed_bytes(*shape, dtype.itemsize)
    for leading in [(1,), (5,), (2, 3), (2, 1, 4)]:
        x = torch.randn(*leading, shape[1]).to(dtype)
        for added in (bias, None):
            found = packed(x, added)
            expected = functional.linear(x, weight, added)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 0.02 * (1 + expected.abs().max())


@pytest.mark.needs_packing
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2,)])
def test_a_vector_may_be_repeated(leading, rows, monkeypatch):
    monkeypatch.setattr(packing, "_least_rows", lambda *_: rows)
    weight, bias, x = torch.randn(16, 8), torch.randn(16), torch.randn(*leading, 8)
    found = packing.pack(weight)(x, bias)
    assert found.shape == (*leading, 16)
    assert torch.allclose(found, functional.linear(x, weight, bias), atol=1e-5)


def test_what_is_slower_or_wrong_is_not_usable(monkeypatch):
    _gain(monkeypatch, 0.9)
    verdict = packing.judge((8, 8), torch.float32, CPU)
    assert not verdict.usable
    assert "0.90x" in verdict.reason
    _gain(monkeypatch, 1.5)
    packing._judge.cache_clear()
    monkeypatch.setattr(packing, "_product", lambda x, w, b: torch.zeros(len(x), 8))  # noqa: ARG005
    verdict = packing.judge((8, 8), torch.float32, CPU)
    assert not verdict.usable
    assert "something else" in verdict.reason


def test_missing_operators_are_a_reason_not_an_error(monkeypatch):
    def fail(_):
        raise AttributeError("no such operator: _reorder_linear_weight")

    monkeypatch.setattr(packing, "_pack", fail)
    verdict = packing.judge((8, 8), torch.float32, CPU)
    assert not verdict.usable
    assert "_reorder_linear_weight" in verdict.reason


@pytest.mark.parametrize(
    ("dtype", "device", "word"),
    [(torch.float64, CPU, "float64"), (torch.float32, torch.device("meta"), "meta")],
)
def test_what_cannot_be_packed_is_said(dtype, device, word):
    verdict = packing.judge((8, 8), dtype, device)
    assert not verdict.usable
    assert word in verdict.reason


def test_gain_is_a_ratio_of_two_timings(monkeypatch):
    clock = [0.0]

    def spend(seconds, output):
        clock[0] += seconds
        return output

    monkeypatch.setattr(packing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(packing, "_pack", lambda weight: weight)
    monkeypatch.setattr(packing, "_product", lambda x, *_: spend(1.0, x))
    monkeypatch.setattr(packing.functional, "linear", lambda x, *_: spend(3.0, x))
    assert packing.measure_gain((8, 8), torch.float32) == 3.0


@torch.no_grad()
def test_without_gain_packed_falls_back_and_says_so(monkeypatch):
    _gain(monkeypatch, 0.5)
    model = _sparse(executor="packed")
    assert model.execution.executor == "compact"
    assert "0.50x" in model.execution.reason
    expected = model.to_dense()(prompt()).logits
    assert torch.equal(model(prompt(), domain=None).logits, expected)
    assert model.resident == {}, "a dense pass without packing needs no copies"
    model(prompt(), domain="code")
    assert all(not isinstance(kept.weight, packing.Packed) for kept in _copies(model))


def _copies(model):
    blocks = model._attachment.blocks
    copies = [k for b in blocks for leaf in b.leaves.values() for k in leaf.copies.values()]
    assert copies
    return copies


@pytest.mark.needs_packing
@torch.no_grad()
def test_auto_packs_what_is_large_and_fits(monkeypatch):
    _gain(monkeypatch, 2.0)
    model = _sparse()
    assert model.execution.executor == "compact"
    assert "too little" in model.execution.reason
    monkeypatch.setattr(execution, "_WORTH_BYTES", 0)
    everything = model._attachment.copies.total()
    blocks = model._attachment.copies.most(packed=True)
    assert blocks < everything
    for limit, expected in [
        (everything, "packed-all"),
        (everything - 1, "packed"),
        (blocks, "packed"),
        (blocks - 1, "compact"),
    ]:
        model.max_resident_bytes = limit
        assert model.execution.executor == expected
        model(prompt(), domain="code")
        assert sum(model.resident.values()) <= limit


@torch.no_grad()
def test_auto_leaves_dense_passes_alone(monkeypatch):
    _gain(monkeypatch, 2.0)
    monkeypatch.setattr(execution, "_WORTH_BYTES", 0)
    model = _sparse()
    model.max_resident_bytes = "1GB"
    expected = model.to_dense()(prompt()).logits
    model(prompt(), domain="code")
    assert torch.equal(model(prompt(), domain=None).logits, expected)
    assert "dense" not in model.resident


@pytest.mark.parametrize("executor", ["packed", "packed-all"])
def test_gradients_autocast_and_tracing_do_without(executor, monkeypatch):
    _gain(monkeypatch, 2.0)
    model = _sparse(executor=executor)
    reference = _sparse(executor="masked")
    ids = prompt()
    for domain in ("code", None, ["code", "law"]):
        model.zero_grad()
        reference.zero_grad()
        model(ids, labels=ids, domain=domain).loss.backward()
        reference(ids, labels=ids, domain=domain).loss.backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mine, theirs = (m(ids, domain=domain).logits for m in (model, reference))
        assert (mine - theirs).abs().max() <= 0.1 * theirs.abs().max()


@pytest.mark.needs_packing
@torch.no_grad()
def test_leaves_outside_the_blocks_are_swapped_only_while_packed(monkeypatch):
    _gain(monkeypatch, 2.0)
    model = _sparse(executor="packed-all")
    attention = model.model.layers[0].self_attn.q_proj
    assert type(attention) is torch.nn.Linear
    model(prompt(), domain="code")
    assert type(attention) is not torch.nn.Linear
    assert type(model.to_dense().model.layers[0].self_attn.q_proj) is torch.nn.Linear
    model.set_executor("compact")
    assert type(attention) is torch.nn.Linear


@pytest.mark.needs_packing
@torch.no_grad()
def test_a_loaded_model_packs_its_attention_too(monkeypatch, tmp_path):
    _gain(monkeypatch, 2.0)
    _sparse().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, executor="packed-all")
    model.max_resident_bytes = "1GB"
    expected = _sparse(executor="masked")(prompt(), domain="code").logits
    assert torch.allclose(model(prompt(), domain="code").logits, expected, atol=1e-5)
    assert list(model.resident) == ["code", "attention and head"]


@torch.no_grad()
def test_changed_attention_weights_are_noticed(monkeypatch):
    _gain(monkeypatch, 2.0)
    model = _sparse(executor="packed-all")
    model(prompt(), domain="code")
    for change in (lambda w: w.mul_(0.5), lambda w: w.data.mul_(3.0)):
        change(model.model.layers[1].self_attn.o_proj.weight)
        found = model(prompt(), domain="code").logits
        model.set_executor("masked")
        assert torch.allclose(found, model(prompt(), domain="code").logits, atol=1e-5)
        model.set_executor("packed-all")


def test_unknown_executors_are_refused():
    with pytest.raises(UnknownNameError, match=r"'pakced'.*packed-all"):
        _sparse(executor="pakced")
