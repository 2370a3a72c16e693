"""The tensors of pathways by name, ``<domain index>.<block index>.<part>``: written, chosen, read.

Of a block with clusters the parts of experts are numbered, ``<block index>.<expert>.<part>``.

A header is held against the description before anything is read: every block's parts are put
together without memory (``tensor_files``) and checked as those of a live pathway are. Of what the
description does not name there may be nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.ffn.block_pathway import PARTS, BlockPathway
from hf_sparse_pathways.ffn.clusters import (
    ROUTER_PARTS,
    SHARED,
    ClusteredBlock,
    Kept,
    count_clusters,
)
from hf_sparse_pathways.files import check_finite
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.checks import check_block
from hf_sparse_pathways.pathways.description import base_from_json, check_entries
from hf_sparse_pathways.pathways.pathway import Pathway

KNOWN = (*PARTS, *ROUTER_PARTS, SHARED)
"""Kinds of parts that this version reads."""

GROUPS = {"domains": "", "controls": "c"}
"""Field of the description -> what stands before the index in its tensors' names."""


def name_tensors(group: str, pathways: Mapping[str, Pathway]) -> dict[str, Tensor]:
    """Return the tensors of a group of pathways by their names."""
    return {
        f"{GROUPS[group]}{index}.{position}.{part}": tensor
        for index, pathway in enumerate(pathways.values())
        for position, block in enumerate(pathway.blocks)
        for part, tensor in block.parts().items()
    }


def held_parts(pathway: Pathway) -> list[str]:
    """Return the names of the parts that any of a pathway's blocks holds."""
    held = {_kind(name) for block in pathway.blocks for name in block.parts()}
    return [name for name in KNOWN if name in held]


def choose_tensors(
    only: str | None, meta: Mapping[str, Any], header: Mapping[str, Tensor]
) -> list[str]:
    """Check a file's header against its description; return the names of what is to be read.

    Args:
        only: A domain, to read it alone.
        meta: The description.
        header: As in ``TensorFile``.

    Raises:
        ArtefactError: The description is damaged, or they do not describe the same.
        MismatchError: A tensor's dtype or shape does not fit its block.
    """
    base = base_from_json(meta["base"])
    chosen: list[str] = []
    known: set[str] = set()
    for group, prefix in GROUPS.items():
        check_entries(meta[group])
        for index, entry in enumerate(meta[group]):
            names = _check_blocks(entry, f"{prefix}{index}", base, header)
            known |= names
            if only is None or (group, entry["name"]) == ("domains", only):
                chosen.extend(names)
    unknown = header.keys() - known
    if unknown:
        raise ArtefactError(f"the tensors hold {min(unknown)!r}, which belongs to no domain.")
    return chosen


def _check_blocks(
    entry: Mapping[str, Any], prefix: str, base: BaseModel, header: Mapping[str, Tensor]
) -> set[str]:
    """Check the blocks of one pathway; return the names of their tensors."""
    holds, least = entry["holds"], {"keep"} if base.blocks else set()
    if not isinstance(holds, list) or not least <= {*map(str, holds)} <= {*KNOWN}:
        raise ArtefactError(
            f"{entry['name']!r} holds {holds!r:.200}, of which this version reads only "
            f"{list(KNOWN)}. Upgrade hf-sparse-pathways."
        )
    names: set[str] = set()
    held: set[str] = set()
    for position, shape in enumerate(base.blocks):
        parts = _parts(header, f"{prefix}.{position}", holds)
        check_block(entry["name"], _from_parts(parts), shape)
        names |= {f"{prefix}.{position}.{part}" for part in parts}
        held |= {*map(_kind, parts)}
    if sorted(held) != sorted(holds):
        raise ArtefactError(f"the tensors lack parts of {entry['name']!r}, which holds {holds}.")
    return names


def restore_pathways(
    group: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], only: str | None
) -> dict[str, Pathway]:
    """Return the pathways of a group whose tensors were chosen and read.

    Raises:
        ArtefactError: Two have one name, or a tensor holds what is no number, or no truth value.
    """
    restored: dict[str, Pathway] = {}
    for index, entry in enumerate(meta[group]):
        name = entry["name"]
        if only is not None and name != only:
            continue
        if name in restored:
            raise ArtefactError(f"{name!r} stands twice.")
        blocks = tuple(
            _block(tensors, f"{GROUPS[group]}{index}.{position}", entry["holds"])
            for position in range(len(meta["base"]["blocks"]))
        )
        restored[name] = Pathway(blocks=blocks, provenance=entry["provenance"])
    return restored


def _block(tensors: Mapping[str, Tensor], prefix: str, holds: list[str]) -> Kept:
    parts = _parts(tensors, prefix, holds)
    for part, tensor in parts.items():
        check_finite(f"'{prefix}.{part}'", tensor)
        if _kind(part) == "keep" and bool((tensor.view(torch.uint8) > 1).any()):
            raise ArtefactError(f"'{prefix}.{part}' holds bytes that are neither true nor false.")
    return _from_parts(parts)


def _parts(tensors: Mapping[str, Tensor], prefix: str, holds: list[str]) -> dict[str, Tensor]:
    """Return one block's parts by name; all but a mask may be missing from single blocks."""
    router = tensors.get(f"{prefix}.{ROUTER_PARTS[0]}") if ROUTER_PARTS[0] in holds else None
    own = [part for part in holds if part in PARTS]
    names = own
    if router is not None:
        experts = range(count_clusters(router))
        names = [*ROUTER_PARTS, SHARED]
        names += [f"{number}.{part}" for number in experts for part in own]
    parts = {part: tensors[f"{prefix}.{part}"] for part in names if f"{prefix}.{part}" in tensors}
    if "keep" not in map(_kind, parts):
        raise ArtefactError(f"the tensors lack '{prefix}.keep'.")
    return parts


def _from_parts(parts: dict[str, Tensor]) -> Kept:
    clustered = ROUTER_PARTS[0] in parts
    return ClusteredBlock.from_parts(parts) if clustered else BlockPathway.from_parts(parts)


def _kind(part: str) -> str:
    """Return a part's name without the number of the expert that it belongs to."""
    return part.rpartition(".")[2]
