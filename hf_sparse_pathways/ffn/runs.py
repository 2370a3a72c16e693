"""Runs: the stretches of neighbouring kept neurons in a keep mask."""

import torch
from torch import Tensor

Run = tuple[int, int]
"""First neuron, and the one after the last."""


MOST_RUNS = 8
"""Most runs of an FFN block that are computed one by one; each costs a few products more."""


def few_runs(keep: Tensor) -> tuple[Run, ...] | None:
    """Return the runs of a keep mask ``(d_ff,)``, ascending; None if they are too many to slice."""
    runs = find_runs(keep)
    return runs if len(runs) <= MOST_RUNS else None


def find_runs(keep: Tensor) -> tuple[Run, ...]:
    """Return the runs of a keep mask ``(d_ff,)``, ascending."""
    edge = torch.zeros(1, dtype=torch.int8)
    steps = torch.diff(keep.cpu().to(torch.int8), prepend=edge, append=edge)
    starts, stops = (steps == 1).nonzero().flatten(), (steps == -1).nonzero().flatten()
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))
