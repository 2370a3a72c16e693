"""How a budget of FLOPs is divided among the FFN blocks.

Every allocation returns, per block, how many neurons stay. ``uniform`` and ``depth`` do not look at
the blocks; ``water_filling`` removes neurons where the error curves say that it costs least, until
the budget is met. The curves have to be comparable between blocks: with a metric from the loss
(``sensitivity.py``) they are in nats; as plain output errors they are not, and then water-filling
can be far worse than uniform. Even in nats each curve is that of one block alone, which misleads
where a budget makes much of it: ``balanced`` goes half the way.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.pathways.base import BlockShape

MOST_REMOVED = 0.9
"""Water-filling leaves a tenth of each block if the budget allows it: beyond, error curves say
little."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a pathway may compute.

    Attributes:
        kept: Fraction of the dense FFN FLOPs, in (0, 1].
        multiple: Widths are rounded to multiples of this, downwards; not in narrower blocks.
        overhead: FLOPs per block that are not neurons (the bypass), in neurons.
    """

    kept: float
    multiple: int = 1
    overhead: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """What an allocation may know of one block.

    Attributes:
        d_ff: Number of neurons.
        flops_per_neuron: Multiply-adds per neuron and token.
        error: Error after removing the n least useful neurons, float64 ``(d_ff + 1,)``.
    """

    d_ff: int
    flops_per_neuron: int
    error: Tensor


AllocationFunction = Callable[[Sequence[BlockCosts], Budget], list[int]]


def uniform(blocks: Sequence[BlockCosts], budget: Budget) -> list[int]:
    """Return the same fraction of every block."""
    return [
        _rounded(budget.kept * block.d_ff - overhead, block.d_ff, budget.multiple)
        for block, overhead in zip(blocks, budget.overhead, strict=True)
    ]


def depth(blocks: Sequence[BlockCosts], budget: Budget) -> list[int]:
    """Return all of the first and last tenth of the blocks, and less of those between.

    Source:
        A. Young 2026, "Sparse Pathways": early and late layers are protected. The paper gives no
        numbers; a tenth at each end is ours. If the budget is too small for that, every block
        outside the middle gives what is missing.
    """
    count = len(blocks)
    edge = max(1, round(0.1 * count)) if count > 2 else 0
    weights = [0.0 if i < edge or i >= count - edge else 1.0 for i in range(count)]
    total = sum(block.d_ff * block.flops_per_neuron for block in blocks)
    middle = sum(
        weight * block.d_ff * block.flops_per_neuron
        for weight, block in zip(weights, blocks, strict=True)
    )
    removed = (1.0 - budget.kept) * total
    parts = zip(blocks, budget.overhead, strict=True)
    room = min(_room(block.d_ff, overhead, budget.multiple) for block, overhead in parts)
    most = min(MOST_REMOVED, room)
    inner = min(most, removed / middle) if middle else 0.0
    outer = max(0.0, removed - inner * middle) / max(total - middle, 1e-9)
    if outer > most:  # nothing is left to protect
        inner = outer = 1.0 - budget.kept
    kept = [1.0 - (inner if weight else outer) for weight in weights]
    return [
        _rounded(share * block.d_ff - overhead, block.d_ff, budget.multiple)
        for share, block, overhead in zip(kept, blocks, budget.overhead, strict=True)
    ]


def water_filling(blocks: Sequence[BlockCosts], budget: Budget) -> list[int]:
    """Return the widths of least total error.

    Each curve is replaced by its lower convex hull at multiples of the width; segments are then
    taken in the order of error per FLOP until the budget is met, which is optimal for convex
    curves.
    """
    segments: list[tuple[float, int, int]] = []
    deepest = max(MOST_REMOVED, 1.0 - budget.kept / 2)
    for index, (block, overhead) in enumerate(zip(blocks, budget.overhead, strict=True)):
        start = block.d_ff - _rounded(block.d_ff - 1e-9, block.d_ff, budget.multiple)
        most = min(block.d_ff - 1, int(deepest * block.d_ff) + math.ceil(overhead))
        stops = list(range(start, most + 1, _step(block.d_ff, budget.multiple)))
        curve = block.error.tolist()
        for left, right in _hull(curve, stops):
            slope = _slope(curve, left, right) / block.flops_per_neuron
            segments.append((slope, index, right - left))
    kept = [_rounded(block.d_ff - 1e-9, block.d_ff, budget.multiple) for block in blocks]
    excess = _excess(blocks, kept, budget)
    for _, index, width in sorted(segments):
        if excess <= 1e-6:
            break
        step = _step(blocks[index].d_ff, budget.multiple)
        cost = blocks[index].flops_per_neuron
        taken = min(width, -(-int(-(-excess // cost)) // step) * step)
        kept[index] -= taken
        excess -= taken * cost
    return kept


def balanced(blocks: Sequence[BlockCosts], budget: Budget) -> list[int]:
    """Return widths half-way between ``uniform`` and ``water_filling``.

    What rounding down leaves of the budget goes to the first blocks that were rounded.
    """
    pairs = zip(uniform(blocks, budget), water_filling(blocks, budget), strict=True)
    halves = [sum(pair) / 2 for pair in pairs]
    widths = [
        _rounded(half, block.d_ff, budget.multiple)
        for half, block in zip(halves, blocks, strict=True)
    ]
    spare = -_excess(blocks, widths, budget)
    for index, (half, block) in enumerate(zip(halves, blocks, strict=True)):
        step = _step(block.d_ff, budget.multiple)
        if widths[index] < half and step * block.flops_per_neuron <= spare + 1e-6:
            widths[index] += step
            spare -= step * block.flops_per_neuron
    return widths


def _excess(blocks: Sequence[BlockCosts], widths: Sequence[int], budget: Budget) -> float:
    """Return by how many FLOPs some widths, with the overhead, are above the budget."""
    parts = zip(blocks, widths, budget.overhead, strict=True)
    used = sum((width + extra) * block.flops_per_neuron for block, width, extra in parts)
    return used - budget.kept * sum(block.d_ff * block.flops_per_neuron for block in blocks)


ALLOCATIONS: Mapping[str, AllocationFunction] = MappingProxyType(
    {"uniform": uniform, "depth": depth, "water_filling": water_filling, "balanced": balanced}
)


def resolve_allocation(name: str | AllocationFunction) -> tuple[str, AllocationFunction]:
    """Return an allocation's name and function.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if callable(name):
        return getattr(name, "__name__", "a user's function"), name
    if name not in ALLOCATIONS:
        raise UnknownNameError("allocation", name, ["auto", "sensitivity", *ALLOCATIONS])
    return name, ALLOCATIONS[name]


