"""Switching really switches, and costs what the steps say."""

from itertools import pairwise

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.measure.speed.switching import describe_switch, fit_pairs, time_switch
from tests.architectures import random_masks, tiny_llama


@pytest.fixture
def model():
    dense = tiny_llama()
    pathways = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)


@pytest.fixture
def seen(model, monkeypatch):
    domains = []
    own = type(model).forward

    def spy(self, *args, **options):
        domains.append(options["domain"])
        return own(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", spy)
    return domains


@pytest.mark.parametrize("other", ["law", None])
def test_switching_really_switches(model, seen, other):
    assert len(time_switch(model, "code", other, pairs=6)) == 6
    rounds = [other, "code", "code", "code", other, other]
    assert seen == ["code", other, *rounds * 3]


def test_what_a_switch_takes_is_what_its_step_takes_more(model, seen, monkeypatch):
    def now(_device):
        """A step takes 1 second, in law 5, and 2 more where the domain changes."""
        steps = sum(5 if domain == "law" else 1 for domain in seen)
        return float(steps + sum(2 for a, b in pairwise(seen) if a != b))

    monkeypatch.setattr(clock, "now", now)
    assert time_switch(model, "code", "law", pairs=4) == (2.0,) * 4


@pytest.mark.parametrize(("share", "pairs"), [(0.0, 10), (60.0, 20), (1e6, 60)])
def test_pairs_fit_a_share_of_time(model, monkeypatch, share, pairs):
    looks = iter(range(10))
    monkeypatch.setattr(clock, "now", lambda _device: float(next(looks)))
    assert fit_pairs(model, "code", share) == pairs


def test_the_cost_is_described_with_its_spread():
    assert "1.00 ms per step, median of 3 (quartiles 0.50 to 1.50)" in describe_switch(
        [0.0, 0.001, 0.002]
    )
