"""Adapters that are active in a model: which they are, and the model without them for a while.

An adapter library (PEFT) wraps leaves in modules that add the adapter's part to the leaf's output.
Each has a switch, ``enable_adapters(bool)`` and ``disable_adapters``, by which it is known here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_sparse_pathways.errors import UnsupportedModelError


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters whose effect a model's output has.

    Raises:
        UnsupportedModelError: The base cannot be had without them: one is merged into the
            weights, or was trained together with the base's biases.
    """
    layers = _active_layers(model)
    names = tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if any(getattr(layer, "merged", False) for layer in layers):
        raise UnsupportedModelError(
            f"The adapter {', '.join(names)} is merged into the weights, so the dense model "
            "cannot be measured without it. Call unmerge_adapter() first; or merge_and_unload(), "
            "if the merged model is to be called dense."
        )
    settings: Any = getattr(model, "peft_config", {})
    biased = [name for name in names if getattr(settings.get(name), "bias", "none") != "none"]
    if biased:
        raise UnsupportedModelError(
            f"The adapter {', '.join(biased)} has changed biases of the base itself, so the dense "
            "model cannot be measured without it. Call merge_and_unload() first, if the merged "
            "model is to be called dense."
        )
    return names


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the active adapters do nothing; then all is as it was, gradients too."""
    layers = _active_layers(model)
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, before in trained:  # the switch sets these
            parameter.requires_grad_(before)


def _active_layers(model: nn.Module) -> list[Any]:
    """Return the modules whose switch is on and that have an active adapter."""
    return [
        module
        for module in model.modules()
        if getattr(module, "disable_adapters", None) is False
        and callable(getattr(module, "enable_adapters", None))
        and getattr(module, "active_adapters", None)
    ]
