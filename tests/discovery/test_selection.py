"""Selections against naive ones, and their counts exactly."""

import copy
import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from itertools import chain, pairwise

import numpy
import pytest
import torch

from hf_sparse_pathways.discovery.goal import DEFAULT_SPARSITY
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.scores import SCORES, ScoreInput
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.errors import MismatchError, PathwaysError, UnknownNameError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.pathways.names import POOLED
from hf_sparse_pathways.pathways.pathway import Pathways
from tests.architectures import build, tiny_llama
from tests.discovery.profiles import random_profile
from tests.texts import documents, tiny_tokenizer

MODEL = tiny_llama()
PROFILE = random_profile(MODEL)
BLOCKS = len(PROFILE.base.blocks)
NAN = float("nan")


def _kept(pathways, domain):
    return [int(mask.sum()) for mask in pathways[domain].keep]


def _keep(pathways, domain):
    return [mask.tolist() for mask in pathways[domain].keep]


def _count(sparsity, d_ff):
    """Return how many neurons stay: no more FLOPs than asked for, but at least one neuron."""
    return max(1, math.floor((1 - sparsity) * d_ff + 1e-6))


def _naive_best(scores, sparsity):
    """Return the mask of the best neurons, by sorting."""
    count = _count(sparsity, len(scores))
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[:count]
    return [index in best for index in range(len(scores))]


def _scores(domain, name, model=MODEL, given=PROFILE):
    """Return a score's values by its formula, per block, as lists."""
    values = []
    for block, statistics in zip(find_blocks(model), given[domain].blocks, strict=True):
        if name == "mean_abs":
            values.append((statistics.abs_sum / statistics.tokens).tolist())
            continue
        weight = block.outgoing.weight.double()
        if weight.shape[1] != block.d_ff:  # Conv1D
            weight = weight.T
        norms = weight.pow(2).sum(0).sqrt()
        values.append(((statistics.square_sum / statistics.tokens).sqrt() * norms).tolist())
    return values


@pytest.mark.parametrize("architecture", ["llama", "gpt2_odd", "phi3", "opt", "deepseek_v3"])
@pytest.mark.parametrize("score", ["mean_abs", "wanda"])
def test_the_best_neurons_of_each_block_are_kept(architecture, score):
    model = build(architecture)
    given = random_profile(model)
    pathways = select(model, given, sparsity=0.4, score=score)
    for domain in given.domains:
        naive = [_naive_best(values, 0.4) for values in _scores(domain, score, model, given)]
        assert _keep(pathways, domain) == naive


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.01, 0.25, 0.3, 1 / 3, 0.5, 0.9, 0.99, 1 - 1e-9])
def test_the_kept_counts_are_exact(sparsity):
    pathways = select(MODEL, PROFILE, sparsity=sparsity)
    for domain in (*PROFILE.domains, POOLED):
        expected = [_count(sparsity, 48)] * BLOCKS
        assert _kept(pathways, domain) == expected
        assert pathways.sparsity(domain) == pytest.approx(1 - sum(expected) / (48 * BLOCKS))
        assert pathways.flops(domain) == pytest.approx(sum(expected) / (48 * BLOCKS))


@pytest.mark.parametrize("wrap", [list, tuple])
def test_each_block_may_have_its_own_sparsity(wrap):
    fractions = [0.0, 0.5, 0.9]
    pathways = select(MODEL, PROFILE, sparsity=wrap(fractions))
    assert _kept(pathways, "code") == [_count(f, 48) for f in fractions]
    assert pathways["code"].provenance["sparsity"] == fractions


def test_defaults_are_wanda_at_the_default_sparsity():
    plain, named = (
        select(MODEL, PROFILE, **options)
        for options in ({}, {"sparsity": DEFAULT_SPARSITY, "score": "wanda"})
    )
    assert _keep(plain, "law") == _keep(named, "law")
    assert plain["law"].provenance == named["law"].provenance
    paper, named = (
        select(MODEL, PROFILE, percentile=50, score=score) for score in (None, "mean_abs")
    )
    assert _keep(paper, "law") == _keep(named, "law")


