"""A profile as files: ``profile.json`` describes, ``profile.safetensors`` and ``grams/`` hold.

The Gram matrices are one file per domain and block, named by their content, so that a profile can
be written over an earlier one from which it was made; what nothing refers to is deleted last.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.background import PARTS, Background
from hf_sparse_pathways.discovery.expert_statistics import (
    TENSORS as EXPERT_TENSORS,
)
from hf_sparse_pathways.discovery.expert_statistics import (
    ExpertStatistics,
    statistics_header,
)
from hf_sparse_pathways.discovery.grams import (
    GRAM_NAME,
    GramFile,
    GramSource,
    files_of,
    write_gram,
)
from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.discovery.statistics import TENSORS, BlockStatistics, check_statistics
from hf_sparse_pathways.discovery.windows import Window, number_documents
from hf_sparse_pathways.display import plain
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import check_finite, read_pair, write_pair
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape
from hf_sparse_pathways.pathways.description import (
    base_from_json,
    base_to_json,
    check_entries,
    check_text,
)
from hf_sparse_pathways.tensor_files import check_header, without_memory

FORMAT_VERSION = 2
JSON_NAME = "profile.json"
GRAMS_FOLDER = "grams"
SPLITS = ("windows", "validation", "routing")
WINDOWS = ("ids", "lengths", "documents")
"""Tensors that hold windows: all token ids, how many each has, the number of each's document."""
LATER = ("routing", "documents")
"""What older profiles have not."""
BACKGROUND = "background"
EXPERTS = "experts"
"""Of a domain's description: tokens per layer with routed experts, if it has statistics of them."""
ENTANGLEMENT = "entanglement"


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
        tensors |= {
            f"{index}.{EXPERTS}.{layer}.{part}": getattr(statistics, part)
            for layer, statistics in enumerate(domain.experts)
            for part in EXPERT_TENSORS
        }
        for split in SPLITS:
            tensors |= _packed(f"{index}.{split}", getattr(domain, split))
        tensors |= {
            f"{index}.{position}.{ENTANGLEMENT}": distances
            for position, distances in enumerate(domain.entanglement)
        }
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
                **({EXPERTS: [one.tokens for one in domain.experts]} if domain.experts else {}),
                **({ENTANGLEMENT: True} if domain.entanglement else {}),
            }
        )
    meta = {"format": FORMAT_VERSION, "base": base_to_json(profile.base), "domains": entries}
    if profile.background is not None:
        meta[BACKGROUND] = True
        tensors |= {f"{BACKGROUND}.{n}": part for n, part in profile.background.parts().items()}
    write_pair(folder / JSON_NAME, meta, tensors)
    _delete_others(folder / GRAMS_FOLDER, profile, entries)


def _split_names(index: int, header: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names of the tensors that hold a domain's text."""
    for split, part in product(SPLITS, WINDOWS):
        name = f"{index}.{split}.{part}"
        if name in header or not {split, part} & {*LATER}:
            yield name


def _delete_others(folder: Path, profile: Profile, entries: list[dict[str, Any]]) -> None:
    """Delete the matrices that neither the description nor this profile in memory refers to.

    What is behind a link in place of the folder, or has another name than ``write_gram`` gives, is
    nothing of ours.
    """
    named = {gram["file"] for entry in entries for gram in entry["grams"]}
    for domain in profile.by_domain.values():
        named |= {path.name for source in domain.grams for path in files_of(source)}
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if GRAM_NAME.fullmatch(path.name) and path.name not in named:
            path.unlink()


def read_profile(cls: type[Profile], folder: Path) -> Any:
    """Read a profile from a folder.

    Raises:
        ArtefactError: It is missing, corrupt, truncated, of a newer format, or holds NaN.
    """
    path = folder / JSON_NAME
    try:
        tensors_path = path.with_suffix(".safetensors")
        meta, tensors = read_pair(path, tensors_path, FORMAT_VERSION, _choose)
        base = base_from_json(meta["base"])
        by_domain = {
            str(entry["name"]): _restored(entry, f"{index}", base, tensors, folder)
            for index, entry in enumerate(meta["domains"])
        }
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"{path} lacks or misuses {plain(str(error))}.") from error
    if len(by_domain) < len(meta["domains"]):
        raise ArtefactError(f"{path} names a domain twice.")
    return cls(base=base, by_domain=by_domain, background=_background(meta, tensors))


