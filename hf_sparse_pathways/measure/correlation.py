"""How two figures go together over a few models: Pearson and Spearman with their uncertainty.

Intervals are Fisher's: atanh of the coefficient is about normal with variance 1 / (n - 3), for
Spearman (1 + r^2 / 2) / (n - 3). With few models they are wide, and below four there is none.

Source: Fisher 1921; for ranks Bonett and Wright 2000, "Sample size requirements for estimating
Pearson, Kendall and Spearman correlations", Psychometrika 65.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_sparse_pathways.errors import PathwaysError

NORMAL_975 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""

FEW = 10
"""With fewer points than this a correlation is no evidence by itself."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A coefficient with its uncertainty.

    Attributes:
        kind: ``Pearson`` or ``Spearman``.
        value: In [-1, 1]; None if one side does not vary.
        interval: 95 % interval; None with fewer than four points, or a coefficient of 1.
        n: Number of points.
    """

    kind: str
    value: float | None
    interval: tuple[float, float] | None
    n: int

    @property
    def caveat(self) -> str:
        """What stands against taking it at its word; empty if nothing does."""
        if self.value is None:
            return f"n = {self.n}: undefined, because one side does not vary"
        if self.n < 4:
            return f"n = {self.n} is too small for an interval: this says nothing"
        few = f"n = {self.n} is too small for a conclusion" if self.n < FEW else ""
        if self.interval is None:
            return "; ".join(filter(None, [few, "no interval, since the points are on a line"]))
        low, high = self.interval
        if low <= 0.0 <= high:
            return "; ".join(filter(None, [few, "the interval holds 0"]))
        return few

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.kind} -, n = {self.n}"
        if self.interval is None:
            return f"{self.kind} {self.value:.2f}, no interval, n = {self.n}"
        low, high = self.interval
        return f"{self.kind} {self.value:.2f} (95 %: {low:.2f} to {high:.2f}), n = {self.n}"


def correlate(x: Sequence[float], y: Sequence[float]) -> tuple[Correlation, Correlation]:
    """Return Pearson's and Spearman's coefficient of paired figures.

    Raises:
        PathwaysError: The lengths differ, or a figure is NaN or infinite.
    """
    if len(x) != len(y):
        raise PathwaysError(f"{len(x)} figures cannot be paired with {len(y)}.")
    if not all(map(math.isfinite, [*x, *y])):
        raise PathwaysError("Figures to be correlated have to be finite.")
    linear = _product_moment(x, y)
    ranked = _product_moment(rank(x), rank(y))
    return (
        _with_interval("Pearson", linear, len(x), 1.0),
        _with_interval("Spearman", ranked, len(x), 1.0 + (ranked or 0.0) ** 2 / 2.0),
    )


def rank(values: Sequence[float]) -> list[float]:
    """Return ranks from 1; equal values share the mean of theirs."""
    ranks = [0.0] * len(values)
    order = sorted(range(len(values)), key=lambda index: values[index])
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + 1 + end) / 2.0
        start = end
    return ranks


def _product_moment(x: Sequence[float], y: Sequence[float]) -> float | None:
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    dx, dy = _about_mean(x), _about_mean(y)
    products = math.fsum(a * b for a, b in zip(dx, dy, strict=True))
    norms = math.sqrt(math.fsum(a * a for a in dx)) * math.sqrt(math.fsum(b * b for b in dy))
    return max(-1.0, min(1.0, products / norms)) if norms > 0.0 else None


def _about_mean(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _with_interval(kind: str, value: float | None, n: int, spread: float) -> Correlation:
    if value is None or n < 4 or abs(value) > 1.0 - 1e-12:
        return Correlation(kind=kind, value=value, interval=None, n=n)
    middle, half = math.atanh(value), NORMAL_975 * math.sqrt(spread / (n - 3))
    interval = (math.tanh(middle - half), math.tanh(middle + half))
    return Correlation(kind=kind, value=value, interval=interval, n=n)
