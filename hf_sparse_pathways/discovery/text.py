"""Documents out of whatever a user has: strings, files, globs, folders, datasets.

A source that is too large is read in part, at random over its files and rows, and says so. Only of
a stream, which may have no end, the first rows are taken: as many as give far more text than is
going to be drawn from them.
"""

import heapq
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, cast

from hf_sparse_pathways.discovery.documents import (
    Document,
    Documents,
    cut_sections,
    distinct_documents,
)
from hf_sparse_pathways.discovery.hub_datasets import SCHEME, Address, describe_dataset
from hf_sparse_pathways.discovery.streams import LEAST_DOCUMENTS, read_as_needed
from hf_sparse_pathways.errors import TextError

logger = logging.getLogger(__name__)

TextSource = Any
"""A string, a path, a list of either, a ``datasets`` object, or any iterable of texts or rows."""

FOLDER_SUFFIXES = frozenset(
    """
    .c .cc .cfg .cpp .cs .css .csv .go .h .hpp .html .java .jl .js .json .jsonl .kt .license .log
    .lua .md .parquet .php .pl .py .r .rb .rs .rst .scala .sh .sql .swift .tex .toml .ts .tsx .txt
    .xml .yaml .yml
    """.split()  # noqa: SIM905
)
"""What is read of a folder; a file that is named itself, or by a glob, may end in anything."""

MAX_ROWS = 200_000
MAX_CHARACTERS = 200_000_000
"""Most that is kept of one source; files and rows beyond are left out at random, which is said."""


def read_documents(source: TextSource, *, seed: int = 0, tokens: int | None = None) -> Documents:
    """Read a text source.

    Args:
        source: One of
            - a string: a file, folder or glob if there is one of that name, a dataset on the Hub
              (``hf://datasets/OWNER/NAME:SPLIT:COLUMN``, see ``hub_datasets``), else a text;
            - a ``Path``;
            - a list of texts, or of paths; what has white space in it and is no file is a text;
            - a ``datasets`` Dataset or IterableDataset, or any iterable of texts or of rows with
              a text column (``text``, ``content``, or the only one that holds strings).
        seed: Decides what is read of a source that is larger than ``MAX_CHARACTERS``.
        tokens: How many are going to be drawn; a stream is read as far as that needs, and without
            it as far as ``MAX_ROWS`` or ``MAX_CHARACTERS``.

    Returns:
        Each distinct document that is not blank.

    Raises:
        TextError: Nothing is there, or it cannot be read as text.
    """
    if isinstance(source, Documents):
        return source
    if isinstance(source, str) and source.startswith(SCHEME):
        return _read_address(Address.parse(source), seed, tokens)
    files = _matching_files(source)
    if files is not None:
        described = str(source).encode(errors="replace").decode()  # any bytes may be in a name
        return _gathered(Documents(items=tuple(_read_files(files, seed)), source=described))
    described = _describe(source)
    items = [source] if isinstance(source, str) else _iterate(source, described)
    return _read_items(items, described, seed, tokens, describe_dataset(source))


def _read_address(address: Address, seed: int, tokens: int | None) -> Documents:
    pinned = address.pinned()
    return _read_items(pinned.stream(), str(address), seed, tokens, pinned.described())


def _read_items(
    items: Iterable[Any],
    described: str,
    seed: int,
    tokens: int | None,
    dataset: dict[str, str],
) -> Documents:
    column = dataset.get("column")
    documents: Iterable[Document] = _from_items(items, described, seed, column)
    streamed = not hasattr(items, "__len__")
    if streamed:
        documents = read_as_needed(documents, described, tokens=tokens, most=MAX_CHARACTERS)
    read = tuple(documents)
    return _gathered(
        Documents(
            items=read,
            source=described,
            datasets=(dataset,) if dataset else (),
            streamed=streamed and len(read) >= LEAST_DOCUMENTS,  # fewer are read each time
        )
    )


def _gathered(read: Documents) -> Documents:
    """Return the distinct documents, cut where they are few."""
    unique = distinct_documents(read.items)
    if not unique:
        raise TextError(f"{read.source} holds no text. Give files or strings with text in them.")
    return replace(read, items=distinct_documents(cut_sections(unique)))


