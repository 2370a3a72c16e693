"""Allocations keep their budget, and water-filling is the best that keeps it."""

import itertools

import pytest
import torch

from hf_sparse_pathways.discovery.allocation import (
    ALLOCATIONS,
    BlockCosts,
    Budget,
    allocate,
    check_multiple,
    check_widths,
    resolve_allocation,
)
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError

SHAPES = {
    "one": [(48, 96)],
    "equal": [(48, 96)] * 5,
    "odd": [(37, 64), (101, 64), (13, 64)],
    "several costs": [(48, 96), (24, 33), (60, 64), (15, 200)],
    "many": [(100, 30)] * 30,
}


def _curve(d_ff, generator, *, convex=True):
    """Return an error curve that rises from 0."""
    rises = torch.rand(d_ff, generator=generator, dtype=torch.float64)
    if convex:
        rises = rises.sort().values
    return torch.cat([torch.zeros(1, dtype=torch.float64), rises.cumsum(0)])


def _blocks(shapes, seed=0, *, convex=True):
    generator = torch.Generator().manual_seed(seed)
    return [
        BlockCosts(d_ff=d_ff, flops_per_neuron=cost, error=_curve(d_ff, generator, convex=convex))
        for d_ff, cost in shapes
    ]


def _budget(blocks, kept, multiple=1, overhead=0.0):
    return Budget(kept=kept, multiple=multiple, overhead=(overhead,) * len(blocks))


def _flops(blocks, widths, budget):
    parts = zip(blocks, widths, budget.overhead, strict=True)
    return sum((width + extra) * block.flops_per_neuron for block, width, extra in parts)


def _allowed(blocks, budget):
    return budget.kept * sum(block.d_ff * block.flops_per_neuron for block in blocks)


def _error(blocks, widths):
    pairs = zip(blocks, widths, strict=True)
    return sum(float(block.error[block.d_ff - width]) for block, width in pairs)


@pytest.mark.parametrize("overhead", [0.0, 1.3])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("kept", [0.99, 0.75, 0.7, 0.5, 1 / 3])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_budget_is_used_and_never_exceeded(name, kind, kept, multiple, overhead):
    blocks = _blocks(SHAPES[kind], convex=False)
    budget = _budget(blocks, kept, multiple, overhead)
    widths = ALLOCATIONS[name](blocks, budget)
    assert check_widths(name, widths, blocks) == widths
    spare = _allowed(blocks, budget) - _flops(blocks, widths, budget)
    assert spare >= -1e-3
    largest = [multiple * block.flops_per_neuron for block in blocks]
    slack = max(largest) if name == "water_filling" else sum(largest)
    ends = sum(  # what is left over where widths are no multiple of anything
        (block.d_ff % multiple) * block.flops_per_neuron for block in blocks
    )
    assert spare <= slack + ends + 1e-3


@pytest.mark.parametrize("kept", [0.1, 0.05, 0.02])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_small_budget_is_not_exceeded(name, kept):
    blocks = _blocks([(100, 30)] * 10)
    budget = _budget(blocks, kept)
    widths = ALLOCATIONS[name](blocks, budget)
    assert _flops(blocks, widths, budget) <= _allowed(blocks, budget) + 1e-3


@pytest.mark.parametrize("multiple", [1, 3, 8, 16, 48, 64])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_widths_are_multiples_where_they_can_be(name, multiple):
    blocks = _blocks([(48, 96), (96, 96), (33, 96)])
    widths = ALLOCATIONS[name](blocks, _budget(blocks, 0.6, multiple))
    for width, block in zip(widths, blocks, strict=True):
        assert 1 <= width <= block.d_ff
        assert multiple >= block.d_ff or width % multiple == 0


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_whole_budget_keeps_everything(name, kind):
    blocks = _blocks(SHAPES[kind])
    assert ALLOCATIONS[name](blocks, _budget(blocks, 1.0)) == [block.d_ff for block in blocks]


@pytest.mark.parametrize("kept", [0.1 * tenths for tenths in range(1, 10)])
@pytest.mark.parametrize("name", ["uniform", "water_filling", "balanced"])
def test_a_budget_of_whole_neurons_is_met_exactly(name, kept):
    blocks = _blocks([(100, 96)] * 10)
    assert sum(ALLOCATIONS[name](blocks, _budget(blocks, kept))) == round(1000 * kept)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_more_budget_never_takes_neurons_away(name):
    blocks = _blocks(SHAPES["several costs"], convex=False)
    budgets = [_budget(blocks, kept / 20) for kept in range(3, 21)]
    widths = [sum(ALLOCATIONS[name](blocks, budget)) for budget in budgets]
    assert widths == sorted(widths)


