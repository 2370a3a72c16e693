"""Neurons that are skipped token by token: those whose gate is small for the token at hand.

With h the activation function's output (of a gated block: act(gate), so that a = h * up; else the
activation itself), a kept neuron i takes part in a token's sum only if ``|h_i| > threshold_i``.
The gate is known before the rest of the neuron is computed, so that what is skipped need not be.

Where all kept neurons are computed anyway, h is found as ``|a| / |up|``, whatever the activation
function is. A step of decoding computes the gate first, by a function that is known to be the
block's (``find_function``), and reads of the other weights only what the token needs.

Source: Lee et al. 2024, "CATS", arXiv:2404.08763, thresholds the gate of gated blocks; thresholds
by neuron, and columns that are refitted to what is left, are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.ffn.additions import spread
from hf_sparse_pathways.ffn.block_pathway import BlockPathway

Function = Callable[[Tensor], Tensor]

_NAMES = ("act_fn", "act", "activation_fn", "activation", "activation_func", "hidden_act")
"""Of a block's activation function, in its module."""


def gate_size(activation: Tensor, up: Tensor | None) -> Tensor:
    """Return |h|, of the shape of the activation; NaN where it is 0 / 0, which exceeds nothing.

    Args:
        activation: ``(..., neurons)``.
        up: The other factor of a gated block's activation; None where there is no gate.
    """
    return activation.abs() if up is None else activation.abs() / up.abs()


def skip_small(activation: Tensor, up: Tensor | None, threshold: Tensor) -> Tensor:
    """Return an activation with zeros where a neuron is skipped. Pure.

    Args:
        activation: ``(..., neurons)``.
        up: As in ``gate_size``.
        threshold: ``(neurons,)``, or one row per token.
    """
    return activation.masked_fill(~(gate_size(activation, up) > threshold), 0)


def threshold_table(members: Sequence[BlockPathway], device: torch.device) -> Tensor:
    """Return every member's thresholds, float32 ``(members + 1, d_ff)``.

    Those of neurons that are never skipped, and of the last row, which is dense, are below zero;
    what is not kept is masked before.
    """
    table = torch.full((len(members) + 1, len(members[0].keep)), -1.0, device=device)
    for row, member in zip(table, members, strict=False):
        if member.skipping is not None:
            row[member.keep.to(device)] = member.skipping.threshold.to(device)
    return table


def of_tokens(table: Tensor, member: int | Tensor, activation: Tensor) -> Tensor:
    """Return the thresholds of an activation's tokens: one row for all, or one for each.

    Args:
        table: What ``threshold_table`` returned.
        member: One, or one per row of the batch, or per token.
        activation: ``(..., d_ff)``.
    """
    if not isinstance(member, Tensor):
        return table[member]
    rows = table[member.to(table.device)]
    return rows.reshape(activation.shape) if member.dim() > 1 else spread(rows, activation)


def up_part(output: Tensor, position: int, rows_per_neuron: int) -> Tensor | None:
    """Return the second factor of the activation, if an incoming leaf's output holds it.

    Args:
        output: Of the leaf.
        position: Which of the block's incoming leaves it is; the gate is the first.
        rows_per_neuron: 2 in a fused gate-up matrix.
    """
    if rows_per_neuron == 2:
        return output[..., output.shape[-1] // 2 :]
    return output if position else None


@dataclass(frozen=True)
class Example:
    """One token's way through a gated block with two incoming leaves.

    Attributes:
        gate: What the first leaf has returned.
        up: What the second has.
        activation: What the outgoing leaf was given.
    """

    gate: Tensor
    up: Tensor
    activation: Tensor

    @classmethod
    def of(cls, gate: Tensor, up: Tensor, activation: Tensor) -> "Example":
        """Take the last token of some."""
        return cls(*(each.detach().flatten(0, -2)[-1:].clone() for each in (gate, up, activation)))


@torch.no_grad()
def find_function(parent: nn.Module, example: Example) -> Function | None:
    """Return a block's activation function; None if it is no field of it under a usual name.

    Args:
        parent: The block's module.
        example: That the function of its gate, times the other factor, is the activation.
    """
    for name in _NAMES:
        function: Any = getattr(parent, name, None)
        if not callable(function):
            continue
        try:
            made = function(example.gate) * example.up
        except (TypeError, ValueError, RuntimeError):  # it takes something else
            continue
        if torch.allclose(made, example.activation, rtol=1e-2, atol=1e-5):
            return function
    return None
