"""An FFN block that holds one pathway's neurons only, with the compensation in its weights.

The block's leaves become linear leaves of their own class with the kept rows and columns; refit,
bias and changes of incoming leaves are added into them once. A bypass has its two thin matrices in
the outgoing leaf and hooks that hand it the block's input. An entangled block keeps its width: the
removed neurons' columns are zeroed, which is what a pathway means there. Where blocks have to have
one width, narrow ones are filled up with neurons that are zero.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, Matrix, as_matrix
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.runs import Run, find_runs


class ReducedBlock:
    """One FFN block on its way to one pathway's neurons.

    Attributes:
        block: The live block.
        part: What the pathway keeps and adds.
    """

    def __init__(self, block: FfnBlock, part: BlockPathway) -> None:
        self.block, self.part = block, part
        self._reduced: set[tuple[int, str]] = set()

    def parameters(self) -> list[tuple[nn.Module, str, int, list[Run]]]:
        """Return what is to be cut: leaf, parameter, dimension, and the runs that stay of it."""
        if self.block.entangled is not None:
            return []
        kept, found = find_runs(self.part.keep), []
        for leaf in self.block.incoming:
            shifts = range(0, linear_weight(leaf).shape[0], self.block.d_ff)
            rows = [(start + shift, stop + shift) for shift in shifts for start, stop in kept]
            found.append((leaf, "weight", 1 if isinstance(leaf, Conv1D) else 0, rows))
            if leaf._parameters.get("bias") is not None:
                found.append((leaf, "bias", 0, rows))
        outgoing = self.block.outgoing
        found.append((outgoing, "weight", 0 if isinstance(outgoing, Conv1D) else 1, [*kept]))
        return found

    def reserve(self, leaf: nn.Module, name: str, dim: int, runs: Sequence[Run]) -> None:
        """Give a parameter that is not loaded yet the shape of what is going to be, in place."""
        old = leaf.get_parameter(name)
        shape = list(old.shape)
        shape[dim] = sum(stop - start for start, stop in runs)
        empty = torch.empty(shape, dtype=old.dtype, device=old.device)
        leaf._parameters[name] = nn.Parameter(empty, requires_grad=old.requires_grad)
        self._reduced.add((id(leaf), name))

    @torch.no_grad()
    def finish(self) -> None:
        """Cut what is still whole, and add the compensation into the weights, in place."""
        for leaf, name, dim, runs in self.parameters():
            if (id(leaf), name) not in self._reduced:
                old = leaf.get_parameter(name)
                parts = [old.narrow(dim, start, stop - start) for start, stop in runs]
                _replace(leaf, name, torch.cat(parts, dim=dim))
        if self.block.entangled is None:
            for leaf in self.block.leaves:
                _set_widths(leaf)
        self._add_compensation()

    @torch.no_grad()
    def widen(self, width: int) -> None:
        """Give a finished block neurons that are zero, up to a width, in place.

        Their rows, biases and columns are zeros: whatever the activation makes of a zero, they add
        nothing.
        """
        missing = width - self.part.kept
        for leaf in self.block.incoming:
            _set_weight(leaf, self._with_zeros(linear_weight(leaf).detach().contiguous(), missing))
            if (bias := leaf._parameters.get("bias")) is not None:
                _replace(leaf, "bias", self._with_zeros(bias.detach(), missing))
        columns = linear_weight(self.block.outgoing).detach()
        _set_weight(self.block.outgoing, functional.pad(columns, (0, missing)))
        for leaf in self.block.leaves:
            _set_widths(leaf)

    def _with_zeros(self, rows: Tensor, missing: int) -> Tensor:
        """Return rows with zeros after those of each of a fused leaf's parts."""
        parts = rows.view(-1, self.part.kept, *rows.shape[1:])
        zeros = parts.new_zeros(len(parts), missing, *parts.shape[2:])
        return torch.cat([parts, zeros], dim=1).flatten(0, 1)

    def _add_compensation(self) -> None:
        part, outgoing = self.part, self.block.outgoing
        for leaf, change in zip(self.block.incoming, part.incoming, strict=False):
            if change is not None:
                self._add(leaf, 0, change)
        if self.block.entangled is not None:
            columns = linear_weight(outgoing).clone()
            columns[:, ~part.keep] = 0
            _set_weight(outgoing, columns)
        if part.delta is not None:
            self._add(outgoing, 1, part.delta)
        if part.bias is not None:
            weight, bias = outgoing.get_parameter("weight"), outgoing._parameters.get("bias")
            added = part.bias.to(weight.device).float()
            added = added if bias is None else bias.float() + added
            _replace(outgoing, "bias", added.to(weight.dtype))
        if part.bypass is not None:
            _add_bypass(self.block, part.bypass)

    def _add(self, leaf: nn.Module, dim: int, change: Matrix) -> None:
        """Add a change of kept rows or columns to a leaf's weight, in float32."""
        weight = linear_weight(leaf).detach()
        delta = as_matrix(change).to(weight.device)
        if self.block.entangled is not None:
            parts = weight.shape[dim] // self.block.d_ff
            index = self.part.keep.repeat(parts).nonzero().flatten().to(weight.device)
            delta = torch.zeros_like(weight, dtype=torch.float32).index_add(dim, index, delta)
        _set_weight(leaf, (weight.float() + delta).to(weight.dtype))


