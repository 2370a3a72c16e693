"""The percentile rule against counting, and against numpy."""

import math
from fractions import Fraction

import numpy
import pytest
import torch

from hf_sparse_pathways.discovery.percentile import check_percentile, keep_above
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError


@pytest.mark.parametrize("percentile", range(100))
def test_a_percentile_removes_that_many_of_a_hundred(percentile):
    scores = torch.randperm(100, generator=torch.Generator().manual_seed(0)).double()
    assert int((~keep_above([scores], percentile, "layer")[0]).sum()) == percentile


@pytest.mark.parametrize("count", [1000, 1001])
@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_percentiles_are_those_of_numpy(percentile, count):
    scores = torch.rand(count, generator=torch.Generator().manual_seed(0)).double()
    threshold = numpy.percentile(scores.numpy(), percentile, method="inverted_cdf")
    kept = keep_above([scores], percentile, "layer")[0]
    assert kept.tolist() == (scores.numpy() > threshold).tolist()


@pytest.mark.parametrize("percentile", [0, 12.5, 50, 87, 99.9])
def test_blocks_of_different_widths_are_pooled_neuron_by_neuron(percentile):
    generator = torch.Generator().manual_seed(1)
    blocks = [torch.rand(width, generator=generator).double() for width in (3, 17, 8)]
    everything = sorted(torch.cat(blocks).tolist())
    below = math.ceil(Fraction(percentile) * len(everything) / 100)
    threshold = everything[min(below, len(everything) - 1)]
    naive = [[v >= threshold or v == max(b.tolist()) for v in b.tolist()] for b in blocks]
    assert [mask.tolist() for mask in keep_above(blocks, percentile, "model")] == naive


def test_a_block_of_low_scores_keeps_its_best_neuron():
    low, high = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([5.0, 6.0, 7.0])
    masks = keep_above([low, high], 50, "model")
    assert [mask.tolist() for mask in masks] == [[False, True, False], [True] * 3]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_ties_are_all_kept(count):
    assert keep_above([torch.zeros(count)], 50, "layer")[0].tolist() == [True] * count


def test_what_is_out_of_range_is_refused():
    for percentile in (-1, 100, float("nan"), "50"):
        with pytest.raises(PathwaysError, match="percentile"):
            check_percentile(percentile, "layer")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'layer'\?"):
        check_percentile(50, "layr")
