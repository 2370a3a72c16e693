"""What a profile says of its neurons' entanglement, and what was measured of its worth.

The entanglement of a row of an incoming leaf is the distance W1 of its standardised output to the
normal distribution (``discovery/entanglement.py``).

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756.
"""

from dataclasses import dataclass

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.measure.correlation import Correlation

HIGH = 0.9
"""The quantile that stands beside median and maximum."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How entangled the rows of one block's incoming leaf are.

    Attributes:
        domain: On whose text.
        block: Index of the FFN block.
        branch: ``gate`` or ``up``; ``incoming`` where there is no gate.
        median: Of W1 over the rows, in standard deviations.
        high: Nine rows in ten are below.
        largest: The maximum.
    """

    domain: str
    block: int
    branch: str
    median: float
    high: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Relation:
    """How a row's entanglement goes together with what sparsifying the row does to its output.

    Attributes:
        domain: On whose held-out text.
        method: ``magnitude`` or ``sparsegpt``.
        sparsity: Fraction of each row's weights that are zeroed.
        pearson: Of W1 and the error, over all rows of the model.
        spearman: The same, of ranks.
        within: Mean of Spearman's coefficient over the leaves, each by itself.
        points: W1 and error of a sample of rows; the error is the mean squared change of the
            output over the output's variance.
    """

    domain: str
    method: str
    sparsity: float
    pearson: Correlation
    spearman: Correlation
    within: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What sparsifying a share of each leaf's rows does to the model, beside dense.

    Attributes:
        domain: On whose held-out text.
        rule: Which rows: ``most entangled``, ``random`` or ``least entangled``.
        share: Fraction of each incoming leaf's rows.
        sparsity: Fraction of their weights that are zeroed, by SparseGPT.
        ratio: Perplexity over the dense model's.
        interval: 95 % interval of the ratio over resampled documents; None with one document.
        tokens: Scored tokens.
        documents: Documents they come from.
    """

    domain: str
    rule: str
    share: float
    sparsity: float
    ratio: float
    interval: tuple[float, float] | None
    tokens: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Entanglement:
    """What is known of a model's entanglement.

    Attributes:
        spreads: One per domain, block and branch.
        relations: One per domain, method and sparsity; none if nothing was measured.
        harms: One per domain and rule; none if nothing was measured.
    """

    spreads: tuple[Spread, ...]
    relations: tuple[Relation, ...] = ()
    harms: tuple[Harm, ...] = ()


def summarise_entanglement(profile: Profile) -> Entanglement | None:
    """Return how entangled each leaf's rows are; None if a profile does not hold it. Pure."""
    spreads = [
        Spread(
            domain=domain,
            block=index,
            branch=branch,
            median=float(values.median()),
            high=float(values.quantile(HIGH)),
            largest=float(values.max()),
        )
        for domain, known in profile.by_domain.items()
        for index, block in enumerate(known.entanglement)
        for branch, values in zip(branch_names(len(block)), block, strict=True)
    ]
    return Entanglement(spreads=tuple(spreads)) if spreads else None


def branch_names(branches: int) -> tuple[str, ...]:
    """Return what the rows of a neuron are called."""
    return ("gate", "up") if branches == 2 else ("incoming",)
