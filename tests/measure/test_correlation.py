"""Coefficients against numpy, intervals against Fisher's formula, and few points said plainly."""

import math
import random

import numpy
import pytest

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.correlation import correlate, rank


def _pairs(n, seed=0, ties=False):
    chance = random.Random(seed)
    x = [chance.gauss(0, 1) for _ in range(n)]
    y = [0.6 * a + chance.gauss(0, 1) for a in x]
    if ties:
        x, y = [float(round(a)) for a in x], [float(round(a)) for a in y]
    return x, y


def _naive_rank(values):
    return [
        1 + sum(other < value for other in values) + (values.count(value) - 1) / 2
        for value in values
    ]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [4, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_coefficients_are_those_of_numpy(n, seed, ties):
    x, y = _pairs(n, seed, ties)
    assert rank(x) == _naive_rank(x)
    pearson, spearman = correlate(x, y)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert pearson.value == pytest.approx(numpy.corrcoef(x, y)[0, 1])
        expected = numpy.corrcoef(_naive_rank(x), _naive_rank(y))[0, 1]
        assert spearman.value == pytest.approx(expected)
    assert (pearson.n, spearman.n) == (n, n)


def test_many_points_take_as_many_sums_as_few(monkeypatch):
    """An analysis has one point for every row of every incoming leaf: hundreds of thousands."""
    sums, counts = math.fsum, []

    def count(values):
        counts[-1] += 1
        return sums(values)

    monkeypatch.setattr(math, "fsum", count)
    for n in (10, 1000):
        counts.append(0)
        correlate(*_pairs(n))
    assert counts[0] == counts[1] > 0


def test_intervals_are_fishers():
    pearson, spearman = correlate(*_pairs(28))
    for found, spread in ((pearson, 1.0), (spearman, 1.0 + spearman.value**2 / 2)):
        half = 1.959964 * math.sqrt(spread / 25)
        low, high = (math.tanh(math.atanh(found.value) + side * half) for side in (-1, 1))
        assert found.interval == pytest.approx((low, high), abs=1e-6)
        assert low < found.value < high
        assert "n = 28" in str(found)
        assert f"{low:.2f} to {high:.2f}" in str(found)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = numpy.random.default_rng(0)
    covered = 0
    for _ in range(600):
        x = generator.normal(size=12)
        y = 0.5 * x + math.sqrt(0.75) * generator.normal(size=12)
        low, high = correlate(x.tolist(), y.tolist())[0].interval
        covered += low <= 0.5 <= high
    assert 0.92 < covered / 600 < 0.98


@pytest.mark.parametrize("n", [0, 1])
def test_no_line_through_one_point(n):
    for found in correlate([1.0] * n, [2.0] * n):
        assert (found.value, found.interval, found.n) == (None, None, n)
        assert "undefined" in found.caveat


@pytest.mark.parametrize("n", [2, 3])
def test_below_four_points_there_is_no_interval(n):
    for found in correlate(*_pairs(n)):
        assert found.value is not None
        assert found.interval is None
        assert "says nothing" in found.caveat
        assert f"n = {n}" in found.caveat


def test_few_points_and_wide_intervals_are_called_so():
    pearson, spearman = correlate([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 3.5])
    for found in (pearson, spearman):
        assert "n = 5 is too small" in found.caveat
        assert "holds 0" in found.caveat
    strong = correlate([float(i) for i in range(50)], [i + (i % 3) * 0.1 for i in range(50)])
    assert strong[0].caveat == ""


def test_points_on_a_line_have_no_interval_instead_of_a_point():
    pearson, spearman = correlate([1.0, 2.0, 3.0, 5.0], [-1.0, -2.0, -3.0, -5.0])
    for found in (pearson, spearman):
        assert found.value == pytest.approx(-1.0)
        assert found.interval is None
        assert "on a line" in found.caveat


def test_a_side_that_does_not_vary_has_no_correlation():
    found = correlate([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert [c.value for c in found] == [None, None]
    assert str(found[0]) == "Pearson -, n = 5"


@pytest.mark.parametrize(
    ("x", "y", "part"),
    [([1.0], [1.0, 2.0], "paired"), ([1.0, math.nan], [1.0, 2.0], "finite")],
)
def test_wrong_figures_are_refused(x, y, part):
    with pytest.raises(PathwaysError, match=part):
        correlate(x, y)
