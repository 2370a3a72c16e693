"""Oracles: clustered pathways equal a model that computes every expert and picks by token."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.native import product
from tests.architectures import ARCHITECTURES, build, prompt
from tests.architectures import repaired as repaired_model
from tests.clustered import clustered, reference
from tests.test_exactness import EXECUTORS, TOLERANCE

IDS = prompt(3, 9)


@pytest.fixture(autouse=True)
def _large_enough(monkeypatch, every_form_pays):
    """Tiny models gain nothing from packing; torch multiplies gathered rows, as in oracles."""
    monkeypatch.setattr(product, "MOST_INPUTS", 0)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def case(request):
    dense = build(request.param)
    pathways = clustered(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.max_resident_bytes = "1GB"
    with torch.no_grad():
        expected = {
            "code": reference(dense, pathways["code"])(IDS, use_cache=False).logits,
            "law": repaired_model(dense, pathways["law"])(IDS, use_cache=False).logits,
            None: dense(IDS).logits,
        }
    return dense, model, expected


def _difference(left, right):
    return (left - right).abs().max().item()


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_equals_the_expert_of_each_token(case, executor):
    _, model, expected = case
    model.set_executor(executor)
    assert model.execution.executor == executor, model.execution.reason
    assert _difference(expected["code"], expected["law"]) > 1e-2
    for name in ("code", "law", None):
        assert _difference(model(IDS, domain=name).logits, expected[name]) <= 5 * TOLERANCE, name


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_rows_of_other_domains_beside_it(case, executor):
    _, model, expected = case
    model.set_executor(executor)
    rows = ["law", "code", None]
    logits = model(IDS, domain=rows).logits
    for row, name in enumerate(rows):
        assert _difference(logits[row], expected[name][row]) <= 5 * TOLERANCE, name


def test_gradients_equal_the_reference(case):
    dense, model, _ = case
    pathways = model.pathways
    plain = reference(dense, pathways["code"])
    plain(IDS, labels=IDS, use_cache=False).loss.backward()
    model(IDS, labels=IDS, domain="code", use_cache=False).loss.backward()
    expected = plain.get_input_embeddings().weight.grad
    assert _difference(model.get_input_embeddings().weight.grad, expected) <= TOLERANCE
    model.zero_grad()
