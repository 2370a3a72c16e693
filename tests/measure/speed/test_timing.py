"""Rounds, and how many fit a budget."""

import pytest

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.speed.timing import TimingSettings, alternate


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_arms_take_turns_in_rotating_order_and_the_first_round_is_discarded(count):
    calls = []

    def arm(name):
        def run():
            calls.append(name)
            return float(len(calls))

        return run

    names = [f"arm {index}" for index in range(count)]
    figures = alternate({name: arm(name) for name in names}, 4, "x")
    rounds = [calls[start : start + count] for start in range(0, len(calls), count)]
    assert len(rounds) == 5
    assert all(sorted(one) == names for one in rounds), "each arm once per round"
    assert [one[0] for one in rounds] == [names[index % count] for index in range(5)]
    assert list(figures) == names
    for name, values in figures.items():
        places = [index + 1.0 for index, called in enumerate(calls) if called == name]
        assert list(values) == places[1:]


def test_the_discarded_round_says_how_long_one_takes(still):
    def run():
        still.time += 2.0
        return 1.0

    said = []

    def rounds(seconds):
        said.append(seconds)
        return 3

    figures = alternate({"a": run, "b": run}, rounds, "x")
    assert said == [4.0]
    assert [len(values) for values in figures.values()] == [3, 3]
    assert still.time == 4 * 4.0


@pytest.mark.parametrize(
    ("seconds", "share", "rounds"),
    [(1.0, 0.0, 3), (1.0, 4.0, 3), (1.0, 11.0, 10), (1.0, 11.9, 10), (0.0, 9.0, 25)],
)
def test_as_many_rounds_as_fit_beside_the_discarded_one(seconds, share, rounds):
    assert TimingSettings().fit_rounds(seconds, share) == rounds
    assert TimingSettings(rounds=2).fit_rounds(seconds, share) == 2


@pytest.mark.parametrize(
    ("seconds", "share", "tokens"), [(1.0, 0.0, 8), (1.0, 20.0, 16), (1.0, 1e6, 64)]
)
def test_as_many_tokens_as_let_the_wanted_rounds_fit(seconds, share, tokens):
    assert TimingSettings().fit_tokens(seconds, share) == tokens
    assert TimingSettings(new_tokens=3).fit_tokens(seconds, share) == 3
    assert TimingSettings(rounds=11).fit_tokens(seconds, share) <= tokens


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"budget": -1.0}, "--budget -1"),
        ({"budget": float("nan")}, "--budget nan"),
        ({"budget": float("inf")}, "--budget inf"),
        ({"rounds": 0}, "--rounds 0"),
        ({"new_tokens": 1}, "--new-tokens 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options, part):
    with pytest.raises(PathwaysError, match=part):
        TimingSettings(**options)
