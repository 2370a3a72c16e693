"""The classes made at run time: one per base model class, registered with the auto classes.

Such a class derives from ours and from the base's; only its ``forward`` is new: the base's, with
``domain``. Transformers decides some things by a class's module or name; those are handed on from
the base.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
)

from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig
from hf_sparse_pathways.modeling.domains import UNSET
from hf_sparse_pathways.modeling.model import SparsePathwaysModel
from hf_sparse_pathways.modeling.picked import tell_decisions
from hf_sparse_pathways.modeling.replacement import forward_with_losses
from hf_sparse_pathways.modeling.structure import first_class
from hf_sparse_pathways.sgatlin.layer import has_losses

CLASS_PREFIX = "SparsePathways"

_CLASSES: dict[tuple[type, type], Any] = {}


def model_class_for(
    base: type[PreTrainedModel], config_class: type[SparsePathwaysConfig]
) -> type[SparsePathwaysModel]:
    """Return the class made from ours and a base's, with a ``forward`` that takes ``domain``."""
    if (base, config_class) not in _CLASSES:
        ours = SparsePathwaysForCausalLM if base.can_generate() else SparsePathwaysModel
        namespace = {
            "__module__": __name__,
            "__doc__": base.__doc__,
            "config_class": config_class,
            "forward": _forward_with_domain(base.forward),
        }
        if base.can_generate():
            namespace["prepare_inputs_for_generation"] = _guarded(
                base.prepare_inputs_for_generation
            )
        made = type(f"{CLASS_PREFIX}{base.__name__}", (ours, base), namespace)
        _CLASSES[base, config_class] = made
    return _CLASSES[base, config_class]


def register_models(base: type[PreTrainedConfig], made: type[SparsePathwaysConfig]) -> None:
    """Register the models of a configuration class with the auto classes."""
    for auto, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModel, MODEL_MAPPING),
    ):
        if base in mapping:
            model_class = first_class(mapping[base])
            _share_conversion(model_class)
            auto.register(made, model_class_for(model_class, made), exist_ok=True)


def _share_conversion(base: type[PreTrainedModel]) -> None:
    """Convert our class's checkpoints as the base's, where that is kept by the class's name."""
    conversion = get_checkpoint_conversion_mapping(base.__name__)
    if conversion is not None:
        name = f"{CLASS_PREFIX}{base.__name__}"
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)


def _forward_with_domain(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``forward`` with the base's signature and a keyword ``domain``.

    The signature matters: ``generate`` and ``Trainer`` read it to decide what they pass.
    """

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, domain: Any = UNSET, **kwargs: Any) -> Any:
        choice = self.enter_forward(domain, args, kwargs)
        try:
            if has_losses(self.config.ffn):
                return forward_with_losses(base_forward, self, *args, **kwargs)
            return tell_decisions(base_forward(self, *args, **kwargs), choice.routed)
        finally:
            self.leave_forward(choice)

    signature = inspect.signature(base_forward)
    parameters = list(signature.parameters.values())
    named = inspect.Parameter("domain", inspect.Parameter.KEYWORD_ONLY, default=UNSET)
    last = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        last -= 1
    parameters.insert(last, named)
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def _guarded(base_prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``prepare_inputs_for_generation`` before which a guard sees the whole text.

    All forms of ``generate`` call it before a pass, also those that reorder or drop tokens; its
    signature is read as that of ``forward`` is.
    """

    @functools.wraps(base_prepare)
    def prepare_inputs_for_generation(
        self: Any, input_ids: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        self.follow_guard(input_ids)
        return base_prepare(self, input_ids, *args, **kwargs)

    return prepare_inputs_for_generation
