"""How the weights of routed experts are packed, and how some of them are taken out.

Transformers packs the experts of a layer into one module, whose forward takes tokens, the numbers
of their experts and the experts' weights. Its parameters run over experts, then over rows or
columns. A layout is matched by name *and* by shape; what a shape cannot tell (gate and up one after
the other, or in turns) the module itself says, by the attributes that Transformers gives it.

To support another way of packing, add one row here and a tiny model of it to
``tests/moe/architectures.py``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertLayout:
    """Names of packed experts' parameters, relative to the module that has the forward.

    Attributes:
        incoming: From d_model to d_ff; gate and up if there are two.
        outgoing: From d_ff to d_model.
        fused: Whether the one incoming parameter holds gate and up.
        flat: Whether parameters are matrices in which one expert stands above the other, with a
            row per neuron.
    """

    incoming: tuple[str, ...]
    outgoing: str
    fused: bool = False
    flat: bool = False


EXPERT_LAYOUTS: tuple[ExpertLayout, ...] = (
    ExpertLayout(("gate_up_proj",), "down_proj", fused=True),
    ExpertLayout(("up_proj",), "down_proj"),
    ExpertLayout(("mlp.w1", "mlp.v1"), "mlp.w2", flat=True),
)

_WIDTHS = ("intermediate_dim", "intermediate_size", "ffn_hidden_size", "expert_dim")
"""Attributes by which modules know the width of their experts."""


@dataclass(frozen=True)
class Packing:
    """Where experts and their neurons lie in one parameter.

    Attributes:
        name: The parameter.
        experts: Number of experts.
        dim: Which dimension runs over neurons, the first one being over experts; None if none does.
        rows: Rows of a neuron in it.
        interleaved: Whether these lie beside each other.
        flat: As in ``ExpertLayout``.
    """

    name: str
    experts: int
    dim: int | None
    rows: int = 1
    interleaved: bool = False
    flat: bool = False

    def of(self, experts: int) -> "Packing":
        """Return the same of another number of experts."""
        return replace(self, experts=experts)

    def apart(self, tensor: Tensor) -> Tensor:
        """Return a view of the parameter whose first dimension is over experts."""
        return tensor.view(self.experts, -1, *tensor.shape[1:]) if self.flat else tensor

    def take(
        self, tensor: Tensor, experts: Tensor, neurons: Tensor | None, silent: int = 0
    ) -> Tensor:
        """Return the parameter of some experts with some of their neurons. Differentiable.

        Args:
            tensor: The parameter.
            experts: Which experts, int64 ``(kept,)``.
            neurons: Which neurons of each, int64 ``(kept, width)``; None for all.
            silent: How many of the last of these are zeros instead.
        """
        own = self.apart(tensor).index_select(0, experts)
        if neurons is not None and self.dim is not None:
            places = self._places(neurons, own.shape[self.dim] // self.rows)
            shape = [len(experts)] + [1] * (own.dim() - 1)
            shape[self.dim] = places.shape[1]
            wanted = [*own.shape]
            wanted[self.dim] = places.shape[1]
            own = own.gather(self.dim, places.view(shape).expand(wanted))
            if silent:
                live = own.narrow(self.dim, 0, places.shape[1] - silent)
                none = own.narrow(self.dim, 0, silent)
                own = torch.cat([live, torch.zeros_like(none)], dim=self.dim)
        return own.flatten(0, 1) if self.flat else own

    def _places(self, neurons: Tensor, d_ff: int) -> Tensor:
        """Return where the rows of neurons lie, int64 ``(kept, rows * width)``."""
        if self.rows == 1:
            return neurons
        if self.interleaved:
            beside = [self.rows * neurons + part for part in range(self.rows)]
            return torch.stack(beside, dim=2).flatten(1)
        return torch.cat([neurons + part * d_ff for part in range(self.rows)], dim=1)


@dataclass(frozen=True)
class PackedExperts:
    """One module's packed experts.

    Attributes:
        experts: Their number.
        d_in: Width of their input (d_model).
        d_ff: Neurons of each.
        d_out: Width of their output.
        branches: Rows of the incoming parameters per neuron: 2 with a gate, else 1.
        packings: Of every parameter; the outgoing one first.
    """

    experts: int
    d_in: int
    d_ff: int
    d_out: int
    branches: int
    packings: tuple[Packing, ...]


def match_experts(module: Any) -> PackedExperts | None:
    """Return how a module packs experts, or None if it follows no layout."""
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int) or count < 1 or getattr(module, "has_post_expert_norm", False):
        return None
    for layout in EXPERT_LAYOUTS:
        names = (*layout.incoming, layout.outgoing)
        if all(isinstance(_find(module, name), Tensor) for name in names):
            return _match(module, layout, count)
    return None


def _match(module: Any, layout: ExpertLayout, count: int) -> PackedExperts | None:
    """Hold the shapes of a module's parameters against a layout."""
    if layout.flat:
        return _match_flat(module, layout, count)
    transposed = getattr(module, "is_transposed", None)
    outgoing, incoming = _find(module, layout.outgoing), _find(module, layout.incoming[0])
    if transposed is None or outgoing.dim() != 3 or incoming.dim() != 3:
        return None
    d_ff, d_out = outgoing.shape[1:] if transposed else outgoing.shape[:0:-1]
    rows = 2 if layout.fused else 1
    d_in, wide = incoming.shape[1:] if transposed else incoming.shape[:0:-1]
    if {len(outgoing), len(incoming)} != {count} or wide != rows * d_ff:
        return None
    turns = layout.fused and not getattr(module, "is_concatenated", True)
    packings = [Packing(layout.outgoing, count, 1 if transposed else 2)]
    packings += [Packing(layout.incoming[0], count, 2 if transposed else 1, rows, turns)]
    biases = {layout.incoming[0]: (1, rows, turns), layout.outgoing: (None, 1, False)}
    for name, places in biases.items():
        if _find(module, f"{name}_bias") is not None:
            packings.append(Packing(f"{name}_bias", count, *places))
    if {packing.name for packing in packings} != {*_names(module)}:
        return None
    return PackedExperts(count, d_in, d_ff, d_out, rows, tuple(packings))


