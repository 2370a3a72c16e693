"""A leaf's weights as they lie in memory: a plain matrix, or int8 with a factor per output.

The second kind is what torchao's int8 weight-only quantisation makes of an ``nn.Linear``. Its rows
and columns are selected as int8; torchao is not imported, its tensor is known by its parts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.ffn.block_pathway import Matrix, as_matrix
from hf_sparse_pathways.ffn.layouts import linear_weight

_LARGEST = 127

_OF_ACTIVATIONS = ("act_pre_scale", "act_quant_kwargs", "act_quant_scale")


@dataclass(frozen=True)
class Stored:
    """A matrix in ``nn.Linear``'s order.

    Attributes:
        values: ``(outputs, inputs)``.
        scale: Factors of int8 values, float32 ``(outputs,)``; None if the values are the weights.
    """

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, leaf: Any) -> "Stored":
        """Return a linear leaf's weights, without copying them."""
        weight: Any = leaf.weight
        if not is_int8(weight):
            return cls(linear_weight(leaf))
        return cls(weight.qdata, weight.scale.flatten().float())

    @property
    def known(self) -> bool:
        """Whether the values lie in memory; another quantiser may have replaced the weight."""
        return type(self.values) in (Tensor, nn.Parameter)

    def rows(self, index: Tensor) -> "Stored":
        """Return some rows, copied."""
        scale = None if self.scale is None else self.scale[index]
        return Stored(self.values.index_select(0, index).contiguous(), scale)

    def columns(self, index: Tensor) -> "Stored":
        """Return some columns, copied.

        For two-byte types torch's selection of columns has no vector code on the CPU; gathering
        them as integers takes a third to a half of the time.
        """
        values = self.values
        if values.device.type == "cpu" and values.element_size() == 2:
            gathered = values.view(torch.int16).gather(1, index.expand(len(values), -1))
            return Stored(gathered.view(values.dtype), self.scale)
        return Stored(values.index_select(1, index).contiguous(), self.scale)

    def changed(self, delta: Matrix | None) -> "Stored":
        """Add a change in float32, rounded as the weights are."""
        if delta is None:
            return self
        change = as_matrix(delta).to(self.values.device)
        if self.scale is None:
            return Stored((self.values.float() + change).to(self.values.dtype))
        return quantise(self.values.float() * self.scale[:, None] + change)


def quantise(weight: Tensor) -> Stored:
    """Return a matrix in int8, symmetric, with the largest entry of each output at 127. Pure."""
    scale = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    return Stored((weight.float() / scale[:, None]).round().to(torch.int8), scale)


def is_int8(weight: Any) -> bool:
    """Whether a weight is torchao's int8 with one factor per output and nothing else to it."""
    if type(weight).__name__ != "Int8Tensor" or getattr(weight, "qdata", None) is None:
        return False
    values, factors, shift = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
    return bool(
        values.dtype == torch.int8
        and values.dim() == 2
        and values.shape == weight.shape
        and factors.shape in ((len(values),), (len(values), 1))
        and all(getattr(weight, name, None) is None for name in _OF_ACTIVATIONS)
        and (shift is None or not shift.any())
    )


def lies_in_memory(weight: Any) -> bool:
    """Whether a weight is one of the two kinds."""
    plain = type(weight) in (Tensor, nn.Parameter) or type(weight.data) is Tensor
    return (plain and weight.layout is torch.strided) or is_int8(weight)


def stored_tensor(weight: Any) -> Tensor:
    """Return the tensor that lies in memory for a weight."""
    plain = type(weight) in (Tensor, nn.Parameter)
    found: Tensor = weight if plain else getattr(weight, "qdata", weight)
    return found
