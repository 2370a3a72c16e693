"""Limits of quality and speed on the command line, and comparisons."""

import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from hf_sparse_pathways.cli import budgets
from hf_sparse_pathways.cli.budgets import Limits, choose_pathways
from hf_sparse_pathways.cli.options import parse_sparsities
from hf_sparse_pathways.cli.profile import split_texts
from hf_sparse_pathways.discovery import budget, profiling, selection
from hf_sparse_pathways.discovery.budget import Search, fit_sparsities
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure import speed_target
from hf_sparse_pathways.measure.speed_target import SpeedupPlan, sparsity_for_speedup
from hf_sparse_pathways.pathways.pathway import Pathways
from tests.architectures import build, prompt
from tests.cli.commands import assert_error, run, run_well
from tests.texts import documents, tiny_tokenizer

SMALL = ("--max-tokens", 200)
MODEL, TOKENIZER = build("llama"), tiny_tokenizer()
TEXTS = {name: documents(name, 12, 30) for name in ("code", "law")}


def test_a_limit_of_perplexity_is_met_and_said(places, tmp_path):
    limit = ("--max-perplexity-increase", "30%", *SMALL, "--order", "one-shot")
    said = run_well("build", places.dense, *places.texts, *limit, "--output", tmp_path / "out")
    assert "largest sparsity within +30.0% perplexity" in said
    assert "held out" in said
    pathways = Pathways.from_pretrained(tmp_path / "out")
    assert pathways.domains == ["code", "law"]
    assert all(0 < pathways.sparsity(name) <= 0.92 for name in pathways.domains)
    assert "pooled" in pathways.controls


