"""Hooks that accumulate one FFN block's statistics while the model runs over a domain's text."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.grams import GramAccumulator
from hf_sparse_pathways.discovery.statistics import TENSORS, BlockStatistics
from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.processes import Processes

_CHUNK_VALUES = 2**18
"""Activations that are summed at a time: one megabyte, which stays in a core's cache."""

_GRAM_TOKENS = 2048
"""Tokens that enter a Gram matrix at a time."""

_MOST_SPACE = 2**24
"""Most float32 values of working space for Gram matrices: 64 MB."""


class Workspaces:
    """Memory that the collectors of one run share: fresh memory costs more than the sums."""

    def __init__(self) -> None:
        self._spaces: dict[tuple[str, torch.device, int], Tensor] = {}

    def sums(self, width: int, device: torch.device) -> Tensor:
        """Return float32 ``(2, tokens, width)`` for a chunk of activations."""
        shape = (2, max(32, _CHUNK_VALUES // width), width)
        return self._get("sums", shape, device)

    def gram(self, width: int, device: torch.device) -> Tensor:
        """Return float32 ``(tokens, width)`` for the vectors of a Gram matrix."""
        tokens = max(64, min(_GRAM_TOKENS, _MOST_SPACE // width))
        return self._get("gram", (tokens, width), device)

    def _get(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        key = (name, device, shape[-1])
        if key not in self._spaces:
            self._spaces[key] = torch.empty(shape, dtype=torch.float32, device=device)
        return self._spaces[key]


class Collector(ABC):
    """Sums over tokens, which can be stored and added to those of other processes.

    ``begin`` says which tokens of the coming forward pass are real; hooks then see a part of the
    model.

    Attributes:
        batches: How many have been seen.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._rows: Tensor | None = None
        self._tokens = 0

    def begin(self, batch: Batch) -> None:
        """Take note of which tokens of the coming forward pass are real."""
        flat = batch.mask.flatten()
        self._rows = None if bool(flat.all()) else flat.nonzero().flatten()
        self._tokens = len(flat)

    @abstractmethod
    def attach(self) -> list[Any]:
        """Hook the part of the model; return the handles."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all sums by name, to be stored; ``restore`` takes them back."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor], batches: int) -> None:
        """Go on from stored sums, in place."""

    @abstractmethod
    def combine(self, processes: Processes) -> None:
        """Add the sums of all processes, in place; each then has those of all."""

    @property
    def real_tokens(self) -> int:
        """Number of real tokens of the coming forward pass."""
        return self._tokens if self._rows is None else len(self._rows)

    def real(self, values: Tensor) -> Tensor:
        """Return the real tokens ``(tokens, width)``, without padding."""
        values = values.detach().flatten(0, -2)
        if len(values) != self._tokens:
            raise PathwaysError(
                f"An FFN block received {len(values)} tokens of the {self._tokens} in the "
                "batch: the model routes tokens past it, so padding cannot be told from text. "
                "Such blocks cannot be profiled."
            )
        return (
            values if self._rows is None else values.index_select(0, self._rows.to(values.device))
        )


class OfBlock(Collector):
    """Sums over one FFN block's tokens.

    Attributes:
        block: It.
    """

    def __init__(self, block: FfnBlock) -> None:
        super().__init__()
        self.block = block


class BlockCollector(OfBlock):
    """Accumulates the moments, and if asked the Gram matrix, of one FFN block.

    Two forward pre-hooks see the block's input and its activation.
    """

    def __init__(
        self, block: FfnBlock, spaces: Workspaces, *, gram: bool, inputs: bool = False
    ) -> None:
        super().__init__(block)
        self.statistics = BlockStatistics.empty(block.d_ff)
        width = block.d_in if inputs else 0
        self._inputs = inputs
        self.accumulator = GramAccumulator(width, block.d_ff) if gram else None
        self._spaces = spaces
        self._input: Tensor | None = None

    def attach(self) -> list[Any]:
        """Hook the block; return the handles."""
        handles = [self.block.outgoing.register_forward_pre_hook(self._see_activation)]
        if self.accumulator is not None and self._inputs:
            handles.append(self.block.incoming[0].register_forward_pre_hook(self._see_input))
        return handles

    def _see_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self._input = self.real(args[0])

    def _see_activation(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        activation = self.real(args[0])
        space = self._spaces.sums(activation.shape[1], activation.device)
        for chunk in torch.split(activation, space.shape[1]):
            self.statistics = self.statistics.merged(_statistics(chunk, space))
        if self.accumulator is not None:
            width = len(self.accumulator.upper)
            workspace = self._spaces.gram(width, activation.device)
            self.accumulator.add(activation, self._input, workspace)
            self._input = None
        self.batches += 1

    def state(self) -> dict[str, Tensor]:
        """Return all sums by name, to be stored; ``restore`` takes them back."""
        state = {name: getattr(self.statistics, name) for name in TENSORS}
        state["tokens"] = torch.tensor(self.statistics.tokens)
        if self.accumulator is not None:
            state["upper"] = self.accumulator.upper
        return state

    def restore(self, state: dict[str, Tensor], batches: int) -> None:
        """Go on from stored sums, in place."""
        moments = {name: state[name] for name in TENSORS}
        self.statistics = BlockStatistics(tokens=int(state["tokens"]), **moments)
        self.batches = batches
        if self.accumulator is not None:
            self.accumulator.upper.copy_(state["upper"])

    def combine(self, processes: Processes) -> None:
        """Add the sums of all processes, in place; each then has those of all."""
        own = self.statistics
        sums = {name: getattr(own, name) for name in TENSORS if name != "abs_max"}
        added = processes.add_up(torch.stack(list(sums.values())))
        self.statistics = BlockStatistics(
            tokens=int(processes.add_up(torch.tensor(own.tokens))),
            abs_max=processes.largest(own.abs_max),
            **dict(zip(sums, added.unbind(), strict=True)),
        )
        if self.accumulator is not None:
            self.accumulator.upper = processes.add_up(self.accumulator.upper)


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
    work /= work.sum(1, keepdim=True).clamp_min(torch.finfo(work.dtype).tiny)
    tensors["share_square_sum"] = work.sum(0)
    torch.gt(values, 0, out=work)
    tensors["positive"] = work.sum(0)
    return BlockStatistics(
        tokens=len(values), **{name: tensor.double().cpu() for name, tensor in tensors.items()}
    )
