"""What switching between two resident pathways adds to a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.speed import clock

PAIRS = (10, 60)
"""Least and most pairs of steps."""


@dataclass(frozen=True, kw_only=True)
class SwitchCost:
    """Seconds that a step takes longer after a switch.

    Attributes:
        executor: The executor.
        first: One pathway.
        second: The other; None for dense.
        seconds: One sample per pair of steps. Single ones are mostly noise: see their quartiles.
    """

    executor: str
    first: str
    second: str | None
    seconds: tuple[float, ...]


@torch.no_grad()
def time_switch(
    model: Any, first: str, second: str | None, *, pairs: int = PAIRS[1]
) -> tuple[float, ...]:
    """Return what switching between two resident pathways adds to a one-token step, in seconds.

    Every pair is the first and the second step in a pathway after a step in the other one; the
    difference of the two is one sample.
    """
    for domain in (first, second):
        _step(model, domain)
    differences = []
    for index in range(pairs):
        one, other = (first, second) if index % 2 else (second, first)
        _step(model, one)
        switched = _step(model, other)
        differences.append(switched - _step(model, other))
    return tuple(differences)


def describe_switch(samples: Sequence[float]) -> str:
    """Say what switching costs, from samples in seconds."""
    low, middle, high = (1000 * quantile(samples, q) for q in (0.25, 0.5, 0.75))
    return (
        f"switching between two resident domains: {middle:.2f} ms per step, median of "
        f"{len(samples)} (quartiles {low:.2f} to {high:.2f})"
    )


def fit_pairs(model: Any, domain: str, share: float) -> int:
    """Return how many pairs of steps fit into a share of time, in seconds."""
    with torch.no_grad():
        step = _step(model, domain)
    least, most = PAIRS
    return max(least, min(most, int(share / max(3.0 * step, 1e-9))))


def _step(model: Any, domain: str | None) -> float:
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    started = clock.now(model.device)
    model(input_ids=token, use_cache=False, domain=domain)
    return clock.now(model.device) - started
