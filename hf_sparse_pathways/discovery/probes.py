"""One FFN block on the pruned stream: what it sees before it is pruned, and what that changes."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grams import GramAccumulator
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.layouts import outgoing_weight
from hf_sparse_pathways.ffn.state import needed_input


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


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight.to(x.dtype))


class Probe:
    """Sees one block's input and activation, and adds up its second moments."""

    def __init__(self, block: FfnBlock, spaces: Workspaces, *, inputs: bool) -> None:
        self.block, self.spaces = block, spaces
        width = block.d_in if inputs else 0
        self.accumulator = GramAccumulator(width, block.d_ff, targets=block.d_out)
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

    def add(self, rows: Tensor, missing: Tensor | None, weights: Tensor | None) -> None:
        """Add what was seen last, padding left out."""
        space = self.spaces.gram(len(self.accumulator.upper), rows.device)
        activation = self._activation.index_select(0, rows)
        block_input = None if self._input is None else self._input.index_select(0, rows)
        self.accumulator.add(activation, block_input, space, target=missing, weights=weights)

    def task(self) -> BlockTask:
        """Return the block as it is to be repaired."""
        gram = self.accumulator.gram()
        return BlockTask(
            weight=outgoing_weight(self.block.outgoing),
            gram=gram,
            missing=self.accumulator.cross.cpu() / gram.tokens,
        )
