"""Documents: known by their content, split into calibration and held-out text, cut where few.

A document is the unit of every split: calibration and evaluation never share one. Its digest
identifies it across runs, so an artefact can say which documents it has seen. Where a source has
too few documents to split, long ones are cut into sections, and each section is a document.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hf_sparse_pathways.errors import PathwaysError, TextError, option

SECTION_CHARACTERS = 4_000
FEW_DOCUMENTS = 5


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        text: The text.
        origin: File, row or range of characters, in words.
        whole: Digest of the document that this one is a section of; None if it is uncut.
    """

    text: str
    origin: str
    whole: str | None = None

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of SHA-256 over the text without outer white space.

        Lines that end in CR LF are as those that end in LF.
        """
        text = self.text.strip().replace("\r\n", "\n")
        return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of one domain.

    Attributes:
        items: Documents, each text once, in the source's order.
        source: What they were read from, in words that may be saved.
        datasets: Ids of the Hub datasets among that; never a path of this machine.
    """

    items: tuple[Document, ...]
    source: str
    datasets: tuple[str, ...] = ()

    def without(self, digests: Iterable[str], cut: Iterable[str] = ()) -> "Documents":
        """Return the documents that share no text with others. Pure.

        Args:
            digests: Digests of the others; a section of one of them is left out too.
            cut: Digests of documents of which the others hold sections; an uncut one is left out.
        """
        seen, parts = set(digests), set(cut)
        kept = tuple(
            document
            for document in self.items
            if document.digest not in seen
            and document.whole not in seen
            and not (document.whole is None and document.digest in parts)
        )
        return replace(self, items=kept)

    def unseen(self, provenances: Iterable[Mapping[str, Any]]) -> "tuple[Documents, int]":
        """Return the documents that were neither calibrated nor validated on. Pure.

        Args:
            provenances: What profiles and pathways say of the text that they have seen.

        Returns:
            The documents, and how many others there were.
        """
        listed = list(provenances)
        seen, cut = (
            [
                digest
                for text in listed
                for kind in ("", "validation_")
                for digest in text.get(f"{kind}{name}", ())
            ]
            for name in ("digests", "cut_digests")
        )
        fresh = self.without(seen, cut)
        return fresh, len(self.items) - len(fresh.items)

    def split(self, held_out: float, seed: int = 0) -> "tuple[Documents, Documents]":
        """Return ``(calibration, held-out)`` documents, disjoint. Pure.

        The order by a seeded hash of each text decides, so that the split does not depend on the
        order of the files, and a text that occurs twice is on one side.

        Args:
            held_out: Fraction of the documents that is held out, in (0, 1).
            seed: Another seed is another split.

        Raises:
            PathwaysError: The fraction is outside (0, 1).
            TextError: There are fewer than two documents.
        """
        if not 0.0 < held_out < 1.0:
            raise PathwaysError(f"{option('held_out')} has to be in (0, 1), got {held_out!r}.")
        if len(self.items) < 2:
            raise TextError(
                f"{self.source} has {len(self.items)} document(s), too few to hold any out. Give "
                "more files, or a longer one."
            )
        ranked = sorted(
            self.items, key=lambda d: hashlib.sha256(f"{seed}{d.digest}".encode()).digest()
        )
        count = min(max(1, round(held_out * len(ranked))), len(ranked) - 1)
        chosen = {document.digest for document in ranked[:count]}
        held = tuple(document for document in self.items if document.digest in chosen)
        return self.without(chosen), replace(self, items=held)


def distinct_documents(documents: Iterable[Document]) -> tuple[Document, ...]:
    """Return each document that is not blank, once."""
    kept = {document.digest: document for document in documents if document.text.strip()}
    return tuple(kept.values())


def cut_sections(documents: tuple[Document, ...]) -> tuple[Document, ...]:
    """Cut the documents of a source that has few into sections that can be split."""
    if len(documents) >= FEW_DOCUMENTS:
        return documents
    return tuple(section for document in documents for section in _cut(document))


def _cut(document: Document) -> Iterator[Document]:
    if len(document.text) < 2 * SECTION_CHARACTERS:
        yield document
        return
    for start, end in spans(document.text, SECTION_CHARACTERS):
        origin = f"{document.origin}:{start}-{end}"
        yield Document(document.text[start:end], origin, whole=document.digest)


def spans(text: str, length: int) -> Iterator[tuple[int, int]]:
    """Cut a text into pieces of at most ``length`` characters that end at a line or a space."""
    start = 0
    while start < len(text):
        end = start + length
        if end < len(text):
            middle = start + length // 2
            breaks = (text.rfind(mark, middle, end) for mark in ("\n\n", "\n", " "))
            end = next((found + 1 for found in breaks if found > 0), end)
        yield start, min(end, len(text))
        start = end
