"""Pathways as two files: ``pathways.json`` describes, ``pathways.safetensors`` holds.

The same two files lie beside the weights of a full checkpoint or alone in a folder (an adapter).
They hold every domain, or those that do not lie in folders of their own (``apart``). Tensors are
named ``<domain index>.<block index>.<part>``, and ``c<control index>...`` for controls; the parts
that a pathway holds (its keep masks, and compensation) are listed by name.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from hf_sparse_pathways.errors import (
    ArtefactError,
    MismatchError,
    PathwaysError,
    UnknownNameError,
)
from hf_sparse_pathways.ffn.block_pathway import PARTS, BlockPathway
from hf_sparse_pathways.files import check_finite, read_json, read_pair, write_pair
from hf_sparse_pathways.pathways.apart import FIELD, folder_for, list_apart
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.pathways.revision import commit_of
from hf_sparse_pathways.version import __version__

FORMAT_VERSION = 1
JSON_NAME = "pathways.json"
TENSORS_NAME = "pathways.safetensors"


def write_pathways(pathways: Pathways, folder: Path, *, apart: bool = False) -> None:
    """Write the two files into a folder, which is made if needed; each whole or not at all.

    Args:
        pathways: What is written.
        folder: Where.
        apart: Put every domain into a folder of its own.
    """
    if apart:
        places = {name: folder_for(name) for name in pathways.domains}
        for name, place in places.items():
            write_pathways(replace(pathways.subset([name]), controls={}), folder / place)
        write_rest(replace(pathways, by_domain={}), folder, places)
    else:
        write_rest(pathways, folder, {})


def write_rest(pathways: Pathways, folder: Path, places: Mapping[str, str]) -> None:
    """Write the two files, with a list of the domains that lie apart."""
    tensors: dict[str, Tensor] = {}
    for prefix, group in (("", pathways.by_domain), ("c", pathways.controls)):
        for index, pathway in enumerate(group.values()):
            for position, block in enumerate(pathway.blocks):
                for name, tensor in block.parts().items():
                    tensors[f"{prefix}{index}.{position}.{name}"] = tensor
    meta = {
        "format": FORMAT_VERSION,
        "written_by": f"hf-sparse-pathways {__version__}",
        "base": base_to_json(pathways.base),
        "domains": _described(pathways.by_domain),
        "controls": _described(pathways.controls),
        **({FIELD: dict(places)} if places else {}),
    }
    before = _listed_before(folder)
    write_pair(folder / JSON_NAME, meta, tensors)
    for place in before - {*places.values()}:
        shutil.rmtree(folder / place, ignore_errors=True)


def _listed_before(folder: Path) -> set[str]:
    """Return where an earlier save put domains apart."""
    try:
        return {*list_apart(read_json(folder / JSON_NAME)).values()}
    except ArtefactError:
        return set()


def read_pathways(
    cls: type[Pathways], source: str | PathLike[str], only: str | None = None, **hub: Any
) -> Any:
    """Read the two files from a folder or Hub repository.

    Args:
        cls: What is returned.
        source: The folder or repository.
        only: A domain, to read it alone.
        hub: As in ``Pathways.from_pretrained``.

    Raises:
        ArtefactError: They are missing, corrupt, truncated or of a newer format.
        UnknownNameError: There is no such domain.
    """
    places, hub = _list_places(source, hub)
    if isinstance(only, str) and only in places:
        return _read_apart(cls, source, only, places[only], hub)
    found = _read_pair(cls, source, only, places, hub)
    if only is not None or not places:
        return found
    by_domain = dict(found.by_domain)
    for name, place in places.items():
        other = _read_apart(cls, source, name, place, hub)
        if name in by_domain:
            raise ArtefactError(f"{JSON_NAME} in {source}: domain {name!r} stands twice.")
        if other.base != found.base:
            raise MismatchError(
                f"Domain {name!r} in {source} was made for {other.base.title}, the others for "
                f"{found.base.title}."
            )
        by_domain[name] = other[name]
    return replace(found, by_domain=by_domain)


def _list_places(
    source: str | PathLike[str], hub: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return where domains lie apart, and how to read the other files of the same commit.

    A branch may move on between two files; they would then not belong together.
    """
    file = locate(source, JSON_NAME, **hub)
    commit = commit_of(file)
    return list_apart(read_json(file)), hub if commit is None else {**hub, "revision": commit}


