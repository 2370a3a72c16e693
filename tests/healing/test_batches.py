"""Training windows are fresh, in a fixed order, and of no document that anything is judged on."""

from dataclasses import replace

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.healing.batches import draw_text
from tests.healing.healings import QUICK, TEXTS, text
from tests.texts import tiny_tokenizer


def _draw(seen=None, source=None, **settings):
    chosen = sp.HealingSettings(**{**QUICK, "steps": None, **settings})
    read = read_documents(TEXTS if source is None else source)
    return draw_text("code", read, seen or {}, tiny_tokenizer(), chosen, 16)


def _digests(windows):
    return {window.document.digest for window in windows}


def test_steps_are_the_same_every_time_and_other_with_another_seed():
    assert _draw(tokens=300) == _draw(tokens=300)
    assert _draw(tokens=300).steps != _draw(tokens=300, seed=1).steps


def test_a_longer_run_goes_through_the_text_again_in_another_order():
    once, often = _draw(tokens=300), _draw(tokens=2000)
    assert once.passes < often.passes
    assert 295 < once.tokens <= 300, "windows of one token are left out"
    assert 1980 < often.tokens <= 2000
    assert len(set(often.steps)) > 0.9 * len(often.steps)


def test_steps_can_be_counted_instead():
    drawn = _draw(steps=7, batch_size=3, accumulate=2)
    assert [len(step) for step in drawn.steps] == [6] * 7


def test_documents_of_validation_are_those_of_the_pathway_and_never_trained_on():
    digests = sorted(document.digest for document in read_documents(TEXTS).items)[:4]
    drawn = _draw({"validation_digests": digests}, tokens=2000)
    training = {digest for step in drawn.steps for digest in _digests(step)}
    assert _digests(drawn.validation) == set(digests)
    assert not training & set(digests)
    assert len(training) == len(TEXTS) - 4


def test_without_any_a_tenth_is_set_aside():
    drawn = _draw(tokens=2000)
    training = {digest for step in drawn.steps for digest in _digests(step)}
    assert len(_digests(drawn.validation)) == 3
    assert not training & _digests(drawn.validation)


def test_digests_join_those_of_calibration():
    drawn = text()
    seen = drawn.added_to({"source": "x", "digests": ["a"], "tokens": 5})
    training = {digest for step in drawn.steps for digest in _digests(step)}
    assert set(seen["digests"]) == training | {"a"}
    assert set(seen["validation_digests"]) == _digests(drawn.validation)
    assert seen["source"] == "x"
    assert seen["datasets"] == []
    assert seen["tokens"] == 5


def test_datasets_join_those_of_calibration():
    read = replace(read_documents(TEXTS), datasets=({"id": "me/new"},))
    chosen = sp.HealingSettings(**QUICK)
    drawn = draw_text("code", read, {}, tiny_tokenizer(), chosen, 16)
    laws, new = {"id": "me/laws"}, {"id": "me/new"}
    assert drawn.added_to({"datasets": [laws]})["datasets"] == [laws, new]
    assert drawn.added_to({"datasets": [new]})["datasets"] == [new]


@pytest.mark.parametrize("source", [["one"], ["one two"] * 3, ["x", "y", "z"]])
def test_too_little_text_is_refused(source):
    with pytest.raises(sp.PathwaysError):
        _draw(source=source, tokens=100)


def test_a_validation_without_training_text_is_refused():
    digests = [document.digest for document in read_documents(TEXTS).items]
    with pytest.raises(sp.PathwaysError, match="Give more documents"):
        _draw({"validation_digests": digests}, tokens=100)