def test_uniform_is_the_same_fraction():
    blocks = _blocks([(48, 96), (24, 33), (100, 64)])
    assert ALLOCATIONS["uniform"](blocks, _budget(blocks, 0.5)) == [24, 12, 50]
    assert ALLOCATIONS["uniform"](blocks, _budget(blocks, 0.5, 16)) == [16, 16, 48]
    assert ALLOCATIONS["uniform"](blocks, _budget(blocks, 0.5, 1, 2.5)) == [21, 9, 47]
    assert ALLOCATIONS["uniform"](blocks, _budget(blocks, 0.01)) == [1, 1, 1]


def test_depth_protects_the_ends():
    blocks = _blocks([(100, 30)] * 20)
    widths = ALLOCATIONS["depth"](blocks, _budget(blocks, 0.6))
    assert widths == [100, 100, *[50] * 16, 100, 100]
    widths = ALLOCATIONS["depth"](blocks, _budget(blocks, 0.2))
    assert widths[2:18] == [10] * 16
    assert widths[:2] == widths[18:] == [60, 60]


@pytest.mark.parametrize("count", [1, 2])
def test_depth_has_no_ends_to_protect_in_a_shallow_model(count):
    blocks = _blocks([(100, 30)] * count)
    assert ALLOCATIONS["depth"](blocks, _budget(blocks, 0.4)) == [40] * count


def _best(blocks, budget, multiple=1):
    """Return the least error of all widths within the budget."""
    choices = [range(multiple, block.d_ff + 1, multiple) for block in blocks]
    allowed = _allowed(blocks, budget) + 1e-6
    fitting = (w for w in itertools.product(*choices) if _flops(blocks, w, budget) <= allowed)
    return min(_error(blocks, widths) for widths in fitting)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kept", [0.9, 0.61, 0.5, 0.3])
def test_water_filling_is_best_for_convex_curves(kept, seed):
    blocks = _blocks([(10, 5), (12, 5), (9, 5)], seed)
    budget = _budget(blocks, kept)
    widths = ALLOCATIONS["water_filling"](blocks, budget)
    assert _error(blocks, widths) == pytest.approx(_best(blocks, budget), abs=1e-12)