def test_what_the_search_has_made_is_not_made_again(places, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(select(*args, **options))
        return calls[-1]

    monkeypatch.setattr(selection, "select", counted)
    limit = ("--max-perplexity-increase", "30%", *SMALL, "--order", "one-shot")
    run_well("build", places.dense, *places.texts, *limit, "--output", tmp_path / "out")
    *tried, final = calls
    for name in final.domains:
        assert any(final[name] is made[name] for made in tried if name in made.domains)


@pytest.mark.parametrize(
    "words", [("--compensation", "refit+bias+bypass:16"), ("--multiple", 16)], ids=str
)
def test_a_search_goes_no_further_than_there_is_room(places, tmp_path, words):
    limit = ("--max-perplexity-increase", "1000000%", *SMALL, "--order", "one-shot")
    words = (*words, *limit, "--output", tmp_path / "out")
    said = run_well("build", places.dense, *places.texts, *words)
    pathways = Pathways.from_pretrained(tmp_path / "out")
    assert all(0.6 < 1 - pathways.flops(name) <= 0.9 for name in pathways.domains)
    assert "not measured" not in said


@pytest.mark.parametrize("words", [("--compensation", "bypass:99"), ("--multiple", 48)], ids=str)
def test_no_room_at_all_is_said_before_the_profile(places, tmp_path, monkeypatch, words):
    monkeypatch.setattr(profiling, "profile", None)
    for limit in ("--max-perplexity-increase", "--target-speedup"):
        words = (*words, limit, "5%" if "increase" in limit else 1.2)
        ran = run("build", places.dense, *places.texts, *words, "--output", tmp_path / "out")
        assert_error(ran, "nothing could be removed")
        words = words[:-2]


def test_a_domain_without_held_out_text_costs_no_work(places, tmp_path):
    """One domain's folder holds the other's: what is held out of it was calibrated on."""
    part = tmp_path / "part"
    part.mkdir()
    taken = {item.digest for item in split_texts({"law": places.law}, 0.2, 0, 200)["law"][0].items}
    for path in places.law.iterdir():
        if read_documents(path).items[0].digest in taken:
            shutil.copy(path, part)
    words = ("--domain", f"law={places.law}", "--domain", f"part={part}")
    limit = ("--max-perplexity-increase", "30%", *SMALL, "--quick")
    said = run_well("build", places.dense, *words, *limit, "--output", tmp_path / "out")
    assert re.search(r"\bpart\b.*not measured", said)
    assert "part: not measured on held-out text. Domain 'part': the pathways were" in said
    assert "law: not measured" not in said
    assert Pathways.from_pretrained(tmp_path / "out").domains == ["law", "part"]


def _searched(monkeypatch, capsys, found, *, increase=0.1, best=0.3):
    """Return what is printed where a search found a sparsity, and held-out text gave a figure."""
    search = Search(math.log1p(increase), {0.4: 1.0, **({best: 0.0} if best else {})})
    monkeypatch.setattr(budget, "fit_sparsities", lambda *_, **__: {"code": search})
    monkeypatch.setattr(budgets, "_measure", lambda *_: {"code": found})
    limits = Limits(
        sparsity=None,
        percentile=None,
        pool=None,
        max_perplexity_increase=increase,
        target_speedup=None,
    )
    taken = profile(MODEL, TOKENIZER, {"code": TEXTS["code"]}, max_length=64)
    choose_pathways(MODEL, TOKENIZER, taken, limits, {"method": "wanda"}, {})
    return capsys.readouterr().out


def test_held_out_text_above_the_limit_is_marked(monkeypatch, capsys):
    said = _searched(monkeypatch, capsys, 0.003, increase=0.00001)
    assert "within +0.001% perplexity on validation text" in said
    assert "+0.300% (above)" in said
    assert "code: on held-out text the increase is above the limit." in said
    assert "above" not in _searched(monkeypatch, capsys, 0.1, increase=0.1)


def test_a_search_that_found_nothing_says_that_all_is_kept(monkeypatch, capsys):
    said = _searched(monkeypatch, capsys, 0.0, best=0.0)
    assert "code: nothing that was tried is within the limit; all is kept." in said
    assert "all is kept" not in _searched(monkeypatch, capsys, 0.0)


def test_a_saved_profile_is_said_to_leave_nothing_to_measure_on(places, tmp_path):
    limit = ("--max-perplexity-increase", "30%", "--order", "one-shot")
    taken = profile(MODEL, TOKENIZER, TEXTS, max_length=64, validation_share=0.3)
    taken.save_pretrained(tmp_path / "p")
    words = ("--profile", tmp_path / "p", *limit, "--output", tmp_path / "out")
    said = run_well("build", places.dense, *words)
    assert "law: not measured on held-out text. With --profile" in said


def test_a_search_brings_the_pathway_whose_rise_is_within_the_limit(monkeypatch):
    taken = profile(MODEL, TOKENIZER, TEXTS, max_length=64, validation_share=0.3)

    def loss(_model, windows, pathways, _blocks):
        assert windows in {taken[name].validation for name in taken.domains}
        if pathways is None:
            return 1.0
        return 1.0 + sum(float((~block.keep).float().mean()) ** 2 for block in pathways)

    def choose(sparsities):
        own = taken.subset(sparsities)
        return select(MODEL, own, sparsity=sparsities, method="wanda", controls=False)

    monkeypatch.setattr(budget, "mean_loss", loss)
    searches = fit_sparsities(MODEL, taken, max_perplexity_increase=0.2, choose=choose)
    assert list(searches) == taken.domains
    for name, search in searches.items():
        rise = loss(MODEL, taken[name].validation, search.pathway.blocks, None) - 1.0
        assert rise == pytest.approx(search.rises[search.best])
        assert 0.8 * math.log1p(0.2) < rise <= math.log1p(0.2)
        assert max(search.rises.values()) > math.log1p(0.2)


def test_later_rounds_of_a_search_see_every_domain(monkeypatch):
    """What a score takes from the other domains does not change when their search is done."""
    taken = profile(MODEL, TOKENIZER, TEXTS, max_length=64)
    rule = {"method": "lape"}
    found = []

    def fit(_model, _profile, *, max_perplexity_increase, choose, room):
        assert room == 1 - 1 / 48
        assert max_perplexity_increase == 0.1
        found.extend([choose({"code": 0.3, "law": 0.3}), choose({"law": 0.5})])
        return {
            name: Search(0.1, {sparsity: 0.0}, made[name])
            for name, sparsity, made in (("code", 0.3, found[0]), ("law", 0.5, found[1]))
        }

    monkeypatch.setattr(budget, "fit_sparsities", fit)
    limits = Limits(
        sparsity=None,
        percentile=None,
        pool="layer",
        max_perplexity_increase=0.1,
        target_speedup=None,
    )
    pathways = choose_pathways(MODEL, TOKENIZER, taken, limits, rule, {})
    expected = select(MODEL, taken, sparsity={"code": 0.3, "law": 0.5}, method="lape")
    for name in ("code", "law", "pooled"):
        for mine, theirs in zip(pathways[name].keep, expected[name].keep, strict=True):
            assert torch.equal(mine, theirs)


def test_a_speed_out_of_reach_is_said_before_the_profile(places, tmp_path, monkeypatch):
    monkeypatch.setattr(speed_target, "_speedup", lambda _model, s, *_: 1 / (1 - 0.2 * s))
    monkeypatch.setattr(profiling, "profile", None)
    words = (*places.texts, "--target-speedup", 2, *SMALL, "--output", tmp_path / "out")
    assert_error(run("build", places.dense, *words), "out of reach")


@pytest.mark.parametrize("given", ["5", "1.5", "0%", "-3%", "x", "nan", "inf%"])
def test_a_limit_that_is_none_is_refused(places, tmp_path, given):
    words = (*places.texts, "--max-perplexity-increase", given, "--output", tmp_path / "out")
    assert_error(run("build", tmp_path / "absent", *words), given, "5%")


def test_a_limit_in_percent_may_be_of_any_size(places, tmp_path):
    for given in ("500%", "1", "0.05"):
        words = (*places.texts, "--max-perplexity-increase", given, "--output", tmp_path / "out")
        assert_error(run("build", tmp_path / "absent", *words), "absent")


def test_two_limits_are_refused(places, tmp_path):
    words = ("--sparsity", 0.3, "--target-speedup", 1.2, "--output", tmp_path / "out")
    assert_error(run("build", places.dense, *places.texts, *words), "--sparsity", "not both")
    words = ("--target-speedup", 1.0, "--output", tmp_path / "out")
    assert_error(run("build", places.dense, *places.texts, *words), "above 1")


def test_sparsities_in_percent_are_fractions(places, tmp_path):
    assert parse_sparsities("30%") == [0.3]
    assert parse_sparsities("20%, 0.3,50 %") == [0.2, 0.3, 0.5]
    words = (*places.texts, "--quick", *SMALL, "--output", tmp_path / "out")
    run_well("build", places.dense, "--sparsity", "25%,0.5,0%", *words)
    pathways = Pathways.from_pretrained(tmp_path / "out")
    assert pathways.sparsity("law", per_block=True) == [0.25, 0.5, 0.0]


@pytest.mark.parametrize("command", ["build", "compare"])
@pytest.mark.parametrize("given", ["x%", "%", "", "0.3,", "30%%", "30", "20%,150%"])
def test_sparsities_that_are_none_are_refused(places, tmp_path, command, given):
    words = (*places.texts, "--sparsity", given, "--output", tmp_path / "out")
    part = "[0, 1)" if given in ("30", "20%,150%") else f"{given!r} does not fit; write 0.3 or 30%"
    assert_error(run(command, tmp_path / "absent", *words), part)


@pytest.mark.parametrize("rise", [lambda s: s**2, lambda s: 3 * s**3, lambda s: 0.1 * s])
@pytest.mark.parametrize("limit", [0.01, 0.05, 0.2])
def test_a_search_comes_close_from_below(rise, limit):
    search = Search(limit)
    for _ in range(8):
        if search.done:
            break
        guess = search.guess()
        assert 0 < guess <= 0.9
        search.rises[guess] = rise(guess)
    assert rise(search.best) <= limit
    assert search.best == 0.9 or rise(search.best) >= 0.9 * limit


@pytest.mark.parametrize("rise", [lambda s: s**2, lambda _s: -0.01, lambda _s: 1.0])
@pytest.mark.parametrize("most", [0.7, 0.3, 0.05])
def test_a_search_stays_within_its_room(rise, most):
    search = Search(0.05, most=most)
    for _ in range(8):
        if search.done:
            break
        guess = search.guess()
        assert 0 < guess <= most
        search.rises[guess] = rise(guess)
    assert search.best == most or rise(most) > 0.05


def test_a_search_that_nothing_satisfies_says_zero():
    search = Search(0.01)
    for _ in range(4):
        search.rises[search.guess()] = 1.0
    assert search.best == 0.0


def test_a_search_survives_a_rise_that_falls():
    search = Search(0.05)
    for _ in range(5):
        search.rises[search.guess()] = -0.01
    assert search.best == 0.9
    assert search.done


def test_the_sparsity_for_a_speed_follows_from_what_was_measured(monkeypatch):
    share = 0.6
    monkeypatch.setattr(speed_target, "_speedup", lambda _model, s, *_: 1 / (1 - share * s))
    plan = sparsity_for_speedup(build("llama"), 1.3)
    assert plan.sparsity == pytest.approx((1 - 1 / 1.3) / share)
    assert plan.measured == pytest.approx(1.3)
    assert plan.ceiling == pytest.approx(2.5)
    assert "1.30x" in str(plan)
    with pytest.raises(Exception, match=r"2\.50x as fast.*at most 2\.18"):
        sparsity_for_speedup(build("llama"), 2.45)


def test_where_nothing_is_saved_no_speed_up_is_offered(monkeypatch):
    for ratio in (1.0, 0.9, 1.001):
        monkeypatch.setattr(speed_target, "_speedup", lambda *_, r=ratio: r)
        with pytest.raises(PathwaysError, match=r"1\.00x as fast.*No speed-up is within reach\."):
            sparsity_for_speedup(build("llama"), 1.3)


@pytest.mark.parametrize(
    ("options", "room"),
    [
        ({}, 0.95),
        ({"bypass_rank": 16}, 1 - (1 + 16 * 64 / 96) / 48),
        ({"bypass_rank": 40}, 1 - (1 + 40 * 64 / 96) / 48),
        ({"multiple": 32}, 1 / 3),
    ],
)
def test_no_more_is_timed_than_a_bypass_and_a_multiple_leave_room_for(monkeypatch, options, room):
    timed = []

    def speedup(_model, sparsity, bypass_rank, _rounds):
        assert bypass_rank == options.get("bypass_rank", 0)
        timed.append(sparsity)
        return 1 / (1 - 0.5 * sparsity**1.1)

    monkeypatch.setattr(speed_target, "_speedup", speedup)
    with pytest.raises(PathwaysError, match=f"at most {room:.1%} of it can go"):
        sparsity_for_speedup(build("llama"), 1.9, **options)
    assert 0.5 * room < max(timed) <= room + 1e-9


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_timed_has_the_bypass_and_computes_what_the_sparsity_leaves(
    monkeypatch, architecture, rank
):
    timed = []

    def time_generation(model, **_options):
        timed.append(model.pathways)
        model.generate(prompt(1, 4), domain="random", max_new_tokens=2)
        return [SimpleNamespace(ratios=[1.2])]

    monkeypatch.setattr(speed_target, "time_generation", time_generation)
    dense = build(architecture)
    assert speed_target._speedup(dense, 0.5, rank, 3) == 1.2
    for block, shape in zip(timed[0]["random"].blocks, timed[0].base.blocks, strict=True):
        assert (block.bypass.rank if rank else block.bypass) == (rank or None)
        one = shape.flops_per_neuron
        assert 0.5 * shape.dense_flops - one < shape.flops(block) <= 0.5 * shape.dense_flops


def test_a_target_of_speed_knows_the_bypass_that_will_be_there(places, tmp_path, monkeypatch):
    def stop(_dense, target, *, bypass_rank, multiple):
        raise PathwaysError(f"asked for {target}, rank {bypass_rank}, multiple {multiple}")

    monkeypatch.setattr(speed_target, "sparsity_for_speedup", stop)
    words = ("--target-speedup", 1.2, "--compensation", "refit+bypass:4", "--multiple", 8)
    words = (*places.texts, *words, "--output", tmp_path / "out")
    assert_error(run("build", places.dense, *words), "asked for 1.2, rank 4, multiple 8")


def test_one_timing_alone_refuses_nothing(monkeypatch):
    timings = iter([1.01])
    monkeypatch.setattr(
        speed_target, "_speedup", lambda _model, s, *_: next(timings, 1 / (1 - 0.5 * s))
    )
    plan = sparsity_for_speedup(build("llama"), 1.2)
    assert plan.measured == pytest.approx(1 / (1 - 0.5 * plan.sparsity))
    assert plan.measured > 1.2
    assert plan.ceiling == pytest.approx(2.0)


@pytest.mark.parametrize(
    "saved",
    [
        lambda s: 0.35 * s**2,
        lambda s: 0.5 * s**0.5,
        lambda s: max(-0.1, 0.45 * s - 0.1),
        lambda s: 0.4 if s > 0.35 else 0.05 * s,
    ],
    ids=["convex", "concave", "overhead", "step"],
)
def test_a_speed_is_met_where_savings_are_not_linear(monkeypatch, saved):
    timed = []

    def speedup(_model, sparsity, *_):
        timed.append(sparsity)
        return 1 / (1 - saved(sparsity))

    monkeypatch.setattr(speed_target, "_speedup", speedup)
    plan = sparsity_for_speedup(build("llama"), 1.1)
    assert plan.measured == pytest.approx(1 / (1 - saved(plan.sparsity)))
    assert plan.measured >= 1.1 * 0.99
    less = next(s / 1000 for s in range(1000) if saved(s / 1000) >= 1 - 1 / 1.1)
    assert plan.sparsity <= max(1.1 * less, less + 0.1)
    assert len(timed) <= 6


def test_one_timing_too_low_does_not_carry_the_choice_away(monkeypatch):
    """A first timing that is disturbed makes the FFN seem cheap; the next ones correct it."""
    timings = iter([1.10])

    def speedup(_model, sparsity, *_):
        return next(timings, 1 / (1 - 0.5 * sparsity))

    monkeypatch.setattr(speed_target, "_speedup", speedup)
    plan = sparsity_for_speedup(build("llama"), 1.08)
    assert plan.measured == pytest.approx(1.08, rel=0.03)
    assert plan.sparsity == pytest.approx((1 - 1 / 1.08) / 0.5, rel=0.3)


def test_a_target_of_speed_is_said_and_used(places, tmp_path, monkeypatch):
    plan = SpeedupPlan(target=1.2, sparsity=0.5, measured=1.21, ceiling=1.5)
    monkeypatch.setattr(speed_target, "sparsity_for_speedup", lambda *_, **__: plan)
    words = ("--target-speedup", 1.2, "--quick", *SMALL, "--output", tmp_path / "out")
    said = run_well("build", places.dense, *places.texts, *words)
    assert "1.20x: 50.0% of the FFN removed" in said
    pathways = Pathways.from_pretrained(tmp_path / "out")
    assert pathways.flops("law") <= 0.5