def read_together(source: str | PathLike[str], **hub: Any) -> Pathways:
    """Read those domains that lie in one pair of files, and the controls; see ``read_pathways``."""
    found: Pathways = _read_pair(Pathways, source, None, {}, hub)
    return found


def _read_apart(
    cls: type[Pathways], source: str | PathLike[str], name: str, place: str, hub: dict[str, Any]
) -> Any:
    """Read a domain from its own folder."""
    subfolder = "/".join(part for part in (hub.get("subfolder"), place) if part)
    return _read_pair(cls, source, name, {}, {**hub, "subfolder": subfolder})


def _read_pair(
    cls: type[Pathways],
    source: str | PathLike[str],
    only: str | None,
    places: Mapping[str, str],
    hub: dict[str, Any],
) -> Any:
    """Read the domains of two files, or one of them."""
    files = locate(source, JSON_NAME, **hub), locate(source, TENSORS_NAME, **hub)
    wanted = None if only is None else partial(_belongs, only)
    try:
        meta, tensors = read_pair(*files, FORMAT_VERSION, wanted)
        base = base_from_json(meta["base"])
        if only is not None:
            check_entries(meta["domains"])
            names = [entry["name"] for entry in meta["domains"]]
            if only not in names:
                raise UnknownNameError("domain", only, [*names, *places])
        return cls(
            base=base,
            by_domain=_restored(meta["domains"], "", base, tensors, only),
            controls={} if only else _restored(meta["controls"], "c", base, tensors),
        )
    except (ArtefactError, MismatchError, UnknownNameError):
        raise
    except PathwaysError as error:
        raise ArtefactError(f"{JSON_NAME} in {source}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"{JSON_NAME} in {source} lacks or misuses {error}.") from error


def pathway_files(source: str | PathLike[str]) -> list[Path]:
    """Return all files of the pathways in a folder or Hub repository.

    Raises:
        ArtefactError: One is missing, or the description is damaged.
    """
    places, hub = _list_places(source, {})
    return [
        locate(source, name, **hub, **({"subfolder": place} if place else {}))
        for place in ("", *places.values())
        for name in (JSON_NAME, TENSORS_NAME)
    ]


def _belongs(domain: str, meta: dict[str, Any], tensor: str) -> bool:
    """Whether a tensor belongs to a domain's pathway."""
    index = tensor.partition(".")[0]
    entries = meta["domains"]
    return index.isdigit() and int(index) < len(entries) and entries[int(index)]["name"] == domain


def locate(source: str | PathLike[str], name: str, **hub: Any) -> Path:
    """Return the local path of a file in a folder or Hub repository.

    Raises:
        ArtefactError: There is no such file, folder or repository.
    """
    local = Path(source, hub.get("subfolder") or "", name)
    if os.path.isdir(source):
        if not local.is_file():
            raise ArtefactError(
                f"{source} has no {name}. A folder with pathways is written by "
                "save_pretrained or `sparse-pathways build`; for a plain base model pass "
                "pathways=FOLDER."
            )
        return local
    if Path(source).is_absolute() or len(Path(source).parts) > 2 or str(source).startswith("."):
        raise ArtefactError(f"There is no folder {str(source)!r}. Check the path.")
    try:
        found = cached_file(str(source), name, **hub)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ArtefactError(f"No {name} in {str(source)!r}: {first}") from error
    return Path(str(found))


def base_to_json(base: BaseModel) -> dict[str, Any]:
    """Return a base's identity as JSON values."""
    data = asdict(base)
    if base.neuron_order is None:
        del data["neuron_order"]
    return data


def base_from_json(data: dict[str, Any]) -> BaseModel:
    """Return a base's identity from JSON values.

    Raises:
        ArtefactError: A value is missing, unknown, or of the wrong kind.
    """
    try:
        blocks = tuple(_block_shape(block) for block in data["blocks"])
        texts = [data["name"], data["model_type"], data["revision"] or "", *data["routed"]]
        if not blocks or not isinstance(data["routed"], list) or not _all_text(texts):
            raise TypeError("a value of the wrong kind")
        if not all(isinstance(data.get(name), str | None) for name in ("revision", "neuron_order")):
            raise TypeError("a revision or an order that is no text")
        return BaseModel(**{**data, "blocks": blocks, "routed": tuple(data["routed"])})
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"The base's description does not fit: {error}.") from error


