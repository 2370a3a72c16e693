"""Find the routed experts of a decoder layer and the router that chooses among them.

A module whose parameters follow ``expert_layouts`` is one, if a router stands beside it: a child
with the same parent, named as routers are, that holds a row of d_model weights for every expert and
knows how many it chooses. What does not fit stays dense, with the reason. The experts of a sgatlin
layer are such, too: of one neuron each, with a choice in each channel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse_pathways.ffn.expert_layouts import PackedExperts, Packing, match_experts
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN

_ROUTERS = ("gate", "router")

_TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_top_k")


@dataclass(frozen=True, kw_only=True)
class RoutedExperts:
    """The routed experts of one layer of a live model.

    Attributes:
        name: Qualified name of the module that holds them.
        parent: The module that it and the router are children of.
        module: The module that holds them.
        router: The module that chooses among them.
        packed: How they are packed.
        top_k: How many a token has.
        groups: How many groups the router chooses among first; 1 for none.
        top_groups: How many of these a token has.
        channels: Choices that a token makes, each of ``top_k / channels`` among as many experts of
            its own; more than 1 in sgatlin layers alone.
    """

    name: str
    parent: nn.Module
    module: nn.Module
    router: nn.Module
    packed: PackedExperts
    top_k: int
    groups: int
    top_groups: int
    channels: int = 1


def match_routed(name: str, parent: nn.Module, module: nn.Module) -> RoutedExperts | str:
    """Return the routed experts that a module holds, or why they stay dense.

    Args:
        name: The module's qualified name.
        parent: The module that it is a child of.
        module: The module.
    """
    packed = match_experts(module)
    if packed is None:
        parameters = ", ".join(name for name, _ in module.named_parameters()) or "none"
        return f"its parameters are packed in a way that is not known ({parameters:.80})"
    router = _find_router(parent, packed)
    if router is None:
        return "no router that chooses among exactly these experts stands beside it"
    top_k = _first_number((router, parent, getattr(router, "config", None)), _TOP_K)
    if top_k is None or top_k > packed.experts:
        return "its router does not say how many experts a token has"
    if any(name == "tid2eid" for name, _ in router.named_buffers()):
        return "its router chooses by the token's id"
    groups = _first_number((router,), ("num_group", "n_group")) or 1
    top_groups = _first_number((router,), ("topk_group",)) or groups
    if getattr(router, "topk_method", None) == "greedy" or packed.experts % groups:
        groups = top_groups = 1
    return RoutedExperts(
        name=name,
        parent=parent,
        module=module,
        router=router,
        packed=packed,
        top_k=top_k,
        groups=groups,
        top_groups=min(top_groups, groups),
    )


def _find_router(parent: nn.Module, packed: PackedExperts) -> nn.Module | None:
    """Return the child that has a row of weights for every expert and nothing else of the kind."""
    shape = (packed.experts, packed.d_in)
    for name in _ROUTERS:
        router = parent._modules.get(name)
        if router is not None and any(tuple(p.shape) == shape for p in router.parameters()):
            return router
    return None


def _first_number(holders: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def list_candidates(
    layer_name: str, layer: nn.Module
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the outermost modules of a layer that may hold routed experts: name, parent, module."""
    found: list[str] = []
    for name, module in layer.named_modules(prefix=layer_name):
        packed = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        named = "expert" in type(module).__name__.lower()
        inside = any(name.startswith(f"{other}.") for other in found)
        if ((packed and named) or name.split(".")[-1] == "experts") and not inside:
            found.append(name)
            path = name.removeprefix(layer_name).rpartition(".")[0].removeprefix(".")
            yield name, layer.get_submodule(path), module


def list_linear(layer_name: str, layer: nn.Module) -> Iterator[RoutedExperts]:
    """Yield the experts of the sgatlin layers in a decoder layer."""
    for name, module in layer.named_modules(prefix=layer_name):
        if isinstance(module, SgatlinFFN):
            path = name.removeprefix(layer_name).rpartition(".")[0].removeprefix(".")
            yield _match_linear(name, layer.get_submodule(path), module)


def _match_linear(name: str, parent: nn.Module, module: SgatlinFFN) -> RoutedExperts:
    config, width = module.config, module.d_model
    count = config.n_channels * config.n_experts
    tables = (Packing("v", count, None), Packing("u", count, None))
    return RoutedExperts(
        name=name,
        parent=parent,
        module=module,
        router=module.router,
        packed=PackedExperts(count, width, 1, width, 1, tables),
        top_k=config.n_channels * config.top_k,
        groups=1,
        top_groups=1,
        channels=config.n_channels,
    )