def test_smaller_pathways_lie_in_larger_ones():
    kept = [_keep(select(MODEL, PROFILE, sparsity=s), "code") for s in (0.2, 0.5, 0.8)]
    for large, small in pairwise(kept):
        pairs = zip(chain(*large), chain(*small), strict=True)
        assert all(outer or not inner for outer, inner in pairs)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_ties_do_not_change_the_count(sparsity):
    pathways = select(MODEL, PROFILE, sparsity=sparsity, score=lambda block: 0 * block.down[0])
    assert _kept(pathways, "law") == [_count(sparsity, 48)] * BLOCKS


def _naive_percentile(blocks, percentile, pool):
    """Remove what scores below the percentile, by counting; keep each block's best."""
    masks = []
    everything = sorted(value for block in blocks for value in block)
    for block in blocks:
        ranked = sorted(block) if pool == "layer" else everything
        below = math.ceil(Fraction(percentile) * len(ranked) / 100)
        threshold = ranked[min(below, len(ranked) - 1)]
        masks.append([value >= threshold or value == max(block) for value in block])
    return masks


@pytest.mark.parametrize("pool", ["layer", "model"])
@pytest.mark.parametrize("percentile", [0, 10, 25, 50.0, 62.5, 75, 90, 99, 99.99])
def test_the_percentile_rule_equals_a_naive_one(percentile, pool):
    pathways = select(MODEL, PROFILE, percentile=percentile, pool=pool)
    for domain in PROFILE.domains:
        naive = _naive_percentile(_scores(domain, "mean_abs"), percentile, pool)
        assert _keep(pathways, domain) == naive


def test_a_users_function_is_given_the_block():
    given = []

    def smallest_mean(block):
        given.append(block)
        return -block.statistics.mean

    pathways = select(MODEL, PROFILE, sparsity=0.5, score=smallest_mean)
    for position, statistics in enumerate(PROFILE["law"].blocks):
        naive = _naive_best((-statistics.sum / statistics.tokens).tolist(), 0.5)
        assert pathways["law"].keep[position].tolist() == naive
    assert pathways["law"].provenance["method"] == "smallest_mean"
    assert all(isinstance(block, ScoreInput) for block in given)
    leaves = [block.outgoing.weight for block in find_blocks(MODEL)]
    for index, block in enumerate(given):
        assert block.down.dtype == torch.float32
        assert torch.equal(block.down, leaves[index % BLOCKS])


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_down_is_oriented_the_same_for_every_layout(architecture):
    model, shapes = build(architecture).bfloat16(), []

    def spy(block):
        shapes.append((tuple(block.down.shape), block.down.dtype))
        return block.statistics.mean

    select(model, random_profile(model, ["code"]), score=spy)
    expected = [((b.d_out, b.d_ff), torch.float32) for b in find_blocks(model)]
    assert shapes == expected


BAD_SCORES = {
    "short": lambda block: block.statistics.mean[:-1],
    "two dimensions": lambda block: block.statistics.mean[None],
    "list": lambda block: block.statistics.mean.tolist(),
    "None": lambda _: None,
    "NaN": lambda block: block.statistics.mean * NAN,
    "one NaN": lambda block: block.statistics.mean.clone().index_fill_(0, torch.tensor(3), NAN),
}


@pytest.mark.parametrize("kind", BAD_SCORES)
@pytest.mark.parametrize("rule", [{"sparsity": 0.5}, {"percentile": 50}])
def test_bad_scores_are_refused(kind, rule):
    with pytest.raises(PathwaysError, match="Score"):
        select(MODEL, PROFILE, score=BAD_SCORES[kind], **rule)