@pytest.mark.parametrize("kept", [0.75, 0.5])
def test_water_filling_is_best_in_multiples(kept):
    blocks = _blocks([(12, 5), (16, 5), (8, 5)], 3)
    budget = _budget(blocks, kept, 4)
    widths = ALLOCATIONS["water_filling"](blocks, budget)
    assert _error(blocks, widths) == pytest.approx(_best(blocks, budget, 4), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_water_filling_is_best_up_to_one_neuron_if_costs_differ(seed):
    blocks = _blocks([(10, 3), (12, 7), (8, 5)], seed)
    budget = _budget(blocks, 0.5)
    error = _error(blocks, ALLOCATIONS["water_filling"](blocks, budget))
    assert error <= _best(blocks, budget) + max(float(b.error.diff().max()) for b in blocks)


def test_water_filling_is_not_caught_behind_a_step():
    """A block whose first removal is dear but whose others are free has to be seen as a whole."""
    step = torch.tensor([0.0, *[3.0] * 10]).double()
    steady = torch.arange(11).double()
    blocks = [BlockCosts(d_ff=10, flops_per_neuron=1, error=error) for error in (step, steady)]
    assert ALLOCATIONS["water_filling"](blocks, _budget(blocks, 0.6)) == [2, 10]


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("kept", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("kind", SHAPES)
def test_balanced_is_half_way(kind, kept, multiple):
    blocks = _blocks(SHAPES[kind])
    budget = _budget(blocks, kept, multiple)
    ends = [ALLOCATIONS[name](blocks, budget) for name in ("uniform", "water_filling")]
    widths = ALLOCATIONS["balanced"](blocks, budget)
    for width, pair in zip(widths, zip(*ends, strict=True), strict=True):
        assert abs(width - sum(pair) / 2) < multiple


def test_water_filling_takes_from_the_cheapest_per_flop():
    rises = torch.arange(11).double()
    blocks = [BlockCosts(d_ff=10, flops_per_neuron=cost, error=rises) for cost in (1, 3)]
    assert ALLOCATIONS["water_filling"](blocks, _budget(blocks, 0.775)) == [10, 7]


def test_water_filling_leaves_a_tenth_of_each_block():
    blocks = _blocks([(100, 1), (100, 1)])
    free = BlockCosts(d_ff=100, flops_per_neuron=1, error=torch.zeros(101).double())
    assert ALLOCATIONS["water_filling"]([free, blocks[0]], _budget(blocks, 0.55)) == [10, 100]


def test_flat_curves_are_filled_too():
    free = [BlockCosts(d_ff=20, flops_per_neuron=2, error=torch.zeros(21).double())] * 3
    assert sum(ALLOCATIONS["water_filling"](free, _budget(free, 0.5))) == 30


def test_names_and_functions_resolve():
    def mine(blocks, budget):  # noqa: ARG001
        return [1]

    assert resolve_allocation("uniform") == ("uniform", ALLOCATIONS["uniform"])
    assert resolve_allocation(mine) == ("mine", mine)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'water_filling'\?"):
        resolve_allocation("waterfilling")


BAD_WIDTHS = {
    "too few": [5, 5],
    "too many": [5] * 4,
    "none": [],
    "zero": [5, 0, 5],
    "negative": [5, -1, 5],
    "too wide": [5, 13, 5],
    "NaN": [5, float("nan"), 5],
    "fraction": [5, 2.5, 5],
    "None": None,
    "None inside": [5, None, 5],
    "text": "abc",
    "a number": 5,
}


@pytest.mark.parametrize("kind", BAD_WIDTHS)
def test_widths_that_do_not_fit_are_refused_by_name(kind):
    blocks = _blocks([(12, 5)] * 3)
    with pytest.raises(PathwaysError, match=r"'mine'.*one width per FFN block"):
        check_widths("mine", BAD_WIDTHS[kind], blocks)


@pytest.mark.parametrize("wrap", [tuple, torch.tensor, lambda w: [float(x) for x in w]])
def test_widths_in_any_container_are_taken(wrap):
    widths = check_widths("mine", wrap([1, 12, 5]), _blocks([(12, 5)] * 3))
    assert widths == [1, 12, 5]
    assert all(type(width) is int for width in widths)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_multiples_too_coarse_for_the_budget_are_refused_with_what_fits(name):
    blocks = _blocks([(160, 96)] * 3)
    with pytest.raises(PathwaysError, match=r"80\.0%.*0\.5 allows 50\.0%.*at most 0\.2, a small"):
        allocate(name, blocks, _budget(blocks, 0.5, 128))
    assert allocate(name, blocks, _budget(blocks, 0.8, 128)) == [128] * 3
    with pytest.raises(PathwaysError, match=r"bypass included.*at most 0\.15"):
        allocate(name, blocks, _budget(blocks, 0.8, 128, overhead=8))


@pytest.mark.parametrize(
    "widths",
    [[48, 96, 33], [24, 48, 17], [25, 48, 17], [48, 40, 1]],
    ids=["everything", "one more", "two more", "unequal"],
)
def test_widths_above_the_budget_are_refused(widths):
    blocks = _blocks([(48, 96), (96, 96), (33, 96)])
    with pytest.raises(PathwaysError, match=r"'<lambda>' would keep .*narrower widths"):
        allocate(lambda *_: widths, blocks, _budget(blocks, 0.5))
    fitting = [24, 48, 16]
    assert allocate(lambda *_: fitting, blocks, _budget(blocks, 0.5)) == fitting


def test_a_bypass_counts_in_a_users_widths_but_not_where_nothing_is_removed():
    blocks = _blocks([(100, 96)] * 2)
    budget = _budget(blocks, 0.75, overhead=10)
    for widths in ([65, 65], [100, 40]):
        assert allocate(lambda *_, w=widths: w, blocks, budget) == widths
    for widths in ([66, 65], [100, 41]):
        with pytest.raises(PathwaysError, match="bypass included"):
            allocate(lambda *_, w=widths: w, blocks, budget)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_one_neuron_per_block_is_always_allowed(name):
    blocks = _blocks([(10, 96), (20, 30)])
    assert allocate(name, blocks, _budget(blocks, 0.001)) == [1, 1]
    with pytest.raises(PathwaysError, match="narrower widths"):
        allocate(lambda *_: [1, 2], blocks, _budget(blocks, 0.001))


def test_a_users_widths_have_to_be_multiples_or_everything():
    blocks = _blocks([(160, 96)] * 2)
    budget = _budget(blocks, 0.75, 16)
    for widths in ([16, 160], [80, 160], [112, 128]):
        assert allocate(lambda *_, w=widths: w, blocks, budget) == widths
    with pytest.raises(PathwaysError, match=r"width 77; .* multiple of 16, or all 160"):
        allocate(lambda *_: [80, 77], blocks, budget)


@pytest.mark.parametrize("multiple", [1, 33, 96])
def test_a_multiple_above_the_widest_block_is_refused(multiple):
    check_multiple(multiple, [48, 96, 33])
    with pytest.raises(PathwaysError, match=r"multiple 97 .* 96 neurons"):
        check_multiple(97, [48, 96, 33])


@pytest.mark.parametrize("kept", [0.9, 0.6, 0.5, 0.4, 0.34])
@pytest.mark.parametrize(("multiple", "overhead"), [(1, 30.0), (32, 0.0), (16, 11.0)])
@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_what_leaves_room_for_a_multiple_and_the_bypass_fits(name, count, multiple, overhead, kept):
    blocks = _blocks([(100, 96)] * count)
    assert multiple + overhead <= kept * 100
    allocate(name, blocks, _budget(blocks, kept, multiple, overhead))
