"""Perplexity under a domain's experts, beside a loop over single windows and all controls."""

import math

import pytest
import torch

import hf_sparse_pathways as sp
from tests.measure.test_linear_experts import TOKENIZER, make_sgatlin
from tests.texts import documents

TEXTS = {name: documents(name, count=12) for name in ("code", "law")}
SETTINGS = {"max_tokens": 80, "max_length": 64, "batch_size": 3}


@pytest.fixture(scope="module")
def made():
    model = make_sgatlin()
    usage = sp.measure_experts(model, TOKENIZER, TEXTS, **SETTINGS)
    report = sp.evaluate_experts(model, TOKENIZER, TEXTS, usage, 0.25, max_length=64, batch_size=3)
    return model, usage, report


@torch.no_grad()
def _perplexity(model, usage, domain):
    """Score, one by one, every document that the usage has not seen."""
    from hf_sparse_pathways.discovery.text import read_documents

    total, tokens = 0.0, 0
    for document in read_documents(TEXTS[domain]).without(*usage.seen[domain]).items:
        ids = TOKENIZER(document.text, return_tensors="pt")["input_ids"]
        assert ids.shape[1] <= 64
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens), tokens


def test_figures_are_those_of_single_windows(made):
    model, usage, report = made
    for row in report.rows:
        all_experts, tokens = _perplexity(model, usage, row.domain)
        assert row.tokens == tokens
        assert row.perplexity == pytest.approx(all_experts, rel=1e-4)
        (other,) = {"code", "law"} - {row.domain}
        sets = {
            "own": usage.experts(row.domain, 0.25),
            other: usage.experts(other, 0.25),
            "pooled": usage.pooled(0.25),
            "random": usage.random(0.25),
        }
        assert row.ratios.keys() == sets.keys()
        for name, experts in sets.items():
            with sp.restrict_experts(model, experts):
                found, _ = _perplexity(model, usage, row.domain)
            assert row.ratios[name] == pytest.approx(found / all_experts, rel=1e-4)


def test_bytes_are_the_rows(made):
    _, _, report = made
    assert report.bytes == (3 * 2 * 2 * 16 * 32 * 4, 3 * 2 * 2 * 4 * 32 * 4)


def test_the_table(made):
    text = made[2].to_markdown()
    assert text.startswith("25% of each channel's experts: 0.0 of 0.0 MB of rows.")
    assert "| text | tokens | all experts | own | pooled | random | other domains' |" in text
    assert "| code |" in text


def test_nothing_held_out_is_told(made):
    model, _, _ = made
    usage = sp.measure_experts(model, TOKENIZER, TEXTS, max_length=64)
    with pytest.raises(sp.PathwaysError, match="nothing is left but"):
        sp.evaluate_experts(model, TOKENIZER, TEXTS, usage, 0.5)
    with pytest.raises(sp.PathwaysError, match="Did you mean 'law'"):
        sp.evaluate_experts(model, TOKENIZER, {"laws": TEXTS["law"]}, usage, 0.5)
