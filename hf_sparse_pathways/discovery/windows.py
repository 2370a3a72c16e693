"""Windows of tokens, drawn at random over all documents, and batches of them.

Documents are cut into spans of characters *before* anything is tokenised, the spans are shuffled,
and only as many are tokenised as the token budget takes: many documents are seen, and a large
corpus costs no more than a small one. Each window starts as the tokenizer starts a text.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.documents import Document, Documents, spans
from hf_sparse_pathways.errors import PathwaysError, option

CHARACTERS_PER_TOKEN = 3
"""Cautious: English prose has 4 to 5, code about 3. A span that is too long is halved."""

DEFAULT_LENGTH = 512

LEAST_LENGTH = 2
"""Of one token alone there is nothing that a model could have read before it."""


@dataclass(frozen=True)
class Window:
    """Token ids of a piece of one document.

    Attributes:
        ids: They.
        document: None if it is not known any more.
        number: Then that of the document among those of the same text, if that is known.
    """

    ids: tuple[int, ...]
    document: Document | None = None
    number: int | None = None


@dataclass(frozen=True)
class Batch:
    """Windows padded on the right.

    Attributes:
        ids: int64 ``(batch, tokens)``.
        mask: bool ``(batch, tokens)``, False on padding.
        windows: The windows, one per row.
    """

    ids: Tensor
    mask: Tensor
    windows: tuple[Window, ...]


def check_length(max_length: int) -> None:
    """Check the most tokens of a window.

    Raises:
        PathwaysError: They are too few.
    """
    if max_length < LEAST_LENGTH:
        raise PathwaysError(
            f"{option('max_length')} has to be at least {LEAST_LENGTH}, got {max_length!r}: a "
            "token alone has no context. Leave it out for the usual length."
        )


def resolve_length(model: Any, max_length: int | None) -> int:
    """Return the most tokens of a window: as given, or the default within the model's positions.

    Raises:
        PathwaysError: The model has fewer positions than asked for, or it is too short.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if max_length is None:
        return min(DEFAULT_LENGTH, positions)
    check_length(max_length)
    if max_length > positions and hasattr(text_config, "max_position_embeddings"):
        raise PathwaysError(
            f"{option('max_length')} {max_length} is more than the model's {positions} "
            f"positions. Give at most {positions}."
        )
    return max_length


def check_seed(seed: object) -> None:
    """Check the seed of what is drawn.

    Raises:
        PathwaysError: It is no whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise PathwaysError(f"{option('seed')} has to be a whole number, got {seed!r}.")


def draw_windows(
    documents: Documents, tokenizer: Any, *, max_tokens: int, max_length: int, seed: int
) -> list[Window]:
    """Draw windows until a token budget is met, or every document is used up.

    Args:
        documents: Where to draw from.
        tokenizer: A Transformers tokenizer.
        max_tokens: The budget; the last window is cut to meet it.
        max_length: Most tokens of a window.
        seed: Decides the order.

    Raises:
        PathwaysError: A number is not positive.
    """
    for name, value in (("max_tokens", max_tokens), ("max_length", max_length)):
        if value < 1:
            raise PathwaysError(f"{option(name)} has to be at least 1, got {value!r}.")
    pieces = [
        (document, start, end)
        for document in documents.items
        for start, end in spans(document.text, CHARACTERS_PER_TOKEN * max_length)
    ]
    random.Random(seed).shuffle(pieces)
    windows: list[Window] = []
    left = max_tokens
    for document, start, end in pieces:
        for ids in _tokenise(document.text[start:end], tokenizer, max_length):
            if left > 0 and ids:
                windows.append(Window(tuple(ids[:left]), document))
                left -= len(windows[-1].ids)
        if left <= 0:
            break
    return windows


def _tokenise(text: str, tokenizer: Any, max_length: int) -> Iterator[list[int]]:
    """Yield the token ids of a text, halved until each part fits."""
    valid = text.encode(errors="replace").decode()  # JSON may hold half of a surrogate pair
    ids = list(tokenizer(valid, verbose=False)["input_ids"])
    if len(ids) <= max_length or len(text) < 2:
        yield ids[:max_length]
        return
    for start, end in spans(text, (len(text) + 1) // 2):
        yield from _tokenise(text[start:end], tokenizer, max_length)


def quarter(windows: Sequence[Window], limits: tuple[int, int]) -> int:
    """Return a quarter of a text's tokens, but at least and at most the limits: a sample's size."""
    least, most = limits
    return min(most, max(least, count_tokens(windows) // 4))


def count_tokens(windows: Sequence[Window]) -> int:
    """Return the number of tokens in windows."""
    return sum(len(window.ids) for window in windows)


def number_documents(windows: Sequence[Window]) -> list[int]:
    """Return for each window the number of its document among those of all windows, from 0.

    A window of which that is not known is a document of its own.
    """
    keys = [_document_key(window, place) for place, window in enumerate(windows)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def join_windows(first: Sequence[Window], second: Sequence[Window]) -> tuple[Window, ...]:
    """Return the windows of two texts; documents that are only numbered are taken to be others."""
    taken = 1 + max((window.number for window in first if window.number is not None), default=-1)
    shifted = (
        window if window.number is None else replace(window, number=window.number + taken)
        for window in second
    )
    return (*first, *shifted)


def _document_key(window: Window, place: int) -> tuple[str, int | str]:
    if window.document is not None:
        return "digest", window.document.digest
    return ("place", place) if window.number is None else ("number", window.number)


def list_digests(windows: Sequence[Window]) -> tuple[list[str], list[str]]:
    """Return the digests of the windows' documents, and of those that they are sections of."""
    documents = [window.document for window in windows if window.document is not None]
    digests = {document.digest for document in documents}
    return sorted(digests), sorted({document.whole for document in documents if document.whole})


def make_batches(windows: Sequence[Window], batch_size: int) -> Iterator[Batch]:
    """Yield batches of windows of like length, so that little is padding.

    Raises:
        PathwaysError: The batch size is not positive.
    """
    if batch_size < 1:
        raise PathwaysError(f"{option('batch_size')} has to be at least 1, got {batch_size!r}.")
    ordered = sorted(windows, key=lambda window: -len(window.ids))
    for start in range(0, len(ordered), batch_size):
        rows = tuple(ordered[start : start + batch_size])
        ids = torch.zeros(len(rows), len(rows[0].ids), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, window in enumerate(rows):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            mask[row, : len(window.ids)] = True
        yield Batch(ids, mask, rows)
