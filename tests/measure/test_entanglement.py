"""Entangled rows: errors by their definition, and what is measured on tiny models."""

import copy
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.sparsegpt import InverseFactor
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.measure import plots
from hf_sparse_pathways.measure.analysis import Analysis, analyse
from hf_sparse_pathways.measure.analysis_report import to_markdown
from hf_sparse_pathways.measure.arms import ScoredText
from hf_sparse_pathways.measure.entangled_rows import (
    LEAST,
    METHODS,
    MOST,
    RANDOM,
    SPARSITIES,
    input_moments,
    prune_rows,
    relate_entanglement,
    row_errors,
)
from hf_sparse_pathways.measure.model_size import ModelSize
from tests.architectures import build
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = {name: documents(name, 8, 20) for name in ("code", "law")}
HELD_OUT = {name: documents(name, 4, 20, seed=1) for name in ("code", "law")}


pytestmark = pytest.mark.usefixtures("no_background")


def _take(model, **options):
    options = {"max_length": 32, "grams": False, "entanglement": True, **options}
    return sp.profile(model, TOKENIZER, TEXTS, **options)


@pytest.fixture(scope="module", params=["llama", "phi3", "gpt2"])
def measured(request):
    model = build(request.param)
    before = copy.deepcopy(model.state_dict())
    taken = _take(model)
    found = relate_entanglement(model, TOKENIZER, taken, HELD_OUT, max_tokens=80, max_length=32)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    return model, taken, *found


def test_errors_are_those_of_outputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=generator, dtype=torch.float64) * 3 + 1
    weight, pruned = torch.randn(2, 6, 16, generator=generator)
    weight[4] = pruned[4] = 0
    z = torch.cat([x, torch.ones(500, 1, dtype=torch.float64)], 1)
    found = row_errors(weight, pruned, z.T @ z / 500)
    y, other = x @ weight.double().T, x @ pruned.double().T
    expected = (y - other).square().mean(0) / y.var(0, correction=0)
    assert bool(found[4].isnan())
    rest = torch.tensor([0, 1, 2, 3, 5])
    torch.testing.assert_close(found[rest], expected[rest])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_moments_are_those_of_the_input(architecture):
    model = build(architecture)
    text = ScoredText.draw(
        "code",
        read_documents(TEXTS["code"]),
        TOKENIZER,
        max_tokens=100,
        max_length=17,
        seed=0,
    )
    found = input_moments(model, text.windows, 3)
    block, seen = find_blocks(model)[1], []
    handle = block.incoming[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        for window in text.windows:
            model(torch.tensor([window.ids]))
    handle.remove()
    x = torch.cat(seen).double()
    z = torch.cat([x, torch.ones(len(x), 1)], 1)
    torch.testing.assert_close(found[1].double(), z.T @ z / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("columns", [16, 96, 160])
def test_every_row_loses_as_much(method, sparsity, columns):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator)
    pruned = prune_rows(weight, InverseFactor.of(x.T @ x), method, sparsity)
    gone = (pruned == 0).sum(1)
    assert bool((gone == gone[0]).all())
    assert float(gone[0]) / columns == pytest.approx(sparsity, abs=0.04)


def test_relations_are_there_for_every_way(measured):
    model, _, relations, _ = measured
    rows = sum(len(linear_weight(leaf)) for block in find_blocks(model) for leaf in block.incoming)
    ways = [(domain, m, s) for domain in TEXTS for m in METHODS for s in SPARSITIES]
    assert [(row.domain, row.method, row.sparsity) for row in relations] == ways
    for row in relations:
        assert row.pearson.n == row.spearman.n == rows
        assert len(row.points) == min(rows, 2000)
        assert -1 <= row.within <= 1


def test_harm_grows_with_what_is_pruned(measured):
    _, _, _, harms = measured
    rules = [(row.domain, row.rule) for row in harms]
    assert rules == [(domain, rule) for domain in TEXTS for rule in (MOST, RANDOM, LEAST)]
    assert all(row.ratio > 0 and row.tokens > 0 for row in harms)
    assert any(row.ratio != 1 for row in harms)


def test_a_report_holds_them_and_reads_them_back(measured):
    model, taken, relations, harms = measured
    analysis = analyse(taken, ModelSize.of(model))
    assert analysis.entanglement is not None
    assert not analysis.entanglement.relations
    known = replace(analysis.entanglement, relations=relations, harms=harms)
    whole = replace(analysis, entanglement=known)
    assert Analysis.from_dict(whole.to_dict()) == whole
    text = to_markdown(whole)
    for words in ("Entanglement of incoming rows", "error of sparsified rows", "most entangled"):
        assert words in text
    figures = plots.draw_all(whole)
    assert {"entanglement", "relation"} <= figures.keys()
    assert "entanglement" in plots.draw_all(taken)


def test_an_older_analysis_is_read():
    model = build("llama")
    taken = _take(model, entanglement=False)
    values = analyse(taken, ModelSize.of(model)).to_dict()
    assert values.pop("entanglement") is None
    assert Analysis.from_dict(values).entanglement is None


def test_a_profile_without_is_refused():
    model = build("llama")
    with pytest.raises(PathwaysError, match=r"entanglement=True \(--entanglement\)"):
        relate_entanglement(
            model, TOKENIZER, _take(model, entanglement=False), HELD_OUT, max_tokens=80
        )
