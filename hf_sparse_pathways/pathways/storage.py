"""Pathways as two files: ``pathways.json`` describes, ``pathways.safetensors`` holds.

The same two files lie beside the weights of a full checkpoint or alone in a folder (an adapter).
They hold every domain, or those that do not lie in folders of their own (``apart``). Tensors are
named ``<domain index>.<block index>.<part>``, and ``c<control index>...`` for controls; the parts
that a pathway holds (its keep masks, and compensation) are listed by name.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.hub import cached_file

from hf_sparse_pathways.display import plain
from hf_sparse_pathways.errors import (
    ArtefactError,
    MismatchError,
    PathwaysError,
    UnknownNameError,
)
from hf_sparse_pathways.files import read_json, read_pair, write_pair
from hf_sparse_pathways.pathways.apart import FIELD, folder_for, list_apart
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.description import base_from_json, base_to_json
from hf_sparse_pathways.pathways.expert_parts import (
    choose_experts,
    describe_experts,
    name_experts,
    restore_experts,
    split_experts,
)
from hf_sparse_pathways.pathways.parts import (
    GROUPS,
    choose_tensors,
    held_parts,
    name_tensors,
    restore_pathways,
)
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.pathways.revision import commit_of
from hf_sparse_pathways.pathways.signature_parts import (
    FIELD as SIGNATURE,
)
from hf_sparse_pathways.pathways.signature_parts import (
    choose_signatures,
    name_signatures,
    restore_signatures,
    split_header,
)
from hf_sparse_pathways.tokens import check_token, hide_tokens
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
    groups = {"domains": pathways.by_domain, "controls": pathways.controls}
    tensors: dict[str, Tensor] = {}
    for group, named in groups.items():
        tensors |= name_tensors(group, named) | name_experts(GROUPS[group], named)
    tensors |= name_signatures(pathways.by_domain)
    meta = {
        "format": FORMAT_VERSION,
        "written_by": f"hf-sparse-pathways {__version__}",
        "base": base_to_json(_told(pathways)),
        **{group: _described(named) for group, named in groups.items()},
        **({FIELD: dict(places)} if places else {}),
    }
    before = _listed_before(folder)
    write_pair(folder / JSON_NAME, meta, tensors)
    for place in before - {*places.values()}:
        _delete_pair(folder / place)


def _told(pathways: Pathways) -> BaseModel:
    """Return the base as it is stored: without experts where nothing depends on them."""
    named = (*pathways.by_domain.values(), *pathways.controls.values())
    if pathways.base.blocks and not any(pathway.experts for pathway in named):
        return replace(pathways.base, experts=())
    return pathways.base


def _listed_before(folder: Path) -> set[str]:
    """Return where an earlier save put domains apart."""
    try:
        return {*list_apart(read_json(folder / JSON_NAME)).values()}
    except ArtefactError:
        return set()


def _delete_pair(folder: Path) -> None:
    """Delete a folder of two files; nothing else in it, nor behind a link in place of a folder.

    Whoever wrote the earlier description may have written anything into it.
    """
    if folder.is_symlink() or folder.parent.is_symlink():
        return
    with suppress(OSError):
        for name in (JSON_NAME, TENSORS_NAME):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


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
        found = replace(found, base=found.base.with_experts_of(other.base))
        if other.base.with_experts_of(found.base) != found.base:
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
    try:
        meta, tensors = read_pair(*files, FORMAT_VERSION, partial(_choose, only))
        by_domain = restore_pathways("domains", meta, tensors, only)
        by_domain = restore_signatures(meta, tensors, by_domain)
        if only not in (None, *by_domain):
            names = [entry["name"] for entry in meta["domains"]]
            raise UnknownNameError("domain", only, [*names, *places])
        controls = {} if only else restore_pathways("controls", meta, tensors, None)
        base = base_from_json(meta["base"])
        domain_entries, control_entries = (_entries(meta, group) for group in GROUPS)
        by_domain = restore_experts(domain_entries, base, tensors, by_domain)
        controls = restore_experts(control_entries, base, tensors, controls)
        return cls(base=base, by_domain=by_domain, controls=controls)
    except UnknownNameError:
        raise
    except MismatchError as error:
        raise MismatchError(f"Pathways in {source}: {plain(str(error))}") from error
    except PathwaysError as error:
        raise ArtefactError(f"Pathways in {source}: {plain(str(error))}") from error
    except (KeyError, TypeError) as error:
        told = plain(str(error))
        raise ArtefactError(f"{JSON_NAME} in {source} lacks or misuses {told}.") from error


def _choose(only: str | None, meta: Mapping[str, Any], header: Mapping[str, Tensor]) -> list[str]:
    """Check a file's header against its description; return the names of what is to be read."""
    signatures, rest = split_header(header)
    experts, rest = split_experts(rest)
    chosen = choose_tensors(only, meta, rest) + choose_signatures(only, meta, signatures)
    entries = {**_entries(meta, "domains"), **_entries(meta, "controls")}
    return chosen + choose_experts(entries, only, meta, experts)


def _entries(meta: Mapping[str, Any], group: str) -> dict[str, Mapping[str, Any]]:
    """Return what is said of each pathway, by what stands before its tensors' numbers."""
    return {f"{GROUPS[group]}{index}": entry for index, entry in enumerate(meta[group])}


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
    check_token(hub.get("token"))
    try:
        found = cached_file(str(source), name, **hub)
    except (OSError, UnicodeError) as error:
        first = hide_tokens((str(error).strip() or type(error).__name__).splitlines()[0])
        raise ArtefactError(f"No {name} in {str(source)!r}: {first}") from error
    return Path(str(found))


def _described(group: Mapping[str, Pathway]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "provenance": dict(pathway.provenance),
            "holds": held_parts(pathway),
            **({SIGNATURE: True} if pathway.signature is not None else {}),
            **describe_experts(pathway),
        }
        for name, pathway in group.items()
    ]
