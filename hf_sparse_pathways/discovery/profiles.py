"""Activation profiles as values: a domain's statistics, and those of all domains of a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.documents import Documents, join_datasets
from hf_sparse_pathways.discovery.expert_statistics import ExpertStatistics
from hf_sparse_pathways.discovery.grams import GramSource, merge_grams
from hf_sparse_pathways.discovery.margins import TARGET_ERROR, check_target, find_margins
from hf_sparse_pathways.discovery.signatures import learn_signature
from hf_sparse_pathways.discovery.statistics import BlockStatistics
from hf_sparse_pathways.discovery.windows import Window, join_windows
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.description import DIGESTS
from hf_sparse_pathways.pathways.signature import Signature
from hf_sparse_pathways.tables import ShownAsTables, Table

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainProfile:
    """One domain's statistics.

    Attributes:
        blocks: One entry per FFN block, in layer order.
        provenance: Source, documents, tokens, seed; plain JSON values. ``digests`` names every
            document that was seen, ``cut_digests`` those of which sections were.
        grams: One Gram matrix per FFN block, in memory or on disk; empty if none were taken.
        windows: The token ids of the calibration text, for methods that run the model again.
        validation: Token ids of other documents of the domain, on which methods are compared.
        routing: Token ids of the text from which the domain is told, of documents that are not
            validated on; if there are none, it is told from the calibration text.
        experts: One entry per layer with routed experts; none in older profiles.
        entanglement: Of every block's incoming leaves, how far from normal each row's output is
            (W1 in standard deviations), float32 ``(branches, d_ff)``; empty if it was not measured.
    """

    blocks: tuple[BlockStatistics, ...]
    provenance: Mapping[str, Any]
    grams: tuple[GramSource, ...] = ()
    windows: tuple[Window, ...] = ()
    validation: tuple[Window, ...] = ()
    routing: tuple[Window, ...] = ()
    experts: tuple[ExpertStatistics, ...] = ()
    entanglement: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return self.blocks[0].tokens if self.blocks else self.experts[0].tokens

    @property
    def told_from(self) -> tuple[Window, ...]:
        """Token ids of the text from which the domain is told."""
        return self.routing or self.windows

    def merged(self, other: Self) -> Self:
        """Return the statistics of both together. Pure.

        Gram matrices stay if both have them, and the blocks' inputs in them if both hold those.
        Entanglement does not: it does not follow from that of the parts.
        What one was validated on and the other has learnt from is no validation text any more.
        """
        pairs = zip(self.blocks, other.blocks, strict=True)
        told_apart = bool(self.routing or other.routing)
        return replace(
            self,
            blocks=tuple(mine.merged(theirs) for mine, theirs in pairs),
            provenance=_merged_provenance(self.provenance, other.provenance),
            grams=merge_grams(self.grams, other.grams) if self.grams and other.grams else (),
            windows=join_windows(self.windows, other.windows),
            validation=join_windows(self._validation_beside(other), other._validation_beside(self)),
            routing=join_windows(self.told_from, other.told_from) if told_apart else (),
            experts=tuple(
                mine.merged(theirs)
                for mine, theirs in zip(self.experts, other.experts, strict=False)
            ),
            entanglement=(),
        )

    def _validation_beside(self, other: Self) -> tuple[Window, ...]:
        """Return the validation windows of documents that another profile has not learnt from.

        Where a stored profile does not know the windows' documents, none if any is shared.
        """
        taken = [
            [*other.provenance.get(name, ()), *other.provenance.get(f"router_{name}", ())]
            for name in ("digests", "cut_digests")
        ]
        names = ("validation_digests", "validation_cut_digests")
        own = chain.from_iterable(self.provenance.get(name, ()) for name in names)
        if set(own).isdisjoint(chain(*taken)):
            return self.validation
        known = [window for window in self.validation if window.document is not None]
        documents = tuple(window.document for window in known if window.document is not None)
        fresh = Documents(items=documents, source="").without(*taken)
        return tuple(window for window in known if window.document in fresh.items)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Profile(ShownAsTables):
    """Activation profiles of one base model.

    Attributes:
        base: The model they were taken from.
        by_domain: Domain name -> statistics.
        background: What the model writes by itself, from which a domain's text is told; None if
            that is not known.
    """

    base: BaseModel
    by_domain: Mapping[str, DomainProfile]
    background: Background | None = None

    @property
    def domains(self) -> list[str]:
        """The domains' names."""
        return list(self.by_domain)

    def __getitem__(self, domain: str) -> DomainProfile:
        """Return a domain's statistics.

        Raises:
            UnknownNameError: There is none of that name.
        """
        if domain not in self.by_domain:
            raise UnknownNameError("domain", domain, self.by_domain)
        return self.by_domain[domain]

    def merged(self, other: Self) -> Self:
        """Return both together; a domain in both has the statistics of both streams. Pure.

        Raises:
            MismatchError: The other was taken from another model.
            PathwaysError: A domain's text is the same in both, so that it would count twice.
        """
        self.base.check_same(other.base)
        together = dict(self.by_domain)
        for name, theirs in other.by_domain.items():
            if name in together:
                _check_differ(name, together[name], theirs)
            together[name] = together[name].merged(theirs) if name in together else theirs
        return replace(self, by_domain=together, background=self.background or other.background)

    def subset(self, domains: Iterable[str]) -> Self:
        """Return a copy with some of the domains. Pure.

        Raises:
            UnknownNameError: There is none of a name.
        """
        return replace(self, by_domain={name: self[name] for name in domains})

    def signature(self, domain: str, *, target_error: float = TARGET_ERROR) -> Signature | None:
        """Return what tells a domain's text, always the same object; None if that is not known.

        Args:
            domain: The domain.
            target_error: Share of its held-out texts that may be taken to be another domain's.
        """
        self[domain]  # there is one
        if target_error not in self._signatures:
            self._signatures[target_error] = self._learn_signatures(target_error)
        return self._signatures[target_error].get(domain)

    @cached_property
    def _signatures(self) -> dict[float, dict[str, Signature]]:
        return {}

    def _learn_signatures(self, target_error: float) -> dict[str, Signature]:
        check_target(target_error)
        if self.background is None:
            return {}
        windows = {
            name: (taken.told_from, taken.validation)
            for name, taken in self.by_domain.items()
            if taken.told_from
        }
        learnt = {name: learn_signature(*own, self.background) for name, own in windows.items()}
        return find_margins(learnt, windows, self.background, target_error)

    def pooled(self) -> DomainProfile:
        """Return the statistics of all domains' text together, always the same object. Pure."""
        return self._pooled

    @cached_property
    def _pooled(self) -> DomainProfile:
        first, *rest = self.by_domain.values()
        for profile in rest:
            first = first.merged(profile)
        return first

    def save_pretrained(self, folder: "str | PathLike[str]") -> None:
        """Write ``profile.json`` and ``profile.safetensors``, and the Gram matrices beside them.

        Each file is written beside its place and then renamed, the description last.
        """
        from hf_sparse_pathways.discovery.profile_storage import write_profile

        write_profile(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: "str | PathLike[str]") -> Self:
        """Read what ``save_pretrained`` wrote; Gram matrices stay on disk until they are used.

        Raises:
            ArtefactError: It is missing, corrupt, truncated, of a newer format, or holds NaN.
        """
        from hf_sparse_pathways.discovery.profile_storage import read_profile

        return read_profile(cls, Path(folder))

    def sections(self) -> list[Table]:
        """Return the tables that a notebook shows."""
        rows = [
            [
                name,
                str(taken.tokens),
                str(taken.provenance.get("documents", "-")),
                str(sum(len(window.ids) for window in taken.validation)),
                "yes" if taken.grams else "no",
                str(taken.provenance.get("source", "-")),
            ]
            for name, taken in self.by_domain.items()
        ]
        return [
            Table(
                title=f"Activation profile of {self.base.title}",
                note=f"{self.base.summary}.",
                header=["domain", "tokens", "documents", "for validation", "Gram matrices", "text"],
                rows=rows,
            )
        ]

    def __repr__(self) -> str:
        tokens = ", ".join(f"{name} {p.tokens} tokens" for name, p in self.by_domain.items())
        return f"Profile(base={self.base.name!r}, {len(self.base.blocks)} FFN blocks, {tokens})"


def _check_differ(domain: str, mine: DomainProfile, theirs: DomainProfile) -> None:
    ids = [{window.ids for window in part.windows} for part in (mine, theirs)]
    if ids[0] and ids[0] == ids[1]:
        raise PathwaysError(
            f"Domain {domain!r}: both profiles were taken from the same text of "
            f"{_source(mine.provenance)}, which would count twice. Merge profiles of "
            "different text."
        )


def _merged_provenance(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: sorted({*mine.get(name, ()), *theirs.get(name, ())}) for name in DIGESTS}
    return {
        **mine,
        "source": "; ".join(dict.fromkeys((_source(mine), _source(theirs)))),
        "datasets": join_datasets(mine, theirs.get("datasets", ())),
        "documents": len(both["digests"]),
        "tokens": mine.get("tokens", 0) + theirs.get("tokens", 0),
        **both,
    }


def _source(provenance: Mapping[str, Any]) -> str:
    return str(provenance.get("source", "an unknown source"))
