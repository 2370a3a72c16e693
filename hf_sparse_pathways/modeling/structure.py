"""Copies of a model's structure that share its weights, and which models can have one."""

import copy
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import has_parts
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig
from hf_sparse_pathways.modeling.replacement import refuse
from hf_sparse_pathways.processes import is_spread


def copy_structure(model: nn.Module, replaced: dict[int, Any]) -> Any:
    """Copy the modules of a model, sharing its parameters and buffers.

    Args:
        model: The model; unchanged.
        replaced: ``id(object) -> stand-in`` for objects that the copy has instead.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**shared, **replaced})


def check_convertible(model: nn.Module) -> None:
    """Check that a dense model can be given pathways and saved with them.

    Raises:
        UnsupportedModelError: It is no causal LM of Transformers, or already dispatched.
        PathwaysError: It has FFN layers without neurons to keep.
    """
    base = type(model)
    config: Any = getattr(model, "config", None)
    ours = isinstance(config, SparsePathwaysConfig)
    if ours and config.ffn is not None and not has_parts(model):
        raise refuse(config.ffn, "it cannot be given any")
    if ours and (config.ffn is None or config.domains):
        raise UnsupportedModelError(
            f"{base.__name__} has pathways already: use set_pathways, or to_dense() first."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{base.__name__} has a {type(config).__name__}, from which AutoModelForCausalLM could "
            "not load a saved model again. Only models that it loads by themselves fit; of a "
            "wrapped one pass accelerator.unwrap_model(model)."
        )
    known = first_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if base is not known:
        raise UnsupportedModelError(
            f"{base.__name__} cannot be given pathways: it has to be a {known.__name__}, as "
            "AutoModelForCausalLM returns it, not a bare decoder, a classifier or an adapter "
            "model (merge that first)."
        )
    check_undispatched(model)


def check_undispatched(model: nn.Module) -> None:
    """Check that no hooks of accelerate or of tensor parallelism hold on to the modules' forward.

    Raises:
        UnsupportedModelError: There are some.
    """
    check_whole(
        model,
        "and its hooks would bypass the pathways. Load it with SparsePathwaysForCausalLM."
        "from_pretrained(base, pathways=..., tp_plan='auto'), which attaches them before the "
        "weights are sharded.",
    )
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            f"The model is already dispatched to {', '.join(devices) or 'devices'}, and its hooks "
            "would bypass the pathways. Load it with SparsePathwaysForCausalLM.from_pretrained("
            "base, pathways=..., device_map=...), which attaches them before dispatch."
        )


def check_whole(model: nn.Module, why: str) -> None:
    """Check that this process has all of a model's weights.

    Args:
        model: Any model.
        why: Why it has to, and what to do, as the end of the message.

    Raises:
        UnsupportedModelError: It has not.
    """
    if is_spread(model):
        raise UnsupportedModelError(
            f"The model's weights are sharded over several processes, {why}"
        )


def first_class(entry: Any) -> Any:
    """Return the class that an auto mapping's entry stands for."""
    return entry[0] if isinstance(entry, (list, tuple)) else entry