def _set_weight(leaf: nn.Module, weight: Tensor) -> None:
    """Replace a leaf's weight by one in ``nn.Linear``'s order."""
    _replace(leaf, "weight", weight.T.contiguous() if isinstance(leaf, Conv1D) else weight)


def _replace(leaf: nn.Module, name: str, value: Tensor) -> None:
    old = leaf._parameters.get(name)
    leaf._parameters[name] = nn.Parameter(value, requires_grad=old is None or old.requires_grad)


def _set_widths(leaf: Any) -> None:
    """Let a leaf's own attributes say how wide it is."""
    outputs, inputs = linear_weight(leaf).shape
    if isinstance(leaf, Conv1D):
        leaf.nx, leaf.nf = inputs, outputs
    else:
        leaf.in_features, leaf.out_features = inputs, outputs


class Bypass(nn.Module):
    """A linear map of low rank from a block's input to its output."""

    def __init__(self, bypass: LowRank) -> None:
        """Take both thin matrices as parameters."""
        super().__init__()
        self.inner, self.outer = nn.Parameter(bypass.inner), nn.Parameter(bypass.outer)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d_in)`` to ``(..., d_out)``."""
        return functional.linear(functional.linear(x, self.inner), self.outer)


class _Inputs(threading.local):
    def __init__(self) -> None:
        self.by_block: dict[int, Tensor] = {}


_INPUTS = _Inputs()


class _Remember:
    """Forward pre-hook of the first incoming leaf: keeps the block's input for its bypass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        _INPUTS.by_block[id(self)] = args[0]


class _AddBypass:
    """Forward hook of the outgoing leaf: adds the bypass of what was kept."""

    def __init__(self, remembered: _Remember) -> None:
        self.remembered = remembered

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG002
        block_input = _INPUTS.by_block.pop(id(self.remembered), None)
        if block_input is None:
            raise UnsupportedModelError(
                "A linear bypass needs its block's input, but the block's incoming leaf was not "
                "called before its outgoing leaf. Build the pathways without a bypass."
            )
        bypassed: Tensor = output + module.bypass(block_input)
        return bypassed


def _add_bypass(block: FfnBlock, bypass: LowRank) -> None:
    outgoing, remember = block.outgoing, _Remember()
    outgoing.add_module("bypass", Bypass(bypass.to(outgoing.get_parameter("weight"))))
    block.incoming[0].register_forward_pre_hook(remember)
    outgoing.register_forward_hook(_AddBypass(remember))
