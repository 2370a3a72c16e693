"""Stop strings across pieces, and draws with a generator of one's own."""

import random

import pytest
import torch

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.serving.generation import StopStrings
from hf_sparse_pathways.serving.sampling import Sampling
from hf_sparse_pathways.serving.service import Service
from tests.serving.running import tiny_model


def _shown(stops, pieces):
    filtered = StopStrings(stops)
    shown = []
    for piece in pieces:
        shown.append(filtered.feed(piece))
        if filtered.found:
            break
    return shown, filtered.rest(), filtered.found


@pytest.mark.parametrize("seed", range(30))
def test_a_text_in_pieces_ends_where_the_whole_text_does(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices("ab", k=40))
    stop = "".join(draw.choices("ab", k=draw.randint(1, 6)))
    cuts = sorted(draw.sample(range(1, 40), 8))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 40], strict=True)]
    shown, rest, found = _shown([stop], pieces)
    assert "".join(shown) + rest == text.partition(stop)[0]
    assert found == (stop in text)


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    assert _shown(["###", "\n\n"], ["a#b", "c\n", "#", "#d", "e\n"]) == (
        ["a#b", "c", "\n", "##d", "e"],
        "\n",
        False,
    )
    assert _shown([], ["a", "b"]) == (["a", "b"], "", False)


def _drawn(sampling, scores, device="cpu"):
    for processor in sampling.processors(torch.device(device)):
        scores = processor(None, scores)
    return scores.argmax(-1)


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, -torch.inf])
    rows = logits.expand(40_000, 5)
    counts = _drawn(Sampling(temperature=0.7, seed=1), rows).bincount(minlength=5) / len(rows)
    assert torch.allclose(counts, (logits / 0.7).softmax(0), atol=0.01)
    kept = _drawn(Sampling(top_p=0.8, seed=1), rows).bincount(minlength=5)
    assert kept.bool().tolist() == [True, False, True, False, False]
    assert _drawn(Sampling(top_k=1), rows).unique().tolist() == [0]
    assert _drawn(Sampling(temperature=0), rows).unique().tolist() == [0]


def test_a_seed_is_one_s_own():
    rows = torch.zeros(8, 50)
    first = _drawn(Sampling(seed=3), rows)
    torch.manual_seed(5)
    assert torch.equal(_drawn(Sampling(seed=3), rows), first)
    assert not torch.equal(_drawn(Sampling(), rows), _drawn(Sampling(), rows))
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    _drawn(Sampling(seed=3), rows)
    assert torch.equal(torch.rand(1), before)


def test_a_tokenizer_has_to_stream():
    class Slow:
        is_fast = False

    with pytest.raises(PathwaysError, match=r"Slow cannot.*fast tokenizer"):
        Service(tiny_model(), Slow(), "tiny")
