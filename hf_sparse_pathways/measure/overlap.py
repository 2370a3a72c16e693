"""How alike two domains' neurons are: the Jaccard index, beside that of random choices.

Two domains that keep most of a block have most of it in common whatever they are: an overlap says
something only beside the one that as many neurons, drawn at random, would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from hf_sparse_pathways.measure.figures import Section
from hf_sparse_pathways.pathways.pathway import Pathways


@dataclass(frozen=True, kw_only=True)
class PairOverlap:
    """How alike two domains' neurons are: those that they skip, or those that they keep.

    Attributes:
        first: A domain.
        second: Another.
        jaccard: Neurons that both have over those that one of them has.
        chance: The same expected of two random choices of as many neurons of each block.
        per_block: The Jaccard index of each FFN block; None where neither has any.
    """

    first: str
    second: str
    jaccard: float
    chance: float
    per_block: tuple[float | None, ...]


def measure_kept_overlap(pathways: Pathways) -> tuple[PairOverlap, ...]:
    """Return how alike the domains' kept neurons are; no pairs with one domain. Pure."""
    return tuple(
        compare_neurons(first, second, pathways[first].keep, pathways[second].keep)
        for first, second in combinations(pathways.domains, 2)
    )


def measure_expert_overlap(pathways: Pathways) -> tuple[PairOverlap, ...]:
    """Return how alike the routed experts are that domains keep, of those that keep some. Pure."""
    keeps = {
        name: [kept.keep for kept in pathways[name].experts]
        for name in pathways.domains
        if pathways[name].experts
    }
    return tuple(
        compare_neurons(first, second, keeps[first], keeps[second])
        for first, second in combinations(keeps, 2)
    )


def overlap_section(pairs: Sequence[PairOverlap], what: str = "neurons") -> Section:
    """Return the table of pairs of domains, over all blocks.

    Args:
        pairs: The pairs.
        what: What they keep: ``"neurons"``, or ``"experts"``.
    """
    place = "block" if what == "neurons" else "layer"
    return Section(
        title=f"Overlap of kept {what} (Jaccard)",
        note=f"{what.capitalize()} that both domains keep over those that one of them keeps; "
        f"chance: of as many {what} of every {place}, drawn at random.",
        header=["domains", "overlap", "chance"],
        rows=[
            [f"{pair.first} and {pair.second}", f"{pair.jaccard:.2f}", f"{pair.chance:.2f}"]
            for pair in pairs
        ],
    )


def compare_neurons(
    first: str, second: str, mine: Sequence[Tensor], theirs: Sequence[Tensor]
) -> PairOverlap:
    """Compare two domains' sets of neurons, one mask ``(d_ff,)`` per block each. Pure.

    Chance is the ratio of the expected sizes: for k and m of n neurons, k m / n are common.
    """
    both = [int((a & b).sum()) for a, b in zip(mine, theirs, strict=True)]
    either = [int((a | b).sum()) for a, b in zip(mine, theirs, strict=True)]
    sizes = [(int(a.sum()), int(b.sum()), len(a)) for a, b in zip(mine, theirs, strict=True)]
    common = sum(k * m / n for k, m, n in sizes)
    together = sum(k + m for k, m, _ in sizes) - common
    return PairOverlap(
        first=first,
        second=second,
        jaccard=sum(both) / sum(either) if sum(either) else 0.0,
        chance=common / together if together else 0.0,
        per_block=tuple(b / e if e else None for b, e in zip(both, either, strict=True)),
    )
