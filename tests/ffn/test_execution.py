"""Which executor runs for a name, and what ``auto`` makes of gains and memory."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn import execution, verdicts
from hf_sparse_pathways.ffn.forms import NATIVE, PACKED, PLAIN
from tests.architectures import build, compensate, prompt, random_masks
from tests.clustered import clustered


@pytest.fixture(autouse=True)
def _judge_anew(monkeypatch):
    verdicts._judge.cache_clear()
    monkeypatch.setattr(verdicts, "find_problem", lambda *_: None)
    yield
    verdicts._judge.cache_clear()


def _gain(monkeypatch, *, packed, native):
    gains = {PACKED: packed, NATIVE: native}
    monkeypatch.setattr(verdicts, "measure_gain", lambda form, *_: gains[form])


def _sparse(**arguments):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


@pytest.mark.parametrize("executor", ["packed", "packed-all", "indexed"])
@torch.no_grad()
def test_without_gain_compact_runs_and_says_why(executor, monkeypatch):
    _gain(monkeypatch, packed=0.5, native=0.5)
    model = _sparse(executor=executor)
    assert model.execution.executor == "compact"
    assert "0.50x" in model.execution.reason
    expected = model.to_dense()(prompt()).logits
    assert torch.equal(model(prompt(), domain=None).logits, expected)
    assert model.resident == {}, "a dense pass in the plain form needs no copies"
    model(prompt(), domain="code")
    leaves = [leaf for b in model._attachment.blocks for leaf in b.leaves.values()]
    assert {kept.form for leaf in leaves for kept in leaf.copies.values()} == {PLAIN}


def test_auto_takes_no_other_form_for_small_weights(monkeypatch):
    _gain(monkeypatch, packed=2.0, native=2.0)
    model = _sparse()
    assert model.execution.executor == "compact"
    assert "too little" in model.execution.reason


@pytest.mark.needs_compiler
@pytest.mark.needs_packing
@pytest.mark.parametrize(
    ("packed", "native", "choices"),
    [
        (2.0, 0.8, ("packed-all", "packed", "compact", "compact")),
        (2.0, 1.5, ("packed-all", "packed", "indexed", "indexed")),
        (2.0, 1.7, ("indexed", "indexed", "indexed", "indexed")),
        (0.9, 1.1, ("indexed", "indexed", "indexed", "indexed")),
        (0.9, 0.8, ("compact", "compact", "compact", "compact")),
    ],
)
@torch.no_grad()
def test_auto_weighs_gains_and_memory(packed, native, choices, monkeypatch):
    _gain(monkeypatch, packed=packed, native=native)
    monkeypatch.setattr(execution, "_WORTH_BYTES", 0)
    model = _sparse()
    copies = model._attachment.copies
    everything, blocks = copies.total(), copies.most(PACKED)
    in_place = copies.most(NATIVE)
    assert in_place < copies.most(PLAIN) <= blocks < everything
    limits = (everything, blocks, blocks - 1, in_place)
    for limit, expected in zip(limits, choices, strict=True):
        model.max_resident_bytes = limit
        assert model.execution.executor == expected
        model(prompt(), domain="code")
        assert sum(model.resident.values()) <= limit
    model.max_resident_bytes = in_place - 1
    assert model.execution.executor == "compact"
    expected = _sparse(executor="masked")(prompt(), domain="code").logits
    assert torch.allclose(model(prompt(), domain="code").logits, expected, atol=1e-5)
    assert model.resident == {}


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kind", ["clustered", "plain"])
def test_auto_reads_experts_in_place_where_copies_of_all_do_not_fit(kind, monkeypatch):
    _gain(monkeypatch, packed=0.9, native=0.8)
    monkeypatch.setattr(execution, "_WORTH_BYTES", 0)
    dense = build("llama")
    pathways = compensate(dense, random_masks(dense))
    if kind == "clustered":
        pathways = clustered(dense, change_rows=False)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    copies = model._attachment.copies
    model.max_resident_bytes = copies.most(PLAIN)
    assert model.execution.executor == "compact"
    model.max_resident_bytes = copies.most(PLAIN) - 1
    assert model.execution.executor == ("indexed" if kind == "clustered" else "compact")
    model.max_resident_bytes = copies.most(NATIVE) - 1
    assert model.execution.executor == "compact"


@pytest.mark.needs_compiler
@pytest.mark.needs_packing
@pytest.mark.parametrize("native", [1.1, 3.0])
@torch.no_grad()
def test_auto_leaves_dense_passes_alone(native, monkeypatch):
    _gain(monkeypatch, packed=2.0, native=native)
    monkeypatch.setattr(execution, "_WORTH_BYTES", 0)
    model = _sparse()
    model.max_resident_bytes = "1GB"
    assert model.execution.executor == ("packed-all" if native < 1.6 else "indexed")
    expected = model.to_dense()(prompt()).logits
    model(prompt(), domain="code")
    assert torch.equal(model(prompt(), domain=None).logits, expected)
    assert "dense" not in model.resident


def test_unknown_executors_are_refused():
    with pytest.raises(UnknownNameError, match=r"'pakced'.*packed-all"):
        _sparse(executor="pakced")
