"""How much is removed: a sparsity, or the paper's percentile."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_sparse_pathways.discovery.percentile import POOLS, check_percentile
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError

DEFAULT_SPARSITY = 0.3


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How much is removed.

    Attributes:
        sparsity: Fraction of FLOPs, over all blocks or one per block; None with a percentile.
        percentile: The paper's rule instead.
        pool: What the percentile is taken over.
    """

    sparsity: float | tuple[float, ...] | None
    percentile: float | None
    pool: str

    def described(self) -> dict[str, Any]:
        """Return the goal as JSON values."""
        if self.percentile is not None:
            return {"percentile": self.percentile, "pool": self.pool}
        several = isinstance(self.sparsity, tuple)
        return {"sparsity": list(self.sparsity) if several else self.sparsity}  # type: ignore[arg-type]


def make_goals(
    sparsity: float | Sequence[float] | Mapping[str, float] | None,
    percentile: float | None,
    pool: str | None,
    *,
    domains: Sequence[str],
    blocks: int,
) -> dict[str, Goal]:
    """Return every domain's goal, checked.

    Raises:
        PathwaysError: A number is out of range, both rules were given, or a pool without a
            percentile.
        UnknownNameError: An unknown pool, or a domain that the profile does not have.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(domains, make_goal(sparsity, percentile, pool, blocks))
    for name in sparsity:
        if name not in domains:
            raise UnknownNameError("domain", name, domains)
    if set(sparsity) != set(domains):
        raise PathwaysError(f"Give a sparsity for each of {', '.join(domains)}, or a single one.")
    return {name: make_goal(sparsity[name], percentile, pool, blocks) for name in domains}


def check_division(
    sparsity: Any, percentile: float | None, allocation: object, multiple: int
) -> None:
    """Check that no option divides the budget that another has divided already.

    Raises:
        PathwaysError: One does.
    """
    if percentile is not None and (allocation is not None or multiple != 1):
        raise PathwaysError(
            "A percentile decides how many neurons of each block stay: leave out allocation and "
            "multiple, or give a sparsity."
        )
    given = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
    several = any(isinstance(v, Sequence) or getattr(v, "ndim", 0) > 0 for v in given)
    if allocation is not None and several:
        raise PathwaysError(
            "One sparsity per block is an allocation: leave out the other, or give one sparsity."
        )


def mean_goal(goals: Sequence[Goal]) -> Goal:
    """Return the goal of the pooled control: the domains' own, or the mean of their sparsities."""
    first = goals[0]
    plain = [goal.sparsity for goal in goals if isinstance(goal.sparsity, float)]
    if len(plain) < len(goals):
        return first
    return replace(first, sparsity=sum(plain) / len(plain))


def make_goal(
    sparsity: float | Sequence[float] | None,
    percentile: float | None,
    pool: str | None,
    blocks: int,
) -> Goal:
    """Return a checked goal.

    Raises:
        PathwaysError: A number is out of range, both rules were given, or a pool without a
            percentile.
        UnknownNameError: An unknown pool.
    """
    if percentile is None and pool is not None:
        raise PathwaysError(
            f"A percentile is taken over a pool: leave out pool {pool!r}, or give a percentile."
        )
    pool = POOLS[0] if pool is None else pool
    if percentile is not None:
        if sparsity is not None:
            raise PathwaysError("Give a sparsity or a percentile, not both.")
        check_percentile(percentile, pool)
        return Goal(sparsity=None, percentile=percentile, pool=pool)
    wanted: Any = DEFAULT_SPARSITY if sparsity is None else sparsity
    if hasattr(wanted, "tolist"):  # a tensor or an array, of one number or several
        wanted = wanted.tolist()
    fractions = check_sparsity(wanted, blocks)
    one = isinstance(wanted, (int, float))
    return Goal(sparsity=fractions[0] if one else tuple(fractions), percentile=None, pool=pool)


def check_sparsity(sparsity: float | Sequence[float], blocks: int) -> list[float]:
    """Return one sparsity per block.

    Raises:
        PathwaysError: One is outside [0, 1), or their number is not that of the blocks.
    """
    if hasattr(sparsity, "tolist"):  # a tensor or an array
        sparsity = sparsity.tolist()
    fractions: list[Any] = [sparsity] * blocks
    if isinstance(sparsity, Sequence) and not isinstance(sparsity, (str, bytes)):
        fractions = [*sparsity]
    if len(fractions) != blocks:
        raise PathwaysError(
            f"{len(fractions)} sparsities were given for {blocks} FFN blocks. Give one per block, "
            "or a single one."
        )
    for value in fractions:
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not number or not 0.0 <= value < 1.0:
            raise PathwaysError(
                f"sparsity has to be in [0, 1), the fraction of neurons removed; got {value!r}."
            )
    return [float(value) for value in fractions]
