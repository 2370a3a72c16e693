"""Which domain holds: named, ambient, default, or none; and that nothing leaks out of a scope."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn import choices
from tests.architectures import build, prompt, random_masks, zeroed

IDS = prompt()


@pytest.fixture(scope="module")
def parts():
    dense = build("llama")
    masks = random_masks(dense)
    with torch.no_grad():
        expected = {name: zeroed(dense, keep)(IDS).logits for name, keep in masks.items()}
        expected[None] = dense(IDS).logits
    return dense, sp.Pathways.from_masks(dense, masks), expected


@pytest.fixture(params=[None, "law"])
def case(request, parts):
    dense, paths, expected = parts
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, default_domain=request.param)
    return model, request.param, expected


def _runs(model, expected, **arguments):
    """Return the name of the pathway whose logits a call gives."""
    with torch.no_grad():
        logits = model(IDS, **arguments).logits
    close = [name for name, value in expected.items() if torch.allclose(logits, value, atol=1e-5)]
    assert len(close) == 1
    return close[0]


def test_precedence(case):
    model, default, expected = case
    assert _runs(model, expected) == default
    assert _runs(model, expected, domain=None) is None
    assert _runs(model, expected, domain="code") == "code"
    with model.pathway("code"):
        assert _runs(model, expected) == "code"
        assert _runs(model, expected, domain=None) is None
        assert _runs(model, expected, domain="law") == "law"
        with model.pathway(None):
            assert _runs(model, expected) is None
        assert _runs(model, expected) == "code"
    assert _runs(model, expected) == default


@pytest.mark.parametrize("wrong", ["cde", ["code", "cde"]])
def test_an_unknown_domain_is_told_the_domains_and_controls_go_on(parts, wrong):
    dense, paths, expected = parts
    paths = paths.with_controls({"pooled": paths["law"]})
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    with pytest.raises(sp.PathwaysError) as caught:
        model(IDS, domain=wrong)
    assert str(caught.value).endswith("Did you mean 'code'? Known: 'code', 'law'.")
    with pytest.raises(sp.PathwaysError, match=r"Known: 'code', 'law'\.$"):
        model(IDS, domain=5)
    assert _runs(model, expected, domain="pooled") == "law"
    rows = IDS[:1].repeat(2, 1)
    with torch.no_grad():
        mixed = model(rows, domain=["pooled", "code"]).logits
        index = model(rows, domain=torch.tensor([2, 0])).logits
    assert torch.equal(mixed, index)
    assert torch.allclose(mixed[0], expected["law"][0], atol=1e-5)
    with pytest.raises(sp.PathwaysError, match=r"from -1 \(dense\) to 2"):
        model(rows, domain=torch.tensor([3, 0]))


def test_generate_follows_the_same_precedence(case):
    model, default, _ = case
    tokens = {d: _new_tokens(model, domain=d) for d in ("code", "law", None)}
    assert len({tuple(value) for value in tokens.values()}) == 3
    assert _new_tokens(model) == tokens[default]
    with model.pathway("code"):
        assert _new_tokens(model) == tokens["code"]
        assert _new_tokens(model, domain=None) == tokens[None]


def _new_tokens(model, **arguments):
    output = model.generate(IDS, do_sample=False, max_new_tokens=8, **arguments)
    return output[:, IDS.shape[1] :].flatten().tolist()


def test_rows_in_a_scope(parts):
    dense, paths, expected = parts
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    with model.pathway(["law", "code"]), torch.no_grad():
        logits = model(IDS).logits
        with pytest.raises(sp.PathwaysError, match=r"2 entries.*4 rows"):
            model(torch.cat([IDS, IDS]))
        beams = model.generate(IDS, num_beams=2, do_sample=False, max_new_tokens=4)
    assert torch.allclose(logits[0], expected["law"][0], atol=1e-5)
    assert torch.allclose(logits[1], expected["code"][1], atol=1e-5)
    named = model.generate(
        IDS, num_beams=2, do_sample=False, max_new_tokens=4, domain=["law", "code"]
    )
    assert torch.equal(beams, named)


def test_indices_as_a_tensor(parts):
    dense, paths, expected = parts
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    with torch.no_grad():
        logits = model(IDS, domain=torch.tensor([1, -1])).logits
    assert torch.allclose(logits[0], expected["law"][0], atol=1e-5)
    assert torch.equal(logits[1], expected[None][1])


def test_nothing_leaks_after_an_error(case):
    model, default, expected = case
    with pytest.raises(RuntimeError, match="stop"), model.pathway("code"):
        raise RuntimeError("stop")
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 3), 10**6), domain="code")
    assert choices._LOCAL.top is None
    assert _runs(model, expected) == default


def test_two_models_do_not_hear_each_other(parts):
    dense, paths, expected = parts
    one = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    two = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    with one.pathway("code"), two.pathway("law"):
        assert _runs(one, expected) == "code"
        assert _runs(two, expected) == "law"
        assert _runs(dense, expected) is None
    with two.pathway("law"):
        assert _runs(one, expected) is None


def test_the_default_is_saved(parts, tmp_path):
    dense, paths, expected = parts
    sp.SparsePathwaysForCausalLM.from_dense(
        dense, paths, default_domain="code", executor="masked"
    ).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, sp.SparsePathwaysConfig)
    assert isinstance(config, type(dense.config))
    assert (config.domains, config.default_domain) == (["code", "law"], "code")
    assert (config.executor, config.pathways_format) == ("masked", 1)
    assert _runs(AutoModelForCausalLM.from_pretrained(tmp_path), expected) == "code"


@torch.no_grad()
def test_the_bare_decoder_follows_a_scope_and_a_keyword(parts, tmp_path):
    from transformers import AutoModel

    dense, paths, _ = parts
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    with model.pathway("code"):
        scoped = model.model(IDS).last_hidden_state
    expected = model(IDS, domain="code", output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(scoped, expected, atol=1e-5)
    assert torch.allclose(bare(IDS, domain="code").last_hidden_state, expected, atol=1e-5)
    assert not torch.allclose(bare(IDS).last_hidden_state, expected, atol=1e-3)


def test_scopes_that_end_out_of_order_leave_nothing_behind(parts):
    dense, paths, expected = parts
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)

    def hold(name):
        with model.pathway(name):
            yield

    first, second = hold("code"), hold("law")
    next(first)
    next(second)
    first.close()
    assert _runs(model, expected) == "law"
    second.close()
    assert _runs(model, expected) is None
    assert choices._LOCAL.top is None


def test_a_default_can_be_set_when_loading(parts, tmp_path):
    dense, paths, expected = parts
    dense.save_pretrained(tmp_path / "base")
    paths.save_pretrained(tmp_path / "paths")
    load = sp.SparsePathwaysForCausalLM.from_pretrained
    arguments = {"pathways": tmp_path / "paths"}
    assert _runs(load(tmp_path / "base", default_domain="law", **arguments), expected) == "law"
    with pytest.raises(sp.PathwaysError, match="Did you mean 'law'"):
        load(tmp_path / "base", default_domain="lwa", **arguments)
