"""Specialisation, skipping and overlap against loops."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.measure.analysis import analyse, thirds
from hf_sparse_pathways.measure.analysis_report import to_markdown
from hf_sparse_pathways.measure.model_size import ModelSize
from hf_sparse_pathways.measure.overlap import compare_neurons
from hf_sparse_pathways.measure.skipping import measure_overlap, measure_skippable
from hf_sparse_pathways.measure.specialisation import (
    CRITERIA,
    PAPER,
    Criterion,
    activation_ratios,
    measure_specialisation,
)
from tests.architectures import build, tiny_llama
from tests.discovery.profiles import random_profile
from tests.measure.profiles import skewed_profile
from tests.texts import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DOMAINS = ("code", "law", "medicine")
SIZE = ModelSize(parameters=1000, ffn=600, experts=0, other=300, head=100)


def _with_silent(given, neurons=(0, 5)):
    """Return a profile in which some neurons of the first block are zero in every domain."""
    by_domain = {}
    for name, known in given.by_domain.items():
        first = known.blocks[0]
        sums = first.abs_sum.clone()
        sums[list(neurons)] = 0
        blocks = (replace(first, abs_sum=sums), *known.blocks[1:])
        by_domain[name] = replace(known, blocks=blocks)
    return replace(given, by_domain=by_domain)


def _activity(given, domain, block):
    return given[domain].blocks[block].mean_abs.tolist()


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gpt2_odd"])
@pytest.mark.parametrize("domains", [DOMAINS, ("code", "law")])
def test_specialised_fractions_are_counted_by_their_definition(architecture, domains):
    given = skewed_profile(architecture, domains)
    found = measure_specialisation(given)
    widths = [shape.d_ff for shape in given.base.blocks]
    assert (found.neurons, found.domains) == (sum(widths), len(domains))
    assert architecture != "deepseek_v3" or len(set(widths)) > 1, "widths differ"
    for criterion in CRITERIA:
        fraction = found.of(criterion)
        anywhere, hits = 0, {name: [0] * len(widths) for name in domains}
        for block, width in enumerate(widths):
            count = 0
            for neuron in range(width):
                own = {name: _activity(given, name, block)[neuron] for name in domains}
                total = sum(own.values())
                values = {
                    "ratio": lambda a, t=total: a / (t / len(domains)),
                    "excess": lambda a, t=total: (a / (t / len(domains)) - 1) / (len(domains) - 1),
                    "share": lambda a, t=total: a / t,
                }
                met = [n for n in domains if values[criterion.kind](own[n]) > criterion.threshold]
                for name in met:
                    hits[name][block] += 1
                count += bool(met)
            assert fraction.per_block[block] == pytest.approx(count / width)
            anywhere += count
        assert fraction.overall == pytest.approx(anywhere / sum(widths))
        for name in domains:
            assert fraction.per_domain[name] == pytest.approx(sum(hits[name]) / sum(widths))
            expected = [hit / width for hit, width in zip(hits[name], widths, strict=True)]
            assert fraction.per_domain_and_block[name] == pytest.approx(tuple(expected))
    assert found.of(Criterion(kind="ratio", threshold=1.25)).overall > 0


def test_mean_excess_is_nought_for_even_and_one_for_exclusive_neurons():
    model = tiny_llama()
    plain = random_profile(model, DOMAINS)
    same = plain["code"].blocks
    even = replace(plain, by_domain={name: replace(plain["code"], blocks=same) for name in DOMAINS})
    assert measure_specialisation(even).mean_excess == pytest.approx(0.0)
    nothing = tuple(replace(block, abs_sum=0 * block.abs_sum) for block in same)
    alone = {name: replace(plain["code"], blocks=nothing) for name in DOMAINS}
    alone["law"] = plain["code"]
    found = measure_specialisation(replace(plain, by_domain=alone))
    assert found.mean_excess == pytest.approx(1.0)
    assert found.of(PAPER).per_domain == {"code": 0.0, "law": 1.0, "medicine": 0.0}


def test_silent_neurons_are_counted_and_not_specialised():
    found = measure_specialisation(_with_silent(skewed_profile()))
    assert found.silent == 2
    assert measure_specialisation(skewed_profile()).silent == 0
    ratios = activation_ratios(_with_silent(skewed_profile()))
    assert all(bool(block.isfinite().all()) for block in ratios)
    assert ratios[0][:, [0, 5]].eq(1.0).all()
    assert analyse(_with_silent(skewed_profile()), SIZE).specialisation.silent == 2


def test_two_domains_put_the_papers_threshold_out_of_reach():
    found = measure_specialisation(skewed_profile(domains=("code", "law")))
    assert not found.of(PAPER).reachable
    assert found.of(PAPER).overall == 0.0
    assert measure_specialisation(skewed_profile()).of(PAPER).reachable
    text = to_markdown(analyse(skewed_profile(domains=("code", "law")), SIZE))
    assert "out of reach with 2 domains" in text


def test_one_domain_has_skippable_neurons_but_no_specialisation():
    given = skewed_profile(domains=("code",))
    with pytest.raises(PathwaysError, match="only code"):
        measure_specialisation(given)
    found = analyse(given, SIZE)
    assert found.specialisation is None
    assert all(overlap.pairs == () for overlap in found.overlaps)
    assert {role.specialised for role in found.roles} == {None}
    assert found.skippable_by("layer").per_domain["code"] == pytest.approx(0.5)
    assert "nothing can be said of specialisation" in to_markdown(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_unknown_criterion_is_named():
    with pytest.raises(UnknownNameError, match="ratio"):
        Criterion(kind="ration", threshold=2.0)
    with pytest.raises(UnknownNameError, match="ratio > 2"):
        measure_specialisation(skewed_profile()).of(Criterion(kind="ratio", threshold=7.0))


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("percentile", [0.0, 30.0, 50.0, 99.0])
def test_skippable_fractions_are_counted_below_the_percentile(architecture, percentile):
    given = skewed_profile(architecture)
    layer, model = measure_skippable(given, percentile)
    assert (layer.pool, model.pool) == ("layer", "model")
    widths = [shape.d_ff for shape in given.base.blocks]
    costs = [shape.flops_per_neuron for shape in given.base.blocks]
    for domain in DOMAINS:
        activity = [_activity(given, domain, block) for block in range(len(widths))]
        everything = sorted(itertools.chain(*activity))
        for found, pools in ((layer, [sorted(a) for a in activity]), (model, [everything] * 9)):
            skipped = []
            for block, pool in zip(activity, pools, strict=False):
                place = min(math.ceil(percentile * len(pool) / 100), len(pool) - 1)
                below = sum(value < pool[place] for value in block)
                skipped.append(min(below, len(block) - 1))
            fractions = [n / width for n, width in zip(skipped, widths, strict=True)]
            assert found.per_block[domain] == pytest.approx(tuple(fractions))
            assert found.per_domain[domain] == pytest.approx(sum(skipped) / sum(widths))
            removed = sum(n * cost for n, cost in zip(skipped, costs, strict=True))
            dense = sum(width * cost for width, cost in zip(widths, costs, strict=True))
            assert found.flops[domain] == pytest.approx(removed / dense)


@pytest.mark.parametrize("percentile", [-1.0, 100.0, math.nan])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(PathwaysError, match="percentile"):
        analyse(skewed_profile(), SIZE, percentile=percentile)


def test_overlaps_are_jaccard_indices():
    given = skewed_profile("deepseek_v3")
    for overlap in measure_overlap(given):
        assert [(pair.first, pair.second) for pair in overlap.pairs] == list(
            itertools.combinations(DOMAINS, 2)
        )
        for pair in overlap.pairs:
            both = either = 0
            for block, shape in enumerate(given.base.blocks):
                count = min(math.ceil(overlap.sparsity * shape.d_ff), shape.d_ff - 1)
                sets = []
                for name in (pair.first, pair.second):
                    activity = _activity(given, name, block)
                    sets.append(set(sorted(range(shape.d_ff), key=activity.__getitem__)[:count]))
                both += len(sets[0] & sets[1])
                either += len(sets[0] | sets[1])
                assert pair.per_block[block] == len(sets[0] & sets[1]) / len(sets[0] | sets[1])
            assert pair.jaccard == pytest.approx(both / either)


def test_chance_is_what_random_masks_overlap_by():
    chance = random.Random(0)
    totals = []
    for _ in range(300):
        masks = []
        for _ in range(2):
            drawn = [torch.zeros(60, dtype=torch.bool), torch.zeros(31, dtype=torch.bool)]
            for mask, count in zip(drawn, (20, 9), strict=True):
                mask[chance.sample(range(len(mask)), count)] = True
            masks.append(drawn)
        pair = compare_neurons("a", "b", *masks)
        totals.append(pair.jaccard)
    assert sum(totals) / len(totals) == pytest.approx(pair.chance, abs=0.01)
    nothing = [torch.zeros(4, dtype=torch.bool)]
    empty = compare_neurons("a", "b", nothing, nothing)
    assert (empty.jaccard, empty.chance, empty.per_block) == (0.0, 0.0, (None,))


def test_speedups_are_amdahls():
    found = analyse(skewed_profile(), SIZE)
    assert SIZE.ffn_share == 0.6
    for speedup in found.speedups:
        fractions = found.skippable_by(speedup.pool)
        assert speedup.paper == pytest.approx(1 / (1 - fractions.per_domain[speedup.domain]))
        left = 1 - 0.6 * fractions.flops[speedup.domain]
        assert speedup.amdahl == pytest.approx(1 / left)
        assert speedup.amdahl < speedup.paper
    assert len(found.speedups) == 2 * len(DOMAINS)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 30])
def test_thirds_cover_every_block_once(count):
    parts = thirds(count)
    assert [index for _, part in parts for index in part] == list(range(count))
    assert all(len(part) for _, part in parts)


def test_roles_are_means_over_their_blocks():
    given = skewed_profile()
    found = analyse(given, SIZE)
    assert [role.name for role in found.roles] == ["early", "middle", "late"]
    for index, role in enumerate(found.roles):
        assert (role.first, role.last) == (index, index)
        assert role.specialised == found.specialisation.of(PAPER).per_block[index]
        pool = found.skippable_by("model").per_block
        assert role.skippable == {name: pool[name][index] for name in DOMAINS}
        half = next(overlap for overlap in found.overlaps if overlap.sparsity == 0.5)
        mean = sum(pair.per_block[index] for pair in half.pairs) / len(half.pairs)
        assert role.overlap == pytest.approx(mean)


def test_sizes_are_counted_from_the_weights():
    model = build("llama")
    size = ModelSize.of(model)
    assert size.ffn == 3 * 3 * 32 * 48
    assert size.other == 3 * (32 * 32 * 2 + 32 * 16 * 2)
    assert size.head == 99 * 32
    assert size.experts == 0
    assert size.parameters == sum(p.numel() for p in model.parameters())
    tied = ModelSize.of(build("gemma3"))
    assert tied.head == 99 * 32, "a tied head multiplies although its weights are counted once"
    assert 0 < tied.ffn_share < 1


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_of_routed_experts_those_count_that_a_token_visits(architecture):
    model = build(architecture)
    size = ModelSize.of(model)
    config = model.config
    layers = 1 if architecture == "qwen3_moe" else 2
    visited = config.num_experts_per_tok * 3 * config.moe_intermediate_size * config.hidden_size
    assert size.experts == layers * visited
    assert size.other > 0
