"""Streams: read as far as is needed, split by the text alone, with their origin."""

import itertools

import datasets
import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import streams
from hf_sparse_pathways.discovery import text as text_module
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import TextError
from tests.architectures import build
from tests.texts import documents, tiny_tokenizer


def _digests(read):
    return {document.digest for document in read.items}


class Endless:
    """Rows without an end, counted."""

    def __init__(self, column="text"):
        self.read = 0
        self.column = column

    def __iter__(self):
        for number in itertools.count():
            self.read += 1
            yield {self.column: f"{number} words of document number {number}"}


def _save_rows(folder, count=300):
    lines = datasets.Dataset.from_list([{"text": text} for text in documents("code", count=count)])
    lines.to_json(folder / "rows.jsonl")
    return str(folder / "rows.jsonl")


def test_a_stream_is_read_as_far_as_is_needed():
    stream = Endless()
    read = read_documents(stream, tokens=1000)
    characters = sum(len(document.text) for document in read.items)
    assert characters >= streams.CHARACTERS_PER_TOKEN * 1000 > characters - 100
    assert stream.read == len(read.items)


def test_of_long_documents_there_are_many(monkeypatch):
    monkeypatch.setattr(streams, "LEAST_DOCUMENTS", 40)
    stream = Endless()
    assert len(read_documents(stream, tokens=1).items) == 40 == stream.read


def test_a_stream_ends_at_the_most_that_is_kept(monkeypatch, caplog):
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 5000)
    stream = Endless()
    read = read_documents(stream)
    assert 5000 < sum(len(document.text) for document in read.items) < 5100
    assert f"only the first {len(read.items)} documents" in caplog.text


def test_more_of_a_stream_leaves_every_document_on_its_side():
    few, many = (read_documents(Endless(), tokens=tokens) for tokens in (500, 5000))
    assert len(few.items) < len(many.items)
    for seed in (0, 1):
        (calibration, held), (more, more_held) = (read.split(0.2, seed) for read in (few, many))
        assert _digests(calibration) <= _digests(more)
        assert _digests(held) <= _digests(more_held)
        assert _digests(more).isdisjoint(_digests(more_held))
        assert abs(len(more_held.items) / len(many.items) - 0.2) < 0.05
    assert _digests(more_held) != _digests(many.split(0.2, 0)[1])


def test_a_side_of_a_stream_that_is_empty_is_told():
    with pytest.raises(TextError, match="one side is empty"):
        read_documents(Endless(), tokens=1).split(1e-9)


@pytest.mark.parametrize("tokens", [1, None])
def test_few_documents_are_split_as_a_list_of_them(tokens):
    few = [f"document number {number}" for number in range(6)]
    split, expected = (
        read_documents(source, tokens=tokens).split(0.01) for source in (iter(few), few)
    )
    assert [*map(_digests, split)] == [*map(_digests, expected)]


SOURCES = {
    "json": lambda path: datasets.load_dataset(
        "json", data_files=path, split="train", streaming=True
    ),
    "generator": lambda path: datasets.IterableDataset.from_generator(  # noqa: ARG005
        _rows, gen_kwargs={"count": 300}
    ),
    "interleaved": lambda path: datasets.interleave_datasets(
        [SOURCES["json"](path), SOURCES["generator"](path)]
    ),
    "shuffled": lambda path: SOURCES["json"](path).shuffle(seed=0, buffer_size=50),
    "chosen column": lambda path: (
        SOURCES["json"](path)
        .map(lambda row: {"other": "!", "body": row["text"]})
        .remove_columns("text")
        .select_columns(["body"])
    ),
}


def _rows(count):
    yield from ({"text": text} for text in documents("code", count=count))


@pytest.mark.parametrize("kind", SOURCES)
def test_datasets_that_stream_are_read(kind, tmp_path):
    source = SOURCES[kind](_save_rows(tmp_path))
    read = read_documents(source, tokens=1)
    assert read.streamed
    assert {document.text for document in read.items} <= set(documents("code", count=300))
    assert len(read.items) >= streams.LEAST_DOCUMENTS / 2  # interleaved ones are twins


def test_a_profile_of_a_stream_is_that_of_its_rows(tmp_path):
    stream = SOURCES["json"](_save_rows(tmp_path))
    sources = [{"code": stream}, {"code": datasets.Dataset.from_list(list(stream))}]
    found, expected = (
        sp.profile(build("llama"), tiny_tokenizer(), source, max_tokens=2000, grams=False)
        for source in sources
    )
    assert found["code"].provenance["digests"] == expected["code"].provenance["digests"]
    ids = [[window.ids for window in taken["code"].windows] for taken in (found, expected)]
    assert ids[0] == ids[1]


def test_where_a_local_dataset_is_from(tmp_path):
    read = read_documents(SOURCES["json"](_save_rows(tmp_path)), tokens=1)
    assert read.datasets == ({"name": "json", "config": "default", "split": "train"},)
    calibration, held = read.split(0.2)
    assert calibration.datasets == held.datasets == read.datasets
    assert read_documents(["a text"]).datasets == ()


def test_a_missing_column_names_those_there_are():
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"body": "a", "title": "b"}]))
    with pytest.raises(TextError, match=r"columns are body, title.*select_columns"):
        read_documents(rows)


def test_splits_are_no_text():
    splits = datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(_rows)})
    with pytest.raises(TextError, match=r"splits: 'train'.*dataset\['train'\]"):
        read_documents(splits)
