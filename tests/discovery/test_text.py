"""Every kind of text source gives the same documents; a split never shares one."""

import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import text as text_module
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import TextError
from tests.architectures import tiny_llama
from tests.texts import documents, tiny_tokenizer

TEXTS = documents("code", count=8)
ROWS = [{"text": text, "id": str(index)} for index, text in enumerate(TEXTS)]


def _texts(source, **options):
    return [document.text for document in read_documents(source, **options).items]


def _files(folder, suffix=".txt"):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}{suffix}" for index in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def _json_lines(path, rows=ROWS):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def _parquet(path, columns=None, **options):
    columns = {"text": TEXTS} if columns is None else columns
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


class Stream:
    """An iterable without a length."""

    def __iter__(self):
        return iter(ROWS)


SOURCES = {
    "strings": lambda _: TEXTS,
    "tuple": lambda _: tuple(TEXTS),
    "generator": lambda _: (text for text in TEXTS),
    "rows": lambda _: ROWS,
    "stream of rows": lambda _: Stream(),
    "content column": lambda _: [{"content": t, "url": "x"} for t in TEXTS],
    "text beats content": lambda _: [{"content": "no", "text": t} for t in TEXTS],
    "only column": lambda _: [{"body": t, "stars": 3} for t in TEXTS],
    "paths": lambda folder: _files(folder),
    "paths as strings": lambda folder: [str(path) for path in _files(folder)],
    "folder": lambda folder: _files(folder)[0].parent,
    "folder as string": lambda folder: str(_files(folder)[0].parent),
    "markdown": lambda folder: _files(folder, ".md")[0].parent,
    "python": lambda folder: _files(folder, ".py")[0].parent,
    "upper case suffix": lambda folder: _files(folder, ".TXT")[0].parent,
    "glob": lambda folder: f"{_files(folder)[0].parent}/*.txt",
    "glob of an unknown suffix": lambda folder: f"{_files(folder, '.xyz')[0].parent}/[0-9].xyz",
    "recursive glob": lambda folder: f"{_files(folder / 'deep')[0].parents[1]}/**/*.txt",
    "jsonl": lambda folder: _json_lines(folder / "rows.jsonl"),
    "jsonl of strings": lambda folder: _json_lines(folder / "rows.jsonl", TEXTS),
    "jsonl with blank lines": lambda folder: _spaced(_json_lines(folder / "rows.jsonl")),
    "parquet": lambda folder: _parquet(folder / "rows.parquet"),
    "parquet in row groups": lambda folder: _parquet(folder / "a.parquet", row_group_size=3),
    "Dataset": lambda _: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda _: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "Documents": lambda _: read_documents(TEXTS),
}


