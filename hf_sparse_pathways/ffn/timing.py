"""Timing two ways of multiplying by matrices, in this process and by wall clock."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

_STREAM_BYTES = 48 << 20
"""Weights that are timed together: more than the processor's caches hold."""

_MOST_MATRICES = 64

_ROUNDS = 9


def matrices(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return as many equal matrices as do not fit the caches, within reason.

    They are parts of one tensor: memory in such large pieces goes back to the system afterwards.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    count = min(_MOST_MATRICES, -(-_STREAM_BYTES // size))
    return [*torch.ones(count, *shape, dtype=dtype)]


def time_ratio(slow: Callable[[], None], fast: Callable[[], None]) -> float:
    """Return how many times as long the first takes.

    Both are timed in turn, and the least time of each counts: other load only adds to it.
    """

    def seconds(run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    times = [(seconds(slow), seconds(fast)) for _ in range(_ROUNDS)]
    return min(first for first, _ in times) / min(second for _, second in times)
