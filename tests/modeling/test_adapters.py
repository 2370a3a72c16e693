"""A LoRA per domain: the outputs are those of the model with it merged, and the pathway."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from transformers import AutoModel

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import ArtefactError, MismatchError, UnsupportedModelError
from tests.architectures import build, compensate, prompt, random_masks, repaired

IDS = prompt(4, 7)
GREEDY = {"do_sample": False, "max_new_tokens": 6}
TARGETS = {
    "llama": {"code": ["q_proj", "v_proj"], "law": "all-linear"},
    "gpt2": {"code": ["c_attn", "c_proj"], "law": ["c_fc"]},
    "opt": {"code": ["q_proj"], "law": ["fc1", "fc2", "out_proj"]},
}


def _train(dense, folder, targets, **options):
    """Save a random adapter of a dense model; return the model with it merged."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, **options}
    torch.manual_seed(len(str(folder)))
    made = peft.get_peft_model(
        copy.deepcopy(dense), peft.LoraConfig(target_modules=targets, **settings)
    )
    made.save_pretrained(folder)
    return made.merge_and_unload()


class Case:
    """A model with three domains, adapters of two of them, and what each should compute."""

    def __init__(self, folder, name="llama", **arguments):
        dense = build(name)
        masks = random_masks(dense, ("code", "law", "v1.5"))
        self.paths = compensate(dense, masks)
        self.places = {domain: folder / domain for domain in TARGETS[name]}
        merged = {d: _train(dense, p, TARGETS[name][d]) for d, p in self.places.items()}
        self.references = {
            domain: repaired(merged.get(domain, dense), self.paths[domain]) for domain in masks
        }
        self.references[None] = dense
        self.model = sp.SparsePathwaysForCausalLM.from_dense(dense, self.paths, **arguments)

    @torch.no_grad()
    def expected(self, domain, ids=IDS):
        return self.references[domain](ids).logits

    @torch.no_grad()
    def close(self, whose, /, **arguments):
        found = self.model(IDS, **arguments).logits
        return torch.allclose(found, self.expected(whose), atol=2e-4)


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    case = Case(tmp_path_factory.mktemp("adapters"), executor="compact")
    case.model.attach_adapters(case.places)
    return case


DOMAINS = ["code", "law", "v1.5", None]


@pytest.mark.parametrize("executor", ["masked", "compact"])
@pytest.mark.parametrize("name", TARGETS)
def test_each_domain_has_its_own_adapter_and_others_none(tmp_path, name, executor):
    case = Case(tmp_path, name, executor=executor)
    case.model.attach_adapters(case.places)
    assert case.model.adapters == ["code", "law"]
    for domain in DOMAINS:
        assert case.close(domain, domain=domain), domain
    assert not case.close("law", domain="code")


@torch.no_grad()
def test_each_row_has_its_own_adapter(attached):
    found = attached.model(IDS, domain=["law", None, "v1.5", "code"]).logits
    for row, domain in enumerate(["law", None, "v1.5", "code"]):
        assert torch.allclose(found[row], attached.expected(domain)[row], atol=2e-4), domain


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_follows_the_adapter_of_each_row(attached, beams):
    options = {**GREEDY, "num_beams": beams, "pad_token_id": 0}
    found = attached.model.generate(IDS, domain=DOMAINS, **options)
    for row, domain in enumerate(DOMAINS):
        expected = attached.references[domain].generate(IDS[row : row + 1], **options)
        assert torch.equal(found[row, : expected.shape[1]], expected[0])
    alone = attached.model.generate(IDS, domain="law", **options)
    assert torch.equal(alone, attached.references["law"].generate(IDS, **options))


def test_scopes_and_defaults_choose_it_too(tmp_path):
    case = Case(tmp_path, default_domain="law")
    case.model.attach_adapters(case.places)
    assert case.close("law")
    with case.model.pathway("code"):
        assert case.close("code")
        assert case.close(None, domain=None)


def test_threads_have_adapters_of_their_own(attached):
    start = threading.Barrier(len(DOMAINS))

    def run(domain):
        start.wait()
        return [attached.close(domain, domain=domain) for _ in range(15)]

    with ThreadPoolExecutor(len(DOMAINS)) as pool:
        assert all(all(found) for found in pool.map(run, DOMAINS))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_them_and_chooses_alone(attached, copier):
    other = copier(attached.model)
    with attached.model.pathway("code"), torch.no_grad():
        found = other(IDS, domain="law").logits
        assert torch.allclose(found, attached.expected("law"), atol=2e-4)
        assert torch.allclose(other(IDS).logits, attached.expected(None), atol=2e-4)


def test_adapters_of_the_attention_leave_the_executor_as_it_is(tmp_path):
    case = Case(tmp_path, executor="compact")
    with torch.no_grad():
        case.model(IDS, domain="code")
    resident = case.model.resident
    case.model.attach_adapters({"code": case.places["code"]})
    assert case.close("code", domain="code")
    assert case.model.resident == resident
    assert resident


@pytest.mark.parametrize("checkpointing", [False, True])
def test_they_can_be_trained_further(tmp_path, checkpointing):
    case = Case(tmp_path)
    case.model.attach_adapters(case.places)
    assert not any("lora" in n for n, p in case.model.named_parameters() if p.requires_grad)
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_("lora" in name)
    case.model.train()
    if checkpointing:
        case.model.activation_checkpointing_enable({"use_reentrant": False})
    case.model(IDS, labels=IDS, domain="law", use_cache=False).loss.backward()
    for name, parameter in case.model.named_parameters():
        if "lora" in name:
            assert ("pathway-law" in name) == (parameter.grad is not None), name


