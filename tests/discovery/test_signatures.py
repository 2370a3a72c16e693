"""Signatures from windows: thresholds come from documents that were not counted."""

import torch

from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.documents import Document
from hf_sparse_pathways.discovery.signatures import (
    FOLDS,
    hold_out,
    learn_signature,
    score_texts,
    take_quantiles,
    weigh_tokens,
)
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.pathways.pairs import share_seen
from hf_sparse_pathways.pathways.signature import LENGTHS, LEVELS

VOCABULARY = 5_000


def _window(generator, document):
    ids = torch.randint(1, VOCABULARY, (64,), generator=generator).tolist()
    return Window(tuple(ids), Document(text=document, origin="made"))


def _background():
    empty = torch.empty(0, dtype=torch.int32)
    return Background(
        probabilities=torch.full((VOCABULARY,), 1 / VOCABULARY),
        samples=torch.randint(VOCABULARY, (64, 8)).int(),
        ignored=torch.tensor([0], dtype=torch.int32),
        prefix=empty,
        suffix=empty,
    )


def test_pairs_of_text_that_repeats_nothing_are_no_sign():
    """Held-out text of random tokens shares no pairs, though its own are all known."""
    generator = torch.Generator().manual_seed(0)
    windows = [_window(generator, str(number)) for number in range(40)]
    signature = learn_signature(windows, windows[:0], _background())
    signature.check()
    signature.check_values()
    ids = torch.tensor([window.ids for window in windows])
    assert bool((share_seen(signature.pairs, ids, torch.ones_like(ids).bool()) == 1.0).all())
    assert float(signature.own_pairs[LENGTHS.index(32)].max()) < 0.2


def test_pairs_that_documents_share_are_a_sign():
    generator = torch.Generator().manual_seed(0)
    same = _window(generator, "")
    windows = [Window(same.ids, Document(text=str(n), origin="made")) for n in range(40)]
    signature = learn_signature(windows, [], _background())
    assert bool((signature.own_pairs == 1.0).all())


def test_a_long_document_that_is_unlike_the_others_decides_nothing():
    """A fifth of all text is of one document that has nothing of the others."""
    generator = torch.Generator().manual_seed(0)
    same = _window(generator, "")
    windows = [Window(same.ids, Document(text=str(n), origin="made")) for n in range(80)]
    odd = [Window(_window(generator, "").ids, Document("odd", "made")) for _ in range(20)]
    apart = [Window(one.ids, Document(str(n), "apart")) for n, one in enumerate(odd, start=100)]
    place = LENGTHS.index(32)
    usual = learn_signature([*windows, *odd], [], _background())
    split = learn_signature([*windows, *apart], [], _background())
    assert usual.least_seen[place] == 1.0
    assert split.least_seen[place] < 0.2
    assert usual.least_scores[place] > split.least_scores[place]


def test_what_the_model_writes_is_of_one_weight():
    """Its scores are mostly negative, and none of them counts more than another."""
    generator = torch.Generator().manual_seed(0)
    same = _window(generator, "")
    windows = [Window(same.ids, Document(text=str(n), origin="made")) for n in range(40)]
    background = _background()
    signature = learn_signature(windows, [], background)
    weights = weigh_tokens(windows, background)
    samples = background.samples.long()
    texts = torch.stack([samples.roll(-start, 0).flatten()[:8] for start in range(len(samples))])
    scores = score_texts(texts, weights, background.ignored)
    assert bool((scores < 0).any())
    assert bool((scores > 0).any())
    expected = scores.quantile(torch.tensor(LEVELS))
    torch.testing.assert_close(signature.background[0], expected)


def test_quantiles_are_weighted():
    values = torch.tensor([3.0, 1.0, 2.0, 5.0])
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    expected = values.quantile(torch.tensor(levels))
    torch.testing.assert_close(take_quantiles(values, torch.ones(4), levels), expected)
    torch.testing.assert_close(take_quantiles(values, torch.full((4,), 7.0), levels), expected)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0])  # middles of 1, 2, 3, 5 at 0, 1.5, 2.5, 3.5
    middle = take_quantiles(values, weights, (0.5,))
    torch.testing.assert_close(middle, torch.tensor([2.25]))
    assert take_quantiles(torch.tensor([4.0]), torch.ones(1), levels).tolist() == [4.0] * 5


def test_no_document_is_held_out_from_itself():
    generator = torch.Generator().manual_seed(0)
    windows = [_window(generator, str(number // 2)) for number in range(20)]
    validation = [_window(generator, "other")]
    found = list(hold_out(windows, validation))
    assert len(found) == 1 + FOLDS
    assert found[0] == (windows, validation)
    for kept, held_out in found[1:]:
        assert len(kept) + len(held_out) == len(windows)
        assert not {w.document.digest for w in kept} & {w.document.digest for w in held_out}