def _background(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Background | None:
    """Return what the model wrote; nothing of it is in older profiles."""
    if not meta.get(BACKGROUND):
        return None
    background = Background(**{part: tensors[f"{BACKGROUND}.{part}"] for part in PARTS})
    background.check()
    return background


def _choose(meta: Mapping[str, Any], header: Mapping[str, Tensor]) -> list[str]:
    """Check a file's header against its description; everything is read."""
    base = base_from_json(meta["base"])
    check_entries(meta["domains"])
    expected: dict[str, Tensor] = {}
    for index, entry in enumerate(meta["domains"]):
        check_text(entry["name"], entry["provenance"])
        for position, shape in enumerate(base.blocks):
            for part in TENSORS:
                statistic = without_memory(torch.float64, shape.d_ff)
                expected[f"{index}.{position}.{part}"] = statistic
            if entry.get(ENTANGLEMENT):
                distances = without_memory(torch.float32, shape.branches, shape.d_ff)
                expected[f"{index}.{position}.{ENTANGLEMENT}"] = distances
        for layer, routed in enumerate(base.experts if entry.get(EXPERTS) else ()):
            parts = statistics_header(routed).items()
            expected |= {f"{index}.{EXPERTS}.{layer}.{part}": tensor for part, tensor in parts}
        for name in _split_names(index, header):
            length = header[name].numel()  # whatever it is
            expected[name] = without_memory(torch.int32, length)
    for name in (f"{BACKGROUND}.{part}" for part in PARTS if meta.get(BACKGROUND)):
        expected[name] = header[name]  # Background.check says what they have to be
    check_header(header, expected)
    return list(expected)


def _restored(
    entry: dict[str, Any], prefix: str, base: BaseModel, tensors: dict[str, Tensor], folder: Path
) -> DomainProfile:
    counts = _counts(entry, "tokens", len(base.blocks))
    blocks = []
    for position, shape in enumerate(base.blocks):
        values = {name: tensors[f"{prefix}.{position}.{name}"] for name in TENSORS}
        statistics = BlockStatistics(tokens=counts[position], **values)
        check_statistics(entry["name"], shape.name, statistics)
        blocks.append(statistics)
    entanglement = [
        tensors[f"{prefix}.{position}.{ENTANGLEMENT}"]
        for position in range(len(base.blocks) if entry.get(ENTANGLEMENT) else 0)
    ]
    for distances in entanglement:
        check_finite(f"Domain {entry['name']!r}: {ENTANGLEMENT}", distances)
    return DomainProfile(
        blocks=tuple(blocks),
        provenance=entry["provenance"],
        grams=_gram_files(entry["grams"], base.blocks, folder / GRAMS_FOLDER),
        experts=_experts(entry, prefix, base, tensors),
        entanglement=tuple(entanglement),
        **{
            split: _unpacked(tensors, f"{prefix}.{split}")
            for split in SPLITS
            if split not in LATER or f"{prefix}.{split}.ids" in tensors
        },
    )


def _counts(entry: dict[str, Any], field: str, parts: int) -> list[int]:
    """Return how many tokens each of a domain's parts has seen."""
    counts = entry[field]
    whole = isinstance(counts, list) and all(type(count) is int and count > 0 for count in counts)
    if not whole or len(counts) != parts:
        raise ArtefactError(
            f"Domain {entry['name']!r}: {field} have to be one count of tokens per block or layer."
        )
    return list(counts)


def _experts(
    entry: dict[str, Any], prefix: str, base: BaseModel, tensors: dict[str, Tensor]
) -> tuple[ExpertStatistics, ...]:
    """Return the statistics of routed experts, if there are any."""
    if not entry.get(EXPERTS):
        return ()
    found = []
    for layer, count in enumerate(_counts(entry, EXPERTS, len(base.experts))):
        parts = {part: tensors[f"{prefix}.{EXPERTS}.{layer}.{part}"] for part in EXPERT_TENSORS}
        statistics = ExpertStatistics(tokens=count, **parts)
        statistics.check(entry["name"], base.experts[layer].name)
        found.append(statistics)
    return tuple(found)


def _gram_files(
    entries: list[dict[str, Any]], shapes: tuple[BlockShape, ...], folder: Path
) -> tuple[GramSource, ...]:
    """Return the Gram matrices' files, not yet read."""
    if not isinstance(entries, list) or len(entries) not in (0, len(shapes)):
        raise ArtefactError(f"{JSON_NAME} names {len(entries)} Gram matrices.")
    files = []
    for entry, shape in zip(entries, shapes, strict=False):
        if not GRAM_NAME.fullmatch(str(entry["file"])):
            raise ArtefactError(f"{JSON_NAME}: {entry['file']!r:.200} is no file of a Gram matrix.")
        path = folder / entry["file"]
        if not path.is_file():
            raise ArtefactError(f"{path} is missing. Take the profile again.")
        size = entry["size"]
        if size not in (shape.d_ff + 1, shape.d_ff + shape.d_in + 1):
            raise ArtefactError(f"{path} is said to have {size!r} rows.")
        files.append(GramFile(path=path, sha256=str(entry["sha256"]), d_ff=shape.d_ff, size=size))
    return tuple(files)


def _packed(name: str, windows: tuple[Window, ...]) -> dict[str, Tensor]:
    """Return windows as tensors, all int32."""
    ids = [token for window in windows for token in window.ids]
    lengths = [len(window.ids) for window in windows]
    return {
        f"{name}.ids": torch.tensor(ids, dtype=torch.int32),
        f"{name}.lengths": torch.tensor(lengths, dtype=torch.int32),
        f"{name}.documents": torch.tensor(number_documents(windows), dtype=torch.int32),
    }


def _unpacked(tensors: dict[str, Tensor], name: str) -> tuple[Window, ...]:
    ids, lengths = tensors[f"{name}.ids"], tensors[f"{name}.lengths"]
    if bool((lengths < 1).any()) or int(lengths.sum()) != len(ids) or bool((ids < 0).any()):
        raise ArtefactError(f"{name} holds no windows of token ids.")
    documents: Sequence[int | None] = [None] * len(lengths)
    if f"{name}.documents" in tensors:
        documents = tensors[f"{name}.documents"].tolist()
        if len(documents) != len(lengths):
            raise ArtefactError(f"{name} has not one document per window.")
    parts = torch.split(ids, lengths.tolist()) if len(lengths) else ()
    return tuple(
        Window(tuple(part.tolist()), number=number)
        for part, number in zip(parts, documents, strict=True)
    )
