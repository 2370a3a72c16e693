"""Each score is its formula, computed neuron by neuron."""

import math
from dataclasses import replace

import pytest
import torch

from hf_sparse_pathways.discovery.recipe import resolve_method
from hf_sparse_pathways.discovery.scores import (
    NEED_SALIENCY,
    SCORES,
    Saliency,
    ScoreInput,
    check_scores,
)
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from tests.discovery.profiles import statistics_of

D_FF, D_MODEL, TOKENS, DOMAINS, BRANCHES = 7, 5, 11, 3, 2


def _drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ACTIVATION = _drawn(0, TOKENS, D_FF).double()
DOWN = _drawn(1, D_MODEL, D_FF)
INCOMING = _drawn(2, BRANCHES, D_FF, D_MODEL)
GRADIENT = _drawn(3, TOKENS, D_FF).double()
OTHERS = _drawn(4, DOMAINS - 1, D_FF).double().sigmoid()


def _given(seed=0, **others):
    statistics = statistics_of(ACTIVATION)
    effect = GRADIENT * ACTIVATION
    everything = {
        "incoming": INCOMING,
        "positive_by_domain": torch.cat([statistics.positive_fraction[None], OTHERS]),
        "saliency": Saliency(signed=effect.sum(0), absolute=effect.abs().sum(0)),
    }
    return ScoreInput(
        statistics=statistics,
        down=DOWN,
        generator=torch.Generator().manual_seed(seed),
        **{**everything, **others},
    )


def _values(neuron):
    return ACTIVATION[:, neuron].tolist()


def _mean(values):
    return sum(values) / len(values)


def _norm(values):
    return math.sqrt(sum(value * value for value in values))


def _mean_abs(neuron):
    return _mean([abs(value) for value in _values(neuron)])


def _wanda(neuron):
    square = _mean([value**2 for value in _values(neuron)])
    return math.sqrt(square) * _norm(DOWN[:, neuron].tolist())


def _flap(neuron):
    mean = _mean(_values(neuron))
    variance = _mean([(value - mean) ** 2 for value in _values(neuron)])
    return variance * _norm(DOWN[:, neuron].tolist()) ** 2


def _magnitude(neuron):
    rows = [_norm(INCOMING[branch, neuron].tolist()) for branch in range(BRANCHES)]
    return math.prod(rows) * _norm(DOWN[:, neuron].tolist())


def _griffin(neuron):
    shares = [ACTIVATION[t, neuron].item() / _norm(ACTIVATION[t].tolist()) for t in range(TOKENS)]
    return _norm(shares)


def _lape(neuron):
    own = sum(value > 0 for value in _values(neuron)) / TOKENS
    firing = [own, *OTHERS[:, neuron].tolist()]
    shares = [rate / sum(firing) for rate in firing]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return own * (1 - entropy / math.log(DOMAINS))


def _taylor(neuron):
    return sum(abs((GRADIENT * ACTIVATION)[t, neuron].item()) for t in range(TOKENS))


def _taylor_signed(neuron):
    return -sum((GRADIENT * ACTIVATION)[t, neuron].item() for t in range(TOKENS))


FORMULAS = {
    "mean_abs": _mean_abs,
    "wanda": _wanda,
    "flap": _flap,
    "magnitude": _magnitude,
    "griffin": _griffin,
    "lape": _lape,
    "taylor": _taylor,
    "taylor_signed": _taylor_signed,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_formula(name):
    scores = SCORES[name](_given())
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx([FORMULAS[name](i) for i in range(D_FF)], rel=1e-9)


def test_every_score_is_tested_here():
    assert set(SCORES) == {*FORMULAS, "random"}


@pytest.mark.parametrize("domains", [None, torch.zeros(1, D_FF).double()])
def test_lape_with_nothing_to_compare_is_how_often_a_neuron_fires(domains):
    scores = SCORES["lape"](_given(positive_by_domain=domains))
    assert torch.equal(scores, (ACTIVATION > 0).double().mean(0))


def test_lape_is_nothing_for_a_neuron_that_never_fires():
    dead = torch.zeros(DOMAINS, D_FF).double()
    silent = statistics_of(-ACTIVATION.abs())
    given = replace(_given(positive_by_domain=dead), statistics=silent)
    assert SCORES["lape"](given).tolist() == [0.0] * D_FF


def test_lape_prefers_a_neuron_of_this_domain_alone():
    firing = torch.tensor([[0.5] * D_FF, [0.5] * D_FF]).double()
    firing[1, 3] = 0.0
    always = statistics_of(ACTIVATION.abs())
    scores = SCORES["lape"](replace(_given(positive_by_domain=firing), statistics=always))
    assert scores.argmax() == 3
    assert scores[3] == pytest.approx(1.0)
    assert scores[[0, 1, 2, 4, 5, 6]].abs().max() < 1e-12


def test_flap_is_nothing_for_a_constant_neuron():
    constant = statistics_of(torch.full((TOKENS, D_FF), 0.1).double())
    assert (SCORES["flap"](replace(_given(), statistics=constant)) <= 1e-15).all()


def test_magnitude_without_incoming_weights_is_the_columns_norm():
    columns = [_norm(DOWN[:, neuron].tolist()) for neuron in range(D_FF)]
    assert SCORES["magnitude"](_given(incoming=None)).tolist() == pytest.approx(columns)


def test_scores_from_the_loss_say_so_when_it_is_missing():
    assert {SCORES["taylor"], SCORES["taylor_signed"]} == NEED_SALIENCY
    for score in NEED_SALIENCY:
        with pytest.raises(PathwaysError, match="gradients"):
            score(_given(saliency=None))


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

    assert resolve_method("wanda") == ("wanda", SCORES["wanda"])
    assert resolve_method(mine) == ("mine", mine)
    assert resolve_method(_Callable())[0]


class _Callable:
    def __call__(self, given):
        return given.statistics.mean


@pytest.mark.parametrize(("name", "hint"), [("wand", "wanda"), ("meanabs", "mean_abs")])
def test_a_typo_is_refused_with_a_hint(name, hint):
    with pytest.raises(UnknownNameError, match=rf"Did you mean '{hint}'\?"):
        resolve_method(name)


@pytest.mark.parametrize("name", ["zzz", "", 5, None])
def test_an_unknown_score_is_refused_with_those_that_exist(name):
    with pytest.raises(UnknownNameError, match=", ".join(f"'{known}'" for known in SCORES)):
        resolve_method(name)


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(D_FF - 1),
        torch.zeros(1, D_FF),
        torch.zeros(()),
        [0.0] * D_FF,
        None,
        torch.tensor([0.0] * (D_FF - 1) + [float("nan")]),
        torch.tensor([0.0] * (D_FF - 1) + [math.inf]),
        torch.tensor([-math.inf] + [0.0] * (D_FF - 1)),
    ],
    ids=["short", "two dimensions", "none", "list", "None", "NaN", "infinity", "minus infinity"],
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
