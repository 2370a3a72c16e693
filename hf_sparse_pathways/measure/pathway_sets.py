"""Several sets of pathways in one model, so that all are measured on the same windows.

A model has one set. While several are measured the others stand among its controls under names that
no domain and no other control has.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from hf_sparse_pathways.errors import MismatchError, PathwaysError
from hf_sparse_pathways.measure.arms import MeasuredArm, pathway_arm
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.names import POOLED, TUNED
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

logger = logging.getLogger(__name__)

RANDOM = "random:"  # no domain's name holds a colon


@dataclass(frozen=True)
class PathwaySet:
    """One set of pathways that is measured.

    Attributes:
        label: What tables call it; None where it is the only one.
        pathways: The pathways; if controls are measured, with random partners.
        prefix: What stands before their names in the model; empty for the model's own.
    """

    label: str | None
    pathways: Pathways
    prefix: str = ""

    def with_partners(self, partner: Callable[[Pathway], Pathway]) -> Self:
        """Return a copy in which every domain's pathway has a random partner. Pure."""
        domains = self.pathways.by_domain.items()
        partners = {f"{RANDOM} {name}": partner(pathway) for name, pathway in domains}
        return replace(self, pathways=self.pathways.with_controls(partners))

    def arms(self, domain: str, controls: bool) -> list[MeasuredArm]:
        """Return the set's arms for one domain's text, with or without partners."""
        given = self.pathways
        wanted = [("pathway", domain)]
        if f"{TUNED}{domain}" in given.controls:
            wanted.append(("tuned", f"{TUNED}{domain}"))
        if controls:
            if POOLED in given.controls:
                wanted.append(("pooled", POOLED))
            wanted.append(("random", f"{RANDOM} {domain}"))
            wanted.extend(("other", name) for name in given.domains if name != domain)
        return [
            pathway_arm(role, name, given, runs=f"{self.prefix}{name}", label=self.label)
            for role, name in wanted
        ]

    @property
    def guests(self) -> dict[str, Pathway]:
        """What the model needs among its controls, by the names that it knows."""
        domains = self.pathways.by_domain if self.prefix else {}
        named = {**domains, **self.pathways.controls}
        return {f"{self.prefix}{name}": pathway for name, pathway in named.items()}


def gather_sets(
    own: Pathways, label: str, also: Mapping[str, Pathways], domains: Sequence[str]
) -> list[PathwaySet]:
    """Return the sets that are measured, a model's own first.

    Args:
        own: The model's pathways.
        label: What they are called beside others.
        also: Label -> other pathways of the same base.
        domains: The domains that are measured.

    Raises:
        PathwaysError: Two labels are equal, or one cannot stand in a table; other pathways are no
            ``Pathways``, or lack a domain.
        MismatchError: Other pathways were made for another base.
    """
    if not also:
        return [PathwaySet(None, own)]
    _check_labels(label, also)
    sets = [PathwaySet(label, own)]
    for place, (name, pathways) in enumerate(also.items()):
        _check_other(name, pathways, own.base, domains)
        sets.append(PathwaySet(name, pathways, f"also {place}: "))
    return sets


def _check_labels(label: str, also: Mapping[str, Pathways]) -> None:
    """Check what sets of pathways are called."""
    for name in (label, *also):
        fits = isinstance(name, str) and name.strip() and name.isprintable() and "|" not in name
        if not fits:
            raise PathwaysError(
                f"{name!r} cannot be the label of a set of pathways. Use printable characters "
                "without |, and not only spaces."
            )
    if label in also:
        raise PathwaysError(
            f"Two sets of pathways are called {label!r}, the model's own and one of `also`. Call "
            "one of them something else; label= names the model's own."
        )


def _check_other(label: str, pathways: Any, base: BaseModel, domains: Sequence[str]) -> None:
    """Check pathways that are measured beside a model's own."""
    if not isinstance(pathways, Pathways):
        raise PathwaysError(
            f"The set {label!r} is a {type(pathways).__name__}, and Pathways are needed. Read a "
            "folder with Pathways.from_pretrained(folder)."
        )
    try:
        pathways.base.check_same(base)
    except MismatchError as error:
        raise MismatchError(f"The set {label!r} does not fit the model. {error}") from error
    names = [Path(given.name).name.casefold() for given in (pathways.base, base)]
    if all(names) and names[0] != names[1]:
        logger.warning(
            "The set %r was made for %s, the model's own pathways for %s. Both have the same "
            "shape; if the weights differ, its rows mean little.",
            label,
            pathways.base.name,
            base.name,
        )
    for domain in domains:
        if domain not in pathways.by_domain:
            raise PathwaysError(
                f"The set {label!r} lacks the domain {domain!r}, which is measured; it has "
                f"{', '.join(map(repr, pathways.domains)) or 'none'}. Leave that text out, or "
                "build the set with this domain too."
            )
