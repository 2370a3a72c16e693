"""Which experts the routers of sgatlin layers may choose, on the calling thread.

Within the block, the best ``top_k`` of the allowed experts are taken: exactly what a router would
choose that gave all others a score of minus infinity. What the layers hold stays as it is, and
other threads are not affected.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.errors import MismatchError, PathwaysError

ExpertSets = Sequence[Tensor]
"""For every sgatlin layer which experts are allowed, bool ``(n_channels, n_experts)``."""


class _Allowed(local):
    by_layer: Mapping[int, Tensor] | None = None


_ALLOWED = _Allowed()


def find_allowed(layer: nn.Module) -> Tensor | None:
    """Return what a layer may choose now, or None if that is not restricted."""
    if _ALLOWED.by_layer is None:
        return None
    return _ALLOWED.by_layer.get(id(layer))


@contextmanager
def restrict(layers: Sequence[Any], sets: ExpertSets) -> Iterator[None]:
    """Within the block, on this thread, let layers choose allowed experts only; no gradients.

    Args:
        layers: The model's, in its order.
        sets: One for each.

    Raises:
        MismatchError: They are not as many, or of another shape.
        PathwaysError: Fewer experts of a channel are allowed than a token gets.
    """
    if len(layers) != len(sets):
        raise MismatchError(f"There are {len(layers)} sgatlin layers, and {len(sets)} sets.")
    for index, (layer, allowed) in enumerate(zip(layers, sets, strict=True)):
        _check(index, layer, allowed)
    before = _ALLOWED.by_layer
    inside = {id(layer): own.to(layer.u.device) for layer, own in zip(layers, sets, strict=True)}
    _ALLOWED.by_layer = {**(before or {}), **inside}
    try:
        with torch.no_grad():  # a recomputation, after the block, would not be restricted
            yield
    finally:
        _ALLOWED.by_layer = before


def _check(index: int, layer: Any, allowed: Tensor) -> None:
    expected = tuple(layer.u.shape[:2])
    if allowed.dtype != torch.bool or tuple(allowed.shape) != expected:
        raise MismatchError(
            f"The set of layer {index} has to be bool of shape {expected} (channels, experts), got "
            f"{allowed.dtype} of {tuple(allowed.shape)}."
        )
    least = int(allowed.sum(1).min())
    if least < layer.config.top_k:
        raise PathwaysError(
            f"Layer {index} has a channel in which {least} experts are allowed, but a token gets "
            f"{layer.config.top_k} of each channel. Allow at least as many."
        )
