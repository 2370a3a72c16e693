"""How far a domain has to be ahead of another: counted on held-out text, for a stated error."""

import itertools
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.documents import Document
from hf_sparse_pathways.discovery.margins import check_target, find_margins, share_out
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
        for found, texts, _ in cut_texts(held_out):
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
    for name, signature in found.items():
        signature.check()
        signature.check_values()
        assert float(signature.target_error) == pytest.approx(target)
        others = [other for other in learnt if other != name]
        assert signature.peers.tolist() == [learnt[other].digest for other in others]
        for place in (0, 2):
            margins = signature.margins[:, place].tolist()
            counted = [
                _taken(case, name, other, place, margin)
                for other, margin in zip(others, margins, strict=True)
            ]
            count, allowed = counted[0][0], int(target * counted[0][0])
            assert count == int(signature.trials[place])
            assert sum(taken for _, taken in counted) <= allowed
            for other, margin in zip(others, margins, strict=True):  # no higher than has to be
                if margin > USUAL_MARGIN + 1e-4:
                    less = _taken(case, name, other, place, margin - 0.01)[1]
                    assert less > _taken(case, name, other, place, margin)[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_shared_out_so_that_least_is_held_back(seed):
    """Against all ways to share it out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count, shift):
        nats = 20 * torch.randn(count, generator=generator) + shift
        return nats.sort(descending=True).values

    pairs = [(draw(6, 10.0), draw(40, 30.0)) for _ in range(3)]
    allowed = 4

    def lost(margins):
        shares = [(own < m).float().mean() for (_, own), m in zip(pairs, margins, strict=True)]
        return float(sum(shares))

    def taken(margins):
        return sum(int((leads >= m).sum()) for (leads, _), m in zip(pairs, margins, strict=True))

    after = [
        sorted({USUAL_MARGIN, *(max(USUAL_MARGIN, float(lead) + 1e-4) for lead in leads)})
        for leads, _ in pairs
    ]
    best = min(lost(way) for way in itertools.product(*after) if taken(way) <= allowed)
    margins = share_out(pairs, allowed)
    assert taken(margins) <= allowed
    assert lost(margins) == pytest.approx(best)


def test_a_few_strays_take_the_error_that_no_other_domain_needs(case):
    """Shared in equal parts it would not do for them, and most of their domain was held back."""
    learnt, windows, background = case
    strays = 3 * 128 // 32  # three windows, in texts of 32 tokens
    trials = int(find_margins(*case, 0.2)["one"].trials[2])
    target = 1.2 * strays / trials
    found = find_margins(learnt, windows, background, target)["one"]
    assert float(found.margins[0, 2]) == pytest.approx(USUAL_MARGIN)


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
