"""Signatures: saved with their domains, and refused if anybody has put something else there."""

from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import ArtefactError, MismatchError, PathwaysError
from hf_sparse_pathways.pathways.pairs import collect_pairs, share_seen
from hf_sparse_pathways.pathways.signature import (
    LENGTHS,
    LEVELS,
    MISSED,
    Reading,
    interpolate,
    no_margins,
    no_pairs,
)
from tests.architectures import build, random_masks
from tests.pathways.corruption import change_tensors, set_field
from tests.pathways.signatures import make_signature

PATHS = ("code", "law")


@pytest.fixture
def saved(tmp_path):
    """A folder of two domains, of which the second has a signature, and what was saved."""
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense, PATHS))
    signed = replace(paths["law"], signature=make_signature())
    paths = replace(paths, by_domain={**paths.by_domain, "law": signed})
    paths.save_pretrained(tmp_path)
    return tmp_path, paths


def assert_same(first, second):
    for name, part in first.parts().items():
        assert torch.equal(part, second.parts()[name]), name


@pytest.mark.parametrize("only", [None, "law"])
def test_what_is_saved_is_read(saved, only):
    folder, paths = saved
    read = sp.Pathways.from_pretrained(folder, only=only)
    assert read.routed == ["law"]
    assert_same(paths["law"].signature, read["law"].signature)


def test_a_domain_keeps_its_signature_whatever_the_others_do(saved):
    _, paths = saved
    assert paths.subset(["law"]).routed == ["law"]
    assert paths.subset(["code"]).merged(paths.subset(["law"])).routed == ["law"]
    assert paths.with_controls({"pooled": paths["code"]}).routed == ["law"]


def test_a_frame_and_special_tokens_say_nothing():
    signature = make_signature()
    said = signature.tokens[[20, 30]].float().sum()
    for ids in ([20, 30], [5, 6, 20, 30, 7], [0, 20, 1, 30], [20, 30, 99, 1000]):
        read = _read(signature, ids)
        assert (read.nats, read.count) == (pytest.approx(float(said)), 2)
        assert read.score == pytest.approx(float(said) / 2)


def test_pairs_are_of_tokens_that_say_something():
    signature = make_signature()
    pairs = collect_pairs([(torch.tensor([20, 30, 40]), torch.ones(3, dtype=torch.bool))])
    signature = replace(signature, pairs=pairs)
    for ids, seen in (
        ([20, 30, 40], 1.0),
        ([20, 30, 20], 0.5),
        ([40, 30], 0.0),
        ([20, 30, 0, 40, 20], 0.5),  # what is special parts its neighbours
        ([5, 6, 20, 30, 7], 1.0),
        ([20], 0.0),
        ([], 0.0),
    ):
        assert _read(signature, ids).seen == pytest.approx(seen)


def test_a_share_of_pairs_is_the_one_that_thresholds_are_quantiles_of():
    ids, counted = torch.tensor([20, 30, 20, 50]), torch.ones(4, dtype=torch.bool)
    pairs = collect_pairs([(ids[:2], counted[:2])])
    signature = replace(make_signature(), pairs=pairs)
    assert _read(signature, ids.tolist()).seen == float(share_seen(pairs, ids, counted))


def test_thresholds_are_quantiles_and_typicality_is_their_inverse():
    signature = make_signature()
    own, seen = (
        [interpolate(MISSED, LEVELS, row) for row in grid.tolist()]
        for grid in (signature.own, signature.own_pairs)
    )
    background = signature.background[:, LEVELS.index(0.99)].tolist()
    assert signature.least_scores == [max(pair) for pair in zip(own, background, strict=True)]
    assert signature.least_seen == seen
    assert replace(signature, background=signature.background - 1e3).least_scores == own
    middle = LENGTHS[2] * float(signature.own[2, LEVELS.index(0.5)])
    said = Reading(count=LENGTHS[2], nats=middle, seen=0.0)
    assert signature.typicality(said) == pytest.approx(0.5)


def test_interpolation_stays_within():
    assert [interpolate(x, (1.0, 2.0), (10.0, 20.0)) for x in (0, 1, 1.5, 2, 3)] == [
        10.0,
        10.0,
        15.0,
        20.0,
        20.0,
    ]


def _read(signature, ids):
    return signature.read(signature.framing.take(torch.tensor(ids, dtype=torch.int64)))


