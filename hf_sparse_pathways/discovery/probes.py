"""One FFN block on the pruned stream: what it sees before it is pruned, and what that changes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from hf_sparse_pathways.ffn.skipping import up_part


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


@dataclass(frozen=True, eq=False)
class Seen:
    """What a block has computed for some tokens, one row per token.

    Attributes:
        activation: ``(tokens, d_ff)``.
        block_input: ``(tokens, d_in)``, if wanted.
        up: What a gated block has multiplied its gates by, if wanted, ``(tokens, d_ff)``.
    """

    activation: Tensor
    block_input: Tensor | None = None
    up: Tensor | None = None

    def at(self, rows: Tensor) -> "Seen":
        """Return some of the tokens."""
        parts = (self.activation, self.block_input, self.up)
        return Seen(*(None if part is None else part.index_select(0, rows) for part in parts))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence["Seen"]) -> "Seen":
        """Put together what was seen of several batches."""
        columns = zip(
            *((part.activation, part.block_input, part.up) for part in parts), strict=True
        )
        return cls(*(None if own[0] is None else torch.cat(own) for own in columns))  # type: ignore[arg-type]

    def input_alone(self) -> "Seen":
        """Return the block's input, with an activation of no width."""
        return Seen(self.activation[:, :0], self.block_input)

    def without_input(self) -> "Seen":
        """Return the same, but for the block's input."""
        return replace(self, block_input=None)


class Observer:
    """Sees one block's activation, and its input and what its gates are multiplied by if wanted."""

    def __init__(self, block: FfnBlock, *, inputs: bool, ups: bool = False) -> None:
        self.block = block
        self._inputs, self._ups = inputs, ups
        self._activation = torch.empty(0)
        self._input: Tensor | None = None
        self._up: Tensor | None = None

    @property
    def seen(self) -> Seen:
        """What the block has computed for the last batch, padding included."""
        return Seen(self._activation, self._input, self._up)

    def attach(self) -> list[Any]:
        """Hook the block; return the handles."""

        def see_input(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            self._input = args[0].flatten(0, -2)

        def see_activation(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            self._activation = args[0].flatten(0, -2)

        place = len(self.block.incoming) - 1, 2 if self.block.layout.fused else 1

        def see_up(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
            up = up_part(output, *place)
            self._up = None if up is None else up.flatten(0, -2)

        handles = [self.block.outgoing.register_forward_pre_hook(see_activation)]
        if self._inputs:
            handles.append(self.block.incoming[0].register_forward_pre_hook(see_input))
        if self._ups:
            handles.append(self.block.incoming[-1].register_forward_hook(see_up))
        return handles

    def seen_at(self, rows: Tensor) -> Seen:
        """Return what it has computed for some tokens of the last batch."""
        return self.seen.at(rows)


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

    def __init__(
        self, block: FfnBlock, spaces: Workspaces, *, inputs: bool, leafwise: bool = False
    ) -> None:
        """Begin with nothing.

        Args:
            block: The block.
            spaces: Where products are made.
            inputs: Whether the block's input is in the moments.
            leafwise: Whether only what each leaf needs by itself is added up.
        """
        super().__init__(block, inputs=inputs)
        self.spaces = spaces
        width, targets = block.d_in if inputs else 0, 0 if leafwise else block.d_out
        self.accumulator = GramAccumulator(width, block.d_ff, targets, mixed=not leafwise)

    def add(self, rows: Tensor, missing: Tensor | None, weights: Tensor | None) -> None:
        """Add what was seen last, padding left out."""
        space = self.spaces.gram(len(self.accumulator.upper), rows.device)
        seen = self.seen_at(rows)
        self.accumulator.add(
            seen.activation, seen.block_input, space, target=missing, weights=weights
        )

    def task(self) -> BlockTask:
        """Return the block as it is to be repaired."""
        gram = self.accumulator.gram()
        return BlockTask(
            weight=outgoing_weight(self.block.outgoing),
            gram=gram,
            missing=self.accumulator.cross.cpu() / gram.tokens,
        )
