"""Pathways selected and repaired from a whole profile: the same however one comes by them."""

import copy
import logging
import random
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import obs
from hf_sparse_pathways.discovery.layerwise import LayerRunner
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.trials import computing
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.pathways.pathway import Pathways
from tests.architectures import build, compensate, prompt, random_masks
from tests.discovery.untouched import remember
from tests.texts import documents, tiny_tokenizer

TEXTS = {"code": documents("code", 14, 20), "law": documents("law", 8, 12)}
REPAIR = "patch:3+bias+bypass:2"
IDS = prompt()


def _take(model, **options):
    options = {"max_length": 32, "max_tokens": 150, **options}
    return profile(model, tiny_tokenizer(), TEXTS, **options)


@pytest.fixture(autouse=True)
def _in_few_steps(monkeypatch):
    monkeypatch.setattr(obs, "STEPS", 6)  # these models' time goes into them


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def case(request):
    model = build(request.param)
    return model, _take(model)


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    return model, _take(model)


def _assert_equal(mine, theirs):
    assert mine.domains == theirs.domains
    assert list(mine.controls) == list(theirs.controls)
    for name in (*mine.domains, *mine.controls):
        for one, other in zip(mine[name].blocks, theirs[name].blocks, strict=True):
            parts, others = one.parts(), other.parts()
            assert parts.keys() == others.keys()
            assert all(torch.equal(part, others[key]) for key, part in parts.items())


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
@pytest.mark.parametrize("there", [["law"], ["code", "law"]])
def test_pathways_that_are_there_are_taken_and_the_others_are_as_ever(case, order, there):
    model, taken = case
    options = {"order": order, "sparsity": 0.5, "allocation": "uniform"}
    whole = select(model, taken, **options)
    made = {name: whole[name] for name in there}
    rest = select(model, taken, made=made, **options)
    _assert_equal(whole, rest)
    assert all(rest[name] is whole[name] for name in there)


def test_a_pathway_that_is_there_under_an_unknown_name_is_refused(llama):
    whole = select(*llama, order="one-shot")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'code'\?"):
        select(*llama, made={"cod": whole["code"]})


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_selecting_twice_gives_the_same_and_leaves_the_model_as_it_was(case, order):
    model, taken = case
    check, state = remember(model), torch.get_rng_state()
    python = random.getstate()
    first, again = (
        select(of, taken, order=order, compensation=REPAIR, seed=3)
        for of in (model, copy.deepcopy(model))
    )
    _assert_equal(first, again)
    assert first["law"].provenance == again["law"].provenance
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    check()


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_a_model_with_pathways_gives_those_of_its_dense_form(case, order):
    model, taken = case
    other = compensate(model, random_masks(model))
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model, other, default_domain="law")
    expected = select(model, taken, order=order)
    _assert_equal(select(sparse, taken, order=order), expected)
    with sparse.pathway("code"):
        _assert_equal(select(sparse, taken, order=order), expected)
    _assert_equal(sparse.pathways, other)


def test_a_loaded_profile_and_loaded_pathways_are_the_same(case, tmp_path):
    model, taken = case
    taken.save_pretrained(tmp_path / "profile")
    loaded = Profile.from_pretrained(tmp_path / "profile")
    pathways = select(model, taken, compensation=REPAIR)
    _assert_equal(select(model, loaded, compensation=REPAIR), pathways)
    pathways.save_pretrained(tmp_path / "pathways")
    read = Pathways.from_pretrained(tmp_path / "pathways")
    _assert_equal(read, pathways)
    assert read["law"].provenance == pathways["law"].provenance