def _tensor(part, change):
    return lambda path: change_tensors(
        path, lambda t: {**t, f"signature.1.{part}": change(t[f"signature.1.{part}"])}
    )


DAMAGE = {
    "dtype": _tensor("tokens", lambda t: t.float()),
    "no token": _tensor("tokens", lambda t: t[:0]),
    "two dimensions": _tensor("tokens", lambda t: t[None]),
    "a short grid": _tensor("own", lambda t: t[:2]),
    "NaN": _tensor("tokens", lambda t: t.fill_(torch.nan)),
    "quantiles that fall": _tensor("background", lambda t: t.flip(1)),
    "a negative id": _tensor("prefix", lambda t: -t),
    "a margin below zero": _tensor("margins", lambda t: t - 100),
    "margins of NaN": _tensor("margins", lambda t: t.fill_(torch.nan)),
    "margins without peers": _tensor("peers", lambda t: t[:0]),
    "peers in half of the bits": _tensor("peers", lambda t: t.int()),
    "trials below zero": _tensor("trials", lambda t: t - 1),
    "an error of all": _tensor("target_error", torch.ones_like),
    "pairs of floats": _tensor("pairs", lambda t: t.float()),
    "half of the pairs": _tensor("pairs", lambda t: t[: len(t) // 2]),
    "shares that fall": _tensor("own_pairs", lambda t: t.flip(1)),
    "a short grid of shares": _tensor("own_pairs", lambda t: t[:2]),
    "errors of many": _tensor("target_error", lambda t: t.repeat(2)),
    "a part missing": lambda path: change_tensors(
        path, lambda t: {name: part for name, part in t.items() if name != "signature.1.own"}
    ),
    "one of no domain": lambda path: change_tensors(
        path, lambda t: {**t, "signature.0.own": t["signature.1.own"].clone()}
    ),
    "neither yes nor no": lambda path: set_field(path, ["domains", 1, "signature"], "yes"),
    "said to be absent": lambda path: set_field(path, ["domains", 1, "signature"], False),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_was_damaged_is_refused(saved, name):
    folder, _ = saved
    DAMAGE[name](folder / "pathways.json")
    with pytest.raises((ArtefactError, MismatchError)) as told:
        sp.Pathways.from_pretrained(folder)
    assert isinstance(told.value, PathwaysError)


ADDED = {"margins": no_margins(), "pairs": no_pairs()}


@pytest.mark.parametrize("added", [("margins", "pairs"), ("pairs",)], ids=["margins", "pairs"])
def test_pathways_load_that_are_older_than_a_part(saved, added):
    folder, paths = saved
    older = {f"signature.1.{part}" for name in added for part in ADDED[name]}
    change_tensors(
        folder / "pathways.json", lambda t: {n: own for n, own in t.items() if n not in older}
    )
    read = sp.Pathways.from_pretrained(folder)["law"].signature
    assert torch.equal(read.tokens, paths["law"].signature.tokens)
    assert not read.knows_pairs
    assert bool(read.peers.numel()) == ("margins" not in added)


@pytest.mark.parametrize("part", [*no_margins(), *no_pairs()])
def test_what_was_added_together_is_there_as_a_whole_or_not_at_all(saved, part):
    folder, _ = saved
    change_tensors(
        folder / "pathways.json",
        lambda t: {n: own for n, own in t.items() if n != f"signature.1.{part}"},
    )
    with pytest.raises(PathwaysError, match=f"signature.1.{part}"):
        sp.Pathways.from_pretrained(folder)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 4), (2, 5)])
def test_a_template_says_nothing_whatever_padding_stands_beside_it(special, before, after):
    begin = [1, 5, 6] if special else [5, 6]
    finish = [7, 1] if special else [7]
    frame = {"prefix": begin, "suffix": finish}
    frame = {name: torch.tensor(ids, dtype=torch.int32) for name, ids in frame.items()}
    signature = replace(make_signature(), **frame)
    text = [8, 9, 10, 5, 6, 11]
    ids = [0] * before + begin + text + finish + [0] * after
    assert _read(signature, ids) == _read(signature, text)
    assert _read(signature, ids).count == len(text)
    bare = [5, 6, *text, 7]  # without what is special of the template
    assert _read(signature, bare).count == len(text)
    assert _read(signature, [0, 8, *begin]).count == 3  # not where a text begins
