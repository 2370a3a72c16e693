"""Signatures from windows: thresholds come from documents that were not counted."""

import torch

from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.documents import Document
from hf_sparse_pathways.discovery.signatures import FOLDS, hold_out, learn_signature
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.pathways.pairs import share_seen
from hf_sparse_pathways.pathways.signature import LENGTHS

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
