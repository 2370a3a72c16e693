"""The bootstrap against a plain one."""

import math
import random

import pytest

from hf_sparse_pathways.measure.fidelity import resampled_ratio


def _naive(differences, tokens, samples=20000):
    chance = random.Random(0)
    ratios = []
    for _ in range(samples):
        drawn = [chance.randrange(len(tokens)) for _ in tokens]
        ratios.append(math.exp(sum(differences[i] for i in drawn) / sum(tokens[i] for i in drawn)))
    ratios.sort()
    return ratios[int(0.025 * samples)], ratios[int(0.975 * samples)]


def test_the_interval_is_that_of_resampled_documents():
    chance = random.Random(1)
    tokens = [chance.randrange(20, 500) for _ in range(30)]
    differences = [count * chance.gauss(0.2, 0.1) for count in tokens]
    found = resampled_ratio(differences, tokens, seed=0, samples=20000)
    assert found == pytest.approx(_naive(differences, tokens), abs=0.01)
    assert found == resampled_ratio(differences, tokens, seed=0, samples=20000)
    assert found != resampled_ratio(differences, tokens, seed=1, samples=20000)


def test_equal_documents_leave_no_doubt():
    assert resampled_ratio([10.0, 20.0], [100, 200], seed=0) == pytest.approx([math.exp(0.1)] * 2)
    assert resampled_ratio([10.0], [100], seed=0) is None
