"""Settings are checked before anything is loaded."""

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.healing.settings import LEARNING_RATES, parse_loss


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("lm", {"lm": 1.0}),
        ("lm+kl:0.5", {"lm": 1.0, "kl": 0.5}),
        ("hidden:.25 + kl:2", {"hidden": 0.25, "kl": 2.0}),
    ],
)
def test_a_loss_is_a_sum_of_terms(text, terms):
    assert parse_loss(text) == terms


@pytest.mark.parametrize("text", ["", "lm+", "lm+lm", "ml", "kl:0", "kl:x", "kl:-1", "lm kl"])
def test_what_is_no_loss_is_refused(text):
    with pytest.raises(sp.PathwaysError, match="lm, kl, hidden"):
        sp.HealingSettings(loss=text)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train": "weight"}, "Did you mean 'weights'"),
        ({"keep": "fold"}, "Did you mean 'folded'"),
        ({"teacher": "other"}, "teacher"),
        ({"attention": True}, "keep='lora'"),
        ({"keep": "lora", "train": "weights"}, r"\(--keep lora\) .* \(--train lora\).* no adapter"),
        ({"teacher": "tuned", "loss": "kl"}, r"dense_partner=True \(--dense-partner\)"),
        ({"teacher": "tuned", "dense_partner": True}, "'kl' or 'hidden'"),
        ({"teacher": "cut", "loss": "kl"}, "dense_first"),
        ({"teacher": "cut", "dense_first": 0.5}, "'kl' or 'hidden'"),
        ({"rank": 0}, "rank"),
        ({"steps": 0}, "steps"),
        ({"tokens": 1.5}, "tokens"),
        ({"tokens": 1}, r"tokens \(--tokens\) has to be a whole number of at least 2, got 1"),
        ({"validation_tokens": 1}, r"\(--validation-tokens\) .* at least 2, got 1"),
        ({"max_length": 1}, r"\(--max-length\) .* at least 2, got 1"),
        ({"batch_size": True}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"clip": float("inf")}, "clip"),
        ({"warmup": 1.0}, "warmup"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"dense_first": 1.0}, "dense_first"),
        ({"dense_first": -0.1}, "dense_first"),
        ({"dense_first": float("nan")}, "dense_first"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, words):
    with pytest.raises(sp.PathwaysError, match=words):
        sp.HealingSettings(**given)


def test_the_rate_goes_with_what_is_trained():
    for train, rate in LEARNING_RATES.items():
        assert sp.HealingSettings(train=train).rate == rate
    assert sp.HealingSettings(learning_rate=0.5).rate == 0.5


@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (0.5, 5), (0.96, 9), (0.04, 1)])
def test_both_parts_have_at_least_one_step(share, steps):
    assert sp.HealingSettings(dense_first=share).dense_steps(10) == steps
