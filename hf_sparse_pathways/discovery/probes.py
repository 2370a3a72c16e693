"""One FFN block on the pruned stream: what it sees before it is pruned, and what that changes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grams import GramAccumulator
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.ffn.additions import needed_input
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, Kept, experts_of
from hf_sparse_pathways.ffn.layouts import outgoing_weight


def make_change(block: FfnBlock, pathway: Kept) -> "Change | ClusteredChange":
    """Return what replacing a dense FFN by its pathway adds to its output."""
    if isinstance(pathway, ClusteredBlock):
        return ClusteredChange(block, pathway)
    return Change(block, pathway)


class Change:
    """What replacing a dense FFN by its pathway adds to its output."""

    def __init__(self, block: FfnBlock, pathway: BlockPathway) -> None:
        difference = -outgoing_weight(block.outgoing)
        difference[:, pathway.keep] = 0.0
        if pathway.full_delta is not None:
            difference[:, pathway.keep] += pathway.full_delta.float()
        leaf: Any = block.outgoing
        device = leaf.weight.device
        self.weight = difference.to(device)
        self.bias = None if pathway.bias is None else pathway.bias.float().to(device)
        self.bypass = None if pathway.bypass is None else pathway.bypass.product().to(device)

    def of(self, activation: Tensor, block_input: Tensor | None) -> Tensor:
        """Return the change, from what the FFN saw, flattened."""
        change = _linear(activation, self.weight)
        if self.bypass is not None:
            change = change + _linear(needed_input(block_input), self.bypass)
        return change if self.bias is None else change + self.bias


_MOST_CHANGES = 10**9
"""Most bytes of experts' changes that are kept from one batch to the next."""


class ClusteredChange:
    """The same where each token has one of several experts.

    Together their changes take as much as so many whole blocks: those that are too much are made
    again for each batch.
    """

    def __init__(self, block: FfnBlock, pathway: ClusteredBlock) -> None:
        self.block, self.router, self.experts = block, pathway.router, experts_of(pathway)
        self._changes: dict[int, Change] = {}

    def of(self, activation: Tensor, block_input: Tensor | None) -> Tensor:
        """Return the change, from what the FFN saw, flattened."""
        x = needed_input(block_input)
        clusters = self.router.to(x.device)(x)
        change = x.new_zeros(len(x), self.block.d_out, dtype=torch.float32)
        for number in torch.unique(clusters).tolist():
            own = (clusters == number).nonzero().flatten()
            change[own] = self._expert(number).of(activation[own], x[own]).float()
        return change

    def _expert(self, number: int) -> Change:
        change = self._changes.get(number)
        if change is None:
            change = Change(self.block, self.experts[number])
            if (len(self._changes) + 1) * change.weight.nbytes <= _MOST_CHANGES:
                self._changes[number] = change
        return change


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight.to(x.dtype))


class Observer:
    """Sees one block's activation, and its input if wanted."""

    def __init__(self, block: FfnBlock, *, inputs: bool) -> None:
        self.block = block
        self._inputs = inputs
        self._activation = torch.empty(0)
        self._input: Tensor | None = None

    @property
    def seen(self) -> tuple[Tensor, Tensor | None]:
        """The last batch's activation, and its input if wanted, padding included, flattened."""
        return self._activation, self._input

    def attach(self) -> list[Any]:
        """Hook the block; return the handles."""

        def see_input(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            self._input = args[0].flatten(0, -2)

        def see_activation(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            self._activation = args[0].flatten(0, -2)

        handles = [self.block.outgoing.register_forward_pre_hook(see_activation)]
        if self._inputs:
            handles.append(self.block.incoming[0].register_forward_pre_hook(see_input))
        return handles

    def seen_at(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the last batch's activation and input of some tokens."""
        block_input = None if self._input is None else self._input.index_select(0, rows)
        return self._activation.index_select(0, rows), block_input


@contextmanager
def attached(observers: Sequence[Observer]) -> Iterator[None]:
    """Within the block, observers see what their blocks compute."""
    with ExitStack() as stack:
        for observer in observers:
            for handle in observer.attach():
                stack.callback(handle.remove)
        yield


class Probe(Observer):
    """Adds up one block's second moments."""

    def __init__(self, block: FfnBlock, spaces: Workspaces, *, inputs: bool) -> None:
        super().__init__(block, inputs=inputs)
        self.spaces = spaces
        width = block.d_in if inputs else 0
        self.accumulator = GramAccumulator(width, block.d_ff, targets=block.d_out)

    def add(self, rows: Tensor, missing: Tensor | None, weights: Tensor | None) -> None:
        """Add what was seen last, padding left out."""
        space = self.spaces.gram(len(self.accumulator.upper), rows.device)
        activation, block_input = self.seen_at(rows)
        self.accumulator.add(activation, block_input, space, target=missing, weights=weights)

    def task(self) -> BlockTask:
        """Return the block as it is to be repaired."""
        gram = self.accumulator.gram()
        return BlockTask(
            weight=outgoing_weight(self.block.outgoing),
            gram=gram,
            missing=self.accumulator.cross.cpu() / gram.tokens,
        )