def _match_flat(module: Any, layout: ExpertLayout, count: int) -> PackedExperts | None:
    names = (layout.outgoing, *layout.incoming)
    shapes = {tuple(_find(module, name).shape) for name in names}
    if len(shapes) != 1 or {*names} != {*_names(module)}:
        return None
    rows, width = next(iter(shapes))
    packings = tuple(Packing(name, count, 1, flat=True) for name in names)
    return PackedExperts(count, width, rows // count, width, len(layout.incoming), packings)


def cut_experts(
    module: Any, own: type[nn.Module], tensors: Mapping[str, Tensor], experts: int, d_ff: int
) -> nn.Module:
    """Return a module like another one that holds fewer or narrower experts. Pure.

    It has the other one's fields, and these tensors in place of parameters, so that the class's
    own forward computes with them; nothing of the other one is copied or changed.

    Args:
        module: The other one.
        own: The class of what is made.
        tensors: By the parameters' names.
        experts: How many they hold.
        d_ff: Neurons of each.
    """
    made = own.__new__(own)
    mine = {name: tensor for name, tensor in tensors.items() if "." not in name}
    fields = {**module.__dict__, "_parameters": {**module._parameters, **mine}}
    widths = {"num_experts": experts, **dict.fromkeys(_WIDTHS, d_ff)}
    fields |= {name: value for name, value in widths.items() if name in fields}
    for holder in {name.partition(".")[0] for name in tensors} - mine.keys():
        inner = {
            name.partition(".")[2]: tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{holder}.")
        }
        child = module._modules[holder]
        made_child = cut_experts(child, type(child), inner, experts, d_ff)
        fields["_modules"] = {**fields["_modules"], holder: made_child}
    made.__dict__.update(fields)
    return made


def find_parameter(module: Any, name: str) -> Any:
    """Return a parameter of a module, or of one of its children; None if there is none."""
    return _find(module, name)


def _find(module: Any, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _names(module: nn.Module) -> Iterator[str]:
    return (name for name, _ in module.named_parameters())
