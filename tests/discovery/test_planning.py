"""What is decided on validation text is what has the least loss there."""

import pytest

from hf_sparse_pathways.discovery import obs, planning
from hf_sparse_pathways.discovery.drafts import Draft
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.pathways.names import POOLED
from tests.architectures import build
from tests.texts import documents, tiny_tokenizer

TEXTS = {"code": documents("code", 14, 20), "law": documents("law", 12, 16)}
RIDGES = (0.01, 10.0, 1e-6)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(obs, "STEPS", 6)
    monkeypatch.setattr(planning, "RIDGES", RIDGES)


def _take(model, texts=TEXTS, **options):
    options = {"max_length": 32, "max_tokens": 150, "validation_tokens": 96, **options}
    return profile(model, tiny_tokenizer(), texts, **options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_the_ridge_has_the_least_loss_on_validation_text(architecture):
    model = build(architecture)
    taken = _take(model)
    options = {"sparsity": 0.6, "method": "wanda", "compensation": "refit+bias"}
    tried = {ridge: select(model, taken, ridge=ridge, **options) for ridge in RIDGES}
    found = select(model, taken, **options)
    for name in ("code", "law", POOLED):
        losses = {
            ridge: _validated(model, taken, pathways[name].blocks, name)
            for ridge, pathways in tried.items()
        }
        assert len(set(losses.values())) == len(RIDGES)
        usual, larger, smaller = RIDGES
        other = larger if losses[larger] < losses[usual] else smaller
        assert found[name].provenance["ridge"] == min((usual, other), key=losses.get)


def _validated(model, taken, blocks, name):
    windows = taken.pooled().validation if name == POOLED else taken[name].validation
    assert windows
    return mean_loss(model, windows, blocks, find_blocks(model))


def test_without_validation_text_the_usual_ridge_is_taken():
    model = build("llama")
    taken = _take(model, validation_tokens=0)
    assert not taken["code"].validation
    assert select(model, taken)["code"].provenance["ridge"] == RIDGES[0]


def test_a_ridge_that_is_given_is_used():
    model = build("llama")
    taken = _take(model)
    small, large = (
        select(model, taken, ridge=ridge, method="wanda", compensation="refit")["code"]
        for ridge in (1e-4, 1e4)
    )
    assert (small.provenance["ridge"], large.provenance["ridge"]) == (1e-4, 1e4)
    for one, other in zip(small.blocks, large.blocks, strict=True):
        assert float(other.delta.float().norm()) < 0.01 * float(one.delta.float().norm())


def test_nothing_is_tried_where_nothing_is_solved(monkeypatch):
    model = build("llama")
    taken = _take(model)
    monkeypatch.setattr(planning._Plan, "choose_ridge", None)
    assert select(model, taken, method="flap")["code"].provenance["ridge"] == 0.01
    assert select(model, taken, sparsity=0.0)["code"].provenance["ridge"] == 0.01


def test_the_pooled_control_has_the_same_choices_as_the_domains():
    model = build("llama")
    seen = []
    loss = Draft.loss

    def watch(draft, windows):
        seen.append(draft.evidence.name)
        return loss(draft, windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draft, "loss", watch)
        select(model, _take(model))
    for name in ("code", "law", POOLED):  # the usual ridge was tried with the allocations
        assert seen.count(name) in (2 + 1, 2 + 2)