def _all_text(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def check_entries(entries: Any) -> None:
    """Check the description of a list of domains or controls.

    Raises:
        ArtefactError: They are no list, or a name is no string, or a provenance no object.
    """
    fits = isinstance(entries, list) and all(
        isinstance(entry["name"], str) and isinstance(entry["provenance"], dict)
        for entry in entries
    )
    if not fits:
        raise ArtefactError("The list of domains or controls holds a value of the wrong kind.")


def _block_shape(data: dict[str, Any]) -> BlockShape:
    widths = [data[field.name] for field in fields(BlockShape) if field.name != "name"]
    possible = all(type(width) is int and 0 < width < 2**31 for width in widths)
    if not possible or not isinstance(data["name"], str):
        raise ArtefactError(f"An FFN block has impossible widths: {data}.")
    return BlockShape(**data)


def _described(group: Mapping[str, Pathway]) -> list[dict[str, Any]]:
    return [
        {"name": name, "provenance": dict(pathway.provenance), "holds": _held(pathway)}
        for name, pathway in group.items()
    ]


def _held(pathway: Pathway) -> list[str]:
    """Return the names of the parts that any of a pathway's blocks holds."""
    held = {name for block in pathway.blocks for name in block.parts()}
    return [name for name in PARTS if name in held]


def _restored(
    described: list[dict[str, Any]],
    prefix: str,
    base: BaseModel,
    tensors: dict[str, Tensor],
    only: str | None = None,
) -> dict[str, Pathway]:
    check_entries(described)
    restored: dict[str, Pathway] = {}
    for index, entry in enumerate(described):
        name = str(entry["name"])
        if only not in (None, name):
            continue
        holds = entry["holds"]
        known = isinstance(holds, list) and set(map(str, holds)) <= set(PARTS)
        if name in restored or not known or "keep" not in holds:
            raise ArtefactError(
                f"{JSON_NAME}: domain {name!r} stands twice, or holds {holds}, of which this "
                f"version reads only {list(PARTS)}. Upgrade hf-sparse-pathways."
            )
        blocks = tuple(
            _block(tensors, f"{prefix}{index}.{position}", holds)
            for position in range(len(base.blocks))
        )
        restored[name] = Pathway(blocks=blocks, provenance=entry["provenance"])
        if sorted(_held(restored[name])) != sorted(holds):
            raise ArtefactError(f"{TENSORS_NAME} lacks parts of {name!r}, which holds {holds}.")
    return restored


def _block(tensors: dict[str, Tensor], prefix: str, holds: list[str]) -> BlockPathway:
    """Build one block's pathway; parts other than the mask may be missing from single blocks."""
    parts = {part: tensors[f"{prefix}.{part}"] for part in holds if f"{prefix}.{part}" in tensors}
    if "keep" not in parts or parts["keep"].dtype != torch.bool:
        raise ArtefactError(f"{TENSORS_NAME} has no bool tensor '{prefix}.keep': it is corrupt.")
    for part, tensor in parts.items():
        if part != "keep" and not tensor.is_floating_point():
            raise ArtefactError(f"{TENSORS_NAME}: '{prefix}.{part}' is {tensor.dtype}.")
        check_finite(f"{TENSORS_NAME}: '{prefix}.{part}'", tensor)
    return BlockPathway.from_parts(parts)
