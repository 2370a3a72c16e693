"""Kinds of evidence: what each admits, and that a router takes what all of them agree on."""

from dataclasses import replace

import pytest
import torch

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.modeling.kinds import KINDS, admit_by_pairs, admit_by_tokens
from hf_sparse_pathways.modeling.routing import Router
from hf_sparse_pathways.pathways.pairs import collect_pairs
from hf_sparse_pathways.pathways.signature import LENGTHS, LEVELS, no_pairs
from tests.pathways.signatures import make_signature

LENGTH = 32


def _signature(first):
    """Return a signature of which twelve tokens from ``first`` on, in ascending order, are text."""
    tokens = torch.full((99,), -1.0)
    tokens[first : first + 12] = 2.0
    ids = torch.arange(first, first + 12)
    grid = torch.linspace(0.5, 1.5, len(LEVELS)).repeat(len(LENGTHS), 1)
    return replace(
        make_signature(),
        tokens=tokens.half(),
        own=grid,
        background=grid - 2.0,
        pairs=collect_pairs([(ids, torch.ones(12, dtype=torch.bool))]),
        own_pairs=grid / 1.5,
    )


@pytest.fixture
def router():
    return Router(signatures={"one": _signature(10), "two": _signature(30), "near": _signature(32)})


def _text(first, descending=False):
    ids = (first + torch.arange(12)).repeat(3)[:LENGTH]
    return ids.flip(0) if descending else ids


def _decide(router, ids, *kinds):
    chosen = replace(router, kinds=kinds) if kinds else router
    return chosen.decide(ids[None])[0].domain


def test_text_goes_where_both_say(router):
    assert _decide(router, _text(10)) == "one"


def test_the_same_words_in_another_order_go_nowhere(router):
    ids = _text(10, descending=True)
    assert _decide(router, ids, "tokens") == "one"
    assert _decide(router, ids, "pairs") is None
    assert _decide(router, ids) is None


def test_two_domains_that_have_the_pairs_leave_it_to_the_tokens(router):
    ids = (32 + torch.arange(10)).repeat(4)[:LENGTH]  # in both, and no more in one than the other
    readings = {name: one.read(one.framing.take(ids)) for name, one in router.signatures.items()}
    assert admit_by_pairs(router.signatures, readings) == {"two", "near"}
    assert admit_by_tokens(router.signatures, readings) == set()
    assert _decide(router, ids, "pairs") is None
    assert _decide(router, ids) is None
    ids = _text(30)
    assert _decide(router, ids, "pairs") is None
    assert _decide(router, ids) == "two"


def test_each_domain_reads_what_its_own_tokenizer_says_something_with(router):
    two = router.signatures["two"]
    other = replace(two, ignored=torch.arange(30, 36, dtype=torch.int32))
    mixed = replace(router, signatures={**router.signatures, "two": other})
    ids = _text(25)
    decision = mixed.decide(ids[None])[0]
    for name, one in mixed.signatures.items():
        alone = one.read(one.framing.take(ids))
        assert (decision.scores[name], decision.seen[name]) == (alone.score, alone.seen)
    assert decision.scores["two"] < router.decide(ids[None])[0].scores["two"]


def test_domains_whose_pairs_are_not_known_go_by_their_tokens(router):
    older = replace(router.signatures["one"], **no_pairs())
    asked = replace(router, signatures={"one": older})
    for descending in (False, True):
        assert _decide(asked, _text(10, descending)) == "one"


def test_what_is_decided_is_told(router):
    told = router.decide(_text(10)[None])[0]
    assert told.seen["one"] > 0.9 > told.seen["two"] == 0.0
    assert told.scores["one"] == pytest.approx(2.0)


def test_kinds_have_to_be_known():
    with pytest.raises(UnknownNameError, match="tokens"):
        Router(signatures={}, kinds=("token",))
    with pytest.raises(PathwaysError, match="at least one"):
        Router(signatures={}, kinds=())
    assert Router(signatures={}).kinds == tuple(KINDS)
