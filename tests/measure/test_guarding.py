"""What is measured of a guard is what decoding token by token would give."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure import guarding
from hf_sparse_pathways.measure.guarding import HALF, PROMPT, measure_guard
from tests.architectures import VOCAB, build, random_masks
from tests.pathways.signatures import make_signature

STEPS = 2 * HALF - PROMPT


@pytest.fixture(scope="module")
def model():
    """A model of two domains: text of small ids is the first one's, of large ids the second's."""
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense, ("low", "high")))
    weights = torch.where(torch.arange(VOCAB) < VOCAB // 2, 1.3, -0.4)
    known = {
        name: replace(path, signature=replace(make_signature(), tokens=tokens.half()))
        for (name, path), tokens in zip(
            paths.by_domain.items(), (weights, weights.flip(0)), strict=True
        )
    }
    return sp.SparsePathwaysForCausalLM.from_dense(dense, replace(paths, by_domain=known)).eval()


def _half(first, last, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, last, (2, HALF), generator=generator)


def _slow(model, row, domains):
    """Return the mean loss of the second half, one token at a time."""
    cache, losses, start = DynamicCache(), [], 0
    for token, domain in enumerate(domains):
        stop = PROMPT + token
        cached = {guarding._cache_name(model): cache}
        with torch.no_grad(), model.pathway(domain):
            logits = model(row[None, start:stop], use_cache=True, **cached).logits[0, -1]
        losses.append(float(cross_entropy(logits, row[stop])))
        start = stop
    return sum(losses[-HALF:]) / HALF


def test_tokens_that_are_computed_alike_are_passed_together(model):
    row = torch.cat([_half(8, 40, 0), _half(60, 90, 1)], 1)[0]
    domains = ["low"] * 300 + [None] * 20 + ["high"] * 60 + [None] * (STEPS - 380)
    with torch.no_grad():
        found = guarding._loss(model, row, domains)
    assert found == pytest.approx(_slow(model, row, domains), abs=1e-4)
    assert found != pytest.approx(_slow(model, row, ["low"] * STEPS), abs=1e-4)


def test_text_that_changes_is_left_and_text_that_goes_on_is_not(model):
    halves = {"low": _half(8, 40, 2), "high": _half(60, 90, 3), "other": _half(60, 90, 4)}
    with torch.no_grad():
        found = {(one.before, one.after): one for one in measure_guard(model, halves)}
    assert {before for before, _ in found} == {"low", "high"}
    stays, goes = found["low", "low"], found["low", "other"]
    assert stays.densely == 0.0
    assert stays.delay == HALF
    assert stays.ratios["guard"] == stays.ratios["unguarded"] == stays.ratios["oracle"]
    assert 0.9 < goes.densely < 1.0
    assert goes.tokens == 2 * HALF
    assert goes.delay == pytest.approx(12 / 0.7, abs=2)
    assert goes.ratios["guard"] != goes.ratios["unguarded"]
    roams = found["low", "high"].ratios
    assert roams["guard of auto"] != roams["guard"]
