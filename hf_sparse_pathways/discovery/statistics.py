"""Activation statistics as values: per block, per domain, and a model's profile; saved and loaded.

Sums are kept instead of means, in float64, so that statistics of two token streams merge to those
of both.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hf_sparse_pathways.errors import ArtefactError, UnknownNameError
from hf_sparse_pathways.files import check_finite, read_pair, write_pair
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.storage import base_from_json, base_to_json, check_entries

FORMAT_VERSION = 1
JSON_NAME = "profile.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockStatistics:
    """Statistics of one FFN block's activations over a domain's tokens.

    Attributes:
        tokens: Number of tokens, padding excluded.
        abs_sum: Sum of |a|, float64 ``(d_ff,)``, unit a.
        sum: Sum of a, float64 ``(d_ff,)``, unit a.
        square_sum: Sum of a^2, float64 ``(d_ff,)``, unit a^2.
        positive: Count of a > 0, float64 ``(d_ff,)``, tokens.
        abs_max: Largest |a|, float64 ``(d_ff,)``, unit a.
    """

    tokens: int
    abs_sum: Tensor
    sum: Tensor
    square_sum: Tensor
    positive: Tensor
    abs_max: Tensor

    @classmethod
    def empty(cls, d_ff: int) -> Self:
        """Return the statistics of no tokens."""
        return cls(tokens=0, **{name: torch.zeros(d_ff, dtype=torch.float64) for name in TENSORS})

    @property
    def mean_abs(self) -> Tensor:
        """E[|a|], float64 ``(d_ff,)``."""
        return self.abs_sum / self.tokens

    @property
    def mean(self) -> Tensor:
        """E[a], float64 ``(d_ff,)``."""
        return self.sum / self.tokens

    @property
    def second_moment(self) -> Tensor:
        """E[a^2], float64 ``(d_ff,)``."""
        return self.square_sum / self.tokens

    @property
    def positive_fraction(self) -> Tensor:
        """P(a > 0), float64 ``(d_ff,)``."""
        return self.positive / self.tokens

    def merged(self, other: Self) -> Self:
        """Return the statistics of both token streams together. Pure."""
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            abs_sum=self.abs_sum + other.abs_sum,
            sum=self.sum + other.sum,
            square_sum=self.square_sum + other.square_sum,
            positive=self.positive + other.positive,
            abs_max=torch.maximum(self.abs_max, other.abs_max),
        )


TENSORS = tuple(field.name for field in fields(BlockStatistics) if field.name != "tokens")


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainProfile:
    """One domain's statistics.

    Attributes:
        blocks: One entry per FFN block, in layer order.
        provenance: Source, documents, tokens, seed; plain JSON values. ``digests`` names every
            document that was seen, ``cut_digests`` those of which sections were.
    """

    blocks: tuple[BlockStatistics, ...]
    provenance: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return self.blocks[0].tokens

    def merged(self, other: Self) -> Self:
        """Return the statistics of both together. Pure."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        return replace(
            self,
            blocks=tuple(mine.merged(theirs) for mine, theirs in pairs),
            provenance=_merged_provenance(self.provenance, other.provenance),
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Profile:
    """Activation profiles of one base model.

    Attributes:
        base: The model they were taken from.
        by_domain: Domain name -> statistics.
    """

    base: BaseModel
    by_domain: Mapping[str, DomainProfile]

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
        """
        self.base.check_same(other.base)
        together = dict(self.by_domain)
        for name, theirs in other.by_domain.items():
            together[name] = together[name].merged(theirs) if name in together else theirs
        return replace(self, by_domain=together)

    def pooled(self) -> DomainProfile:
        """Return the statistics of all domains' text together. Pure."""
        first, *rest = self.by_domain.values()
        for profile in rest:
            first = first.merged(profile)
        return first

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``profile.json`` and ``profile.safetensors``, each whole or not at all."""
        tensors = {
            f"{index}.{position}.{name}": getattr(block, name)
            for index, profile in enumerate(self.by_domain.values())
            for position, block in enumerate(profile.blocks)
            for name in TENSORS
        }
        domains = [
            {
                "name": name,
                "tokens": [block.tokens for block in profile.blocks],
                "provenance": dict(profile.provenance),
            }
            for name, profile in self.by_domain.items()
        ]
        meta = {"format": FORMAT_VERSION, "base": base_to_json(self.base), "domains": domains}
        write_pair(Path(folder, JSON_NAME), meta, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what ``save_pretrained`` wrote.

        Raises:
            ArtefactError: It is missing, corrupt, truncated, of a newer format, or holds NaN.
        """
        path = Path(folder, JSON_NAME)
        meta, tensors = read_pair(path, path.with_suffix(".safetensors"), FORMAT_VERSION)
        try:
            base = base_from_json(meta["base"])
            check_entries(meta["domains"])
            by_domain = {
                str(entry["name"]): _restored(entry, f"{index}", base, tensors)
                for index, entry in enumerate(meta["domains"])
            }
        except (KeyError, TypeError, IndexError) as error:
            raise ArtefactError(f"{path} lacks or misuses {error}.") from error
        if len(by_domain) < len(meta["domains"]):
            raise ArtefactError(f"{path} names a domain twice.")
        return cls(base=base, by_domain=by_domain)

    def __repr__(self) -> str:
        tokens = ", ".join(f"{name} {p.tokens} tokens" for name, p in self.by_domain.items())
        return f"Profile(base={self.base.name!r}, {len(self.base.blocks)} FFN blocks, {tokens})"


def check_statistics(domain: str, block: str, statistics: BlockStatistics) -> None:
    """Check that statistics are numbers.

    Raises:
        ArtefactError: One is NaN or infinite.
    """
    for name in TENSORS:
        check_finite(f"Domain {domain!r}, {block}: {name}", getattr(statistics, name))


def _merged_provenance(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    digests, cut = (
        sorted({*mine.get(name, ()), *theirs.get(name, ())}) for name in ("digests", "cut_digests")
    )
    return {
        **mine,
        "source": "; ".join(dict.fromkeys((str(mine["source"]), str(theirs["source"])))),
        "documents": len(digests),
        "tokens": mine["tokens"] + theirs["tokens"],
        "digests": digests,
        "cut_digests": cut,
    }


def _restored(
    entry: dict[str, Any], prefix: str, base: BaseModel, tensors: dict[str, Tensor]
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
        statistics = BlockStatistics(tokens=entry["tokens"][position], **values)
        check_statistics(entry["name"], shape.name, statistics)
        blocks.append(statistics)
    return DomainProfile(blocks=tuple(blocks), provenance=entry["provenance"])
