"""Entanglement: how far from normal the outputs of a neuron's incoming products are.

Of a row of an incoming leaf (gate, up) let F be the distribution over tokens of its output,
standardised. Its entanglement is the Wasserstein distance to the normal distribution::

    W1 = integral |F(u) - Phi(u)| du

A first pass over the text gives the mean and deviation of every row, a second one counts
standardised outputs in bins that are narrow in the middle. At the edges of bins F is exact, and in
between it is taken as linear, right to 0.01 even where outputs have few values; beyond the
outermost edges W1 is the mean excess, which is summed. A row that never varies counts as zero.

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756; there the neurons with a large
W1 are those which suffer most from sparsification.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.collection import Collection, Sample, cut_groups
from hf_sparse_pathways.discovery.collectors import OfBlock
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.processes import Processes

BINS = 256
"""An even number: one edge is the mean."""

LIMIT = 8.0
"""The outermost edges, in standard deviations."""

_CORE = 0.5
"""Below so many deviations bins are about equally wide, beyond proportional to the distance."""

_CHUNK_VALUES = 2**22
"""Outputs that are counted at a time."""


def measure_entanglement(
    run: Collection,
    domain: str,
    sample: Sample,
    work_folder: "str | PathLike[str] | None",
    max_memory: int,
) -> tuple[Tensor, ...]:
    """Return W1 of the rows of every block, float32 ``(branches, d_ff)`` each.

    Args:
        run: What all passes of the profile have in common.
        domain: Whose windows.
        sample: They.
        work_folder: Where unfinished sums are stored.
        max_memory: Bytes of counts that are in memory at a time, or those of one block.
    """
    blocks = [block for group in run.groups for block in group]
    first = replace(run, groups=(tuple(blocks),), grams=False, inputs=False)
    found = first.sum_up(domain, sample, work_folder, "moments", ProductMoments)
    known = {collector.block.name: collector.standard() for collector in found}
    sizes = [4 * (BINS + 2) * len(known[block.name][0]) for block in blocks]
    second = replace(first, groups=tuple(cut_groups(blocks, sizes, max_memory)))

    def count(block: FfnBlock) -> ProductCounts:
        return ProductCounts(block, *known[block.name])

    counted: Iterator[ProductCounts] = second.sum_up(domain, sample, work_folder, "counts", count)
    return tuple(collector.distance() for collector in counted)


class ProductCollector(OfBlock):
    """Sees the outputs of a block's incoming leaves, row by row.

    A row is one output of an incoming leaf; the gate's stand before up's, ``(branches * d_ff,)``.
    """

    SUMS: ClassVar[tuple[str, ...]]
    """Names of the attributes that are sums over tokens."""

    def __init__(self, block: FfnBlock) -> None:
        super().__init__(block)
        self.rows = block.d_ff * block.branches
        self.tokens = torch.zeros((), dtype=torch.int64)

    def attach(self) -> list[Any]:
        """Hook the block; return the handles."""
        handles = []
        for position, leaf in enumerate(self.block.incoming):

            def see(_: nn.Module, __: Any, output: Tensor, start: int = position) -> None:
                values = self.real(output)
                first = start * self.block.d_ff
                self.add(values.float(), slice(first, first + values.shape[1]))

            handles.append(leaf.register_forward_hook(see))
        handles.append(self.block.outgoing.register_forward_pre_hook(self._finish))
        return handles

    def _finish(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self.tokens += self.real_tokens
        self.batches += 1

    @abstractmethod
    def add(self, values: Tensor, rows: slice) -> None:
        """Add one leaf's outputs ``(tokens, rows)``, in place."""

    def state(self) -> dict[str, Tensor]:
        """Return all sums by name, to be stored; ``restore`` takes them back."""
        return {name: getattr(self, name) for name in ("tokens", *self.SUMS)}

    def restore(self, state: dict[str, Tensor], batches: int) -> None:
        """Go on from stored sums, in place."""
        for name in ("tokens", *self.SUMS):
            setattr(self, name, state[name].clone())
        self.batches = batches

    def combine(self, processes: Processes) -> None:
        """Add the sums of all processes, in place; each then has those of all."""
        for name in ("tokens", *self.SUMS):
            setattr(self, name, processes.add_up(getattr(self, name)))


