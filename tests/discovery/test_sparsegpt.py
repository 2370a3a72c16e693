"""SparseGPT against one that inverts anew at every column, and against masks without adjustment."""

import pytest
import torch

from hf_sparse_pathways.discovery.sparsegpt import (
    InverseFactor,
    Pattern,
    parse_pattern,
    prune_weights,
)
from hf_sparse_pathways.errors import PathwaysError


def _problem(d_in=24, d_out=10, seed=0, dtype=torch.float64):
    """Return a weight and the second moments of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    x *= torch.rand(d_in, generator=generator, dtype=torch.float64) * 3
    return torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype), x.T @ x


def _loss(weight, pruned, gram):
    difference = (pruned - weight).double()
    return float((difference @ gram @ difference.T).trace())


def _naive(weight, gram, pattern, block, damping):
    """Solve for the columns to the right anew at every column, by the definition of OBS."""
    weight = weight.clone()
    rows, columns = weight.shape
    moments = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for column in range(columns):
        left = torch.linalg.inv(moments[column:, column:])
        width = block if pattern.group == 1 else pattern.group
        if column % width == 0:
            own = range(column, min(column + width, columns))
            inverses = [torch.linalg.inv(moments[c:, c:])[0, 0] for c in own]
            cost = weight[:, own.start : own.stop].square() / torch.stack(inverses)
            if pattern.group == 1:
                before, after = (
                    round(pattern.sparsity * rows * end) for end in (own.start, own.stop)
                )
                for index in cost.flatten().argsort()[: after - before].tolist():
                    gone[index // len(own), own.start + index % len(own)] = True
            else:
                for row in range(rows):
                    cheapest = cost[row].argsort()[: pattern.group - pattern.kept]
                    gone[row, own.start + cheapest] = True
        factor = torch.where(gone[:, column], weight[:, column], 0) / left[0, 0]
        weight[:, column:] -= factor[:, None] * left[0]
        weight[gone[:, column], column] = 0.0
    return weight


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.7), Pattern(0.5, 4), Pattern(0.75, 4)])
@pytest.mark.parametrize("block", [1, 4, 8, 12, 128])
def test_equals_obs_that_inverts_at_every_column(pattern, block):
    weight, gram = _problem()
    found = prune_weights(weight, InverseFactor.of(gram), pattern, block=block)
    expected = _naive(weight, gram, pattern, block, 0.01)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("columns", [24, 130, 257])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.99])
def test_exactly_so_many_go(columns, sparsity):
    weight, gram = _problem(columns, 7, dtype=torch.float32)
    pruned = prune_weights(weight, InverseFactor.of(gram), Pattern(sparsity))
    assert int((pruned == 0).sum()) == round(sparsity * weight.numel())
    assert pruned.dtype == torch.float32


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_every_group_keeps_its_number(pattern):
    kept, group = map(int, pattern.split(":"))
    weight, gram = _problem(264, 5, dtype=torch.float32)
    asked = parse_pattern(pattern, 1 - kept / group)
    assert str(asked) == pattern
    pruned = prune_weights(weight, InverseFactor.of(gram), asked, block=100)
    assert bool(((pruned.view(5, -1, group) != 0).sum(-1) == kept).all())


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.7), Pattern(0.5, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_loses_less_than_masks_without_adjustment(pattern, seed):
    weight, gram = _problem(96, 40, seed)
    found = _loss(weight, prune_weights(weight, InverseFactor.of(gram), pattern), gram)
    for score in (weight.abs(), weight.abs() * gram.diagonal().sqrt()):
        groups = score.view(40, -1, 96 if pattern.group == 1 else pattern.group)
        count = round(pattern.sparsity * groups.shape[-1])
        gone = torch.zeros_like(groups, dtype=torch.bool)
        gone.scatter_(-1, groups.topk(count, largest=False).indices, True)
        assert found < _loss(weight, weight.masked_fill(gone.view_as(weight), 0), gram)


def test_single_precision_suffices():
    weight, gram = _problem(200, 30)
    exact, single = (
        _loss(weight, prune_weights(w, InverseFactor.of(gram), Pattern(0.5)), gram)
        for w in (weight, weight.float())
    )
    assert single == pytest.approx(exact, rel=1e-3)


def test_nothing_goes_at_sparsity_zero():
    weight, gram = _problem(dtype=torch.bfloat16)
    gram[3], gram[:, 3] = 0, 0
    pruned = prune_weights(weight, InverseFactor.of(gram), Pattern(0.0))
    assert torch.equal(pruned, weight.float())


def test_weights_of_dead_inputs_go_first_and_change_nothing():
    weight, gram = _problem(24, 10)
    dead = [2, 3, 9, 17]
    gram[dead], gram[:, dead] = 0, 0
    pruned = prune_weights(weight, InverseFactor.of(gram), Pattern(4 / 24))
    assert torch.equal(pruned[:, dead], torch.zeros(10, 4, dtype=torch.float64))
    assert _loss(weight, pruned, gram) == 0
    none = prune_weights(weight, InverseFactor.of(torch.zeros_like(gram)), Pattern(0.5))
    assert int((none == 0).sum()) == 120


def test_inputs_that_are_the_same_are_damped():
    weight, gram = _problem(24, 10)
    gram = torch.ones_like(gram)
    pruned = prune_weights(weight, InverseFactor.of(gram), Pattern(0.5))
    assert bool(pruned.isfinite().all())
    assert _loss(weight, pruned, gram) < 0.01 * _loss(weight, torch.zeros_like(weight), gram)


def test_arguments_stay_as_they_are():
    weight, gram = _problem()
    before = weight.clone(), gram.clone()
    prune_weights(weight, InverseFactor.of(gram), Pattern(0.5))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize(
    ("pattern", "sparsity", "told"),
    [
        ("2:4", 0.7, r"removes 0\.5 .* not 0\.7: choose sparsity=0\.5"),
        ("4:2", 0.5, "There is no pattern '4:2'"),
        ("sparse", 0.5, "'unstructured', or 'N:M'"),
        ("unstructured", 1.0, r"in \[0, 1\)"),
        ("unstructured", [0.5, 0.5], "one sparsity for all"),
        ("unstructured", float("nan"), r"in \[0, 1\)"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern, sparsity, told):
    with pytest.raises(PathwaysError, match=told):
        parse_pattern(pattern, sparsity)


def test_columns_that_are_no_whole_groups_are_refused():
    weight, gram = _problem(22)
    with pytest.raises(PathwaysError, match="a multiple of 4 columns, but a weight has 22"):
        prune_weights(weight, InverseFactor.of(gram), parse_pattern("2:4", 0.5))
