"""Which routed experts a domain keeps, and which neurons of each, from a profile's statistics.

The same share of every layer's experts stays, at least as many as a token has (and, where the
router chooses among groups first, so many of each group that any of them will do): those that most
tokens are routed to, those of the largest REAP criterion, or those that add most over all tokens;
of sgatlin layers the same number of every channel. Of each kept expert the same number of
neurons stays: those of the largest mean absolute activation times the norm of their outgoing
weights.

Source: Lasby et al. 2025, "REAP the Experts", arXiv:2510.13999; the score of neurons is that of
Wanda (Sun et al. 2023, arXiv:2306.11695) summed over an outgoing column.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.expert_statistics import ExpertStatistics
from hf_sparse_pathways.discovery.profiles import DomainProfile, Profile
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, UnsupportedModelError, option
from hf_sparse_pathways.ffn.blocks import survey_model
from hf_sparse_pathways.ffn.expert_layouts import find_parameter
from hf_sparse_pathways.ffn.experts import RoutedExperts
from hf_sparse_pathways.ffn.kept_experts import ExpertsShape, KeptExperts
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway
from hf_sparse_pathways.shares import is_number

EXPERT_SCORES: Mapping[str, Callable[[ExpertStatistics], Tensor]] = MappingProxyType(
    {
        "usage": lambda statistics: statistics.usage,
        "reap": lambda statistics: statistics.reap,
        "added": lambda statistics: statistics.added,
    }
)
"""Scores of experts by name; larger means keep."""

AUTO_SCORE = "auto"
"""``"reap"``; of sgatlin layers, of whose experts most have few tokens, ``"added"``."""


_ABOUT_BLOCKS = {
    "sparsity": None,
    "percentile": None,
    "pool": None,
    "max_perplexity_increase": None,
    "target_speedup": None,
    "method": None,
    "score": None,
    "allocation": None,
    "compensation": None,
    "clusters": 1,
    "skip": 0.0,
    "mixture": None,
}
"""Options about the neurons of FFN blocks, with what stands for none."""


def check_block_options(base: BaseModel, options: Mapping[str, Any]) -> None:
    """Check that nothing is asked of FFN blocks where a model has none.

    Args:
        base: The model.
        options: Name -> value; others than those about blocks are not looked at.

    Raises:
        PathwaysError: Something is.
    """
    if base.blocks:
        return
    asked = [
        name
        for name, usual in _ABOUT_BLOCKS.items()
        if (value := options.get(name)) is not None and not (is_number(value) and value == usual)
    ]
    if asked:
        raise PathwaysError(
            f"Options about FFN blocks: {', '.join(map(option, asked))}. The FFNs of this "
            f"{base.model_type} model are routed experts alone, of which {option('experts')} or "
            f"{option('expert_neurons')} keep a share: leave the others out."
        )


@dataclass(frozen=True, kw_only=True)
class ExpertGoal:
    """How much of the routed experts stays.

    Attributes:
        experts: Share of each layer's experts, in (0, 1]; None for all.
        neurons: Share of each kept expert's neurons, in (0, 1]; None for all.
        score: A name in ``EXPERT_SCORES``, or ``"auto"``.

    Raises:
        PathwaysError: A share is out of range.
        UnknownNameError: An unknown score.
    """

    experts: float | None = None
    neurons: float | None = None
    score: str = AUTO_SCORE

    def __post_init__(self) -> None:
        for name, share in (("experts", self.experts), ("expert_neurons", self.neurons)):
            if share is not None and not (is_number(share) and 0 < share <= 1):
                raise PathwaysError(
                    f"{option(name)} {share!r:.200} does not fit: it is the share that stays, "
                    "above 0 and at most 1, such as 0.5."
                )
        if self.score not in (AUTO_SCORE, *EXPERT_SCORES):
            raise UnknownNameError("expert score", self.score, (AUTO_SCORE, *EXPERT_SCORES))

    @property
    def wanted(self) -> bool:
        """Whether anything is asked of routed experts."""
        return self.experts is not None or self.neurons is not None

    def check(self, profile: Profile) -> None:
        """Check that a profile has what it needs.

        Raises:
            UnsupportedModelError: As of ``check_base``.
            PathwaysError: The profile holds no statistics of routed experts.
        """
        self.check_base(profile.base)
        told = profile.base.experts and all(own.experts for own in profile.by_domain.values())
        if self.wanted and not told:
            raise PathwaysError(
                "The profile holds no statistics of routed experts: it is older than this version, "
                "or they are packed or chosen in a way that is not known here. Take it again, or "
                f"leave out {option('experts')} and {option('expert_neurons')}."
            )

    def check_base(self, base: BaseModel) -> None:
        """Check that a model has what is asked for.

        Raises:
            UnsupportedModelError: It has no routed experts that fit; or it has nothing else, and
                nothing is asked of them.
        """
        if not self.wanted:
            if not base.blocks:
                raise UnsupportedModelError(
                    f"The FFNs of this {base.model_type} model are routed experts alone: say how "
                    f"many stay with {option('experts')} 0.5, or how much of each with "
                    f"{option('expert_neurons')} 0.5."
                )
            return
        if not base.routed:
            raise UnsupportedModelError(
                f"This {base.model_type} model has no routed experts: leave out "
                f"{option('experts')} and {option('expert_neurons')}."
            )
        if self.neurons is not None and all(shape.single for shape in base.experts):
            raise UnsupportedModelError(
                f"The experts of this {base.model_type} model are single neurons: leave out "
                f"{option('expert_neurons')}, and give {option('experts')}."
            )

    def score_of(self, shape: ExpertsShape) -> Callable[[ExpertStatistics], Tensor]:
        """Return the score of a layer's experts."""
        usual = "added" if shape.single else "reap"
        return EXPERT_SCORES[usual if self.score == AUTO_SCORE else self.score]

    def described(self) -> dict[str, Any]:
        """Return the goal as JSON values."""
        return {"experts": self.experts, "expert_neurons": self.neurons, "expert_score": self.score}