UNKNOWN = {
    "score": ({"score": "wanda2"}, "wanda"),
    "method": ({"method": "obss"}, "obs"),
    "allocation": ({"allocation": "unifrom"}, "uniform"),
    "order": ({"order": "sequentially"}, "sequential"),
    "precision": ({"precision": "bfloat"}, "bfloat16"),
    "domain": ({"sparsity": {"code": 0.5, "laws": 0.5}}, "law"),
    "score with a percentile": ({"score": "mean_ab", "percentile": 50}, "mean_abs"),
    "pool": ({"percentile": 50, "pool": "layers"}, "layer"),
    "model pool": ({"percentile": 50, "pool": "modle"}, "model"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_name_is_refused_with_a_hint(kind):
    options, hint = UNKNOWN[kind]
    with pytest.raises(UnknownNameError, match=rf"Did you mean '{hint}'\?"):
        select(MODEL, PROFILE, **options)


BAD_SPARSITY = [-0.1, 1.0, 1, True, NAN, float("inf"), -float("inf"), "x", "xxx", "0.3", {}, b"abc"]


@pytest.mark.parametrize("sparsity", BAD_SPARSITY, ids=repr)
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(PathwaysError, match="sparsit"):
        select(MODEL, PROFILE, sparsity=sparsity)


@pytest.mark.parametrize("sparsity", BAD_SPARSITY, ids=repr)
def test_a_sparsity_out_of_range_in_a_list_is_refused(sparsity):
    with pytest.raises(PathwaysError, match="sparsity"):
        select(MODEL, PROFILE, sparsity=[0.1, sparsity, 0.1])


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_list_of_another_length_is_refused_with_both_numbers(count):
    with pytest.raises(PathwaysError, match=rf"{count} sparsities .* {BLOCKS} FFN blocks"):
        select(MODEL, PROFILE, sparsity=[0.1] * count)


@pytest.mark.parametrize("percentile", [-1, 100, 150, NAN, float("inf"), "x", "50"], ids=repr)
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(PathwaysError, match="percentile"):
        select(MODEL, PROFILE, percentile=percentile)


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.3, "percentile": 50}, {"method": "obs", "score": "wanda"}], ids=str
)
def test_two_rules_are_refused(options):
    with pytest.raises(PathwaysError, match="not both"):
        select(MODEL, PROFILE, **options)


@pytest.mark.parametrize("pool", ["layer", "model", "modle"])
@pytest.mark.parametrize("sparsity", [None, 0.3, {"code": 0.3, "law": 0.3}], ids=str)
def test_a_pool_without_a_percentile_is_refused(pool, sparsity):
    with pytest.raises(PathwaysError, match=rf"'{pool}'.*give a percentile"):
        select(MODEL, PROFILE, sparsity=sparsity, pool=pool)


@pytest.mark.parametrize("multiple", [0, -1, 1.5, True, "8", None], ids=repr)
def test_a_multiple_that_is_none_is_refused(multiple):
    with pytest.raises(PathwaysError, match="multiple"):
        select(MODEL, PROFILE, multiple=multiple)


def test_each_domain_may_have_its_own_sparsity():
    pathways = select(MODEL, PROFILE, sparsity={"code": 0.25, "law": 0.75})
    assert _kept(pathways, "code") == [36] * BLOCKS
    assert _kept(pathways, "law") == [12] * BLOCKS
    assert _kept(pathways, POOLED) == [24] * BLOCKS
    with pytest.raises(PathwaysError, match="each of code, law"):
        select(MODEL, PROFILE, sparsity={"code": 0.25})


def test_the_control_can_be_left_out():
    alone = select(MODEL, PROFILE, controls=False)
    assert not alone.controls
    assert _keep(alone, "law") == _keep(select(MODEL, PROFILE), "law")


def test_random_is_seeded_and_differs_by_domain_and_block():
    first, again = (select(MODEL, PROFILE, sparsity=0.5, score="random") for _ in range(2))
    other = select(MODEL, PROFILE, sparsity=0.5, score="random", seed=1)
    assert _keep(first, "code") == _keep(again, "code")
    assert _keep(first, "code") != _keep(other, "code")
    masks = [tuple(mask) for name in ("code", "law", POOLED) for mask in _keep(first, name)]
    assert len(set(masks)) == len(masks)


def test_random_does_not_depend_on_the_statistics_or_other_domains():
    alone = select(MODEL, random_profile(MODEL, ["law"], seed=9), score="random")
    assert _keep(alone, "law") == _keep(select(MODEL, PROFILE, score="random"), "law")


def test_selecting_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    python = random.getstate()
    select(MODEL, PROFILE, score="random")
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


@pytest.mark.parametrize(
    "rule", [{"sparsity": 0.3}, {"percentile": 60}, {"percentile": 60, "pool": "model"}]
)
def test_the_pooled_control_is_selected_from_all_text_together(rule):
    tokenizer = tiny_tokenizer()
    texts = {name: documents(name, 6, words) for name, words in (("code", 9), ("law", 25))}
    options = {"max_length": 64, "batch_size": 1, "grams": False}
    apart = profile(MODEL, tokenizer, texts, **options)
    together = profile(MODEL, tokenizer, {"all": [*chain(*texts.values())]}, **options)
    pathways = select(MODEL, apart, **rule)
    assert pathways.domains == ["code", "law"]
    assert list(pathways.controls) == [POOLED]
    assert _keep(pathways, POOLED) == _keep(select(MODEL, together, **rule), "all")
    text = pathways[POOLED].provenance["text"]
    assert text["tokens"] == together["all"].tokens
    assert text["digests"] == together["all"].provenance["digests"]