class ProductMoments(ProductCollector):
    """Mean and deviation of every row's output: the first pass."""

    SUMS = ("sum", "square_sum")

    def __init__(self, block: FfnBlock) -> None:
        super().__init__(block)
        self.sum = torch.zeros(self.rows, dtype=torch.float64)
        self.square_sum = torch.zeros(self.rows, dtype=torch.float64)

    def add(self, values: Tensor, rows: slice) -> None:
        """Add one leaf's outputs ``(tokens, rows)``, in place."""
        exact = values.double()
        self.sum[rows] += exact.sum(0).cpu()
        self.square_sum[rows] += exact.square_().sum(0).cpu()

    def standard(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each row, float64; 0 where it never varies."""
        mean = self.sum / self.tokens
        variance = self.square_sum / self.tokens - mean.square()
        varies = variance > 1e-12 * mean.square()  # below, rounding is all that is left
        return mean, torch.where(varies, variance, 0.0).sqrt()


class ProductCounts(ProductCollector):
    """Counts of every row's standardised outputs by bin: the second pass."""

    SUMS = ("counts", "excess")

    def __init__(self, block: FfnBlock, mean: Tensor, deviation: Tensor) -> None:
        super().__init__(block)
        self.mean = mean.float()
        self.scale = torch.where(deviation > 0, 1.0 / deviation, 0.0).float()
        self.counts = torch.zeros(self.rows, BINS + 2, dtype=torch.int32)
        self.excess = torch.zeros(self.rows, dtype=torch.float64)

    def add(self, values: Tensor, rows: slice) -> None:
        """Add one leaf's outputs ``(tokens, rows)``, in place."""
        mean, scale = self.mean[rows].to(values.device), self.scale[rows].to(values.device)
        width = values.shape[1]
        first = torch.arange(width, device=values.device) * (BINS + 2)
        for part in torch.split(values, max(1, _CHUNK_VALUES // width)):
            standard = (part - mean) * scale
            excess = (standard.abs() - LIMIT).clamp_min_(0.0).sum(0, dtype=torch.float64)
            self.excess[rows] += excess.cpu()
            place = standard.div_(_CORE).asinh_().mul_(BINS / 2 / math.asinh(LIMIT / _CORE))
            place = place.add_(BINS / 2 + 1).floor_().clamp_(0, BINS + 1).long()
            counts = (place + first).flatten().bincount(minlength=width * (BINS + 2))
            self.counts[rows] += counts.view(width, -1).int().cpu()

    def distance(self) -> Tensor:
        """Return each row's W1, float32 ``(branches, d_ff)``."""
        found = distance_to_normal(self.counts, self.excess, int(self.tokens))
        return found.float().view(-1, self.block.d_ff)


def bin_edges() -> Tensor:
    """Return the edges of the bins in standard deviations, float64 ``(BINS + 1,)``."""
    limit = math.asinh(LIMIT / _CORE)
    return _CORE * torch.linspace(-limit, limit, BINS + 1, dtype=torch.float64).sinh()


def distance_to_normal(counts: Tensor, excess: Tensor, tokens: int) -> Tensor:
    """Return the Wasserstein distance W1 of distributions to N(0, 1), float64 ``(rows,)``. Pure.

    Args:
        counts: Values below, in and above the bins, ``(rows, BINS + 2)``.
        excess: Sum of ``max(0, |u| - LIMIT)``, ``(rows,)``.
        tokens: Number of values of each row.
    """
    edges = bin_edges()
    below = counts[:, :-1].double().cumsum(1) / tokens
    difference = below - torch.special.ndtr(edges)
    left, right = difference[:, :-1], difference[:, 1:]
    size = left.abs() + right.abs()
    crossing = (left.square() + right.square()) / size.clamp_min(1e-300)
    area = torch.where(left * right < 0, crossing, size) / 2
    return (area * edges.diff()).sum(1) + excess / tokens
