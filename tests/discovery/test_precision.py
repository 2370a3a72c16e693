"""Products run in the format that was asked for, within the block only."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sparse_pathways.discovery import precision
from hf_sparse_pathways.discovery.precision import (
    bfloat16_products,
    calibration_precision,
    quick_products,
)
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.measure.arms import DENSE, ScoredText, measure_arms
from hf_sparse_pathways.native.processor import slow_dtypes
from tests.architectures import build
from tests.texts import documents, tiny_tokenizer

HALF = nn.Linear(1, 1, dtype=torch.bfloat16)


@pytest.fixture
def emulated(monkeypatch):
    """A processor that multiplies float32 alone."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})


def _draw(*shape, dtype):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return drawn.to(dtype)


def _products(dtype):
    """Return products of drawn factors in a dtype, and the same from float32, rounded once."""
    left, right, bias = (
        _draw(33, 70, dtype=dtype),
        _draw(50, 70, dtype=dtype),
        _draw(50, dtype=dtype),
    )
    stack, other = _draw(3, 9, 70, dtype=dtype), _draw(3, 70, 5, dtype=dtype)
    operands = [
        (linear, left, right),
        (linear, left, right, bias),
        (torch.mm, left, right.T),
        (torch.addmm, bias, left, right.T),
        (torch.bmm, stack, other),
        (torch.baddbmm, _draw(3, 9, 5, dtype=dtype), stack, other),
        (torch.matmul, stack, right.T),
        (torch.matmul, right, left[0]),
    ]
    computed = [run(*given) for run, *given in operands]
    return computed, [run(*(g.float() for g in given)).to(dtype) for run, *given in operands]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_products_are_those_of_float32_rounded_once(dtype, inference):
    with torch.inference_mode(inference), quick_products(nn.Linear(1, 1, dtype=dtype)):
        computed, expected = _products(dtype)
    assert all(map(torch.equal, computed, expected))
    assert {found.dtype for found in computed} == {dtype}


@pytest.mark.parametrize("known", [{"architecture": "x86_64", "avx512_bf16": True}, {}])
def test_no_product_is_changed_that_the_processor_has_or_may_have(monkeypatch, known):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert torch.bfloat16 not in slow_dtypes()
    monkeypatch.setattr(precision, "slow_dtypes", lambda: frozenset())
    with quick_products(HALF):
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.usefixtures("emulated")
def test_other_dtypes_and_factors_of_two_dtypes_are_as_they_were():
    whole = _draw(8, 8, dtype=torch.float32)
    expected = whole @ whole
    with quick_products(HALF):
        assert torch.equal(whole @ whole, expected)
        with pytest.raises(RuntimeError, match="dtype"):
            linear(whole, whole.bfloat16())


@pytest.mark.usefixtures("emulated")
def test_models_of_other_dtypes_run_as_they_do():
    with quick_products(nn.Linear(1, 1)):
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_scored_takes_the_way_round_where_that_is_quicker(dtype):
    model, tokenizer = build("llama").to(dtype), tiny_tokenizer()
    documents_read = read_documents(documents("code", 4, 20))
    text = ScoredText.draw("code", documents_read, tokenizer, max_tokens=40, max_length=16, seed=0)
    modes = []
    current = torch.utils._python_dispatch._get_current_dispatch_mode
    model.register_forward_pre_hook(lambda *_: modes.append(current()))
    dense = replace(DENSE, forward=run_model)
    measure_arms(model, text, [dense], batch_size=2, seed=0)
    assert modes
    assert all((mode is not None) == (dtype == torch.bfloat16) for mode in modes)


@pytest.mark.usefixtures("emulated")
def test_gradients_pass():
    weight = nn.Parameter(_draw(5, 7, dtype=torch.bfloat16))
    inputs = _draw(11, 7, dtype=torch.bfloat16)
    with quick_products(HALF):
        linear(inputs, weight).sum().backward()
    expected = torch.ones(5, 11) @ inputs.float()
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["fastest", "model"])
def test_only_the_fastest_precision_takes_the_way_round(name):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    model = GPT2LMHeadModel(config).to(torch.bfloat16).eval()
    ids = torch.arange(20)[None]
    seen = []
    before = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda own: seen.append(own.shape) or before(own))
        with torch.no_grad(), calibration_precision(model, name):
            logits = model(ids).logits
    assert (torch.Size([50, 32]) in seen or torch.Size([32, 50]) in seen) == (name == "fastest")
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        expected = model.float()(ids).logits
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_processors_units_are_set_within_only(monkeypatch, dtype):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: True)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def fail():
        assert settings.fp32_precision == ("bf16" if dtype == torch.bfloat16 else before)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), bfloat16_products(torch.ones(1, dtype=dtype)):
        fail()
    assert settings.fp32_precision == before
