"""A profile as files: ``profile.json`` describes, ``profile.safetensors`` and ``grams/`` hold.

The Gram matrices are one file per domain and block, named by their content, so that a profile can
be written over an earlier one from which it was made; what nothing refers to is deleted last.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.grams import GramFile, GramSource, files_of, write_gram
from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.statistics import TENSORS, BlockStatistics, check_statistics
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import read_pair, write_pair
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape
from hf_sparse_pathways.pathways.storage import base_from_json, base_to_json, check_entries

FORMAT_VERSION = 2
JSON_NAME = "profile.json"
GRAMS_FOLDER = "grams"
SPLITS = ("windows", "validation")


def write_profile(profile: Profile, folder: Path) -> None:
    """Write a profile into a folder, which is made if needed."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for index, (name, domain) in enumerate(profile.by_domain.items()):
        tensors |= {
            f"{index}.{position}.{part}": getattr(block, part)
            for position, block in enumerate(domain.blocks)
            for part in TENSORS
        }
        for split in SPLITS:
            tensors |= _packed(f"{index}.{split}", getattr(domain, split))
        files = [write_gram(source.load(), folder / GRAMS_FOLDER) for source in domain.grams]
        entries.append(
            {
                "name": name,
                "tokens": [block.tokens for block in domain.blocks],
                "provenance": dict(domain.provenance),
                "grams": [
                    {"file": file.path.name, "sha256": file.sha256, "size": file.size}
                    for file in files
                ],
            }
        )
    meta = {"format": FORMAT_VERSION, "base": base_to_json(profile.base), "domains": entries}
    write_pair(folder / JSON_NAME, meta, tensors)
    _delete_others(folder / GRAMS_FOLDER, profile, entries)


def _delete_others(folder: Path, profile: Profile, entries: list[dict[str, Any]]) -> None:
    """Delete the matrices that neither the description nor this profile in memory refers to."""
    named = {gram["file"] for entry in entries for gram in entry["grams"]}
    for domain in profile.by_domain.values():
        named |= {path.name for source in domain.grams for path in files_of(source)}
    for path in folder.glob("*.safetensors"):
        if path.name not in named:
            path.unlink()


def read_profile(cls: type[Profile], folder: Path) -> Any:
    """Read a profile from a folder.

    Raises:
        ArtefactError: It is missing, corrupt, truncated, of a newer format, or holds NaN.
    """
    path = folder / JSON_NAME
    meta, tensors = read_pair(path, path.with_suffix(".safetensors"), FORMAT_VERSION)
    try:
        base = base_from_json(meta["base"])
        check_entries(meta["domains"])
        by_domain = {
            str(entry["name"]): _restored(entry, f"{index}", base, tensors, folder)
            for index, entry in enumerate(meta["domains"])
        }
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ArtefactError(f"{path} lacks or misuses {error}.") from error
    if len(by_domain) < len(meta["domains"]):
        raise ArtefactError(f"{path} names a domain twice.")
    return cls(base=base, by_domain=by_domain)


def _restored(
    entry: dict[str, Any], prefix: str, base: BaseModel, tensors: dict[str, Tensor], folder: Path
) -> DomainProfile:
    counts = entry["tokens"]
    whole = isinstance(counts, list) and all(type(count) is int and count > 0 for count in counts)
    if not whole or len(counts) != len(base.blocks):
        raise ArtefactError(f"Domain {entry['name']!r}: tokens have to be one count per block.")
    blocks = []
    for position, shape in enumerate(base.blocks):
        values = {name: tensors[f"{prefix}.{position}.{name}"] for name in TENSORS}
        for name, tensor in values.items():
            if tensor.dtype != torch.float64 or tuple(tensor.shape) != (shape.d_ff,):
                raise ArtefactError(
                    f"{shape.name}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not "
                    f"float64 ({shape.d_ff},)."
                )
        statistics = BlockStatistics(tokens=counts[position], **values)
        check_statistics(entry["name"], shape.name, statistics)
        blocks.append(statistics)
    return DomainProfile(
        blocks=tuple(blocks),
        provenance=entry["provenance"],
        grams=_gram_files(entry["grams"], base.blocks, folder / GRAMS_FOLDER),
        **{split: _unpacked(tensors, f"{prefix}.{split}") for split in SPLITS},
    )


def _gram_files(
    entries: list[dict[str, Any]], shapes: tuple[BlockShape, ...], folder: Path
) -> tuple[GramSource, ...]:
    """Return the Gram matrices' files, not yet read."""
    if not isinstance(entries, list) or len(entries) not in (0, len(shapes)):
        raise ArtefactError(f"{JSON_NAME} names {len(entries)} Gram matrices.")
    files = []
    for entry, shape in zip(entries, shapes, strict=False):
        path = folder / Path(str(entry["file"])).name
        if not path.is_file():
            raise ArtefactError(f"{path} is missing. Take the profile again.")
        size = entry["size"]
        if size not in (shape.d_ff + 1, shape.d_ff + shape.d_in + 1):
            raise ArtefactError(f"{path} is said to have {size!r} rows.")
        files.append(GramFile(path=path, sha256=entry["sha256"], d_ff=shape.d_ff, size=size))
    return tuple(files)


def _packed(name: str, windows: tuple[Window, ...]) -> dict[str, Tensor]:
    """Return windows as one run of token ids and their lengths, both int32."""
    ids = [token for window in windows for token in window.ids]
    lengths = [len(window.ids) for window in windows]
    return {
        f"{name}.ids": torch.tensor(ids, dtype=torch.int32),
        f"{name}.lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def _unpacked(tensors: dict[str, Tensor], name: str) -> tuple[Window, ...]:
    lengths = tensors[f"{name}.lengths"].tolist()
    parts = torch.split(tensors[f"{name}.ids"], lengths) if lengths else ()
    return tuple(Window(tuple(part.tolist())) for part in parts)
