"""Which experts domains use, beside counting by hand; models restricted to some of them."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.linear_experts import sgatlin_layers
from tests.architectures import LLAMA_LIKE, build, prompt
from tests.sgatlin import oracles
from tests.texts import documents, tiny_tokenizer

IDS = prompt()
TEXTS = {name: documents(name, count=6) for name in ("code", "law")}
TOKENIZER = tiny_tokenizer()


def make_sgatlin(router="product_dense"):
    torch.manual_seed(0)
    ffn = sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=3, d_key=8, router=router)
    config = sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), ffn=ffn)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in sgatlin_layers(model):
            layer.v.mul_(5.0)
    return model


@pytest.fixture(scope="module")
def model():
    return make_sgatlin()


@pytest.fixture(scope="module")
def usage(model):
    return sp.measure_experts(model, TOKENIZER, TEXTS, max_tokens=150, max_length=16, batch_size=3)


@torch.no_grad()
def test_counts_are_those_of_one_window_at_a_time(model):
    texts = {"code": TEXTS["code"][:2]}
    found = sp.measure_experts(model, TOKENIZER, texts, max_length=64, batch_size=2)
    layer, seen = sgatlin_layers(model)[1], []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for text in texts["code"]:
        model(TOKENIZER(text, return_tensors="pt")["input_ids"])
    hook.remove()
    x = torch.cat(seen)
    chosen, added = torch.zeros(2, 16).double(), torch.zeros(2, 16).double()
    scores, index = layer.route(x)
    for t in range(len(x)):
        for c in range(2):
            for s, i in zip(scores[t, c], index[t, c], strict=True):
                chosen[c, i] += 1
                added[c, i] += (s * (layer.u[c, i] @ x[t]) * layer.v[c, i]).norm()
    own = found.by_domain["code"][1]
    assert found.tokens["code"] == len(x)
    torch.testing.assert_close(own.chosen, chosen / len(x))
    torch.testing.assert_close(own.added, added / len(x), rtol=1e-4, atol=1e-6)


def test_every_token_chooses_top_k_of_each_channel(usage):
    for layers in usage.by_domain.values():
        for own in layers:
            assert torch.allclose(own.chosen.sum(1), torch.full((2,), 3.0).double())
    assert all(0 < tokens <= 150 for tokens in usage.tokens.values())
    assert all(3 / 16 <= share <= 1 for share in usage.utilisation("code"))
    assert all(0 <= share <= 1 for share in usage.specialisation())


def test_a_domain_s_experts_add_most(usage):
    for own, kept in zip(usage.by_domain["law"], usage.experts("law", 0.5), strict=True):
        assert (kept.sum(1) == 8).all()
        for channel in range(2):
            inside, outside = own.added[channel][kept[channel]], own.added[channel][~kept[channel]]
            assert inside.min() >= outside.max()
    assert all((kept.sum(1) == 3).all() for kept in usage.experts("law", 0.01)), "top_k at least"
    (pair,) = usage.overlaps(0.5)
    assert 0 <= pair.jaccard <= 1
    assert pair.chance == pytest.approx(1 / 3)
    sizes = [kept.sum() for kept in usage.random(0.5)]
    assert sizes == [kept.sum() for kept in usage.pooled(0.5)]


def test_what_does_not_fit_is_refused(model, usage):
    with pytest.raises(sp.PathwaysError, match="Did you mean 'code'"):
        usage.experts("cod", 0.5)
    with pytest.raises(sp.PathwaysError, match="share has to be"):
        usage.experts("code", 0.0)
    with pytest.raises(sp.PathwaysError, match="no sgatlin layers"):
        sp.measure_experts(build("llama"), TOKENIZER, TEXTS)
    with pytest.raises(sp.PathwaysError, match="No domains"):
        sp.measure_experts(model, TOKENIZER, {})
    one = sp.measure_experts(model, TOKENIZER, {"code": TEXTS["code"]}, max_tokens=20)
    with pytest.raises(sp.PathwaysError, match="at least two"):
        one.specialisation()
    sets = usage.experts("code", 0.5)
    few = [kept & (torch.arange(16) < 2) for kept in sets]
    for wrong, message in (
        (sets[:2], "3 sgatlin layers, and 2 sets"),
        ([kept[:, :4] for kept in sets], r"bool of shape \(2, 16\)"),
        ([kept.float() for kept in sets], "bool"),
        (few, "a token gets 3 of each channel"),
    ):
        with pytest.raises(sp.PathwaysError, match=message), sp.restrict_experts(model, wrong):
            pass


# -- restricted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["product_dense", "product_key", "dense"])
@torch.no_grad()
def test_a_layer_takes_the_best_of_the_allowed(router):
    model = make_sgatlin(router)
    layer, x = sgatlin_layers(model)[0], torch.randn(9, 32)
    sets = [torch.rand(2, 16, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(3)]
    free = layer(x)
    raw = layer.all_scores(x)
    with sp.restrict_experts(model, sets):
        scores, index = layer.route(x)
        best = raw.masked_fill(~sets[0], -torch.inf).topk(3)
        assert torch.equal(scores, best.values)
        assert torch.equal(index, best.indices)
        torch.testing.assert_close(layer(x), oracles.sgatlin(layer, x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(layer(x), free)
    assert torch.equal(layer(x), free)


@torch.no_grad()
def test_all_experts_are_no_restriction(model):
    sets = [torch.ones(2, 16, dtype=torch.bool)] * 3
    expected = model(IDS).logits
    with sp.restrict_experts(model, sets):
        assert torch.allclose(model(IDS).logits, expected, atol=1e-6)


@torch.no_grad()
def test_generation_with_cache_is_that_without(model, usage):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with sp.restrict_experts(model, usage.experts("code", 0.25)):
        found = model.generate(IDS, **settings)
        assert torch.equal(found, model.generate(IDS, use_cache=False, **settings))


@torch.no_grad()
def test_scopes_end_nest_and_stay_on_their_thread(model, usage):
    code, law = (usage.experts(name, 0.25) for name in ("code", "law"))
    outputs = {}
    for name, sets in (("code", code), ("law", law)):
        with sp.restrict_experts(model, sets):
            outputs[name] = model(IDS).logits
    free = model(IDS).logits
    assert not torch.equal(outputs["code"], outputs["law"])
    elsewhere = []
    with sp.restrict_experts(model, code):
        thread = threading.Thread(target=lambda: elsewhere.append(model(IDS).logits.detach()))
        thread.start()
        thread.join()
        with sp.restrict_experts(model, law):
            assert torch.equal(model(IDS).logits, outputs["law"])
        assert torch.equal(model(IDS).logits, outputs["code"])
    assert torch.equal(elsewhere[0], free)
    assert torch.equal(model(IDS).logits, free)


def _fail_within(model, sets):
    with sp.restrict_experts(model, sets):
        raise KeyError


@torch.no_grad()
def test_a_scope_ends_with_an_error(model, usage):
    free = model(IDS).logits
    with pytest.raises(KeyError):
        _fail_within(model, usage.experts("code", 0.25))
    assert torch.equal(model(IDS).logits, free)


def test_no_gradients_are_taken_under_a_restriction(model, usage):
    with sp.restrict_experts(model, usage.experts("code", 0.25)):
        assert not model(IDS, labels=IDS).loss.requires_grad
    assert model(IDS, labels=IDS).loss.requires_grad