def _matching_files(source: TextSource) -> list[Path] | None:
    """Return the files that a path-like source names, or None if it is no path."""
    if not isinstance(source, (str, Path)):
        return None
    text = str(source)
    if isinstance(source, str) and (len(text) > 1024 or "\n" in text or not text.strip()):
        return None
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long
        return _folder_files(path)
    if os.path.isfile(path):
        return [path]
    if has_magic(text):
        matches = (Path(match) for match in glob(str(path), recursive=True))
        files = sorted(match for match in matches if os.path.isfile(match))
        if files or isinstance(source, Path) or _looks_like_a_path(text):
            return _some(files, f"No file matches {text!r}.")
        return None
    if isinstance(source, Path) or _looks_like_a_path(text):
        raise TextError(f"There is no file, folder or glob {text!r}. Check the path.")
    return None


def _looks_like_a_path(text: str) -> bool:
    """Whether a string without a file of that name is more likely a mistake than a text."""
    if any(character.isspace() for character in text):
        return _names_a_file(text)
    suffix = Path(text[-20:]).suffix.lower()
    return "/" in text or "\\" in text or suffix in FOLDER_SUFFIXES or has_magic(text)


def _names_a_file(text: str) -> bool:
    """Whether a string is one line with a separator that ends in a known suffix."""
    separated = "/" in text or "\\" in text
    return separated and "\n" not in text and Path(text[-20:]).suffix.lower() in FOLDER_SUFFIXES


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    readable = [path for path in files if path.suffix.lower() in FOLDER_SUFFIXES]
    if len(readable) < len(files):
        logger.info("%s: %d files of other kinds left out", folder, len(files) - len(readable))
    return _some(readable, f"No file in {str(folder)!r} ends in a known suffix; use a glob.")


def _some(files: list[Path], complaint: str) -> list[Path]:
    if not files:
        raise TextError(complaint)
    return files


def _read_files(files: Sequence[Path], seed: int) -> Iterator[Document]:
    """Read files in a seeded order until there is enough; yield in the files' order."""
    shuffled = list(files)
    random.Random(seed).shuffle(shuffled)
    read: dict[Path, list[Document]] = {}
    characters = 0
    for path in shuffled:
        if characters > MAX_CHARACTERS:
            logger.warning("Read %d of %d files, chosen at random.", len(read), len(files))
            break
        read[path] = list(_read_file(path, seed))
        characters += sum(len(document.text) for document in read[path])
    for path in files:
        yield from read.get(path, [])


def _read_file(path: Path, seed: int) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _from_items(_sampled(_parquet_rows(path), path, seed), str(path), seed)
    elif suffix == ".jsonl":
        yield from _from_items(_sampled(_json_lines(path), path, seed), str(path), seed)
    else:
        text = _read_text(path)
        if text is not None:
            yield Document(text, str(path))


def _read_text(path: Path) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}.") from error
    if b"\0" in data[:8192]:
        logger.warning("%s is binary and was left out.", path)
        return None
    return data.decode("utf-8", errors="replace").removeprefix("\ufeff")


