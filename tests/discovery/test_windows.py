"""A token budget is met exactly, from many documents, at the cost of the budget alone."""

import random

import pytest
import torch

from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.windows import (
    CHARACTERS_PER_TOKEN,
    Window,
    count_tokens,
    draw_windows,
    make_batches,
)
from hf_sparse_pathways.errors import PathwaysError
from tests.texts import CHARACTERS, documents, tiny_tokenizer

DOCUMENTS = read_documents(documents("code", count=20, words=40))
TOKENIZERS = {
    "words": tiny_tokenizer("words"),
    "characters": tiny_tokenizer("characters"),
    "words with bos": tiny_tokenizer("words", bos=True),
    "characters with bos": tiny_tokenizer("characters", bos=True),
}


class Counting:
    """A tokenizer that counts its calls and the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls, self.characters = tokenizer, 0, 0

    def __call__(self, text, **options):
        self.calls += 1
        self.characters += len(text)
        return self.tokenizer(text, **options)


def _draw(kind, documents=DOCUMENTS, max_tokens=300, max_length=16, seed=0):
    return draw_windows(
        documents, TOKENIZERS[kind], max_tokens=max_tokens, max_length=max_length, seed=seed
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_length", [1, 2, 7, 64])
@pytest.mark.parametrize("max_tokens", [1, 2, 63, 500])
def test_the_budget_is_met_exactly_and_windows_are_short(kind, max_length, max_tokens):
    windows = _draw(kind, max_tokens=max_tokens, max_length=max_length)
    lengths = [len(window.ids) for window in windows]
    assert sum(lengths) == max_tokens == count_tokens(windows)
    assert min(lengths) >= 1
    assert max(lengths) <= max_length


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_short_documents_are_covered_when_the_budget_allows(kind):
    whole = _draw(kind, max_tokens=10**6, max_length=500)
    tokenizer = TOKENIZERS[kind]
    expected = {d.digest: tuple(tokenizer(d.text)["input_ids"]) for d in DOCUMENTS.items}
    assert {window.document.digest: window.ids for window in whole} == expected
    assert len(whole) == len(expected)


@pytest.mark.parametrize("max_length", [1, 2, 3, 10, 17])
@pytest.mark.parametrize("kind", ["words", "characters"])
def test_long_documents_are_cut_without_losing_a_character(kind, max_length):
    """Each span is its own text for a word tokenizer, so only characters must be complete."""
    windows = _draw(kind, max_tokens=10**6, max_length=max_length)
    drawn = sorted(token for window in windows for token in window.ids)
    if kind == "characters":
        whole = (TOKENIZERS[kind](d.text)["input_ids"] for d in DOCUMENTS.items)
        assert drawn == sorted(token for ids in whole for token in ids)
    assert len(drawn) >= sum(len(TOKENIZERS[kind](d.text)["input_ids"]) for d in DOCUMENTS.items)


@pytest.mark.parametrize("seed", range(8))
def test_random_texts_lose_nothing(seed):
    generator = random.Random(seed)
    texts = [
        "".join(generator.choices(CHARACTERS + " \n" * 20, k=generator.randrange(1, 200)))
        for _ in range(5)
    ]
    read = read_documents([text + "." for text in texts])
    tokenizer = TOKENIZERS["characters"]
    windows = _draw("characters", read, 10**6, generator.randrange(1, 40))
    expected = sorted(t for d in read.items for t in tokenizer(d.text)["input_ids"])
    assert sorted(t for window in windows for t in window.ids) == expected


@pytest.mark.parametrize("kind", ["words with bos", "characters with bos"])
def test_each_window_starts_as_the_tokenizer_starts_a_text(kind):
    windows = _draw(kind, max_tokens=400, max_length=9)
    assert {window.ids[0] for window in windows} == {TOKENIZERS[kind].bos_token_id}


def test_windows_are_deterministic_and_seeds_differ():
    first, again, other = (_draw("words", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_small_budget_still_sees_many_documents():
    windows = _draw("words", max_tokens=200, max_length=10)
    assert len({window.document.digest for window in windows}) >= 10


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_a_big_corpus_costs_no_more_than_the_budget(kind):
    read = read_documents(documents("law", count=3000, words=40))
    counting = Counting(TOKENIZERS[kind])
    draw_windows(read, counting, max_tokens=200, max_length=20, seed=0)
    span = CHARACTERS_PER_TOKEN * 20
    assert counting.calls <= 60
    assert counting.characters <= 60 * span
    assert sum(len(document.text) for document in read.items) > 100 * counting.characters


@pytest.mark.parametrize("name", ["max_tokens", "max_length"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_below_one_is_refused(name, value):
    with pytest.raises(PathwaysError, match=name):
        _draw("words", **{name: value})


def test_any_text_that_can_be_read_can_be_tokenised():
    """JSON may hold half of a surrogate pair, which fast tokenizers refuse."""
    read = read_documents([{"text": "the court \ud83d is the judge"}])
    assert count_tokens(_draw("words", read)) >= 5


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_batches_hold_every_window_once_with_right_padding(batch_size):
    windows = _draw("words", max_tokens=311, max_length=16)
    batches = list(make_batches(windows, batch_size))
    key = [(window.ids, window.document.digest) for window in windows]
    seen = [(window.ids, window.document.digest) for batch in batches for window in batch.windows]
    assert sorted(seen) == sorted(key)
    for batch in batches:
        assert batch.ids.shape == batch.mask.shape
        assert batch.ids.dtype == torch.int64
        assert batch.mask.dtype == torch.bool
        assert len(batch.windows) <= batch_size
        assert batch.mask[0].all(), "no column is padding alone"
        for ids, mask, window in zip(batch.ids, batch.mask, batch.windows, strict=True):
            length = len(window.ids)
            assert tuple(ids[:length].tolist()) == window.ids
            assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
            assert not ids[length:].any()


def test_windows_of_like_length_are_batched():
    document = DOCUMENTS.items[0]
    windows = [Window(tuple(range(1, 1 + length)), document) for length in (1, 9, 1, 9, 1, 9)]
    assert [batch.mask.all().item() for batch in make_batches(windows, 3)] == [True, True]


def test_no_windows_are_no_batches():
    assert list(make_batches([], 4)) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(PathwaysError, match="batch_size"):
        list(make_batches(_draw("words"), batch_size))
