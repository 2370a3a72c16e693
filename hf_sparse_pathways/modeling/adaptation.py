"""A dense model made one that picks neurons from its prompts, without any domain."""

from typing import TYPE_CHECKING, Any

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathways

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapt(
    model: "PreTrainedModel",
    *,
    executor: str = "auto",
    default_domain: str | None = None,
    **settings: Any,
) -> Any:
    """Return a model that takes ``domain="prompt"`` and shares a dense model's parameters. Pure.

    It has no domains of its own; ``set_pathways`` gives it some.

    Args:
        model: A causal LM; it stays dense.
        executor: How kept neurons are computed.
        default_domain: ``"prompt"``, for calls that name none; None for dense.
        settings: As in ``set_prompt_pathways``.

    Raises:
        UnsupportedModelError: It is no causal LM of Transformers, has pathways already, or has no
            FFN blocks, as where all are routed experts.
        UnknownNameError: An unknown executor or rule.
        PathwaysError: A setting is out of range.
    """
    if isinstance(model, SparsePathwaysForCausalLM):
        model.check_has_blocks()
        raise UnsupportedModelError(
            "This model has pathways already, and takes domain='prompt' as it is. Its "
            "set_prompt_pathways says how neurons are picked."
        )
    none = Pathways(base=BaseModel.of(model), by_domain={})
    made = SparsePathwaysForCausalLM.from_dense(
        model, none, executor=executor, default_domain=default_domain
    )
    made.set_prompt_pathways(**settings)
    return made