def allocate(
    given: str | AllocationFunction, blocks: Sequence[BlockCosts], budget: Budget
) -> list[int]:
    """Return an allocation's widths, checked.

    Raises:
        UnknownNameError: There is none of that name.
        PathwaysError: The widths do not fit the blocks or the budget.
    """
    name, function = resolve_allocation(given)
    widths = check_widths(name, function(blocks, budget), blocks)
    check_budget(name, widths, blocks, budget)
    return widths


def most_sparsity(
    shapes: Sequence[BlockShape], *, bypass_rank: int, multiple: int, clusters: int = 1
) -> float:
    """Return the largest sparsity that leaves every block neurons, its bypass and its router.

    Raises:
        PathwaysError: There is none: nothing could be removed.
    """
    room = min(
        _room(s.d_ff, s.bypass_width(bypass_rank) + s.router_width(clusters), multiple)
        for s in shapes
    )
    if not room > 0.0:
        raise PathwaysError(
            f"Some FFN block is too narrow for a bypass of rank {bypass_rank}, {clusters} "
            f"clusters and widths in multiples of {multiple}: nothing could be removed. Choose "
            "smaller ones."
        )
    return room


def check_multiple(multiple: int, d_ff: Iterable[int]) -> None:
    """Check that the widest of some FFN blocks holds a multiple of neurons.

    Raises:
        PathwaysError: It does not.
    """
    if multiple > (widest := max(d_ff, default=multiple)):
        raise PathwaysError(
            f"multiple {multiple} is more than the {widest} neurons of the widest FFN block. "
            "Choose a smaller one."
        )


def check_widths(name: str, widths: Any, blocks: Sequence[BlockCosts]) -> list[int]:
    """Return an allocation's widths, checked.

    Raises:
        PathwaysError: They are not one width in [1, d_ff] per block.
    """
    try:
        listed = [int(width) for width in widths if float(width).is_integer()]
    except (TypeError, ValueError):
        listed = []
    if len(listed) != len(blocks) or not all(
        1 <= width <= block.d_ff for width, block in zip(listed, blocks, strict=True)
    ):
        raise PathwaysError(
            f"Allocation {name!r} returned {widths!r}; it has to be one width per FFN block, a "
            "whole number from 1 to d_ff."
        )
    return listed


def check_budget(
    name: str, widths: Sequence[int], blocks: Sequence[BlockCosts], budget: Budget
) -> None:
    """Check that widths are multiples, and that they and the bypass are within the budget.

    A block may keep all of its neurons, which need no bypass, and one whatever the budget.

    Raises:
        PathwaysError: They are not.
    """
    for width, block in zip(widths, blocks, strict=True):
        step = _step(block.d_ff, budget.multiple)
        if width != block.d_ff and width % step:
            raise PathwaysError(
                f"Allocation {name!r} returned the width {width}; it has to be a multiple of "
                f"{step}, or all {block.d_ff} neurons."
            )
    used = allowed = 0.0
    for width, block, extra in zip(widths, blocks, budget.overhead, strict=True):
        used += (width + extra * (width < block.d_ff)) * block.flops_per_neuron
        allowed += (max(1.0, budget.kept * block.d_ff) + 1e-5) * block.flops_per_neuron
    share = used / sum(block.d_ff * block.flops_per_neuron for block in blocks)
    if used > allowed:
        raise PathwaysError(
            f"Allocation {name!r} would keep {share:.1%} of the FFN FLOPs, bypass included; "
            f"sparsity {1.0 - budget.kept:.3g} allows {budget.kept:.1%}. Choose a sparsity of at "
            f"most {math.floor(1000.0 * (1.0 - share) + 1e-6) / 1000.0:.3g}, a smaller multiple "
            "or bypass, or an allocation of narrower widths."
        )


def _rounded(width: float, d_ff: int, multiple: int) -> int:
    """Round a width down to a multiple, but to at least one multiple (or one neuron)."""
    step = _step(d_ff, multiple)
    return min(d_ff, max(step, int(width + 1e-6) // step * step))


def _step(d_ff: int, multiple: int) -> int:
    return multiple if multiple <= d_ff else 1


def _room(d_ff: int, overhead: float, multiple: int) -> float:
    """Return the fraction of a block that can go if one multiple of neurons has to stay."""
    return 1.0 - (_step(d_ff, multiple) + overhead) / d_ff


def _hull(curve: Sequence[float], stops: Sequence[int]) -> list[tuple[int, int]]:
    """Return the segments ``(left, right)`` of a curve's lower convex hull over given places."""
    hull: list[int] = []
    for stop in stops:
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-1], stop):
            hull.pop()
        hull.append(stop)
    return list(pairwise(hull))


def _slope(curve: Sequence[float], left: int, right: int) -> float:
    return (curve[right] - curve[left]) / (right - left)
