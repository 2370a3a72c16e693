"""``domain="prompt"``: what a prompt has used computes what follows, in every form of decoding."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from tests.architectures import build, compensate, prompt, random_masks, repaired
from tests.clustered import clustered
from tests.clustered import reference as clustered_reference
from tests.modeling.test_generate import FORMS, _generate
from tests.prompted import IDS, griffin, griffin_masks, make_case, quiet, reference


@pytest.fixture(scope="module")
def case():
    return make_case()


def _picked(model, ids, **arguments):
    output = _generate(model, ids, domain="prompt", return_dict_in_generate=True, **arguments)
    return output.picked


@pytest.mark.parametrize("executor", ["masked", "compact"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_zeroed_weights(case, executor, form):
    dense, model = case
    model.set_executor(executor)
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], **FORMS[form])
    assert torch.equal(_generate(model, IDS[:1], domain="prompt", **FORMS[form]), expected)
    if not FORMS[form]["do_sample"]:
        assert not torch.equal(_generate(dense, IDS[:1], **FORMS[form]), expected)


@pytest.mark.parametrize("form", ["greedy", "beams_returned", "no_cache", "static_cache"])
@pytest.mark.parametrize("told", [True, False])
def test_rows_of_a_padded_batch_pick_their_own(case, form, told):
    dense, model = case
    model.set_executor("compact")
    lengths, alone = (9, 14, 11), []
    ids = torch.zeros(3, 14, dtype=torch.int64)
    for row, length in enumerate(lengths):
        text = prompt(1, length, seed=row)
        ids[row, 14 - length :] = text[0]
        expected = _generate(griffin(dense, text), text, **FORMS[form])
        alone.append(expected[:, length:])
    given = {"attention_mask": (ids != 0).long()} if told else {}  # else it is inferred
    settings = {**given, **FORMS[form], "max_new_tokens": 6}
    found = model.generate(ids, domain="prompt", **settings)
    assert torch.equal(found[:, 14:], torch.cat(alone))


def test_rows_stand_beside_other_domains(case):
    dense, model = case
    references = {name: repaired(dense, model.pathways[name]) for name in model.domains}
    rows = prompt(5, 12)
    names = ["law", "prompt", None, "code", "prompt"]
    plain = [references["law"], griffin(dense, rows[1:2]), dense, references["code"]]
    plain.append(griffin(dense, rows[4:5]))
    for form in ("greedy", "no_cache", "beams", "prompt_lookup"):
        some = rows[1:2] if form == "prompt_lookup" else rows
        expected = [
            _generate(own, ids[None], **FORMS[form]) for own, ids in zip(plain, rows, strict=True)
        ]
        if form == "prompt_lookup":
            expected, named = expected[1:2], ["prompt"]
        else:
            named = names
        for executor in ("masked", "compact"):
            model.set_executor(executor)
            found = _generate(model, some, domain=named, **FORMS[form])
            assert torch.equal(found, torch.cat(expected)), (form, executor)


def test_rows_stand_beside_a_domain_with_clusters(case):
    dense, _ = case
    paths = clustered(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="compact")
    model.set_prompt_pathways(rule="griffin")
    plain = [clustered_reference(dense, paths["code"]), griffin(dense, IDS[1:2])]
    for form in ("greedy", "no_cache"):
        pairs = zip(plain, IDS[:2], strict=True)
        expected = torch.cat([_generate(own, ids[None], **FORMS[form]) for own, ids in pairs])
        found = _generate(model, IDS[:2], domain=["code", "prompt"], **FORMS[form])
        assert torch.equal(found, expected), form


@pytest.fixture(scope="module")
def fitted():
    """A dense model, and one with the default rule, whose pathways have a refit and a bias."""
    dense = quiet(build("llama"))
    paths = compensate(dense, random_masks(dense))
    plain = {
        name: sp.Pathway(blocks=tuple(replace(b, bypass=None, incoming=()) for b in pathway.blocks))
        for name, pathway in paths.by_domain.items()
    }
    paths = replace(paths, by_domain=plain)
    return dense, sp.SparsePathwaysForCausalLM.from_dense(dense, paths)


@pytest.mark.parametrize("executor", ["masked", "compact"])
@pytest.mark.parametrize("form", ["greedy", "no_cache", "beams", "static_cache"])
def test_columns_are_fitted_to_each_prompt(fitted, executor, form):
    dense, model = fitted
    model.set_executor(executor)
    names = ["prompt", "prompt:law", "law"]
    settings = {**FORMS[form], "return_dict_in_generate": True}
    output = _generate(model, IDS, domain=names, **settings)
    first, second, _ = output.picked.pathways
    assert all(map(torch.equal, first.keep, griffin_masks(dense, IDS[:1])))
    law = model.pathways["law"]
    assert all(map(torch.equal, second.keep, law.keep))
    for mine, prior in zip(second.blocks, law.blocks, strict=True):
        assert 0 < (mine.delta - prior.full_delta).norm() < 10 * prior.full_delta.norm()
    plain = [
        reference(dense, first.keep, 12, first.blocks),
        reference(dense, second.keep, 12, second.blocks),
        repaired(dense, law),
    ]
    pairs = zip(plain, IDS, strict=True)
    expected = torch.cat([_generate(own, ids[None], **FORMS[form]) for own, ids in pairs])
    assert torch.equal(output.sequences, expected)
    assert output.domains == names
    assert second.provenance["prior"] == "law"
    assert second.provenance["sparsity"] == pytest.approx(model.pathways.sparsity("law"))
    assert "prior" not in first.provenance


def test_a_prior_of_another_kind_is_refused(case, fitted):
    _, model = case
    with pytest.raises(sp.PathwaysError, match="takes no domain as a prior"):
        model(IDS, domain="prompt:law")
    model = copy.deepcopy(model)
    model.set_prompt_pathways()
    with pytest.raises(sp.PathwaysError, match="bypass"):
        model(IDS, domain="prompt:law")
    dense, _ = fitted
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, clustered(dense))
    with pytest.raises(sp.PathwaysError, match="clusters"):
        model(IDS, domain="prompt:code")
    with pytest.raises(sp.PathwaysError, match="'code', 'law'"):
        model(IDS, domain="prompt:")


def test_what_was_picked_is_told(case):
    dense, model = case
    settings = {"return_dict_in_generate": True, "do_sample": False}
    output = _generate(model, IDS, domain=["prompt", "law", None], **settings)
    assert output.domains == ["prompt", "law", None]
    first, *others = output.picked.pathways
    assert others == [None, None]
    assert all(map(torch.equal, first.keep, griffin_masks(dense, IDS[:1])))
    assert first.provenance == {"method": "prompt, griffin", "sparsity": 0.5, "tokens": 12}
    mine = sp.Pathways(base=model.pathways.base, by_domain={"mine": first})
    named = sp.SparsePathwaysForCausalLM.from_dense(dense, mine)
    assert named.pathways.sparsity("mine") == 0.5
    assert "prompt" in repr(output.picked)


def test_sparsity_is_a_setting_that_is_saved(case, tmp_path):
    dense, model = copy.deepcopy(case)
    model.set_prompt_pathways(rule="griffin", sparsity=0.25)
    expected = _generate(griffin(dense, IDS[:1], 0.25), IDS[:1], do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for other in (model, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.prompt_settings == model.prompt_settings
        assert torch.equal(
            _generate(quiet(other), IDS[:1], domain="prompt", do_sample=False), expected
        )
    assert "prompt_pathways" not in model.to_dense().config.to_dict()


def test_a_model_without_domains(tmp_path):
    dense = quiet(build("llama"))
    model = sp.adapt(dense, rule="griffin", sparsity=0.4, default_domain="prompt")
    expected = _generate(griffin(dense, IDS[:1], 0.4), IDS[:1], do_sample=False)
    assert torch.equal(_generate(model, IDS[:1], do_sample=False), expected)
    assert torch.equal(
        _generate(model, IDS[:1], domain=None, do_sample=False),
        _generate(dense, IDS[:1], do_sample=False),
    )
    model.save_pretrained(tmp_path)
    loaded = quiet(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert loaded.domains == []
    assert torch.equal(_generate(loaded, IDS[:1], do_sample=False), expected)
    with pytest.raises(sp.PathwaysError, match="set_prompt_pathways"):
        sp.adapt(model)


def test_copies_that_do_not_fit_are_masked(case):
    dense, model = case
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)
    before = model.max_resident_bytes
    try:
        model.max_resident_bytes = 1
        assert torch.equal(_generate(model, IDS[:1], domain="prompt", do_sample=False), expected)
    finally:
        model.max_resident_bytes = before


def test_copies_are_counted_while_a_call_runs(case):
    _, model = case
    model.set_executor("compact")
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(model.resident.get("prompt", 0)))
    picked = _picked(model, IDS[:1], do_sample=False)
    handle.remove()
    leaves = [leaf for attached in model._attachment.blocks for leaf in attached.leaves.values()]
    itemsize = leaves[0].weight.element_size()
    kept = [block.kept for block in picked.pathways[0].blocks]
    expected = sum(3 * width * 32 * itemsize for width in kept)
    assert seen == [0, *[expected] * 5]
    assert "prompt" not in model.resident


@torch.no_grad()
def test_wrapped_leaves_are_masked(case):
    dense, model = case
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)
    for target in ("down_proj", "up_proj"):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=[target]))
        for form in ("greedy", "no_cache"):
            found = _generate(adapted, IDS[:1], domain="prompt", **FORMS[form])
            assert torch.equal(found, expected)


def test_gradients_pass_through_what_was_picked(case):
    dense, model = case
    picked = model(IDS[:1], domain="prompt").picked
    plain = reference(dense, [block.keep for block in picked.pathways[0].blocks], 0)
    plain(IDS[:1], labels=IDS[:1]).loss.backward()
    model.zero_grad()
    model(IDS[:1], labels=IDS[:1], domain=picked).loss.backward()
    expected = plain.get_input_embeddings().weight.grad
    assert torch.allclose(model.get_input_embeddings().weight.grad, expected, atol=1e-5)
    model.zero_grad()


def test_an_unfinished_or_foreign_pick_is_refused(case):
    _, model = case
    picked = _picked(model, IDS, do_sample=False)
    with pytest.raises(sp.PathwaysError, match="another model"):
        copy.deepcopy(model)(IDS, domain=picked)
    with pytest.raises(sp.PathwaysError, match="3 entries"):
        model(IDS[:2], domain=picked)


def _compiled(model, ids):
    with torch.no_grad():
        torch.compile(copy.deepcopy(model), backend="eager")(ids, domain="prompt")


def _generated_by_a_graph(model, ids):
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    compiled.generate(ids, domain="prompt", max_new_tokens=2)


def _loaded_alone(model, ids):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        dense = model.to_dense()
        paths = sp.Pathways.from_masks(dense, {n: model.pathways[n].keep for n in model.domains})
        sp.SparsePathwaysForCausalLM.from_dense(dense, paths).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder, domain="law")(ids, domain="prompt")


REFUSED = {
    "compiled": (_compiled, "compiled pass"),
    "a compiled generation": (_generated_by_a_graph, "compiled pass"),
    "one domain's neurons": (_loaded_alone, "loaded with the neurons of 'law'"),
    "rows": (lambda model, ids: model(ids, domain=["prompt"]), "3 rows"),
    "a typo": (lambda model, ids: model(ids, domain=["prompt", "lwa", None]), "law"),
    "a prior's typo": (lambda model, ids: model(ids, domain="prompt:lwa"), "law"),
    "a sparsity": (lambda model, _: model.set_prompt_pathways(sparsity=1.0), "less than 1"),
    "a truth value": (lambda model, _: model.set_prompt_pathways(sparsity=True), "less than 1"),
    "a rule": (lambda model, _: model.set_prompt_pathways(rule="grifin"), "'griffin'"),
    "a setting": (lambda model, _: model.set_prompt_pathways(share=0.5), "'sparsity'"),
    "a mask": (
        lambda model, ids: model(ids, attention_mask=torch.ones(3, 20), domain="prompt"),
        "same shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_picked_is_said(case, name):
    call, told = REFUSED[name]
    with pytest.raises(sp.PathwaysError, match=told):
        call(case[1], IDS)


def test_no_domain_may_be_called_prompt(case):
    masks = {"prompt": case[1].pathways["law"].keep}
    with pytest.raises(sp.PathwaysError, match="reserved"):
        sp.Pathways.from_masks(case[0], masks)