def _spaced(path):
    path.write_text(path.read_text().replace("\n", "\n\n  \n"))
    return path


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_documents(kind, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    read = read_documents(SOURCES[kind](folder))
    assert [document.text for document in read.items] == TEXTS
    assert [d.digest for d in read.items] == [d.digest for d in read_documents(TEXTS).items]
    assert read.source
    json.dumps(read.source)


LITERALS = {
    "words": "a literal text, no file",
    "one word": "hello",
    "slash and spaces": "either and/or both are fine",
    "glob characters": "Is this **bold**? Yes [it is]",
    "several lines": "one\n/two.txt\n",
    "suffix and spaces": "see main.py",
    "a long line": "word " * 100,
    "a long line with a question": "what? " * 100,
    "a tilde": "~approximately five words",
    "a NUL": "some\0thing else",
    "very long": "word " * 500,
}


@pytest.mark.parametrize("name", LITERALS)
def test_a_string_that_names_no_file_is_a_text(name):
    assert _texts(LITERALS[name]) == [LITERALS[name]]


@pytest.mark.parametrize("name", LITERALS)
def test_strings_of_a_list_are_texts(name):
    assert _texts([LITERALS[name], "another"]) == [LITERALS[name], "another"]


def test_a_long_line_that_ends_like_a_file_is_a_text_in_a_list():
    line = "word " * 100 + "main.py"
    assert _texts([line]) == [line]


MISSING = {
    "file": lambda folder: str(folder / "absent.txt"),
    "bare file name": lambda _: "absent.txt",
    "path": lambda folder: folder / "absent",
    "path with spaces": lambda folder: folder / "not there",
    "folder": lambda folder: f"{folder}/absent/",
    "glob": lambda folder: f"{folder}/*.txt",
    "glob path": lambda folder: folder / "*.md",
    "user's home": lambda _: "~nobody-of-that-name/a.txt",
    "empty folder": lambda folder: folder,
    "listed path": lambda folder: [folder / "absent.txt"],
    "listed jsonl": lambda folder: [folder / "absent.jsonl"],
    "listed parquet": lambda folder: [folder / "absent.parquet"],
    "listed folder": lambda folder: [folder],
    "listed string": lambda folder: [str(folder / "absent.txt")],
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_path_is_refused_by_name(kind, tmp_path):
    source = MISSING[kind](tmp_path)
    with pytest.raises(TextError) as caught:
        read_documents(source)
    assert str(source[0] if isinstance(source, list) else source) in str(caught.value)


def test_a_folder_is_read_recursively_and_only_known_suffixes(tmp_path):
    nested = tmp_path / "a" / "b.txt"  # a folder with a file's suffix
    nested.mkdir(parents=True)
    (nested / "inner.md").write_text("inner")
    (tmp_path / "top.txt").write_text("top")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG text")
    (tmp_path / "no_suffix").write_text("no suffix")
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    _json_lines(tmp_path / "rows.jsonl", [{"text": "row"}])
    _parquet(tmp_path / "rows.parquet", {"text": ["cell"]})
    assert sorted(_texts(tmp_path)) == ["cell", "inner", "row", "top"]
    assert _texts(tmp_path / "no_suffix") == ["no suffix"]


@pytest.mark.parametrize("name", ["picture.png", "binary.bin"])
def test_a_folder_without_a_known_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"some text")
    with pytest.raises(TextError, match="suffix"):
        read_documents(tmp_path)


EMPTY = {
    "empty string": "",
    "blank string": " \n\t ",
    "empty list": [],
    "blank texts": ["", "  ", "\n"],
    "rows of None": [{"text": "  "}, {"text": None}],
    "empty dataset": datasets.Dataset.from_dict({"text": []}),
    "empty generator": iter(()),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_source_without_text_is_refused(kind):
    with pytest.raises(TextError, match="no text"):
        read_documents(EMPTY[kind])


def test_a_binary_file_alone_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("utf-16 is no UTF-8".encode("utf-16"))
    with pytest.raises(TextError, match=r"a\.txt"):
        read_documents(tmp_path / "a.txt")


@pytest.mark.parametrize("source", [None, 5, 1.5, b"bytes", {"text": "x"}, [5], [None], [b"x"]])
def test_what_is_no_text_source_is_refused(source):
    with pytest.raises(TextError):
        read_documents(source)


@pytest.mark.parametrize(
    "row", [{"title": "a", "body": "b"}, {"ids": [1, 2]}, {}], ids=["two strings", "none", "empty"]
)
@pytest.mark.parametrize("wrap", [list, iter], ids=["list", "iterator"])
def test_rows_without_a_clear_text_column_are_refused_with_their_columns(row, wrap):
    with pytest.raises(TextError) as caught:
        read_documents(wrap([row]))
    assert all(name in str(caught.value) for name in row)


@pytest.mark.parametrize("empty", [None, float("nan")])
@pytest.mark.parametrize("column", ["text", "content"])
def test_an_empty_first_row_does_not_decide_the_column(column, empty):
    rows = [{column: empty, "id": "a"}, {column: "a real document", "id": "b"}]
    assert "a real document" in _texts(rows)
    assert "b" not in _texts(rows)


def test_blank_and_duplicate_documents_count_once():
    read = _texts(["a", "b", "a", " ", " a\n", "", "b"])
    assert sorted(text.strip() for text in read) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    text = json.dumps({"text": "hello"}) if suffix == ".jsonl" else "hello"
    (tmp_path / f"a{suffix}").write_text(text, encoding="utf-8-sig")
    assert _texts(tmp_path / f"a{suffix}") == ["hello"]


def test_invalid_utf8_is_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert _texts(tmp_path / "a.txt") == ["caf\ufffd au lait"]


CORRUPT = {
    "truncated jsonl": ("a.jsonl", b'{"text": "one"}\n{"text": "tw'),
    "no json": ("a.jsonl", b"hello\n"),
    "number": ("a.jsonl", b"5\n"),
    "deep nesting": ("a.jsonl", b"[" * 100_000),
    "huge number": ("a.jsonl", b"1" * 5000),
    "empty parquet": ("a.parquet", b""),
    "text as parquet": ("a.parquet", b"hello " * 100),
    "magic alone": ("a.parquet", b"PAR1PAR1"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_file_is_a_text_error_that_names_it(kind, tmp_path):
    name, content = CORRUPT[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=name):
        read_documents(tmp_path / name)


def test_the_line_of_corrupt_jsonl_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": oops}\n')
    with pytest.raises(TextError, match="line 3"):
        read_documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.99])
def test_truncated_parquet_is_a_text_error(tmp_path, fraction):
    whole = _parquet(tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(TextError, match=r"a\.parquet"):
        read_documents(tmp_path / "a.parquet")


def test_parquet_with_invalid_utf8_is_a_text_error_or_read(tmp_path):
    options = {"compression": "none", "use_dictionary": False}
    path = _parquet(tmp_path / "a.parquet", {"text": ["needle in hay"]}, **options)
    whole = path.read_bytes()
    assert whole.count(b"needle in") >= 1
    path.write_bytes(whole.replace(b"needle in", b"\xff" * 9))
    try:
        read_documents(path)
    except TextError as error:
        assert "a.parquet" in str(error)  # noqa: PT017


@pytest.mark.parametrize("limit", ["MAX_ROWS", "MAX_CHARACTERS"])
def test_a_source_that_is_too_large_is_read_in_part(monkeypatch, tmp_path, limit):
    monkeypatch.setattr(text_module, limit, 3)
    source = TEXTS if limit == "MAX_ROWS" else _files(tmp_path / "f")[0].parent
    read = _texts(source)
    assert len(read) == (3 if limit == "MAX_ROWS" else 1)
    assert read == _texts(source)
    assert read == [text for text in TEXTS if text in read], "the source's order"
    assert len({tuple(_texts(source, seed=seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("limit", "most"), [("MAX_ROWS", 5), ("MAX_CHARACTERS", 100)])
def test_a_file_of_rows_is_sampled_from_all_over(
    monkeypatch, tmp_path, caplog, suffix, limit, most
):
    monkeypatch.setattr(text_module, limit, most)
    rows = [f"row {index:03} of the file" for index in range(100)]
    path = tmp_path / f"sorted.{suffix}"
    if suffix == "parquet":
        _parquet(path, {"text": rows})
    else:
        path.write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows))
    read = [_texts(path, seed=seed) for seed in range(20)]
    assert all(len(texts) == 5 for texts in read)  # of 20 characters each
    assert all(texts == sorted(texts) and set(texts) <= set(rows) for texts in read)
    assert read[3] == _texts(path, seed=3)
    places = [int(text[4:7]) for texts in read for text in texts]
    assert 35 < sum(places) / len(places) < 65
    assert min(places) < 15
    assert max(places) > 85
    assert "5 of 100 rows kept, chosen at random" in caplog.text


def test_a_row_that_is_too_large_alone_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 3)
    (tmp_path / "a.jsonl").write_text('{"text": "much too long"}\n')
    assert _texts(tmp_path / "a.jsonl") == ["much too long"]


def test_a_stream_that_is_too_long_is_cut(monkeypatch, caplog):
    monkeypatch.setattr(text_module, "MAX_ROWS", 3)
    assert _texts(Stream()) == TEXTS[:3]
    assert "only the first 3 rows" in caplog.text


@pytest.mark.parametrize(
    "text", ["my texts/held out.py", "nicht da/*.py", "C:\\my texts\\a b.txt", "a/b c/*.jsonl"]
)
def test_a_mistyped_path_with_spaces_is_not_a_text(text):
    with pytest.raises(TextError, match="file"):
        read_documents(text)


@pytest.mark.parametrize(
    "text", ["see docs/readme.md", "The parser, in src/a.py", "either/or main.py", "my texts/a.txt"]
)
def test_words_of_a_list_that_end_in_a_path_are_a_text(text, caplog):
    assert _texts([text, "another"]) == [text, "another"]
    assert _texts(iter([text])) == [text]
    assert caplog.text == ""


@pytest.mark.parametrize("text", ["/no such/a.py", "./my texts/a.md", "~/x y.txt", "C:\\a b.txt"])
def test_that_a_listed_path_with_spaces_is_taken_for_a_text_is_said(text, caplog):
    assert _texts([text]) == [text]
    assert f"there is no file {text!r}, so it is taken for a text" in caplog.text


def test_a_listed_path_with_spaces_is_read(tmp_path):
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "see a.md").write_text("what is in it")
    assert _texts([str(tmp_path / "my texts" / "see a.md")]) == ["what is in it"]


def test_an_empty_glob_as_a_path_is_refused_by_name(tmp_path):
    with pytest.raises(TextError, match="No file matches"):
        read_documents(tmp_path / "with space" / "*.py")


def test_short_words_of_a_list_are_texts():
    words = ["n/a", "ok?", "and/or", "[sic]", "TCP/IP", "main.py", "what*"]
    assert _texts(words) == words


def test_a_dataset_of_the_hub_is_known_by_its_files():
    """Those of this machine are not, whatever their folder is called."""
    known = {
        "hf://datasets/me/laws@0a1b/data/train-00000-of-00001.parquet": None,
        "hf://datasets/me/laws@0a1b/data/train-00001-of-00001.parquet": None,
        "hf://datasets/squad@0a1b/train.parquet": None,
        "/home/me/datasets/me/laws@1/x.parquet": None,
        "https://example.org/datasets/me/other@1/x.csv": None,
    }
    rows = datasets.Dataset.from_list([{"text": f"Text {i}. {TEXTS[0]}"} for i in range(9)])
    assert read_documents(rows).datasets == ()
    rows.info.download_checksums = known
    read = read_documents(rows)
    assert read.datasets == ("me/laws", "squad")
    for part in (*read.split(0.3), read.without([read.items[0].digest])):
        assert part.datasets == read.datasets
    assert read_documents("a text").datasets == ()
    profiles = [
        sp.profile(tiny_llama(), tiny_tokenizer(), {"law": own}, max_tokens=64)
        for own in (read, read_documents([f"Other {i}. {TEXTS[1]}" for i in range(9)]))
    ]
    assert [own["law"].provenance["datasets"] for own in profiles] == [["me/laws", "squad"], []]
    merged = profiles[1].merged(profiles[0])["law"]
    assert merged.provenance["datasets"] == ["me/laws", "squad"]
