"""Experiments against plain pruned copies, and the report of an analysis."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import TextError, UnknownNameError
from hf_sparse_pathways.measure import paper
from hf_sparse_pathways.measure.analysis import analyse
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
from hf_sparse_pathways.measure.specialisation import (
    activation_ratios,
    measure_specialisation,
)
from tests.architectures import build, tiny_llama, zeroed
from tests.measure.profiles import skewed_profile
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZE = ModelSize(parameters=1000, ffn=600, experts=0, other=300, head=100)
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


def test_text_without_spaces_can_be_measured_on(taken):
    fresh, excluded = unseen(taken, "code", read_documents(["神经元只在需要的时候才计算"]))
    assert (len(fresh.items), excluded) == (1, 0)


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
    assert shuffled_profile(tiny_llama(), TOKENIZER, skewed_profile()) is None


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
    text = to_markdown(analyse(skewed_profile(), SIZE))
    assert "No experiments were run" in text
    assert text.count("not measured") >= 2
