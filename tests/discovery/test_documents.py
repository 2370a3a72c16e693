"""Documents are known by their content, and no split shares one."""

import random

import pytest

from hf_sparse_pathways.discovery.documents import SECTION_CHARACTERS, Document, Documents, spans
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import PathwaysError, TextError
from tests.texts import documents

TEXTS = documents("code", count=8)


def test_digests_ignore_outer_space_and_take_any_text():
    assert Document(" a \n", "x").digest == Document("a", "y").digest
    assert Document("a", "x").digest != Document("b", "x").digest
    assert Document("lone \ud83d surrogate", "x").digest


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 5, 40])
def test_a_split_is_disjoint_and_complete(fraction, count):
    read = read_documents(documents("law", count=count))
    calibration, held_out = read.split(fraction)
    mine, theirs = ({d.digest for d in part.items} for part in (calibration, held_out))
    assert mine
    assert theirs
    assert not mine & theirs
    assert mine | theirs == {document.digest for document in read.items}
    assert len(theirs) == min(max(1, round(fraction * count)), count - 1)
    for part in (calibration, held_out):
        assert [d for d in read.items if d in part.items] == list(part.items), "order kept"


def test_a_split_is_independent_of_order_and_duplicates():
    texts = documents("law", count=30)
    shuffled = texts + texts[:7]
    random.Random(1).shuffle(shuffled)
    for seed in (0, 1):
        parts = (read_documents(source).split(0.3, seed) for source in (texts, shuffled))
        first, second = ([{d.digest for d in part.items} for part in pair] for pair in parts)
        assert first == second


def test_a_split_survives_added_documents_mostly():
    texts = documents("law", count=100)
    before = {d.digest for d in read_documents(texts[:90]).split(0.2)[1].items}
    after = {d.digest for d in read_documents(texts).split(0.2)[1].items}
    assert len(before & after) >= 0.7 * len(before)


def test_splits_are_deterministic_and_seeds_differ():
    read = read_documents(documents("law", count=30))
    held_out = [read.split(0.3, seed)[1].items for seed in (0, 0, 1, 2)]
    assert held_out[0] == held_out[1]
    assert len({held_out[0], held_out[2], held_out[3]}) == 3


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(PathwaysError, match="held_out"):
        read_documents(TEXTS).split(fraction)


def test_a_single_short_document_cannot_be_split():
    with pytest.raises(TextError, match="too few"):
        read_documents("short").split(0.5)


def test_a_single_long_document_is_cut_into_sections_and_split():
    text = "\n".join(documents("code", count=200))
    read = read_documents(text)
    assert "".join(document.text for document in read.items) == text
    assert len(read.items) > len(text) // SECTION_CHARACTERS
    assert max(len(document.text) for document in read.items) <= SECTION_CHARACTERS
    assert len({document.origin for document in read.items}) == len(read.items)
    calibration, held_out = read.split(0.2)
    assert calibration.items
    assert held_out.items
    assert not {d.digest for d in calibration.items} & {d.digest for d in held_out.items}


def test_many_documents_are_not_cut():
    long = "\n".join(documents("code", count=200))
    assert [document.text for document in read_documents([long, *TEXTS]).items] == [long, *TEXTS]


@pytest.mark.parametrize(
    "text",
    [("word " * 800) * 5, "begin" + " " * 20_000 + "end"],
    ids=["repetitive", "blank in the middle"],
)
def test_sections_are_distinct_and_not_blank(text):
    read = read_documents(text)
    assert all(document.text.strip() for document in read.items)
    assert len({document.digest for document in read.items}) == len(read.items)


def test_a_repetitive_document_is_never_split_into_nothing():
    read = read_documents(("word " * 800) * 5)
    try:
        parts = read.split(0.2)
    except TextError:
        return
    assert all(part.items for part in parts)


def test_without_removes_by_digest_and_is_pure():
    read = read_documents(TEXTS)
    first, *rest = read.items
    assert read.without([first.digest]) == Documents(items=tuple(rest), source=read.source)
    assert len(read.items) == len(TEXTS)


def _random_text(seed):
    generator = random.Random(seed)
    alphabet = generator.choice(["ab", "a \n", "word\n\n ", "é\u2028 \t.", " "])
    return "".join(generator.choices(alphabet, k=generator.randrange(0, 300)))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50, 299, 1000])
def test_spans_cover_the_text_without_overlap(length):
    for seed in range(60):
        text = _random_text(seed)
        pieces = list(spans(text, length))
        assert "".join(text[start:end] for start, end in pieces) == text
        assert all(0 < end - start <= length for start, end in pieces)
        assert [end for _, end in pieces[:-1]] == [start for start, _ in pieces[1:]]


@pytest.mark.parametrize(
    ("text", "length", "first"),
    [
        ("aaaa bbbb\ncccc dddd\n\neeee ffff", 22, "aaaa bbbb\ncccc dddd\n"),
        ("aaaa bbbb\ncccc dddd\n\neeee ffff", 13, "aaaa bbbb\n"),
        ("aaaa bbbb cccc", 11, "aaaa bbbb "),
        ("aaaabbbbcccc", 5, "aaaab"),
    ],
)
def test_spans_end_at_a_paragraph_a_line_or_a_space(text, length, first):
    start, end = next(iter(spans(text, length)))
    assert text[start:end] == first


def test_sections_and_wholes_know_each_other(tmp_path):
    long = "\n".join(documents("code", count=300))
    (tmp_path / "long.txt").write_text(long)
    for index, text in enumerate(documents("law", count=6)):
        (tmp_path / f"{index}.txt").write_text(text)
    sections, folder = read_documents(tmp_path / "long.txt"), read_documents(tmp_path)
    assert len(sections.items) > 1
    assert len(folder.items) == 7
    (whole,) = {section.whole for section in sections.items}
    assert len(folder.without([], [whole]).items) == 6
    assert not sections.without([whole]).items
    assert len(sections.without([], [whole]).items) == len(sections.items)
    half = [section.digest for section in sections.items[::2]]
    assert len(sections.without(half, [whole]).items) == len(sections.items) - len(half)


def test_a_copy_with_other_ends_of_lines_is_the_same_document():
    first, second = (Document(f"one{end}two{end}", "") for end in ("\n", "\r\n"))
    assert first.digest == second.digest
