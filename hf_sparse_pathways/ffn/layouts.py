"""The one table that knows architectures: how the linear leaves of an FFN block are named.

A layout is matched by name *and* by shape: the outgoing leaf's input width is d_ff, and every
incoming leaf's output width is d_ff, or 2 x d_ff where gate and up are fused into one matrix
(rows ``i`` and ``i + d_ff`` then belong to neuron ``i``).

To support a new family, add one row here and a tiny model of it to ``tests/architectures.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Layout:
    """Names of an FFN block's linear leaves, relative to the module that holds them all.

    Attributes:
        incoming: Leaves from d_model to d_ff; the gate first where there is one.
        outgoing: The leaf from d_ff back to d_model.
        fused: Whether the one incoming leaf holds gate and up, one above the other.
    """

    incoming: tuple[str, ...]
    outgoing: str
    fused: bool = False


LAYOUTS: tuple[Layout, ...] = (
    Layout(("gate_proj", "up_proj"), "down_proj"),
    Layout(("gate_up_proj",), "down_proj", fused=True),
    Layout(("up_proj",), "down_proj"),
    Layout(("w1", "w3"), "w2"),
    Layout(("fc1",), "fc2"),
    Layout(("c_fc",), "c_proj"),
    Layout(("fc_in",), "fc_out"),
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),
    Layout(("lin1",), "lin2"),
    Layout(("input_linear",), "output_linear", fused=True),
    Layout(("Wi",), "Wo", fused=True),
    Layout(("fc1",), "fc2", fused=True),
    Layout(("intermediate.dense",), "output.dense"),
    Layout(("intermediate",), "output"),
    Layout(("w_in.w_0", "w_in.w_1"), "w_out"),
    Layout(("proj_up_gate", "proj_up"), "proj_down"),
    Layout(("0",), "2"),
)


def linear_widths(leaf: nn.Module | None) -> tuple[int, int] | None:
    """Return ``(input width, output width)`` of a linear leaf, or None for any other module.

    None, too, while a wrapper has put the weight away in a shape of its own.
    """
    if not isinstance(leaf, (Conv1D, nn.Linear)) or leaf.weight.dim() != 2:
        return None
    if isinstance(leaf, Conv1D):
        return int(leaf.weight.shape[0]), int(leaf.weight.shape[1])
    return int(leaf.weight.shape[1]), int(leaf.weight.shape[0])


def linear_weight(leaf: Any) -> Tensor:
    """Return a linear leaf's weight in ``nn.Linear``'s order, ``(outputs, inputs)``."""
    weight: Tensor = leaf.weight
    return weight.T if isinstance(leaf, Conv1D) else weight


def outgoing_weight(leaf: Any) -> Tensor:
    """Return an outgoing leaf's weight, float32 ``(d_out, d_ff)``, on the CPU."""
    return linear_weight(leaf).detach().float().cpu()


def incoming_weights(leaves: Sequence[Any], d_ff: int) -> Tensor:
    """Return the incoming leaves' weights, float32 ``(branches, d_ff, d_in)``, on the CPU."""
    together = torch.cat([linear_weight(leaf).detach().float().cpu() for leaf in leaves])
    return together.view(-1, d_ff, together.shape[1])


def find_child(parent: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path below another, or None."""
    module: nn.Module | None = parent
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def match_layout(parent: nn.Module) -> Layout | None:
    """Return the layout that a module's children follow in name and shape, or None."""
    for layout in LAYOUTS:
        outgoing = linear_widths(find_child(parent, layout.outgoing))
        incoming = [linear_widths(find_child(parent, name)) for name in layout.incoming]
        if outgoing is None or None in incoming:
            continue
        width = outgoing[0] * (2 if layout.fused else 1)
        if all(widths is not None and widths[1] == width for widths in incoming):
            return layout
    return None
