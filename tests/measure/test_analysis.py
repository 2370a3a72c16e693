"""Specialisation, skipping and overlap against loops; experiments against plain pruned copies."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.measure import paper
from hf_sparse_pathways.measure.analysis import analyse, thirds
from hf_sparse_pathways.measure.analysis_report import sections, to_markdown
from hf_sparse_pathways.measure.experiments import (
    NEGATIVE,
    POSITIVE,
    RANDOM,
    RULES,
    SELECTION_SPARSITIES,
    keep_largest,
    run_experiments,
    shuffled_profile,
    unseen,
)
from hf_sparse_pathways.measure.model_size import ModelSize
from hf_sparse_pathways.measure.skipping import compare_skips, measure_overlap, measure_skippable
from hf_sparse_pathways.measure.specialisation import (
    CRITERIA,
    PAPER,
    Criterion,
    activation_ratios,
    measure_specialisation,
)
from tests.architectures import build, tiny_llama, zeroed
from tests.discovery.profiles import random_profile, statistics_of
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DOMAINS = ("code", "law", "medicine")
SIZE = ModelSize(parameters=1000, ffn=600, experts=0, other=300, head=100)


def _profile(architecture="llama", domains=DOMAINS, seed=0):
    """Return a profile of skewed activations: other neurons are loud in other domains."""
    model = tiny_llama() if architecture == "llama" else build(architecture)
    plain = random_profile(model, domains, seed)
    generator = torch.Generator().manual_seed(seed)
    by_domain = {
        name: replace(
            known,
            blocks=tuple(
                statistics_of(
                    torch.randn(40, len(block.sum), generator=generator)
                    * torch.rand(len(block.sum), generator=generator).pow(3)
                )
                for block in known.blocks
            ),
        )
        for name, known in plain.by_domain.items()
    }
    return replace(plain, by_domain=by_domain)


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
    given = _profile(architecture, domains)
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
    found = measure_specialisation(_with_silent(_profile()))
    assert found.silent == 2
    assert measure_specialisation(_profile()).silent == 0
    ratios = activation_ratios(_with_silent(_profile()))
    assert all(bool(block.isfinite().all()) for block in ratios)
    assert ratios[0][:, [0, 5]].eq(1.0).all()
    assert analyse(_with_silent(_profile()), SIZE).specialisation.silent == 2


def test_two_domains_put_the_papers_threshold_out_of_reach():
    found = measure_specialisation(_profile(domains=("code", "law")))
    assert not found.of(PAPER).reachable
    assert found.of(PAPER).overall == 0.0
    assert measure_specialisation(_profile()).of(PAPER).reachable
    text = to_markdown(analyse(_profile(domains=("code", "law")), SIZE))
    assert "out of reach with 2 domains" in text


def test_one_domain_has_skippable_neurons_but_no_specialisation():
    given = _profile(domains=("code",))
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
        measure_specialisation(_profile()).of(Criterion(kind="ratio", threshold=7.0))


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("percentile", [0.0, 30.0, 50.0, 99.0])
def test_skippable_fractions_are_counted_below_the_percentile(architecture, percentile):
    given = _profile(architecture)
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
        analyse(_profile(), SIZE, percentile=percentile)


def test_overlaps_are_jaccard_indices():
    given = _profile("deepseek_v3")
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
        pair = compare_skips("a", "b", *masks)
        totals.append(pair.jaccard)
    assert sum(totals) / len(totals) == pytest.approx(pair.chance, abs=0.01)
    nothing = [torch.zeros(4, dtype=torch.bool)]
    empty = compare_skips("a", "b", nothing, nothing)
    assert (empty.jaccard, empty.chance, empty.per_block) == (0.0, 0.0, (None,))


def test_speedups_are_amdahls():
    found = analyse(_profile(), SIZE)
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
    given = _profile()
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


CALIBRATION = {name: documents(name, 6, 30) for name in ("code", "law")}
HELD_OUT = {name: documents(name, 5, 12, seed=3) for name in ("code", "law")}


@pytest.fixture(scope="module")
def taken():
    return profile(tiny_llama(), TOKENIZER, CALIBRATION, max_length=32, batch_size=2)


@pytest.fixture(scope="module")
def experiments(taken):
    return run_experiments(
        tiny_llama(), TOKENIZER, taken, HELD_OUT, max_tokens=500, max_length=32, batch_size=2
    )


@torch.no_grad()
def _naive(model, pruned, texts):
    """Return cosine, agreement, KL and perplexity ratio of plain passes over documents."""
    cosines, agree, divergence, losses = [], [], [], []
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        states = [m.model(ids).last_hidden_state[0, :-1] for m in (model, pruned)]
        logits = [m(ids).logits[0, :-1].double().log_softmax(-1) for m in (model, pruned)]
        cosines.append(functional.cosine_similarity(*states, dim=-1))
        agree.append(logits[0].argmax(-1) == logits[1].argmax(-1))
        divergence.append((logits[0].exp() * (logits[0] - logits[1])).sum(-1))
        losses.append([log.gather(1, ids[0, 1:, None])[:, 0] for log in logits])
    dense, sparse = (torch.cat(side).mean() for side in zip(*losses, strict=True))
    return (
        float(torch.cat(cosines).mean()),
        float(torch.cat(agree).double().mean()),
        float(torch.cat(divergence).mean()),
        float((dense - sparse).exp()),
    )


def _least_active(taken, domain, sparsity):
    masks = []
    for block in taken[domain].blocks:
        width = len(block.mean_abs)
        kept = math.floor((1 - sparsity) * width + 1e-9)
        masks.append(keep_largest(block.mean_abs, kept))
    return masks


def test_every_domain_is_measured_by_every_rule(experiments):
    expected = [
        (domain, rule, sparsity)
        for domain in HELD_OUT
        for sparsity in paper.PRESERVED_SPARSITIES
        for rule in RULES
    ]
    assert [(r.domain, r.rule, r.sparsity) for r in experiments.preservation] == expected
    expected = [
        (domain, rule, sparsity)
        for domain in HELD_OUT
        for sparsity in SELECTION_SPARSITIES
        for rule in (NEGATIVE, POSITIVE, RANDOM)
    ]
    assert [(r.domain, r.rule, r.sparsity) for r in experiments.selection] == expected
    assert experiments.dtype == "float32"
    assert {row.documents for row in experiments.selection} == {5}


@pytest.mark.parametrize("domain", ["code", "law"])
def test_the_papers_rule_is_measured_as_a_plain_pruned_copy(taken, experiments, domain):
    model = tiny_llama()
    rows = [*experiments.preservation, *experiments.selection]
    for row in rows:
        if row.domain == domain and row.rule in ("mean_abs", NEGATIVE):
            masks = _least_active(taken, domain, row.sparsity)
            found = (row.cosine, row.agreement, row.divergence, row.ratio)
            expected = _naive(model, zeroed(model, masks), HELD_OUT[domain])
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), (row.rule, row.sparsity)


def test_positive_selection_keeps_the_most_specialised_as_many_as_negative(taken, experiments):
    model = tiny_llama()
    index = taken.domains.index("law")
    for row in experiments.selection:
        if (row.domain, row.rule) == ("law", POSITIVE):
            negative = _least_active(taken, "law", row.sparsity)
            masks = [
                keep_largest(ratios[index], int(mask.sum()))
                for ratios, mask in zip(activation_ratios(taken), negative, strict=True)
            ]
            expected = _naive(model, zeroed(model, masks), HELD_OUT["law"])
            assert row.divergence == pytest.approx(expected[2], rel=1e-3)


def test_repair_preserves_more_than_the_papers_rule(experiments):
    def mean(rule):
        own = [row.divergence for row in experiments.preservation if row.rule == rule]
        return sum(own) / len(own)

    assert mean("obs") < mean("mean_abs")


def test_without_gram_matrices_obs_is_left_out_and_without_partners_selection(taken):
    poor = {name: replace(known, grams=()) for name, known in taken.by_domain.items()}
    lone = Profile(base=taken.base, by_domain={"code": poor["code"]})
    found = run_experiments(
        tiny_llama(),
        TOKENIZER,
        lone,
        {"code": HELD_OUT["code"]},
        max_tokens=60,
        max_length=32,
    )
    assert {row.rule for row in found.preservation} == {"mean_abs", "wanda"}
    assert found.selection == ()


def test_calibration_text_is_never_measured_on(taken):
    both = [*HELD_OUT["code"], *CALIBRATION["code"], *CALIBRATION["law"]]
    fresh, excluded = unseen(taken, "code", read_documents(both))
    assert sorted(document.text for document in fresh.items) == sorted(HELD_OUT["code"])
    assert excluded == len(both) - len(HELD_OUT["code"])
    with pytest.raises(TextError, match="no text"):
        unseen(taken, "code", read_documents(CALIBRATION["code"]))
    with pytest.raises(UnknownNameError, match="lwa"):
        run_experiments(tiny_llama(), TOKENIZER, taken, {"lwa": ["x y"]}, max_tokens=9)


def test_the_model_is_left_as_it_was(taken):
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_experiments(
        model, TOKENIZER, taken, {"code": HELD_OUT["code"]}, max_tokens=40, max_length=32
    )
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_shuffled_text_has_less_specialisation_and_equal_parts(taken):
    shuffled = shuffled_profile(tiny_llama(), TOKENIZER, taken, max_length=32, batch_size=2)
    assert shuffled.domains == ["shuffled 1", "shuffled 2"]
    tokens = [known.tokens for known in shuffled.by_domain.values()]
    assert sum(tokens) == sum(known.tokens for known in taken.by_domain.values())
    chance, seen = measure_specialisation(shuffled), measure_specialisation(taken)
    assert chance.mean_excess < seen.mean_excess


def test_shuffled_text_needs_the_texts_tokens():
    assert shuffled_profile(tiny_llama(), TOKENIZER, _profile()) is None


def test_a_report_puts_the_paper_beside_what_is_seen(taken, experiments):
    found = analyse(taken, ModelSize.of(tiny_llama())).with_measurements(
        experiments=experiments, shuffled=measure_specialisation(taken)
    )
    text = to_markdown(found, ["overlap.png"])
    assert "![overlap](overlap.png)" in text
    for section in sections(found):
        assert f"## {section.title}" in text
        for row in section.rows:
            assert len(row) == len(section.header), section.title
    statements = next(iter(sections(found))).rows
    assert statements[0][1].startswith("7.4% to 68.2%")
    least = min(row.cosine for row in experiments.preservation if row.rule == "mean_abs")
    assert f"mean_abs {least:.4f}" in statements[3][2]
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["format"] == 1
    assert values["size"]["ffn_share"] == found.size.ffn_share


def test_a_report_says_what_was_not_measured():
    text = to_markdown(analyse(_profile(), SIZE))
    assert "No experiments were run" in text
    assert text.count("not measured") >= 2