def test_one_domain_has_no_pooled_control():
    assert not select(MODEL, random_profile(MODEL, ["law"])).controls


def test_a_profile_of_another_model_is_refused_with_both_shapes():
    other = build("gpt2")
    with pytest.raises(MismatchError) as caught:
        select(MODEL, random_profile(other))
    message = str(caught.value)
    for part in ("gpt2 with 3 FFN blocks", "d_ff 128", "llama with 3 FFN blocks", "d_ff 48"):
        assert part in message


def test_a_profile_of_other_widths_is_refused_with_the_first_difference():
    blocks = list(PROFILE.base.blocks)
    blocks[1] = replace(blocks[1], d_ff=47)
    other = Profile(base=replace(PROFILE.base, blocks=tuple(blocks)), by_domain=PROFILE.by_domain)
    with pytest.raises(MismatchError, match=r"layers\.1\..*32 -> 47.*32 -> 48"):
        select(MODEL, other)


def test_the_provenance_says_how_and_from_what():
    pathways = select(MODEL, PROFILE, percentile=50, pool="model", seed=3)
    for domain in PROFILE.domains:
        assert pathways[domain].provenance == {
            "method": "mean_abs",
            "allocation": "percentile",
            "compensation": "none",
            "ridge": 0.01,
            "order": "one-shot",
            "multiple": 1,
            "precision": "model",
            "percentile": 50,
            "pool": "model",
            "seed": 3,
            "text": PROFILE[domain].provenance,
        }
    assert pathways[POOLED].provenance["text"]["digests"] == ["code1", "code2", "law1", "law2"]
    json.dumps(pathways["code"].provenance, allow_nan=False)


@pytest.mark.parametrize("score", SCORES)
def test_selecting_is_pure_and_fits_the_model(score):
    texts = {name: documents(name, 4, 20) for name in ("code", "law")}
    taken = profile(MODEL, tiny_tokenizer(), texts, max_length=64, grams=False)
    weights, given = copy.deepcopy(MODEL.state_dict()), copy.deepcopy(taken)
    pathways = select(MODEL, taken, score=score, compensation="none")
    assert isinstance(pathways, Pathways)
    pathways.check_fits(MODEL)
    assert _kept(pathways, "law") == [_count(DEFAULT_SPARSITY, 48)] * BLOCKS
    assert all(torch.equal(MODEL.state_dict()[name], weights[name]) for name in weights)
    for domain in given.domains:
        for mine, theirs in zip(taken[domain].blocks, given[domain].blocks, strict=True):
            assert torch.equal(mine.abs_sum, theirs.abs_sum)


@pytest.mark.parametrize("name", ["sum", "abs_max"])
@pytest.mark.parametrize("score", ["wanda", "random"])
def test_nan_in_any_statistic_is_refused(name, score):
    blocks = list(PROFILE["law"].blocks)
    bad = getattr(blocks[1], name).clone()
    bad[3] = math.nan
    blocks[1] = replace(blocks[1], **{name: bad})
    law = replace(PROFILE["law"], blocks=tuple(blocks))
    profile = replace(PROFILE, by_domain={"law": law})
    with pytest.raises(PathwaysError, match=f"{name} holds 1 values that are NaN"):
        select(MODEL, profile, score=score)


@pytest.mark.parametrize("make", [torch.tensor, numpy.array, tuple])
def test_sparsities_in_any_container(make):
    listed = select(MODEL, PROFILE, sparsity=[0.0, 0.25, 0.5])
    made = select(MODEL, PROFILE, sparsity=make([0.0, 0.25, 0.5]))
    assert _keep(made, "law") == _keep(listed, "law")


def test_a_users_score_cannot_write_into_the_model_or_the_profile():
    model = tiny_llama()
    taken = random_profile(model)
    weights = [p.clone() for p in model.parameters()]
    sums = [block.abs_sum.clone() for block in taken["code"].blocks]

    def greedy(given):
        given.down.square_()
        given.incoming.zero_()
        given.statistics.abs_sum.neg_()
        return given.down.sum(0)

    select(model, taken, sparsity=0.5, method=greedy)
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(map(torch.equal, (b.abs_sum for b in taken["code"].blocks), sums))
