"""Activation profiles: what each FFN neuron does on a domain's text.

A forward pre-hook on every outgoing leaf sees the activation, drops padding, and adds to five
running statistics per neuron: sum |a|, sum a, sum a^2, the count of a > 0, and max |a|. Sums
accumulate in float64, so halves merge to the whole.

Source: A. Young 2026, "Sparse Pathways", profiles E[|a|] per domain; the other moments serve other
scores (``discovery/scores.py``).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.text import Documents, TextSource, read_documents
from hf_sparse_pathways.discovery.windows import (
    Batch,
    Window,
    count_tokens,
    draw_windows,
    make_batches,
    resolve_length,
)
from hf_sparse_pathways.errors import ArtefactError, PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.files import check_finite, read_pair, write_pair
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.storage import base_from_json, base_to_json, check_entries

MIN_TOKENS = 32
"""Fewer tokens of a domain are refused: their statistics would be noise."""

FORMAT_VERSION = 1
JSON_NAME = "profile.json"
_CHUNK_VALUES = 2**18
"""Activations that are summed at a time: one megabyte, which stays in a core's cache."""


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
            document that was seen.
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


def profile(  # noqa: PLR0913
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    max_tokens: int = 65536,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Profile:
    """Take the activation profile of each domain's text. The model is left as it was.

    Args:
        model: A causal LM; one with pathways is profiled densely.
        tokenizer: Its tokenizer.
        texts: Domain name -> text source (see ``read_documents``). All of it is calibration text:
            hold out what you evaluate on.
        max_tokens: Most tokens per domain, drawn at random over all of its documents.
        max_length: Most tokens per window; by default 512, or the model's positions if fewer.
        batch_size: Windows per forward pass.
        seed: Decides which windows are drawn.

    Raises:
        UnsupportedModelError: The model has no FFN blocks.
        TextError: A source cannot be read, or has fewer than ``MIN_TOKENS`` tokens.
        PathwaysError: An activation is NaN or infinite.
    """
    base = BaseModel.of(model)
    if not texts:
        raise TextError("No domains were given. Pass a dictionary {domain: text source}.")
    max_length = resolve_length(model, max_length)
    drawn = {}
    for domain, source in texts.items():
        documents = read_documents(source, seed=seed)
        windows = draw_windows(
            documents, tokenizer, max_tokens=max_tokens, max_length=max_length, seed=seed
        )
        _check_enough(domain, documents, windows)
        drawn[domain] = (windows, _provenance(documents, windows, max_length, seed))
    by_domain = {}
    for domain, (windows, provenance) in drawn.items():
        blocks = _collect(model, domain, windows, batch_size)
        by_domain[domain] = DomainProfile(blocks=blocks, provenance=provenance)
    return Profile(base=base, by_domain=by_domain)


def _collect(
    model: nn.Module, domain: str, windows: list[Window], batch_size: int
) -> tuple[BlockStatistics, ...]:
    """Run a domain's windows through the decoder and return every block's statistics."""
    collectors = [_Collector(block.d_ff) for block in find_blocks(model)]
    decoder = getattr(model, "base_model", model)  # without the head: no logits are needed
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(all_dense())
        stack.enter_context(_evaluation_mode(model))
        for collector, block in zip(collectors, find_blocks(model), strict=True):
            handle = block.outgoing.register_forward_pre_hook(collector)
            stack.callback(handle.remove)
        bar = stack.enter_context(
            tqdm(total=count_tokens(windows), desc=f"profile {domain}", unit="tok", disable=None)
        )
        for batch in make_batches(windows, batch_size):
            for collector in collectors:
                collector.begin(batch, device)
            decoder(
                input_ids=batch.ids.to(device),
                attention_mask=batch.mask.long().to(device),
                use_cache=False,
            )
            bar.update(int(batch.mask.sum()))
    for collector, block in zip(collectors, find_blocks(model), strict=True):
        check_statistics(domain, block.name, collector.statistics)
    return tuple(collector.statistics for collector in collectors)


class _Collector:
    """Forward pre-hook of one outgoing leaf that accumulates statistics."""

    def __init__(self, d_ff: int) -> None:
        self.statistics = BlockStatistics.empty(d_ff)
        self._rows: Tensor | None = None
        self._space: Tensor | None = None
        self._tokens = 0

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Take note of which tokens of the coming forward pass are real."""
        flat = batch.mask.flatten()
        self._rows = None if bool(flat.all()) else flat.nonzero().flatten().to(device)
        self._tokens = len(flat)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        activation = args[0].detach().flatten(0, -2)
        if len(activation) != self._tokens:
            raise PathwaysError(
                f"An FFN block received {len(activation)} tokens of the {self._tokens} in the "
                "batch: the model routes tokens past it, so padding cannot be told from text. "
                "Such blocks cannot be profiled."
            )
        if self._rows is not None:
            activation = activation.index_select(0, self._rows)
        chunk_tokens = max(32, _CHUNK_VALUES // activation.shape[1])
        if self._space is None:
            size = (2, chunk_tokens, activation.shape[1])
            self._space = torch.empty(size, dtype=torch.float32, device=activation.device)
        for chunk in activation.split(chunk_tokens):
            self.statistics = self.statistics.merged(_statistics(chunk, self._space))


def _statistics(activation: Tensor, space: Tensor) -> BlockStatistics:
    """Return the statistics of ``(tokens, d_ff)`` activations, computed in a working space.

    A chunk is summed in float32 (cascaded, a few hundred terms) and accumulates in float64:
    float64 throughout costs several times as much and changes the seventh digit.

    Args:
        activation: At most as many tokens as the space has.
        space: float32 ``(2, tokens, d_ff)``, overwritten; fresh memory costs more than the sums.
    """
    values, work = space[0, : len(activation)], space[1, : len(activation)]
    values.copy_(activation)
    tensors = {"sum": values.sum(0)}
    torch.abs(values, out=work)
    tensors["abs_sum"], tensors["abs_max"] = work.sum(0), work.amax(0)
    torch.square(values, out=work)
    tensors["square_sum"] = work.sum(0)
    torch.gt(values, 0, out=work)
    tensors["positive"] = work.sum(0)
    return BlockStatistics(
        tokens=len(values), **{name: tensor.double().cpu() for name, tensor in tensors.items()}
    )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_enough(domain: str, documents: Documents, windows: list[Window]) -> None:
    tokens = count_tokens(windows)
    if tokens < MIN_TOKENS:
        raise TextError(
            f"Domain {domain!r} has {tokens} tokens of text ({documents.source}); at least "
            f"{MIN_TOKENS} are needed, and tens of thousands for a good selection."
        )


def check_statistics(domain: str, block: str, statistics: BlockStatistics) -> None:
    """Check that statistics are numbers.

    Raises:
        ArtefactError: One is NaN or infinite.
    """
    for name in TENSORS:
        check_finite(f"Domain {domain!r}, {block}: {name}", getattr(statistics, name))


def _provenance(
    documents: Documents, windows: list[Window], max_length: int, seed: int
) -> dict[str, Any]:
    digests = sorted({window.document.digest for window in windows})
    return {
        "source": documents.source,
        "documents": len(digests),
        "tokens": count_tokens(windows),
        "max_length": max_length,
        "seed": seed,
        "digests": digests,
    }


def _merged_provenance(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    digests = sorted({*mine.get("digests", ()), *theirs.get("digests", ())})
    return {
        **mine,
        "source": "; ".join(dict.fromkeys((str(mine["source"]), str(theirs["source"])))),
        "documents": len(digests),
        "tokens": mine["tokens"] + theirs["tokens"],
        "digests": digests,
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
