"""How far a domain has to be ahead of another: counted on held-out text, for a stated error."""

from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.documents import Document
from hf_sparse_pathways.discovery.margins import check_target, find_margins
from hf_sparse_pathways.discovery.signatures import (
    cut_texts,
    hold_out,
    learn_signature,
    score_texts,
    weigh_tokens,
)
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.modeling.routing import Router
from hf_sparse_pathways.pathways.pairs import share_seen
from hf_sparse_pathways.pathways.signature import LENGTHS, USUAL_MARGIN

VOCABULARY = 50


def _background():
    generator = torch.Generator().manual_seed(0)
    return Background(
        probabilities=torch.full((VOCABULARY,), 1 / VOCABULARY),
        samples=torch.randint(VOCABULARY, (64, 8), generator=generator).int(),
        ignored=torch.tensor([0], dtype=torch.int32),
        prefix=torch.empty(0, dtype=torch.int32),
        suffix=torch.empty(0, dtype=torch.int32),
    )


def _windows(seed, first, last, count=40):
    """Return windows of tokens between two ids, and of any in between."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        own = torch.randint(first, last, (128,), generator=generator)
        other = torch.randint(1, VOCABULARY, (128,), generator=generator)
        ids = own.where(torch.rand(128, generator=generator) < 0.5, other)
        made.append(Window(tuple(ids.tolist()), Document(text=str(ids.tolist()), origin="made")))
    return tuple(made)


@pytest.fixture(scope="module")
def case():
    """Three domains, their windows, and the background: some text of the first is the second's."""
    ranges = {"one": (1, 14), "two": (20, 33), "far": (36, 50)}
    windows = {
        name: (_windows(seed, *between), _windows(seed + 10, *between, count=12))
        for seed, (name, between) in enumerate(ranges.items())
    }
    strays = _windows(20, *ranges["two"], count=3)
    windows["one"] = (windows["one"][0] + strays, windows["one"][1])
    background = _background()
    learnt = {name: learn_signature(*own, background) for name, own in windows.items()}
    return learnt, windows, background


def _taken(case, name, other, place, margin):
    """Count the held-out texts of a domain, and those that another one takes by a margin."""
    learnt, windows, background = case
    rival = learnt[other]
    least = rival.least_scores[place]
    count = taken = 0
    for kept, held_out in hold_out(*windows[name]):
        weights = weigh_tokens(kept, background)
        for window in held_out:
            for found, texts in cut_texts(window):
                if found != place:
                    continue
                own = score_texts(texts, weights, background.ignored)
                score = score_texts(texts, rival.tokens.float(), background.ignored)
                ahead = (score - own) * LENGTHS[place]
                seen = share_seen(rival.pairs, texts, texts != 0)
                for told, share, lead in zip(score, seen, ahead.tolist(), strict=True):
                    count += 1
                    usual = told >= least and share >= rival.least_seen[place]
                    taken += bool(usual) and lead >= margin
    return count, taken


@pytest.mark.parametrize("target", [0.02, 0.2])
def test_no_more_texts_are_taken_than_was_stated(case, target):
    learnt, windows, background = case
    found = find_margins(learnt, windows, background, target)
    share = target / 2
    for name, signature in found.items():
        signature.check()
        signature.check_values()
        assert float(signature.target_error) == pytest.approx(target)
        others = [other for other in learnt if other != name]
        for row, other in enumerate(others):
            assert int(signature.peers[row]) == learnt[other].digest
            for place in (0, 2):
                margin = float(signature.margins[row, place])
                count, taken = _taken(case, name, other, place, margin)
                assert count == int(signature.trials[place])
                if share * count < 1:
                    assert margin == pytest.approx(USUAL_MARGIN)
                    continue
                assert taken <= share * count
                if margin > USUAL_MARGIN + 1e-4:  # the least one that will do
                    assert _taken(case, name, other, place, margin - 0.01)[1] > share * count - 1


def test_near_domains_need_more_and_a_stricter_target_does_not_need_less(case):
    strict, loose = (find_margins(*case, target) for target in (0.02, 0.2))
    for name in strict:
        assert (strict[name].margins >= loose[name].margins).all()
    near, far = strict["one"].margins[:, 2]  # texts of 32 tokens
    assert near > far == pytest.approx(USUAL_MARGIN)


def test_few_texts_show_nothing(case):
    learnt, windows, background = case
    few = {name: (own[0][:2], ()) for name, own in windows.items()}
    found = find_margins(learnt, few, background, 0.01)
    assert torch.allclose(found["one"].margins, torch.full((2, len(LENGTHS)), USUAL_MARGIN))


def test_a_domain_alone_has_no_peers(case):
    learnt, windows, background = case
    found = find_margins({"one": learnt["one"]}, {"one": windows["one"]}, background, 0.01)
    assert found["one"].margins.shape == (0, len(LENGTHS))
    found["one"].check()


def test_margins_hold_for_whom_they_were_found_whatever_the_names(case):
    found = find_margins(*case, 0.2)
    one, two = found["one"], found["two"]
    count = LENGTHS[0]
    assert one.margin(two, count) == pytest.approx(float(one.margins[0, 0]))
    stranger = replace(two, tokens=two.tokens + 1)
    assert one.margin(stranger, count) == USUAL_MARGIN


def test_the_router_asks_for_the_margin(case):
    found = find_margins(*case, 0.2)
    one, two = found["one"], found["two"]
    ids = torch.arange(1, 1 + LENGTHS[0])
    loose = replace(two, margins=torch.zeros_like(two.margins))
    strict = replace(two, margins=torch.full_like(two.margins, 1e4))
    easy = replace(one, own=one.own - 1e3, background=one.background - 1e3)
    for other, domain in ((loose, "one"), (strict, None)):
        router = Router(signatures={"one": easy, "two": other}, kinds=("tokens",))
        assert router.decide(ids[None])[0].domain == domain


@pytest.mark.parametrize("target", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_is_none_is_refused(target):
    with pytest.raises(sp.PathwaysError, match="share"):
        check_target(target)
