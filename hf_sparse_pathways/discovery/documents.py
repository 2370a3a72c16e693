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

ROUTER_TOKENS = 262_144
"""Most tokens of a domain from which it is told: to count them takes no model. Of 65,536 a domain
is told as well, but of fewer its neighbours' text is often taken to be its own."""


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
        datasets: The datasets among that, as ``describe_dataset`` knows them.
        streamed: Whether they are the first of a stream, of which another time more may be read.
    """

    items: tuple[Document, ...]
    source: str
    datasets: tuple[Mapping[str, str], ...] = ()
    streamed: bool = False

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

    def unseen(
        self, provenances: Iterable[Mapping[str, Any]], *, routed: bool = False
    ) -> "tuple[Documents, int]":
        """Return the documents that were neither calibrated nor validated on. Pure.

        Args:
            provenances: What profiles and pathways say of the text that they have seen.
            routed: Whether to leave out those, too, from which only the router has learnt.

        Returns:
            The documents, and how many others there were.
        """
        listed = list(provenances)
        uses = ("", "validation_", *(["router_"] if routed else []))
        seen, cut = (
            [digest for text in listed for use in uses for digest in text.get(f"{use}{name}", ())]
            for name in ("digests", "cut_digests")
        )
        fresh = self.without(seen, cut)
        return fresh, len(self.items) - len(fresh.items)

    def split(self, held_out: float, seed: int = 0) -> "tuple[Documents, Documents]":
        """Return ``(calibration, held-out)`` documents, disjoint. Pure.

        The order by a seeded hash of each text decides, so that the split does not depend on the
        order of the files, and a text that occurs twice is on one side. Of a stream the hash alone
        decides: however much of it is read, a document is on the same side.

        Args:
            held_out: Fraction of the documents that is held out, in (0, 1).
            seed: Another seed is another split.

        Raises:
            PathwaysError: The fraction is outside (0, 1).
            TextError: There are fewer than two documents, or too few of a stream for both sides.
        """
        if not 0.0 < held_out < 1.0:
            raise PathwaysError(f"{option('held_out')} has to be in (0, 1), got {held_out!r}.")
        if len(self.items) < 2:
            raise TextError(
                f"{self.source} has {len(self.items)} document(s), too few to hold any out. Give "
                "more files, or a longer one."
            )
        ranks = {document.digest: _rank(seed, document.digest) for document in self.items}
        if self.streamed:
            chosen = {digest for digest, rank in ranks.items() if rank < held_out}
        else:
            count = min(max(1, round(held_out * len(ranks))), len(ranks) - 1)
            chosen = set(sorted(ranks, key=ranks.__getitem__)[:count])
        held = tuple(document for document in self.items if document.digest in chosen)
        if not 0 < len(held) < len(self.items):
            raise TextError(
                f"{self.source}: of {len(self.items)} documents {len(held)} are held out, so that "
                f"one side is empty. Give more of them, or {option('held_out')} nearer to 0.5."
            )
        return self.without(chosen), replace(self, items=held)


def _rank(seed: int, digest: str) -> float:
    """Return a number in [0, 1) that is drawn by a seeded hash."""
    drawn = hashlib.sha256(f"{seed}{digest}".encode()).digest()
    return int.from_bytes(drawn[:7], "big") / 2.0**56


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


def join_datasets(seen: Mapping[str, Any], added: Iterable[Any]) -> list[Any]:
    """Return the datasets of a text's provenance, and others, each once. Pure."""
    known = list(seen.get("datasets", ()))
    return [*known, *(one for one in map(dict, added) if one not in known)]
