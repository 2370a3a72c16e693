"""Domains of sgatlin models beside plain models that are restricted by hand, in all forms."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.modeling.replacement import find_layers
from hf_sparse_pathways.sgatlin import routers
from tests.architectures import build, prompt
from tests.by_rows import assert_rows_with_padding
from tests.modeling.test_generate import FORMS, _generate
from tests.sgatlin import oracles
from tests.sgatlin.models import CHANNELS, EXPERTS, make_sgatlin, random_pathways, restricted

IDS = prompt(3, 9)


def attach(model, names=("code", "law")):
    """Return a model with pathways, and a plain restricted one per domain."""
    pathways = random_pathways(model, names)
    references = {name: restricted(model, pathways[name]) for name in names}
    return sp.SparsePathwaysForCausalLM.from_dense(model, pathways), {**references, None: model}


@pytest.fixture(scope="module")
def case():
    return attach(make_sgatlin())


def _difference(left, right):
    return (left - right).abs().max().item()


# -- forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["product_dense", "product_key", "dense"])
@torch.no_grad()
def test_a_layer_takes_the_best_of_the_kept(router):
    model, references = attach(make_sgatlin(router))
    layer, x = find_layers(model)[0], torch.randn(9, 32)
    keep = model.pathways["code"].experts[0].keep.view(CHANNELS, EXPERTS)
    raw = layer.all_scores(x)
    with model.pathway("code"):
        scores, index = layer.route(x)
        best = raw.masked_fill(~keep, -torch.inf).topk(3)
        assert torch.equal(scores, best.values)
        assert torch.equal(index, best.indices)
        torch.testing.assert_close(layer(x), oracles.sgatlin(layer, x), rtol=1e-4, atol=1e-5)
    for name, reference in references.items():
        assert torch.equal(model(IDS, domain=name).logits, reference(IDS).logits)
        assert (
            name is None or _difference(reference(IDS).logits, references[None](IDS).logits) > 0.1
        )


@torch.no_grad()
def test_rows_choose_their_own(case):
    model, references = case
    for rows in (["code", None, "law"], ["law", "law", "code"]):
        logits = model(IDS, domain=rows).logits
        for row, name in enumerate(rows):
            assert _difference(logits[row], references[name](IDS).logits[row]) < 1e-5


@torch.no_grad()
def test_scores_are_held_of_some_tokens_at_a_time(case, monkeypatch):
    model, _ = case
    expected = [model(IDS, domain=domain).logits for domain in ("code", ["code", None, "law"])]
    monkeypatch.setattr(routers, "_MOST_SCORES", 5 * CHANNELS * EXPERTS)
    for domain, logits in zip(("code", ["code", None, "law"]), expected, strict=True):
        assert _difference(model(IDS, domain=domain).logits, logits) < 1e-5


def test_all_experts_are_the_model_itself(case):
    model, references = case
    whole = [sp.KeptExperts(keep=torch.ones(CHANNELS * EXPERTS, dtype=torch.bool))] * 3
    every = model.pathways.with_experts({"code": whole})
    model = sp.SparsePathwaysForCausalLM.from_dense(references[None], every)
    with torch.no_grad():
        expected = references[None](IDS).logits
        assert _difference(model(IDS, domain="code").logits, expected) < 1e-6


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_restricted_model(checkpointed):
    model, references = attach(make_sgatlin())
    reference = references["code"].train()
    reference(IDS, labels=IDS, use_cache=False).loss.backward()
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    model(IDS, labels=IDS, domain="code", use_cache=False).loss.backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert _difference(parameter.grad, expected[name].grad) < 1e-6, name
    kept = model.pathways["code"].experts[0].keep
    assert (find_layers(model)[0].u.grad.flatten(0, 1)[~kept] == 0).all()


@torch.no_grad()
def test_compiles(case):
    model, references = case
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with model.pathway("code"):
        found = compiled(IDS, use_cache=False).logits
    torch._dynamo.reset()
    assert _difference(found, references["code"](IDS).logits) < 1e-5


# -- generate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_generation(case, form):
    model, references = case
    ids = IDS[:1] if form == "prompt_lookup" else IDS
    for name in ("code", "law"):
        expected = _generate(references[name], ids, **FORMS[form])
        assert torch.equal(_generate(model, ids, domain=name, **FORMS[form]), expected)


@pytest.mark.parametrize("form", ["greedy", "beams"])
def test_rows_of_several_domains_with_padding(case, form):
    model, references = case
    assert_rows_with_padding(model, references, ["law", None, "code"], IDS, form)


def test_threads_choose_apart(case):
    model, references = case
    names = ("code", "law", None)
    expected = {name: _generate(references[name], IDS) for name in names}
    found = {}

    def run(number):
        found[number] = _generate(model, IDS, domain=names[number % 3])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(output, expected[names[n % 3]]) for n, output in found.items())


@torch.no_grad()
def test_ambient_and_default_domain(case):
    model, references = case
    expected = references["law"](IDS).logits
    with model.pathway("law"):
        assert torch.equal(model(IDS).logits, expected)
    model.config.default_domain = "law"
    assert torch.equal(model(IDS).logits, expected)
    model.config.default_domain = None
    assert torch.equal(model(IDS).logits, references[None](IDS).logits)


# -- saved, loaded, copied -----------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded(case, tmp_path):
    model, references = case
    model.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM, sp.SparsePathwaysForCausalLM, type(model)):
        again = load.from_pretrained(tmp_path, default_domain="law")
        assert again.domains == ["code", "law"]
        for name, reference in references.items():
            assert torch.equal(again(IDS, domain=name).logits, reference(IDS).logits)
        assert torch.equal(again(IDS).logits, references["law"](IDS).logits)
    headless = AutoModel.from_pretrained(tmp_path)
    expected = references["code"].model(IDS).last_hidden_state
    assert torch.equal(headless(IDS, domain="code").last_hidden_state, expected)
    apart = tmp_path / "apart"
    model.pathways.save_pretrained(apart)
    bare = tmp_path / "bare"
    references[None].save_pretrained(bare)
    again = AutoModelForCausalLM.from_pretrained(bare, pathways=apart)
    assert torch.equal(again(IDS, domain="code").logits, references["code"](IDS).logits)
    assert AutoModelForCausalLM.from_pretrained(bare).domains == []


@torch.no_grad()
def test_one_domain_is_loaded_alone(case, tmp_path):
    model, references = case
    model.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    assert torch.equal(alone(IDS).logits, references["code"](IDS).logits)
    assert torch.equal(_generate(alone, IDS), _generate(references["code"], IDS))
    gone = sum(int((~kept.keep).sum()) for kept in model.pathways["code"].experts)
    assert model.num_parameters() - alone.num_parameters() == gone * 2 * 32
    for domain in ("law", None):
        with pytest.raises(sp.PathwaysError, match="only"):
            alone(IDS, domain=domain)


@torch.no_grad()
def test_copies_and_the_model_without_pathways(case):
    model, references = case
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS, domain="code").logits, references["code"](IDS).logits)
        find_layers(other)[0].v.zero_()
        assert not torch.equal(other(IDS, domain="code").logits, references["code"](IDS).logits)
    bare = model.to_dense()
    assert bare.domains == bare.config.domains == []
    assert model.domains == ["code", "law"]
    assert torch.equal(bare(IDS).logits, references[None](IDS).logits)
    assert find_layers(bare)[0].u is find_layers(model)[0].u
    bare.set_pathways(model.pathways.subset(["law"]))
    assert torch.equal(bare(IDS, domain="law").logits, references["law"](IDS).logits)
    assert torch.equal(model(IDS, domain="code").logits, references["code"](IDS).logits)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "qwen3_moe", "opt"])
@torch.no_grad()
def test_other_architectures(name, tmp_path):
    if name == "qwen3_moe":  # routed experts stand beside
        plain = make_sgatlin(base=build(name).config)
        pathways = random_pathways_of_all(plain)
        model = sp.SparsePathwaysForCausalLM.from_dense(plain, pathways)
    else:
        model, references = attach(make_sgatlin(base=build(name).config))
        expected = references["code"](IDS).logits
        assert torch.equal(model(IDS, domain="code").logits, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    found, free = again(IDS, domain="code").logits, again(IDS).logits
    assert _difference(found, model(IDS, domain="code").logits) < 1e-5
    assert _difference(found, free) > 1e-3


def random_pathways_of_all(model):
    """Return a pathway that keeps the first half of every layer's experts, routed ones too."""
    from hf_sparse_pathways.pathways.base import BaseModel
    from hf_sparse_pathways.pathways.pathway import Pathway

    base = BaseModel.of(model)
    experts = []
    for shape in base.experts:
        keep = torch.zeros(shape.channels, shape.experts // shape.channels, dtype=torch.bool)
        keep[:, : keep.shape[1] // 2] = True
        experts.append(sp.KeptExperts(keep=keep.flatten()))
    assert {shape.channels for shape in base.experts} == {1, CHANNELS}
    return sp.Pathways(base=base, by_domain={"code": Pathway(blocks=(), experts=tuple(experts))})


# -- what does not fit ---------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(case):
    model, references = case
    with pytest.raises(sp.PathwaysError, match="Did you mean 'code'"):
        model(IDS, domain="cod")
    with pytest.raises(sp.PathwaysError, match="2 entries, but the batch has 3"):
        model(IDS, domain=["code", "law"])
    bare = references[None]
    for use in (
        lambda: bare(IDS, domain="code"),
        lambda: bare.generate(IDS, domain=["code", None, None]),
        lambda: bare.generate(IDS, domain="auto"),
        lambda: bare.pathways,
        lambda: bare.pathway("code").__enter__(),
    ):
        with pytest.raises(sp.PathwaysError, match="sgatlin layers"):
            use()
    with pytest.raises(sp.PathwaysError, match="use set_pathways"):
        sp.SparsePathwaysForCausalLM.from_dense(model, model.pathways)
    with pytest.raises(sp.PathwaysError, match="no plain architecture has"):
        sp.export(model, "code", "nowhere")
    other = random_pathways(make_sgatlin("dense", build("opt").config))
    with pytest.raises(sp.PathwaysError, match="Made for"):
        model.set_pathways(other)
    keep = torch.zeros(CHANNELS, EXPERTS, dtype=torch.bool)
    keep[0] = True
    keep[1, :2] = True
    with pytest.raises(sp.PathwaysError, match=r"keeps 2 experts, but a token has 3 of each"):
        model.pathways.with_experts({"code": [sp.KeptExperts(keep=keep.flatten())] * 3})
    neurons = torch.ones(CHANNELS * EXPERTS, 1, dtype=torch.bool)
    kept = sp.KeptExperts(keep=neurons[:, 0], neurons=neurons)
    with pytest.raises(sp.PathwaysError, match="single neurons"):
        model.pathways.with_experts({"code": [kept] * 3})