def keep_experts(
    model: nn.Module, domain: DomainProfile, pathway: Pathway, goal: ExpertGoal
) -> Pathway:
    """Return a domain's pathway with what stays of the routed experts. Pure.

    Args:
        model: The profiled model, whose weights decide about neurons.
        domain: Its profile.
        pathway: What stays of the FFN blocks.
        goal: How much stays of the experts.
    """
    if not goal.wanted:
        return pathway
    found = survey_model(model).experts
    kept = tuple(
        _keep(one, statistics, goal) for one, statistics in zip(found, domain.experts, strict=True)
    )
    provenance = {**pathway.provenance, **goal.described()}
    return replace(pathway, experts=kept, provenance=provenance)


def _keep(found: RoutedExperts, statistics: ExpertStatistics, goal: ExpertGoal) -> KeptExperts:
    shape = ExpertsShape.of(found, "")
    keep = torch.ones(shape.experts, dtype=torch.bool)
    if goal.experts is not None:
        keep = choose_experts(goal.score_of(shape)(statistics), shape, goal.experts)
    neurons = None
    if goal.neurons is not None and not shape.single:
        width = max(1, round(goal.neurons * shape.d_ff))
        scores = score_neurons(found, statistics)
        best = scores.topk(width, dim=1).indices
        neurons = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        neurons &= keep.unsqueeze(1)
    return KeptExperts(keep=keep, neurons=neurons)


def choose_experts(scores: Tensor, shape: ExpertsShape, share: float) -> Tensor:
    """Return which experts of a layer stay, bool ``(experts,)``.

    Args:
        scores: One per expert, larger meaning keep.
        shape: The layer's.
        share: Of the experts; more stay where the router needs more. The same of every channel.
    """
    if shape.channels > 1:
        channels = scores.view(shape.channels, -1)
        count = max(shape.top_k // shape.channels, round(share * channels.shape[1]))
        best = channels.topk(count, dim=1).indices
        return torch.zeros_like(channels, dtype=torch.bool).scatter(1, best, True).flatten()
    grouped = scores.view(shape.groups, -1)
    needed = grouped.topk(shape.least_per_group, dim=1).indices
    keep = torch.zeros_like(grouped, dtype=torch.bool).scatter(1, needed, True).flatten()
    missing = round(share * shape.experts) - int(keep.sum())
    if missing > 0:
        others = scores.double().masked_fill(keep, -torch.inf)
        keep[others.topk(missing).indices] = True
    return keep


@torch.no_grad()
def score_neurons(found: RoutedExperts, statistics: ExpertStatistics) -> Tensor:
    """Return mean |activation| times norm of the outgoing weights, float64 ``(experts, d_ff)``.

    Of experts without tokens it is the norm alone.
    """
    packing = found.packed.packings[0]
    weight = packing.apart(find_parameter(found.module, packing.name)).detach()
    norms = weight.double().cpu().norm(dim=3 - (packing.dim or 0))
    seen = (statistics.routed > 0).unsqueeze(1)
    return norms * torch.where(seen, statistics.mean_abs, 1.0)
