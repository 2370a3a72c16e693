"""Importance scores: one number per neuron of a block, larger means keep.

To add one, write a function of a ``ScoreInput`` and register it in ``SCORES``. A user may pass
such a function to ``select`` without registering it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.statistics import BlockStatistics
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError


@dataclass(frozen=True, kw_only=True)
class ScoreInput:
    """What a score may use of one FFN block and one domain.

    Attributes:
        statistics: The domain's activation statistics.
        down: Weight of the outgoing leaf, float32 ``(d_model, d_ff)``.
        generator: Seeded for this domain and block.
    """

    statistics: BlockStatistics
    down: Tensor
    generator: torch.Generator


ScoreFunction = Callable[[ScoreInput], Tensor]


def mean_abs(given: ScoreInput) -> Tensor:
    """Return the mean absolute activation, float64 ``(d_ff,)``.

    Source:
        A. Young 2026, "Sparse Pathways": E[|a_{l,i}|] over the domain's tokens.
    """
    return given.statistics.mean_abs


def wanda(given: ScoreInput) -> Tensor:
    """Return RMS activation times the norm of the down projection's column, float64 ``(d_ff,)``.

    Source:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs", arXiv:2306.11695,
        eq. 1, taken over a whole column (the neuron) instead of single weights.
    """
    norms = torch.linalg.vector_norm(given.down.double(), dim=0)
    return given.statistics.second_moment.sqrt() * norms


def random(given: ScoreInput) -> Tensor:
    """Return seeded uniform noise, float64 ``(d_ff,)``: the control that every score must beat."""
    size = given.down.shape[1]
    return torch.rand(size, generator=given.generator, dtype=torch.float64)


SCORES: Mapping[str, ScoreFunction] = MappingProxyType(
    {"mean_abs": mean_abs, "wanda": wanda, "random": random}
)


def resolve_score(score: str | ScoreFunction) -> tuple[str, ScoreFunction]:
    """Return a score's name and function.

    Raises:
        UnknownNameError: No score of that name.
    """
    if callable(score):
        return getattr(score, "__name__", "a user's function"), score
    if score not in SCORES:
        raise UnknownNameError("score", score, SCORES)
    return score, SCORES[score]


def check_scores(name: str, scores: object, d_ff: int) -> Tensor:
    """Return scores as float64 on the CPU, checked.

    Raises:
        PathwaysError: They are no ``(d_ff,)`` tensor, or hold NaN.
    """
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (d_ff,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PathwaysError(f"Score {name!r} returned {shape}; it has to be a ({d_ff},) tensor.")
    if bool(scores.isnan().any()):
        raise PathwaysError(f"Score {name!r} returned NaN for {int(scores.isnan().sum())} neurons.")
    return scores.detach().double().cpu()