def _json_lines(path: Path) -> Iterator[Any]:
    try:
        file = path.open(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(f"{path}, line {number}, is not JSON: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise TextError(
            f"{path}: parquet files need pyarrow. Install it with "
            "`pip install hf-sparse-pathways[data]`."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} is not a parquet file: {error}") from error


def _iterate(source: TextSource, described: str) -> Iterable[Any]:
    if isinstance(source, dict) and hasattr(source, "column_names"):  # a DatasetDict
        splits = ", ".join(map(repr, source))
        raise TextError(
            f"{described} is a dataset's splits: {splits}. Give one, as dataset['train']."
        )
    if isinstance(source, (bytes, dict)) or not isinstance(source, Iterable):
        raise TextError(
            f"{described} is no text source. Give strings, files, globs, folders, or a dataset."
        )
    return source


def _from_items(
    items: Iterable[Any], origin: str, seed: int, chosen: str | None = None
) -> Iterator[Document]:
    """Turn texts, paths and rows into documents; at most ``MAX_ROWS`` of them."""
    items = _at_most(items, origin, seed)
    column: str | None = None
    for index, item in enumerate(items):
        place = f"{origin}[{index}]"
        if isinstance(item, dict):
            column = column or _text_column(item, origin, chosen)
            text = item.get(column)
            if isinstance(text, str):
                yield Document(text, place)
        elif isinstance(item, Path) or (isinstance(item, str) and _is_file(item)):
            yield from _read_file(Path(item), seed)
        elif isinstance(item, str):
            _check_no_path(item, place)
            yield Document(item, place)
        else:
            raise TextError(f"{place} is a {type(item).__name__}, not a text, path or row.")


def _check_no_path(text: str, place: str) -> None:
    """Refuse a text of a list that is a path to nothing.

    With white space in it it may be either, so it is a text; from a root on that is said.

    Raises:
        TextError: It is a path.
    """
    if not _names_a_file(text):
        return
    if not any(character.isspace() for character in text):
        raise TextError(f"{place}: there is no file {text!r}. Check the path.")
    if text.startswith(("/", "./", "../", "~")) or text[1:3] in (":\\", ":/"):
        logger.warning("%s: there is no file %r, so it is taken for a text.", place, text)


def _sampled(rows: Iterable[Any], path: Path, seed: int) -> list[Any]:
    """Return a file's rows, or as many of them as may be kept, drawn at random, in their order."""
    generator = random.Random(seed)
    kept: list[tuple[float, int, int, Any]] = []  # the row that goes first is on top
    characters = count = 0
    for row in rows:
        size = sum(len(value) for value in _strings(row))
        heapq.heappush(kept, (generator.random(), count, size, row))
        characters += size
        count += 1
        while len(kept) > MAX_ROWS or (characters > MAX_CHARACTERS and len(kept) > 1):
            characters -= heapq.heappop(kept)[2]
    if len(kept) < count:
        logger.warning("%s: %d of %d rows kept, chosen at random.", path, len(kept), count)
    return [row for *_, row in sorted(kept, key=lambda entry: entry[1])]


def _strings(row: Any) -> list[str]:
    values = row.values() if isinstance(row, dict) else [row]
    return [value for value in values if isinstance(value, str)]


def _at_most(items: Any, origin: str, seed: int) -> Iterable[Any]:
    """Limit the number of items: at random if they can be indexed, else the first ones."""
    if not hasattr(items, "__len__"):
        return _first(items, origin)
    count = len(items)
    if count <= MAX_ROWS:
        return cast("Iterable[Any]", items)
    logger.warning("%s: %d of %d rows read, chosen at random.", origin, MAX_ROWS, count)
    chosen = sorted(random.Random(seed).sample(range(count), MAX_ROWS))
    return (items[index] for index in chosen)


def _first(stream: Iterable[Any], origin: str) -> Iterator[Any]:
    """Yield a stream's first rows, and say so if there are more."""
    rows = iter(stream)
    yield from islice(rows, MAX_ROWS)
    for _ in rows:
        logger.warning("%s: only the first %d rows were read.", origin, MAX_ROWS)
        break


def _is_file(text: str) -> bool:
    short = len(text) < 1024 and "\n" not in text
    return short and Path(text).suffix.lower() in FOLDER_SUFFIXES and os.path.isfile(text)


def _text_column(row: dict[str, Any], origin: str, chosen: str | None) -> str:
    if chosen is not None and chosen not in row:
        raise TextError(f"{origin} has no column {chosen!r}; its columns are {', '.join(row)}.")
    if chosen is not None:
        _check_text(row[chosen], f"{origin}: column {chosen!r}")
        return chosen
    strings = [name for name, value in row.items() if isinstance(value, str)]
    for name in ("text", "content"):
        if name in strings or (name in row and _is_missing(row[name])):
            return name
    if len(strings) == 1:
        return strings[0]
    raise TextError(
        f"{origin} has no column 'text' or 'content'; its columns are {', '.join(row)}. Choose "
        "the one that holds the documents: dataset.select_columns(['NAME']), or :SPLIT:NAME behind "
        "a dataset's address; of other rows pass a list of its strings."
    )


def _check_text(value: Any, place: str) -> None:
    """Refuse what stands in a column if it is neither a text nor missing."""
    if not (isinstance(value, str) or _is_missing(value)):
        raise TextError(
            f"{place} holds a {type(value).__name__}, not text. Choose another one; of chats pass "
            "a list of what tokenizer.apply_chat_template(..., tokenize=False) makes of them."
        )


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN, as tables mark what is missing


def _describe(source: TextSource) -> str:
    name = getattr(getattr(source, "info", None), "dataset_name", None)
    if name:
        return f"dataset {name} ({getattr(source, 'split', None) or 'no split'})"
    if isinstance(source, str):
        return f"a text of {len(source)} characters"
    size = f" of {len(source)}" if hasattr(source, "__len__") else ""
    return f"{type(source).__name__}{size} texts" if size else f"{type(source).__name__} of texts"
