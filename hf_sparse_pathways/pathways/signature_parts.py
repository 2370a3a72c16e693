"""The tensors of domains' signatures by name, ``signature.<domain index>.<part>``.

They lie in the files of the pathways, and the description of a domain says whether it has any. As
with the parts of a pathway, a header is held against the description before anything is read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import check_finite
from hf_sparse_pathways.pathways.pathway import Pathway
from hf_sparse_pathways.pathways.signature import PARTS, Signature, no_margins, no_pairs

FIELD = "signature"
"""Of a domain's description: true if it has one."""

_PREFIX = f"{FIELD}."


def name_signatures(domains: Mapping[str, Pathway]) -> dict[str, Tensor]:
    """Return the tensors of the domains' signatures by their names."""
    return {
        f"{_PREFIX}{index}.{part}": tensor
        for index, pathway in enumerate(domains.values())
        if pathway.signature is not None
        for part, tensor in pathway.signature.parts().items()
    }


def split_header(
    header: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what belongs to signatures, and the rest."""
    signatures = {name: part for name, part in header.items() if name.startswith(_PREFIX)}
    return signatures, {name: part for name, part in header.items() if name not in signatures}


def choose_signatures(
    only: str | None, meta: Mapping[str, Any], header: Mapping[str, Tensor]
) -> list[str]:
    """Check the header's signatures; return the names of what is to be read.

    Args:
        only: A domain, to read it alone.
        meta: The description, whose list of domains has been checked.
        header: As in ``TensorFile``, what belongs to signatures alone.

    Raises:
        ArtefactError: They do not describe the same.
        MismatchError: A tensor's dtype or shape does not fit.
    """
    chosen: list[str] = []
    known: set[str] = set()
    for index, entry in enumerate(meta["domains"]):
        if not _has_signature(entry):
            continue
        names = _names(index, header)
        missing = [name for name in names.values() if name not in header]
        if missing:
            raise ArtefactError(f"the tensors lack {missing[0]!r}.")
        Signature.from_parts({part: header[name] for part, name in names.items()}).check()
        known |= {*names.values()}
        if only in (None, entry["name"]):
            chosen.extend(names.values())
    unknown = header.keys() - known
    if unknown:
        raise ArtefactError(f"the tensors hold {min(unknown)!r}, which belongs to no domain.")
    return chosen


def restore_signatures(
    meta: Mapping[str, Any], tensors: Mapping[str, Tensor], domains: Mapping[str, Pathway]
) -> dict[str, Pathway]:
    """Return domains with their signatures, whose tensors were chosen and read.

    Raises:
        ArtefactError: A tensor holds what is no number, or ids or quantiles that cannot be.
    """
    restored = dict(domains)
    for index, entry in enumerate(meta["domains"]):
        name = entry["name"]
        if name not in domains or not _has_signature(entry):
            continue
        parts = {part: tensors[named] for part, named in _names(index, tensors).items()}
        for part, tensor in parts.items():
            check_finite(f"'{_PREFIX}{index}.{part}'", tensor)
        signature = Signature.from_parts(parts)
        signature.check_values()
        restored[name] = replace(domains[name], signature=signature)
    return restored


def _names(index: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of a signature's tensors by their parts.

    An older one lacks the parts that were added together, all of them.
    """
    names = {part: f"{_PREFIX}{index}.{part}" for part in PARTS}
    for added in (no_margins(), no_pairs()):
        if not any(names[part] in tensors for part in added):
            names = {part: name for part, name in names.items() if part not in added}
    return names


def _has_signature(entry: Mapping[str, Any]) -> bool:
    has = entry.get(FIELD, False)
    if not isinstance(has, bool):
        raise ArtefactError(f"{entry['name']!r} has a signature {has!r:.200}: neither yes nor no.")
    return has
