"""What the routed experts of a model do on each domain's text, from its profile.

Per layer, expert and domain: the fraction of the tokens that are routed to it, its mean weight
there and REAP's criterion; over the domains the variance of that fraction, which is what tells a
specialist; and the cosine of the mean outputs of the two most alike experts, which is what a pruned
expert's tokens would find elsewhere. Experts of sgatlin layers are single neurons, each with an
output of its own: of these it is told instead how many are specialised.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.measure.figures import Section, format_figure
from hf_sparse_pathways.measure.specialisation import NORMALISED


@dataclass(frozen=True, kw_only=True)
class RoutedUsage:
    """The routed experts of one layer.

    Attributes:
        name: Of the module that holds them.
        top_k: How many a token has.
        usage: Domain -> fraction of the tokens, one per expert; they add up to ``top_k``.
        mean_weight: Domain -> mean weight over an expert's tokens.
        reap: Domain -> mean of weight times output norm over an expert's tokens.
        variance: Of each expert's usage over the domains.
        likeness: Domain -> cosines of the experts' mean outputs, one row per expert; none of
            single neurons.
    """

    name: str
    top_k: int
    usage: Mapping[str, tuple[float, ...]]
    mean_weight: Mapping[str, tuple[float, ...]]
    reap: Mapping[str, tuple[float, ...]]
    variance: tuple[float, ...]
    likeness: Mapping[str, tuple[tuple[float, ...], ...]]

    def unused(self, domain: str) -> int:
        """Return how many experts none of a domain's tokens is routed to."""
        return sum(share == 0 for share in self.usage[domain])

    def effective(self, domain: str) -> float:
        """Return how many experts used alike would spread as evenly (exponent of the entropy)."""
        shares = torch.tensor(self.usage[domain], dtype=torch.float64) / self.top_k
        return float(torch.special.entr(shares).sum().exp())

    def closest(self, domain: str) -> float | None:
        """Return the cosine of the two most alike experts; None where that is not known."""
        if not self.likeness:
            return None
        cosines = torch.tensor(self.likeness[domain], dtype=torch.float64)
        return float(cosines.fill_diagonal_(-1.0).max())

    @property
    def specialised(self) -> float:
        """The share of the used experts that one domain uses far more often than the others.

        The criterion is that for activations of neurons, ``NORMALISED`` of ``specialisation.py``.
        """
        usage = torch.tensor([*self.usage.values()], dtype=torch.float64)
        used = usage[:, usage.sum(0) > 0]
        return float(
            (used.amax(0) > NORMALISED.as_ratio(len(usage)) * used.mean(0)).double().mean()
        )

    def common(self, left: str, right: str) -> float:
        """Return which share of the most used half of the experts two domains have in common."""
        half = max(self.top_k, len(self.variance) // 2)
        tops = [
            {*torch.tensor(self.usage[domain]).topk(half).indices.tolist()}
            for domain in (left, right)
        ]
        return len(tops[0] & tops[1]) / half


def summarise_experts(profile: Profile) -> tuple[RoutedUsage, ...]:
    """Return what a profile says of each layer's experts; nothing if it has no statistics. Pure."""
    if not all(domain.experts for domain in profile.by_domain.values()):
        return ()
    return tuple(_layer(profile, index) for index in range(len(profile.base.experts)))


def _layer(profile: Profile, index: int) -> RoutedUsage:
    shape = profile.base.experts[index]
    own = {name: domain.experts[index] for name, domain in profile.by_domain.items()}
    spread = torch.stack([statistics.usage for statistics in own.values()]).var(0, correction=0)
    return RoutedUsage(
        name=shape.name,
        top_k=shape.top_k,
        usage={name: _floats(statistics.usage) for name, statistics in own.items()},
        mean_weight={name: _floats(statistics.mean_weight) for name, statistics in own.items()},
        reap={name: _floats(statistics.reap) for name, statistics in own.items()},
        variance=_floats(spread),
        likeness={}
        if shape.single
        else {name: tuple(map(_floats, statistics.likeness)) for name, statistics in own.items()},
    )


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def expert_sections(layers: tuple[RoutedUsage, ...]) -> Iterator[Section]:
    """Yield a table per domain, with a row per layer, and one of what domains have in common."""
    if not layers:
        return
    domains = [*layers[0].usage]
    for domain in domains:
        yield _domain_section(layers, domain)
    if len(domains) > 1:
        yield _common_section(layers, domains)


def _domain_section(layers: tuple[RoutedUsage, ...], domain: str) -> Section:
    rows: list[list[Any]] = []
    for layer in layers:
        usage, closest = layer.usage[domain], layer.closest(domain)
        most = max(range(len(usage)), key=usage.__getitem__)
        by_reap = max(range(len(usage)), key=layer.reap[domain].__getitem__)
        cells = (
            f"{len(usage)}",
            f"{layer.unused(domain)}",
            format_figure(layer.effective(domain)),
            f"{most}: {usage[most]:.1%}, weight {layer.mean_weight[domain][most]:.3f}",
            f"{by_reap}: {format_figure(layer.reap[domain][by_reap])}",
            "-" if closest is None else f"{closest:.3f}",
        )
        rows.append([layer.name, *cells])
    return Section(
        title=f"Routed experts on {domain}",
        note=(
            "unused: no token is routed to them; effective: as many experts used alike would "
            "spread the tokens as evenly; REAP: mean of weight times output norm over an expert's "
            "tokens; alike: the largest cosine of two experts' mean outputs."
        ),
        header=["experts", "number", "unused", "effective", "most used", "most by REAP", "alike"],
        rows=rows,
    )


def _common_section(layers: tuple[RoutedUsage, ...], domains: list[str]) -> Section:
    pairs = [(left, right) for n, left in enumerate(domains) for right in domains[n + 1 :]]
    rows = [
        [
            layer.name,
            f"{max(layer.variance) ** 0.5:.2%}",
            f"{layer.specialised:.1%}",
            *(f"{layer.common(*pair):.0%}" for pair in pairs),
        ]
        for layer in layers
    ]
    return Section(
        title="Routed experts over domains",
        note=(
            "spread: the largest standard deviation, over the domains, of the fraction of tokens "
            "that an expert has; specialised: the share of the used experts of which one domain "
            f"has more than its part, {NORMALISED} as for neurons; then the share of the most "
            "used half of the experts that two domains have in common."
        ),
        header=["experts", "spread", "specialised", *(f"{left}, {right}" for left, right in pairs)],
        rows=rows,
    )
