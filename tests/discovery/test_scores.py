"""Each score is its formula, computed neuron by neuron."""

import math

import pytest
import torch

from hf_sparse_pathways.discovery.scores import (
    SCORES,
    ScoreInput,
    check_scores,
    resolve_score,
)
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from tests.discovery.profiles import statistics_of

D_FF, D_MODEL, TOKENS = 7, 5, 11
ACTIVATION = torch.randn(TOKENS, D_FF, generator=torch.Generator().manual_seed(0)).double()
DOWN = torch.randn(D_MODEL, D_FF, generator=torch.Generator().manual_seed(1))


def _given(seed=0):
    return ScoreInput(
        statistics=statistics_of(ACTIVATION),
        down=DOWN,
        generator=torch.Generator().manual_seed(seed),
    )


def _mean_abs(neuron):
    return sum(abs(ACTIVATION[t, neuron].item()) for t in range(TOKENS)) / TOKENS


def _wanda(neuron):
    square = sum(ACTIVATION[t, neuron].item() ** 2 for t in range(TOKENS)) / TOKENS
    norm = sum(DOWN[row, neuron].item() ** 2 for row in range(D_MODEL))
    return math.sqrt(square) * math.sqrt(norm)


FORMULAS = {"mean_abs": _mean_abs, "wanda": _wanda}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_formula(name):
    scores = SCORES[name](_given())
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx([FORMULAS[name](i) for i in range(D_FF)], rel=1e-12)


def test_every_score_is_tested_here():
    assert set(SCORES) == {*FORMULAS, "random"}


def test_random_is_seeded_noise():
    first, again, other = (SCORES["random"](_given(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (D_FF,)


@pytest.mark.parametrize("name", SCORES)
def test_scores_pass_their_own_check(name):
    assert torch.equal(check_scores(name, SCORES[name](_given()), D_FF), SCORES[name](_given()))


def test_scores_cannot_be_registered_by_accident():
    with pytest.raises(TypeError):
        SCORES["mine"] = SCORES["random"]


def test_names_and_functions_resolve():
    def mine(given):
        return given.statistics.mean

    assert resolve_score("wanda") == ("wanda", SCORES["wanda"])
    assert resolve_score(mine) == ("mine", mine)
    assert resolve_score(_Callable())[0]


class _Callable:
    def __call__(self, given):
        return given.statistics.mean


@pytest.mark.parametrize(("name", "hint"), [("wand", "wanda"), ("meanabs", "mean_abs")])
def test_a_typo_is_refused_with_a_hint(name, hint):
    with pytest.raises(UnknownNameError, match=rf"Did you mean '{hint}'\?"):
        resolve_score(name)


@pytest.mark.parametrize("name", ["zzz", "", 5, None])
def test_an_unknown_score_is_refused_with_those_that_exist(name):
    with pytest.raises(UnknownNameError, match="'mean_abs', 'wanda', 'random'"):
        resolve_score(name)


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(D_FF - 1),
        torch.zeros(1, D_FF),
        torch.zeros(()),
        [0.0] * D_FF,
        None,
        torch.tensor([0.0] * (D_FF - 1) + [float("nan")]),
    ],
    ids=["short", "two dimensions", "none", "list", "None", "NaN"],
)
def test_scores_that_do_not_fit_are_refused_by_name(scores):
    with pytest.raises(PathwaysError, match="'mine'"):
        check_scores("mine", scores, D_FF)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_scores_become_float64_without_a_gradient(dtype):
    given = torch.arange(D_FF).to(dtype)
    checked = check_scores("mine", given.requires_grad_(dtype.is_floating_point), D_FF)
    assert checked.dtype == torch.float64
    assert not checked.requires_grad
    assert checked.tolist() == list(range(D_FF))
