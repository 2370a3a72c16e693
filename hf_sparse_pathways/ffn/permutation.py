"""An order of a block's neurons in which each domain's kept set is few runs.

Neurons that the same domains keep stand together, so only the order of these groups, at most
2^domains, is to be found. Between two neighbouring groups as many runs begin or end as domains keep
exactly one of them (their Hamming distance), before the first group and behind the last none is
kept: the least number of runs is the shortest round trip from "nobody keeps it" through all groups.
Where every combination occurs, as with one or two domains, a Gray code is such a trip.

Otherwise few groups are solved exactly (Held and Karp 1962, dynamic programming over subsets), and
more start from the Gray code and are improved by reversing parts (2-opt, Croes 1958).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_EXACT = 10
"""Most groups that are solved exactly."""

_IMPROVED = 600
"""Most groups that are improved; more keep the order of the Gray code."""


def order_neurons(keeps: Sequence[Tensor], turn: int = 0) -> Tensor:
    """Return an order in which the domains' kept sets have few runs in all. Pure.

    Args:
        keeps: One keep mask ``(d_ff,)`` per domain.
        turn: Where orders are equally good, the domains take turns at having the fewest runs:
            give each block its own number.

    Returns:
        int64 ``(d_ff,)``: the neuron that stands at each place. Neurons of one group keep their
        order.
    """
    masks = torch.stack([keep.cpu() for keep in keeps]).roll(turn % len(keeps), 0)
    groups, member = torch.unique(masks, dim=1, return_inverse=True)
    rank = torch.empty(groups.shape[1], dtype=torch.int64)
    rank[torch.from_numpy(_order_groups(groups.T.numpy()))] = torch.arange(groups.shape[1])
    return torch.argsort(rank[member], stable=True)


def _order_groups(groups: np.ndarray) -> np.ndarray:
    """Return the best order found of distinct groups, bool ``(groups, domains)``."""
    nobody = ~groups.any(axis=1)
    kept = np.flatnonzero(~nobody)
    kept = kept[np.argsort([_gray_position(groups[index]) for index in kept], kind="stable")]
    stops = np.concatenate([np.zeros((1, groups.shape[1]), dtype=np.int64), groups[kept]])
    distances = np.abs(stops[:, None] - stops[None]).sum(axis=2)
    trip = _shortest_trip(distances)
    return np.concatenate([kept[trip[1:] - 1], np.flatnonzero(nobody)])


def _gray_position(group: np.ndarray) -> int:
    """Return the position of a combination in the reflected Gray code."""
    position, bit = 0, 0
    for member in group.tolist():
        bit ^= member
        position = 2 * position + bit
    return position


def _shortest_trip(distances: np.ndarray) -> np.ndarray:
    """Return a short round trip from stop 0, which is given first, through all stops."""
    trip = np.arange(len(distances))
    if _length(trip, distances) <= len(trip) or len(trip) < 4:
        return trip  # no trip is shorter: each step is one at least
    if len(trip) - 1 <= _EXACT:
        return _solve(distances)
    return _improve(trip, distances) if len(trip) - 1 <= _IMPROVED else trip


def _length(trip: np.ndarray, distances: np.ndarray) -> int:
    return int(distances[trip, np.roll(trip, -1)].sum())


def _solve(distances: np.ndarray) -> np.ndarray:
    """Return a shortest round trip from stop 0."""
    count = len(distances) - 1
    inner = distances[1:, 1:]
    best = np.full((1 << count, count), np.inf)  # through a subset, ending at one of it
    before = np.zeros((1 << count, count), dtype=np.int64)
    for last in range(count):
        best[1 << last, last] = distances[0, last + 1]
    for subset in range(1, 1 << count):
        for last in range(count):
            rest = subset & ~(1 << last)
            if rest != subset and rest:
                lengths = best[rest] + inner[:, last]
                before[subset, last] = lengths.argmin()
                best[subset, last] = lengths.min()
    subset = (1 << count) - 1
    last = int((best[subset] + distances[1:, 0]).argmin())
    trip = []
    while subset:
        trip.append(last + 1)
        subset, last = subset & ~(1 << last), int(before[subset, last])
    return np.array([0, *reversed(trip)])


def _improve(trip: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Reverse the part of a round trip that shortens it most, until none does."""
    while True:
        following = np.roll(trip, -1)
        steps = distances[trip, following]
        gain = steps[:, None] + steps[None]
        gain = gain - distances[np.ix_(trip, trip)] - distances[np.ix_(following, following)]
        gain = np.triu(gain, 1)
        first, second = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, second] <= 0:
            return trip
        trip = trip.copy()
        trip[first + 1 : second + 1] = trip[first + 1 : second + 1][::-1]
