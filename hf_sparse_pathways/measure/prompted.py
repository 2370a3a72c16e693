"""Neurons picked from the first part of each window, as arms: what ``domain="prompt"`` computes.

Beside GRIFFIN (``peers.py``) stand its neurons with columns that are fitted to the prompt, and a
domain's pathway that is fitted to it further. Each window is one pass, in which the first part is
dense: what a generation from that prompt computes, at once.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.measure.arms import MeasuredArm
from hf_sparse_pathways.measure.fidelity import first_scored
from hf_sparse_pathways.modeling.picked import PRIOR
from hf_sparse_pathways.pathways.names import PROMPT
from hf_sparse_pathways.pathways.pathway import Pathways

WITH_DOMAIN = "prompt+domain"
"""The method that starts from the domain's pathway."""

PROMPTED: Mapping[str, str] = MappingProxyType({PROMPT: PROMPT, WITH_DOMAIN: PRIOR})
"""Method -> what its calls name, for the last one before the domain's name."""


def prompt_arm(
    method: str, domain: str, pathways: Pathways, sparsity: float, context: float
) -> MeasuredArm:
    """Return the arm of a method.

    Args:
        method: A name in ``PROMPTED``.
        domain: Of the text.
        pathways: Those of the model that the arm runs.
        sparsity: Fraction of neurons that is left out where no pathway says which.
        context: Fraction of each window that is its prompt.
    """
    if method == PROMPT:
        return MeasuredArm(method, None, 1.0 - sparsity, _forward(PROMPT, context), sparsity)
    flops, removed = pathways.flops(domain), pathways.sparsity(domain)
    return MeasuredArm(method, None, flops, _forward(PRIOR + domain, context), removed)


def _forward(named: str, context: float) -> Callable[[Any, Batch], Tensor]:
    def forward(model: Any, batch: Batch) -> Tensor:
        lengths = [first_scored(len(window.ids), context) for window in batch.windows]
        with model.prompted(named, batch.mask, lengths):
            return run_model(model, batch)

    return forward
