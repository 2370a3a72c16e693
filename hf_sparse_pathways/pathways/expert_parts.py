"""The tensors of pathways' experts by name, ``experts.<pathway>.<layer>.<part>``.

They lie in the files of the pathways, and the description of a domain or control says whether it
has any. As with the parts of blocks, a header is held against the description before anything is
read. Where no pathway of a file has any, nothing of the file speaks of experts.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.ffn.kept_experts import EXPERT_PARTS, KeptExperts
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.checks import check_experts
from hf_sparse_pathways.pathways.description import base_from_json
from hf_sparse_pathways.pathways.pathway import Pathway

FIELD = "experts"
"""Of a domain's description: what it holds of each layer's experts, a list of parts."""

_PREFIX = f"{FIELD}."


def name_experts(prefix: str, pathways: Mapping[str, Pathway]) -> dict[str, Tensor]:
    """Return the tensors of a group of pathways' experts by their names.

    Args:
        prefix: What stands before the index of a pathway of the group.
        pathways: The group.
    """
    return {
        f"{_PREFIX}{prefix}{index}.{layer}.{part}": tensor
        for index, pathway in enumerate(pathways.values())
        for layer, kept in enumerate(pathway.experts)
        for part, tensor in kept.parts().items()
    }


def describe_experts(pathway: Pathway) -> dict[str, list[str]]:
    """Return what is said of a pathway's experts; nothing if it keeps all."""
    held = {part for kept in pathway.experts for part in kept.parts()}
    return {FIELD: [part for part in EXPERT_PARTS if part in held]} if held else {}


def split_experts(header: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what belongs to experts, and the rest."""
    experts = {name: part for name, part in header.items() if name.startswith(_PREFIX)}
    return experts, {name: part for name, part in header.items() if name not in experts}


def choose_experts(
    group: Mapping[str, Mapping[str, Any]],
    only: str | None,
    meta: Mapping[str, Any],
    header: Mapping[str, Tensor],
) -> list[str]:
    """Check the header's experts; return the names of what is to be read.

    Args:
        group: Each pathway's description, by what stands before its layers' numbers.
        only: The name of a domain, to read it alone.
        meta: The description of all.
        header: As in ``TensorFile``, what belongs to experts alone.

    Raises:
        ArtefactError: They do not describe the same.
        MismatchError: A tensor's dtype or shape does not fit.
    """
    base = base_from_json(meta["base"])
    chosen: list[str] = []
    known: set[str] = set()
    for prefix, entry in group.items():
        if not _held(entry):
            continue
        layers = [_parts(header, prefix, layer, entry) for layer in range(len(base.experts))]
        check_experts(entry["name"], tuple(map(KeptExperts.from_parts, layers)), base)
        names = [
            f"{_PREFIX}{prefix}.{layer}.{part}"
            for layer, parts in enumerate(layers)
            for part in parts
        ]
        known |= {*names}
        if only is None or (entry["name"] == only and not prefix.startswith("c")):
            chosen.extend(names)
    unknown = header.keys() - known
    if unknown:
        raise ArtefactError(f"the tensors hold {min(unknown)!r}, which belongs to no domain.")
    return chosen


def restore_experts(
    entries: Mapping[str, Mapping[str, Any]],
    base: BaseModel,
    tensors: Mapping[str, Tensor],
    pathways: Mapping[str, Pathway],
) -> dict[str, Pathway]:
    """Return pathways with their experts, whose tensors were chosen and read.

    Raises:
        ArtefactError: A tensor holds bytes that are neither true nor false.
    """
    restored = dict(pathways)
    for prefix, entry in entries.items():
        if entry["name"] not in pathways or not _held(entry):
            continue
        layers = [_parts(tensors, prefix, layer, entry) for layer in range(len(base.experts))]
        for part in (tensor for parts in layers for tensor in parts.values()):
            if bool((part.view(torch.uint8) > 1).any()):
                raise ArtefactError(
                    f"The experts of {entry['name']!r} hold bytes that are neither true nor false."
                )
        experts = tuple(map(KeptExperts.from_parts, layers))
        restored[entry["name"]] = replace(pathways[entry["name"]], experts=experts)
    return restored


def _held(entry: Mapping[str, Any]) -> list[str]:
    """Return the kinds of parts that a pathway holds of its experts."""
    held = entry.get(FIELD, [])
    fits = isinstance(held, list) and {*map(str, held)} <= {*EXPERT_PARTS}
    if not fits or (held and EXPERT_PARTS[0] not in held):
        raise ArtefactError(
            f"{entry['name']!r} holds {held!r:.200} of experts, of which this version reads only "
            f"{list(EXPERT_PARTS)}. Upgrade hf-sparse-pathways."
        )
    return held


def _parts(
    tensors: Mapping[str, Tensor], prefix: str, layer: int, entry: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return one layer's parts; all but which experts are kept may be missing."""
    names = {part: f"{_PREFIX}{prefix}.{layer}.{part}" for part in _held(entry)}
    parts = {part: tensors[name] for part, name in names.items() if name in tensors}
    if EXPERT_PARTS[0] not in parts:
        raise ArtefactError(f"the tensors lack {names[EXPERT_PARTS[0]]!r}.")
    return parts