def test_without_them_all_is_as_before(tmp_path):
    case = Case(tmp_path, executor="compact")
    with torch.no_grad():
        before = [case.model(IDS, domain=domain).logits for domain in DOMAINS]
        state = case.model.state_dict()
        trained = [p.requires_grad for p in case.model.parameters()]
        case.model.attach_adapters(case.places)
        case.model.detach_adapters()
        after = [case.model(IDS, domain=domain).logits for domain in DOMAINS]
    assert all(map(torch.equal, before, after))
    assert case.model.state_dict().keys() == state.keys()
    assert [p.requires_grad for p in case.model.parameters()] == trained
    assert case.model.adapters == []
    assert not hasattr(case.model, "peft_config")
    case.model.attach_adapters({"law": case.places["law"]})
    assert case.close("law", domain="law")


def test_they_follow_their_domains_into_other_pathways(tmp_path):
    case = Case(tmp_path)
    case.model.attach_adapters(case.places)
    case.model.set_pathways(case.paths.subset(["v1.5", "law", "code"]))
    assert case.model.domains == ["v1.5", "law", "code"]
    for domain in DOMAINS:
        assert case.close(domain, domain=domain), domain


def test_a_model_without_a_head_takes_an_adapter_of_such_a_model(tmp_path):
    case = Case(tmp_path)
    case.model.save_pretrained(tmp_path / "whole")
    options = {"task_type": "FEATURE_EXTRACTION"}
    merged = _train(build("llama").model, tmp_path / "headless", ["q_proj"], **options)
    model = AutoModel.from_pretrained(tmp_path / "whole")
    model.attach_adapters({"law": tmp_path / "headless"})
    full = build("llama")
    full.model = merged
    expected = repaired(full, case.paths["law"]).model(IDS).last_hidden_state
    found = model(IDS, domain="law").last_hidden_state
    assert torch.allclose(found, expected, atol=2e-4)
    assert not torch.allclose(model(IDS, domain=None).last_hidden_state, expected, atol=2e-4)


REFUSED = {
    "saving": lambda case, folder: case.model.save_pretrained(folder),
    "dense": lambda case, _: case.model.to_dense(),
    "pathways": lambda case, _: case.model.set_pathways(case.paths.subset(["law", "v1.5"])),
    "order": lambda case, _: sp.permute(case.model),
    "again": lambda case, _: case.model.attach_adapters(case.places),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_lose_them_is_refused(attached, tmp_path, what):
    with pytest.raises(UnsupportedModelError, match=r"'code', 'law'.*detach_adapters"):
        REFUSED[what](attached, tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_cannot_be_on_for_some_rows_is_refused(tmp_path, options, told):
    case = Case(tmp_path)
    _train(build("llama"), tmp_path / "odd", ["q_proj"], **options)
    with pytest.raises(UnsupportedModelError, match=told):
        case.model.attach_adapters({"code": tmp_path / "odd"})
    assert case.close(None)


def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(tmp_path):
    case = Case(tmp_path)
    _train(build("gpt2"), tmp_path / "gpt2", ["c_attn"])
    _train(build("falcon"), tmp_path / "falcon", ["dense"])
    for wrong in ("gpt2", "falcon"):
        with pytest.raises(MismatchError, match=f"{wrong} of 'law' does not fit"):
            case.model.attach_adapters({"code": case.places["code"], "law": tmp_path / wrong})
        assert case.model.adapters == []
        assert "lora" not in " ".join(case.model.state_dict())
    rank = peft.PeftConfig.from_pretrained(case.places["code"])
    rank.r = 8
    rank.save_pretrained(case.places["code"])
    with pytest.raises(MismatchError, match="size mismatch"):
        case.model.attach_adapters({"code": case.places["code"]})


def test_wrong_names_and_places_are_told(tmp_path, monkeypatch):
    case = Case(tmp_path)
    with pytest.raises(sp.PathwaysError, match=r"Unknown domain 'cod'.*'code'"):
        case.model.attach_adapters({"cod": case.places["code"]})
    with pytest.raises(ArtefactError, match="holds no PEFT adapter for 'code'"):
        case.model.attach_adapters({"code": tmp_path})
    with pytest.raises(sp.PathwaysError, match="at least one"):
        case.model.attach_adapters({})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(sp.PathwaysError, match=r"hf-sparse-pathways\[peft\]"):
        case.model.attach_adapters(case.places)


def test_adapters_of_both_kinds_do_not_hide_each_other(tmp_path):
    case = Case(tmp_path)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    own = peft.get_peft_model(case.model, config)
    with pytest.raises(UnsupportedModelError, match="adapters of its own"):
        case.model.attach_adapters(case.places)
    own.unload()
    case.model.attach_adapters(case.places)
    peft.get_peft_model(case.model, config, adapter_name="mine")
    with pytest.raises(UnsupportedModelError, match=r"adapter mine was added"):
        case.model(IDS, domain="code")


def test_one_domain_s_neurons_have_no_place_for_them(tmp_path):
    case = Case(tmp_path)
    case.model.save_pretrained(tmp_path / "saved")
    model = sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path / "saved", domain="code")
    with pytest.raises(sp.PathwaysError, match=r"'code' only.*adapter"):
        model.attach_adapters(case.places)
