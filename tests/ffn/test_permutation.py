"""Orders of neurons: as few runs as there can be, and nothing but an order."""

import itertools

import pytest
import torch

from hf_sparse_pathways.ffn.permutation import _improve, _length, order_neurons
from hf_sparse_pathways.ffn.runs import find_runs


def _masks(domains, d_ff, seed=0, keep=0.5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(d_ff, generator=generator) < keep for _ in range(domains)]


def _runs(masks, order):
    return [len(find_runs(mask[order])) for mask in masks]


@pytest.mark.parametrize("text", ["", "0", "1", "0110", "1011", "11100", "0101"])
def test_runs_are_those_of_the_written_mask(text):
    found = find_runs(torch.tensor([c == "1" for c in text], dtype=torch.bool))
    expected = []
    for bit, members in itertools.groupby(range(len(text)), key=lambda i: text[i]):
        places = list(members)
        if bit == "1":
            expected.append((places[0], places[-1] + 1))
    assert list(found) == expected


@pytest.mark.parametrize("domains", [1, 2, 3, 5, 11, 40])
def test_it_is_an_order_that_keeps_groups_together(domains):
    masks = _masks(domains, 300)
    order = order_neurons(masks)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(300))
    groups = torch.stack(masks, 1)[order].tolist()
    seen = [tuple(key) for key, _ in itertools.groupby(groups)]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_up_to_two_domains_have_one_run_each(domains, keep):
    masks = _masks(domains, 200, keep=keep)
    assert _runs(masks, order_neurons(masks)) == [1] * domains


@pytest.mark.parametrize("domains", [3, 4, 5])
def test_where_all_combinations_occur_each_step_changes_one_domain(domains):
    masks = _masks(domains, 4000)
    assert sum(_runs(masks, order_neurons(masks))) == 2 ** (domains - 1)


@pytest.mark.parametrize("seed", range(12))
def test_few_groups_are_solved_exactly(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.unique(torch.rand(6, 5, generator=generator) < 0.5, dim=0)
    masks = [*groups.repeat_interleave(3, 0).T]
    fewest = min(
        sum(len(find_runs(row)) for row in groups[list(order)].T)
        for order in itertools.permutations(range(len(groups)))
    )
    assert sum(_runs(masks, order_neurons(masks))) == fewest


def test_many_groups_have_far_fewer_runs_than_before():
    masks = _masks(9, 120)
    before = sum(len(find_runs(mask)) for mask in masks)
    assert sum(_runs(masks, order_neurons(masks))) < before * 0.75


def test_improvement_never_makes_a_trip_longer_and_stays_a_trip():
    points = torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    distances = (points[:, None] != points[None]).sum(2).numpy()
    start = torch.arange(40).numpy()
    found = _improve(start, distances)
    assert found[0] == 0
    assert sorted(found.tolist()) == list(range(40))
    assert _length(found, distances) < _length(start, distances)


def test_domains_take_turns():
    masks = _masks(4, 4000)
    runs = [_runs(masks, order_neurons(masks, turn)) for turn in range(4)]
    assert {sum(one) for one in runs} == {8}
    assert len({sum(column) for column in zip(*runs, strict=True)}) == 1


def test_neurons_of_a_group_keep_their_order_and_none_come_last():
    masks = [torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.bool)]
    assert order_neurons(masks).tolist() == [1, 3, 4, 0, 2, 5]
    nothing = [torch.zeros(4, dtype=torch.bool)]
    assert order_neurons(nothing).tolist() == [0, 1, 2, 3]
