"""``domain="auto"``: the prompt decides, each row for itself, once per generation."""

import copy
import logging
import pickle
import threading

import pytest
import torch

import hf_sparse_pathways as sp
from tests.architectures import build
from tests.texts import documents, tiny_tokenizer

DOMAINS = ("code", "law")
QUIET = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def case():
    """A model whose pathways know their domains' text, and prompts: code, law, medicine, short."""
    dense, tokenizer = build("llama"), tiny_tokenizer()
    dense.generation_config.eos_token_id = None
    texts = {name: documents(name, count=60, words=120) for name in DOMAINS}
    profile = sp.profile(dense, tokenizer, texts, max_tokens=4096, grams=False)
    paths = sp.select(dense, profile, sparsity=0.4)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths).eval()
    texts = [documents(name, count=1, words=90, seed=7)[0] for name in (*DOMAINS, "medicine")]
    texts.append("def return")
    return model, tokenizer, texts


EXPECTED = ["code", "law", None, None]


def _encode(case, side="left"):
    _, tokenizer, texts = case
    tokenizer.padding_side = side
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_go_to_their_domain_and_others_nowhere(case, side):
    assert case[0].route(**_encode(case, side)) == EXPECTED


def test_special_tokens_say_nothing_so_that_a_mask_may_be_missing(case):
    assert case[0].route(_encode(case)["input_ids"]) == EXPECTED


def test_a_forward_pass_computes_what_it_says(case):
    model, inputs = case[0], _encode(case, "right")
    routed = model(**inputs, domain="auto")
    assert routed.domains == EXPECTED
    assert torch.equal(routed.logits, model(**inputs, domain=EXPECTED).logits)
    assert not hasattr(model(**inputs, domain=EXPECTED), "domains")


def test_rows_may_be_named_beside_others_that_are_not(case):
    model, inputs = case[0], _encode(case, "right")
    mixed = model(**inputs, domain=["law", "auto", "auto", None])
    assert mixed.domains == ["law", "law", None, None]
    assert torch.equal(mixed.logits, model(**inputs, domain=["law", "law", None, None]).logits)


@pytest.mark.parametrize(
    "form",
    [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beams", "returned", "no_cache"],
)
def test_generate_keeps_the_choice_that_the_prompt_made(case, form):
    model, inputs = case[0], _encode(case)
    outputs = []
    for domain in ("auto", EXPECTED):
        torch.manual_seed(0)
        settings = {**QUIET, **form, "return_dict_in_generate": True}
        outputs.append(model.generate(**inputs, domain=domain, **settings))
    assert outputs[0].domains == EXPECTED
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@torch.no_grad()
def test_a_cache_of_the_texts_beginning_does_not_decide(case):
    """As Transformers caches a prefix: generate is given the whole text beside it."""
    model, tokenizer, texts = case
    inputs = dict(tokenizer(texts[1], return_tensors="pt"))
    begin = {name: value[:, :10] for name, value in inputs.items()}
    cache = model(**begin, domain="law", use_cache=True).past_key_values
    options = {**QUIET, "return_dict_in_generate": True}
    found = model.generate(**inputs, cache=cache, domain="auto", **options)
    assert found.domains == ["law"]
    whole = model.generate(**inputs, domain="law", **options)
    assert torch.equal(found.sequences, whole.sequences)


def test_an_assistant_has_the_domain_that_was_decided(case):
    model, inputs = case[0], _encode(case)
    row = {name: tensor[:1] for name, tensor in inputs.items()}
    assistant, seen = copy.deepcopy(model), []
    resolve = assistant._resolve
    assistant._resolve = lambda domain: seen.append(domain) or resolve(domain)
    model.generate(**row, domain="auto", assistant_model=assistant, **QUIET)
    assert "code" in seen


def test_scopes_and_the_default_domain_may_be_auto(case):
    model, inputs = case[0], _encode(case, "right")
    expected = model(**inputs, domain=EXPECTED).logits
    with model.pathway("auto"):
        assert torch.equal(model(**inputs).logits, expected)
        with model.pathway("law"):
            assert torch.equal(model(**inputs).logits, model(**inputs, domain="law").logits)
        named = model.generate(**inputs, domain="law", return_dict_in_generate=True, **QUIET)
        assert not hasattr(named, "domains")
    dense = model.to_dense()
    auto = sp.SparsePathwaysForCausalLM.from_dense(dense, model.pathways, default_domain="auto")
    assert torch.equal(auto(**inputs).logits, expected)


def test_threads_decide_for_themselves(case):
    model, inputs = case[0], _encode(case)
    rows = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(4)]
    found = [None] * 4

    def run(index):
        settings = {**QUIET, "return_dict_in_generate": True}
        found[index] = [
            model.generate(**rows[index], domain="auto", **settings).domains for _ in range(3)
        ]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[[name]] * 3 for name in EXPECTED]


