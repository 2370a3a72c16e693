"""Importance scores: one number per neuron of a block, larger means keep.

To add one, write a function of a ``ScoreInput`` and register it in ``SCORES``. A user may pass
such a function to ``select`` without registering it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.statistics import BlockStatistics
from hf_sparse_pathways.errors import PathwaysError


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """First-order effects of removing neurons, summed over a sample of the domain's text.

    Attributes:
        signed: Sum of g a, float64 ``(d_ff,)``, with g the gradient of the loss by the activation.
        absolute: Sum of |g a|, float64 ``(d_ff,)``.
    """

    signed: Tensor
    absolute: Tensor


@dataclass(frozen=True, kw_only=True)
class ScoreInput:
    """What a score may use of one FFN block and one domain.

    Attributes:
        statistics: The domain's activation statistics.
        down: Weight of the outgoing leaf, float32 ``(d_model, d_ff)``.
        generator: Seeded for this domain and block.
        incoming: Weights of the incoming leaves, float32, rows in the order of the neurons,
            ``(branches, d_ff, d_model)``.
        positive_by_domain: P(a > 0) in every domain of the profile, float64 ``(domains, d_ff)``.
        saliency: What the loss says about each neuron; only for scores in ``NEED_SALIENCY``.
    """

    statistics: BlockStatistics
    down: Tensor
    generator: torch.Generator
    incoming: Tensor | None = None
    positive_by_domain: Tensor | None = None
    saliency: Saliency | None = None


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


def flap(given: ScoreInput) -> Tensor:
    """Return the fluctuation of a neuron's contribution, float64 ``(d_ff,)``.

    Meant with a bias that replaces the mean of what is removed: ``compensation="bias"``.

    Source:
        An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        arXiv:2312.11983 (WIFV): Var(a_i) |w_i|^2. Their standardisation over layers belongs
        to the allocation and is left out.
    """
    statistics = given.statistics
    variance = (statistics.second_moment - statistics.mean.square()).clamp_min(0)
    return variance * given.down.double().square().sum(0)


def magnitude(given: ScoreInput) -> Tensor:
    """Return the product of the norms of a neuron's weight vectors, float64 ``(d_ff,)``; no text.

    Source:
        Magnitude pruning of whole neurons, as the baseline of Li et al. 2016, "Pruning Filters for
        Efficient ConvNets", arXiv:1608.08710; a product, since branches and column multiply.
    """
    norms = torch.linalg.vector_norm(given.down.double(), dim=0)
    if given.incoming is not None:
        norms = norms * torch.linalg.vector_norm(given.incoming.double(), dim=2).prod(0)
    return norms


def griffin(given: ScoreInput) -> Tensor:
    """Return the norm of a neuron's share in each token's activation, float64 ``(d_ff,)``.

    Source:
        Dong et al. 2024, "Prompt-prompted Adaptive Structured Pruning for Efficient LLM
        Generation" (GRIFFIN), arXiv:2404.01365, over the domain's text instead of a prompt.
    """
    return given.statistics.share_square_sum.sqrt()


def lape(given: ScoreInput) -> Tensor:
    """Return how specific a neuron is to this domain, float64 ``(d_ff,)``.

    P(a > 0) here, times one minus the normalised entropy of that probability over the domains.

    Source:
        Tang et al. 2024, "Language-Specific Neurons: The Key to Multilingual Capabilities in Large
        Language Models", arXiv:2402.16438. They pick neurons of low entropy; the factor
        P(a > 0), which gives each to its domains, and a instead of act(gate), are ours.
    """
    own = given.statistics.positive_fraction
    if given.positive_by_domain is None or len(given.positive_by_domain) < 2:
        return own
    share = given.positive_by_domain / given.positive_by_domain.sum(0).clamp_min(1e-12)
    entropy = torch.special.entr(share).sum(0) / math.log(len(share))
    return own * (1.0 - entropy)


def taylor(given: ScoreInput) -> Tensor:
    """Return the absolute first-order effect of removing a neuron, float64 ``(d_ff,)``.

    Source:
        Ma et al. 2023, "LLM-Pruner", arXiv:2305.11627 (first order), and Molchanov et al.
        2016, arXiv:1611.06440: E|g a| over tokens.
    """
    return _saliency(given).absolute


def taylor_signed(given: ScoreInput) -> Tensor:
    """Return the signed first-order effect: removed first is what seems to hurt, ``(d_ff,)``.

    Source:
        As ``taylor``, without the absolute value: removing neuron i changes the loss by -E[g a].
    """
    return -_saliency(given).signed


def _saliency(given: ScoreInput) -> Saliency:
    if given.saliency is None:
        raise PathwaysError(
            "This score needs gradients on the domain's text; the profile holds none. Take the "
            "profile again with hf_sparse_pathways.profile, which keeps the text's tokens."
        )
    return given.saliency


def random(given: ScoreInput) -> Tensor:
    """Return seeded uniform noise, float64 ``(d_ff,)``: the control that every score must beat."""
    size = given.down.shape[1]
    return torch.rand(size, generator=given.generator, dtype=torch.float64)


_ALL = (
    mean_abs,
    wanda,
    flap,
    magnitude,
    griffin,
    lape,
    taylor,
    taylor_signed,
    random,
)

SCORES: Mapping[str, ScoreFunction] = MappingProxyType({score.__name__: score for score in _ALL})

NEED_SALIENCY = frozenset({taylor, taylor_signed})
"""Scores for which the model is run backwards over a sample of the text."""


def check_scores(name: str, scores: object, d_ff: int) -> Tensor:
    """Return scores as float64 on the CPU, checked.

    Raises:
        PathwaysError: They are no ``(d_ff,)`` tensor, or not finite.
    """
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (d_ff,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PathwaysError(f"Score {name!r} returned {shape}; it has to be a ({d_ff},) tensor.")
    if odd := int((~scores.isfinite()).sum()):
        raise PathwaysError(
            f"Score {name!r} returned NaN or infinity for {odd} neurons; give finite numbers."
        )
    return scores.detach().double().cpu()
