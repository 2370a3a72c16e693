"""Streams of documents, which may have no end: how far they are read.

Windows are drawn at random from what was read, some documents are held out, and others were
calibrated on before. So far more is read than is going to be drawn, and many documents.
"""

import logging
from collections.abc import Iterable, Iterator

from hf_sparse_pathways.discovery.documents import Document

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 32
"""Read per token that is going to be drawn, which has three to five itself."""

LEAST_DOCUMENTS = 256
"""Fewest documents that are read of a stream that has as many."""


def read_as_needed(
    documents: Iterable[Document], described: str, *, tokens: int | None, most: int
) -> Iterator[Document]:
    """Yield a stream's documents until there are far more than are going to be drawn.

    Args:
        documents: The stream's.
        described: What it is, for messages.
        tokens: How many are going to be drawn; None if that is not known.
        most: Most characters that are read at all, which is said.
    """
    needed = most if tokens is None else CHARACTERS_PER_TOKEN * tokens
    characters = 0
    for count, document in enumerate(documents, 1):
        yield document
        characters += len(document.text)
        if characters > most:
            logger.warning("%s: only the first %d documents were read.", described, count)
            return
        if characters >= needed and count >= LEAST_DOCUMENTS:
            return