def test_what_is_saved_decides_alike(case, tmp_path):
    model, inputs = case[0], _encode(case)
    evidence = model.decide(**inputs)
    model.save_pretrained(tmp_path / "model")
    model.pathways.save_pretrained(tmp_path / "adapter")
    loaded = sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.decide(**inputs) == evidence
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.decide(**inputs) == evidence
    loaded.set_pathways(sp.Pathways.from_pretrained(tmp_path / "adapter").subset(["law"]))
    assert loaded.route(**inputs) == [None, "law", None, None]


def test_a_domain_that_is_added_takes_part(case):
    model, inputs = case[0], _encode(case)
    paths = model.pathways
    law, code = paths.subset(["law"]), paths.subset(["code"])
    other = copy.deepcopy(model)
    other.set_pathways(law.merged(code))
    assert other.route(**inputs) == EXPECTED


def test_a_compiled_pass_says_that_it_cannot_decide(case):
    model, inputs = copy.deepcopy(case[0]), _encode(case, "right")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), pytest.raises(sp.PathwaysError, match=r"model\.route"):
        compiled(**inputs, domain="auto")


def test_every_decision_is_logged(case, caplog):
    caplog.set_level(logging.INFO, "hf_sparse_pathways.modeling.routing")
    case[0].route(**_encode(case))
    assert "Routed 1 to code, 1 to law, 2 to dense." in caplog.text


def _embedded(model, inputs):
    model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), domain="auto")


def _continued(model, inputs):
    cache = model(**inputs, domain="auto", use_cache=True).past_key_values
    model(inputs["input_ids"][:, -1:], past_key_values=cache, domain="auto")


def _continued_by_more_than_was_there(model, inputs):
    cache = model(**inputs, domain="auto", use_cache=True).past_key_values
    model(inputs["input_ids"].repeat(1, 2), past_key_values=cache, domain="auto")


REFUSED = {
    "no tokens": (_embedded, "inputs_embeds"),
    "a cache": (_continued, "decided once"),
    "a short cache": (_continued_by_more_than_was_there, "decided once"),
    "rows": (lambda model, inputs: model(**inputs, domain=["auto"]), "4 rows"),
    "a mask": (
        lambda model, inputs: model.route(inputs["input_ids"], inputs["input_ids"][:2]),
        "same shape",
    ),
    "a list": (
        lambda model, inputs: model.route(inputs["input_ids"], inputs["attention_mask"].tolist()),
        "list.* same shape",
    ),
    "a guard": (lambda model, inputs: model(**inputs, domain="code", guard=True), "generate"),
    "a float": (lambda model, inputs: model.route(inputs["input_ids"].float()), "whole numbers"),
    "an array": (lambda model, inputs: model.route(inputs["input_ids"].numpy()), "ndarray"),
    "a typo": (lambda model, inputs: model(**inputs, domain=["auto", "lwa"] * 2), "law"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decided_is_said(case, name):
    call, told = REFUSED[name]
    with pytest.raises(sp.PathwaysError, match=told):
        call(case[0], _encode(case))


def test_pathways_that_do_not_know_their_text_say_what_to_do(case):
    model = copy.deepcopy(case[0])
    masks = {name: model.pathways[name].keep for name in DOMAINS}
    model.set_pathways(sp.Pathways.from_masks(model, masks))
    assert not model.has_router
    with pytest.raises(sp.PathwaysError, match="sparse-pathways build"):
        sp.SparsePathwaysForCausalLM.from_dense(
            build("llama"), model.pathways, default_domain="auto"
        )
    with pytest.raises(sp.PathwaysError, match="sparse-pathways build"):
        model.route(_encode(case)["input_ids"])
    with pytest.raises(sp.PathwaysError, match="sparse-pathways build"), model.pathway("auto"):
        pass


def test_no_domain_may_be_called_auto(case):
    masks = {"auto": case[0].pathways["law"].keep}
    with pytest.raises(sp.PathwaysError, match="reserved"):
        sp.Pathways.from_masks(case[0], masks)