@torch.no_grad()
def _divergence(model, windows, pathways):
    """Return the mean KL divergence of pathways' predictions from the dense model's."""
    total = []
    for window in windows:
        ids = torch.tensor([window.ids])
        dense = model(ids).logits.log_softmax(-1)
        with computing(find_blocks(model), pathways):
            sparse = model(ids).logits.log_softmax(-1)
        total.append((dense.exp() * (dense - sparse)).sum(-1).flatten())
    return float(torch.cat(total).mean())


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_repair_brings_predictions_nearer_to_the_dense_models(case, order):
    model, taken = case
    options = {"order": order, "sparsity": 0.5, "allocation": "uniform", "controls": False}
    none, *others = (
        _divergence(
            model,
            taken["code"].windows,
            select(model, taken, compensation=parts, **options)["code"].blocks,
        )
        for parts in ("none", "refit+bias+bypass:4", "patch:8+bias")
    )
    assert max(others) < none


@torch.no_grad()
def test_executors_agree_about_selected_pathways(case):
    model, taken = case
    pathways = select(model, taken, compensation="refit+bias+bypass:2")
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model, pathways)
    logits = []
    for executor in ("masked", "compact"):
        sparse.set_executor(executor)
        logits.append(sparse(IDS, domain="law").logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_the_default_is_obs_in_sequence_where_the_profile_allows_it(llama):
    model, taken = llama
    provenance = select(model, taken)["code"].provenance
    assert (provenance["method"], provenance["order"]) == ("obs", "sequential")
    assert (provenance["sparsity"], provenance["compensation"]) == (0.3, "refit+bias")
    assert provenance["text"] == taken["code"].provenance
    provenance = select(model, _take(model, grams=False))["code"].provenance
    assert (provenance["method"], provenance["order"]) == ("wanda", "one-shot")
    assert provenance["compensation"] == "none"


def test_that_a_profile_decides_against_obs_is_said(llama, caplog):
    model, taken = llama
    silent = _take(model, grams=False)
    caplog.clear()
    select(model, taken, sparsity=0.3)
    select(model, silent, sparsity=0.3, method="wanda")
    select(model, silent, percentile=50)
    assert caplog.text == ""
    select(model, silent, sparsity=0.3)
    assert caplog.text.count("neurons are chosen by 'wanda' instead") == 1


def _without(taken, **parts):
    by_domain = {name: replace(taken[name], **parts) for name in taken.domains}
    return replace(taken, by_domain=by_domain)


def test_without_the_texts_tokens_blocks_are_repaired_at_once(llama):
    model, taken = llama
    silent = _without(taken, windows=())
    pathways = select(model, silent)
    assert pathways["code"].provenance["order"] == "one-shot"
    assert pathways["code"].provenance["allocation"] == "uniform"
    assert all(block.compensated for block in pathways["code"].blocks)
    with pytest.raises(PathwaysError, match=r"'code'.*tokens.*order='one-shot'"):
        select(model, silent, order="sequential")


def test_only_one_domain_without_tokens_is_named(llama):
    model, taken = llama
    law = replace(taken["law"], windows=())
    partly = replace(taken, by_domain={**taken.by_domain, "law": law})
    assert select(model, partly)["code"].provenance["order"] == "one-shot"
    with pytest.raises(PathwaysError, match="'law'"):
        select(model, partly, order="sequential")


@pytest.mark.parametrize("options", [{"method": "obs"}, {"compensation": "refit"}], ids=str)
def test_without_grams_repair_is_a_clear_error(llama, options):
    model, taken = llama
    with pytest.raises(PathwaysError, match=r"Gram matrices.*grams=True"):
        select(model, _without(taken, grams=()), **options)


def test_without_tokens_saliency_is_a_clear_error(llama):
    model, taken = llama
    with pytest.raises(PathwaysError, match="gradients"):
        select(model, _without(taken, windows=()), method="taylor")


def _refuse(monkeypatch):
    def check(*_):
        raise UnsupportedModelError("layers cannot be run alone")

    monkeypatch.setattr(LayerRunner, "check", check)


def test_a_model_whose_layers_cannot_be_run_alone_is_repaired_at_once(llama, monkeypatch, caplog):
    _refuse(monkeypatch)
    model, taken = llama
    with caplog.at_level(logging.WARNING):
        pathways = select(model, taken)
    assert "layers cannot be run alone" in caplog.text
    _assert_equal(pathways, select(model, taken, order="one-shot"))
    assert pathways["code"].provenance["order"] == "one-shot"
    with pytest.raises(UnsupportedModelError, match="alone"):
        select(model, taken, order="sequential")


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_a_users_score_chooses_and_is_repaired(llama, order):
    model, taken = llama

    def last(block):
        return torch.arange(block.down.shape[1])

    pathways = select(model, taken, method=last, order=order, sparsity=0.5, compensation="refit")
    for block in pathways["law"].blocks:
        assert block.keep.tolist() == [False] * 24 + [True] * 24
        assert block.delta.abs().max() > 0


def test_a_score_that_cannot_be_hashed_is_a_function_too(llama):
    class Last:
        __hash__ = None

        def __call__(self, block):
            return torch.arange(block.down.shape[1])

    assert select(*llama, method=Last(), sparsity=0.5)["law"].keep[0].tolist()[-24:] == [True] * 24


OTHER_SETTINGS = [{"seed": 1}, {"precision": "bfloat16"}, {"compensation": "bypass:3"}]


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
@pytest.mark.parametrize("other", OTHER_SETTINGS, ids=str)
def test_what_was_selected_before_decides_nothing(llama, other, order):
    model, taken = (copy.deepcopy(part) for part in llama)
    select(model, taken, order=order)
    fresh = select(copy.deepcopy(model), copy.deepcopy(taken), order=order, **other)
    _assert_equal(select(model, taken, order=order, **other), fresh)


@pytest.mark.parametrize("method", ["obs", "taylor"])
def test_weights_that_have_changed_since_are_seen(llama, method):
    model, taken = (copy.deepcopy(part) for part in llama)
    options = {"method": method, "order": "one-shot", "controls": False}
    before = select(model, taken, **options)
    with torch.no_grad():
        for block in find_blocks(model):
            block.outgoing.weight.mul_(torch.rand(48) * 3)
    after = select(model, taken, **options)
    _assert_equal(after, select(copy.deepcopy(model), copy.deepcopy(taken), **options))
    assert not torch.equal(after["code"].keep[0], before["code"].keep[0])


@pytest.mark.parametrize("scope", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_selecting_works_in_any_gradient_mode(llama, scope):
    model, taken = llama
    fresh = copy.deepcopy(model)  # nothing is known of it yet
    with scope():
        inside = select(fresh, taken, controls=False)
    _assert_equal(inside, select(model, taken, controls=False))


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_half_precision_gives_about_the_same(llama, order):
    model, taken = llama
    options = {"order": order, "allocation": "uniform", "controls": False, "sparsity": 0.5}
    exact = select(model, taken, **options)
    half = copy.deepcopy(model).bfloat16()
    windows = taken["code"].windows
    expected = _divergence(model, windows, exact["code"].blocks)
    for pathways in (
        select(model, taken, precision="bfloat16", **options),
        select(half, _take(half), **options),
    ):
        kept = zip(pathways["code"].keep, exact["code"].keep, strict=True)
        same = torch.cat([mine == theirs for mine, theirs in kept]).float().mean()
        assert same > 0.6
        assert _divergence(model, windows, pathways["code"].blocks) < 1.5 * expected


def test_the_pooled_control_sees_equal_parts_of_domains_of_different_size(llama):
    model, taken = llama
    assert taken["code"].tokens != taken["law"].tokens
    pathways = select(model, taken)
    text = pathways["pooled"].provenance["text"]
    assert text["tokens"] == taken["code"].tokens + taken["law"].tokens
    assert pathways.flops("pooled") <= 0.7 + 1e-9


def test_pathways_of_one_domain_do_not_depend_on_the_others(llama):
    model, taken = llama
    together, alone = (select(model, part) for part in (taken, taken.subset(["law"])))
    for one, other in zip(together["law"].blocks, alone["law"].blocks, strict=True):
        assert all(torch.equal(part, other.parts()[key]) for key, part in one.parts().items())
