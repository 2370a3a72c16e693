"""Routed experts of one pathway in a plain model: fewer experts, narrower ones, a smaller router.

As for FFN blocks there is no table of models: a field of the configuration is changed, the model is
built without memory, and it is the field if all routed experts have the wanted number or width and
nothing else has changed. So every layer has to keep the same number of experts, and of neurons.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import survey_model
from hf_sparse_pathways.ffn.expert_layouts import find_parameter
from hf_sparse_pathways.ffn.experts import RoutedExperts
from hf_sparse_pathways.ffn.kept_experts import KeptExperts
from hf_sparse_pathways.modeling.fields import REFUSALS, Outline, set_field


def bake_experts(plain: Any, domain: str, experts: Sequence[KeptExperts]) -> dict[str, int]:
    """Leave the other experts and neurons out of a plain model, in place.

    Args:
        plain: The dense model, whose parameters may be another model's: they are replaced.
        domain: The pathway's name.
        experts: What it keeps, one entry per layer with routed experts.

    Returns:
        Field of the configuration -> value, of what differs; they are set.

    Raises:
        UnsupportedModelError: The architecture has no form for it.
    """
    found = survey_model(plain).experts
    count, width = _check_equal(domain, found, experts)
    fields: dict[str, int] = {}
    for wanted, what in ((count, "experts"), (width, "d_ff")):
        if any(getattr(one.packed, what) != wanted for one in found):
            fields |= _find_field(plain.config, found, what, wanted)
            set_field(plain.config, *next(reversed(fields.items())))
    for one, kept in zip(found, experts, strict=True):
        _cut(one, kept)
    return fields


def _check_equal(
    domain: str, found: Sequence[RoutedExperts], experts: Sequence[KeptExperts]
) -> tuple[int, int]:
    """Return the number of experts of every layer, and of neurons of each.

    Raises:
        UnsupportedModelError: Layers differ, or routers choose among groups.
    """
    shapes = set()
    for one, kept in zip(found, experts, strict=True):
        _, neurons, _ = kept.padded_indices()
        shapes.add((kept.kept, one.packed.d_ff if neurons is None else neurons.shape[1]))
    if len(shapes) != 1:
        raise UnsupportedModelError(
            f"Pathway {domain!r} keeps another number of experts or neurons in every layer, and a "
            "plain configuration has one number for all. Select pathways by a share of experts."
        )
    grouped = any(one.groups > 1 for one in found)
    if grouped and any(kept.kept < len(kept.keep) for kept in experts):
        raise UnsupportedModelError(
            f"The routers of this model choose among groups of experts, of which pathway "
            f"{domain!r} keeps a part: no plain checkpoint has unequal groups. Select pathways "
            "with expert_neurons= (--expert-neurons) alone."
        )
    return shapes.pop()


def _find_field(
    config: Any, found: Sequence[RoutedExperts], what: str, wanted: int
) -> dict[str, int]:
    """Return the field that gives all routed experts a number or width, and its value.

    Raises:
        UnsupportedModelError: There is none.
    """
    numbers = {getattr(one.packed, what) for one in found}
    before = Outline.of(config)
    inside = tuple(f"{one.name}." for one in found)
    text = config.get_text_config(decoder=True)
    for field, value in text.to_dict().items():
        if type(value) is not int or {value} != numbers:
            continue
        after = _shapes_with(config, field, wanted)
        if after is None or any(getattr(one.packed, what) != wanted for one in after[1]):
            continue
        changed = {name for name, shape in after[0].items() if before.shapes.get(name) != shape}
        routers = tuple(f"{name.rpartition('.')[0]}." for name in (one.name for one in found))
        known = all(name.startswith(inside if what == "d_ff" else routers) for name in changed)
        if after[1] and known:
            return {field: wanted}
    raise UnsupportedModelError(
        f"No field of {type(config).__name__} decides how many routed experts there are, or how "
        "wide they are, and nothing else, so that no plain checkpoint can be written. Load the "
        "domain alone with from_pretrained(folder, domain=...)."
    )


def _shapes_with(
    config: Any, field: str, value: int
) -> tuple[dict[str, tuple[int, ...]], tuple[RoutedExperts, ...]] | None:
    """Return a configuration's shapes and experts with another value; None if it refuses that."""
    trial = copy.deepcopy(config)
    try:
        set_field(trial, field, value)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(trial)
    except REFUSALS:
        return None
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, survey_model(model).experts


@torch.no_grad()
def _cut(found: RoutedExperts, kept: KeptExperts) -> None:
    """Leave out the other experts of a layer, their neurons, and their rows of the router."""
    experts, neurons, silent = kept.padded_indices()
    for number, packing in enumerate(found.packed.packings):
        path, _, name = packing.name.rpartition(".")
        weight = find_parameter(found.module, packing.name)
        places = None if neurons is None else neurons.to(weight.device)
        cut = packing.take(weight, experts.to(weight.device), places, 0 if number else silent)
        found.module.get_submodule(path)._parameters[name] = nn.Parameter(cut)
    for tensors, name, tensor in _of_experts(found):
        keep = kept.keep.to(tensor.device)
        cut = tensor[keep] if len(tensor) == len(keep) else tensor[..., keep]
        tensors[name] = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut


def _of_experts(found: RoutedExperts) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield the router's tensors that have an entry or a row per expert, and the block's own."""
    for module in (*found.router.modules(), found.parent):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in [*tensors.items()]:
                if tensor is not None and found.packed.experts in tensor.shape:
                    yield tensors, name, tensor
