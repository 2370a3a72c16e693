"""Which neurons are specialised: how much more active they are in one domain than on average.

The *ratio* of a neuron in a domain is its mean |activation| there over the mean of that over the
domains. It lies in [0, D] for D domains, so that a threshold of 2 asks for half of a neuron's
activation with four domains, and for more than there is with two. Hence two criteria that do not
depend on D stand beside it: the *share* of the activation that falls on the domain, ratio / D, and
the *excess* over an even neuron, (ratio - 1) / (D - 1).

Source: A. Young 2026, "Sparse Pathways": specialised if the ratio exceeds 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError

KINDS = ("ratio", "excess", "share")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """When a neuron counts as specialised for a domain.

    Attributes:
        kind: ``ratio``, ``excess`` or ``share``; see the module.
        threshold: What it has to exceed.
    """

    kind: str
    threshold: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("criterion", self.kind, KINDS)

    def as_ratio(self, domains: int) -> float:
        """Return the ratio that has to be exceeded with a number of domains."""
        if self.kind == "excess":
            return 1.0 + self.threshold * (domains - 1)
        return self.threshold * domains if self.kind == "share" else self.threshold

    def __str__(self) -> str:
        return f"{self.kind} > {self.threshold:g}"


PAPER = Criterion(kind="ratio", threshold=2.0)
"""The paper's."""

NORMALISED = Criterion(kind="excess", threshold=0.25)
"""The one to compare by when the number of domains differs."""

CRITERIA = (
    *(Criterion(kind="ratio", threshold=threshold) for threshold in (1.25, 1.5, 2.0, 3.0)),
    *(Criterion(kind="excess", threshold=threshold) for threshold in (0.1, 0.25, 0.5)),
    Criterion(kind="share", threshold=0.5),
)


@dataclass(frozen=True, kw_only=True)
class SpecialisedFraction:
    """How many neurons meet a criterion.

    Attributes:
        criterion: Which.
        reachable: Whether a neuron can meet it with this many domains.
        overall: Fraction of all neurons that meet it for at least one domain.
        per_block: The same of each FFN block.
        per_domain: Domain -> fraction of all neurons that meet it there; a neuron may count twice.
        per_domain_and_block: Domain -> the same of each FFN block.
    """

    criterion: Criterion
    reachable: bool
    overall: float
    per_block: tuple[float, ...]
    per_domain: dict[str, float]
    per_domain_and_block: dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """How specialised a model's neurons are.

    Attributes:
        domains: Their number.
        neurons: Neurons of all FFN blocks.
        silent: Neurons that are zero on all text; they count as not specialised.
        mean_excess: Mean over neurons of the excess in their strongest domain, in [0, 1].
        fractions: One per criterion.
    """

    domains: int
    neurons: int
    silent: int
    mean_excess: float
    fractions: tuple[SpecialisedFraction, ...]

    def of(self, criterion: Criterion) -> SpecialisedFraction:
        """Return the fractions by one criterion.

        Raises:
            UnknownNameError: It was not measured.
        """
        for fraction in self.fractions:
            if fraction.criterion == criterion:
                return fraction
        known = [str(fraction.criterion) for fraction in self.fractions]
        raise UnknownNameError("criterion", str(criterion), known)


def activation_ratios(profile: Profile) -> list[Tensor]:
    """Return each block's ratios, float64 ``(domains, d_ff)``; 1 for a neuron that is silent."""
    ratios = []
    for blocks in zip(*(domain.blocks for domain in profile.by_domain.values()), strict=True):
        activity = torch.stack([block.mean_abs for block in blocks])
        mean = activity.mean(0)
        ratios.append(torch.where(mean > 0, activity / mean, torch.ones_like(activity)))
    return ratios


def measure_specialisation(
    profile: Profile, criteria: tuple[Criterion, ...] = CRITERIA
) -> Specialisation:
    """Return how specialised the neurons of a profiled model are. Pure.

    Raises:
        PathwaysError: The profile has one domain only.
    """
    domains = profile.domains
    if len(domains) < 2:
        raise PathwaysError(
            f"Specialisation compares domains, and the profile has only {', '.join(domains)}. "
            "Give at least two."
        )
    ratios = activation_ratios(profile)
    largest = torch.cat([block.max(0).values for block in ratios])
    silent = sum(
        int((torch.stack([block.abs_sum for block in blocks]).sum(0) == 0).sum())
        for blocks in zip(*(domain.blocks for domain in profile.by_domain.values()), strict=True)
    )
    return Specialisation(
        domains=len(domains),
        neurons=len(largest),
        silent=silent,
        mean_excess=float((largest - 1.0).mean()) / (len(domains) - 1),
        fractions=tuple(_fraction(criterion, domains, ratios) for criterion in criteria),
    )


def _fraction(
    criterion: Criterion, domains: list[str], ratios: list[Tensor]
) -> SpecialisedFraction:
    threshold = criterion.as_ratio(len(domains))
    met = [block > threshold for block in ratios]
    whole = torch.cat(met, dim=1)
    return SpecialisedFraction(
        criterion=criterion,
        reachable=threshold < len(domains),
        overall=_share(whole.any(0)),
        per_block=tuple(_share(block.any(0)) for block in met),
        per_domain={name: _share(whole[index]) for index, name in enumerate(domains)},
        per_domain_and_block={
            name: tuple(_share(block[index]) for block in met) for index, name in enumerate(domains)
        },
    )


def _share(flags: Tensor) -> float:
    """Return the fraction of flags that are set."""
    return float(flags.double().mean())
