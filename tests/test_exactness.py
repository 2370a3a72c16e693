"""Oracles: a pathway's output equals that of a plain model with zeroed weights, everywhere."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.native import product
from tests.architectures import (
    ARCHITECTURES,
    build,
    compensate,
    prompt,
    random_masks,
    repaired,
    zeroed,
)

TOLERANCE = 1e-5
IDS = prompt()
EXECUTORS = [
    "masked",
    "compact",
    "sliced",
    pytest.param("packed", marks=pytest.mark.needs_packing),
    pytest.param("packed-all", marks=pytest.mark.needs_packing),
    pytest.param("indexed", marks=pytest.mark.needs_compiler),
]


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def case(request):
    """A dense model, its masks, the model with pathways, and the zeroed references' logits."""
    dense = build(request.param)
    masks = random_masks(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))
    with torch.no_grad():
        expected = {name: zeroed(dense, keep)(IDS).logits for name, keep in masks.items()}
        expected[None] = dense(IDS).logits
    return dense, masks, model, expected


@pytest.fixture(scope="module", autouse=True)
def _every_form_pays(every_form_pays):
    """Tiny models gain nothing from packing, which would not be used for them."""


def _use(model, executor):
    model.set_executor(executor)
    assert model.execution.executor == executor, model.execution.reason


def _difference(left, right):
    return (left - right).abs().max().item()


@pytest.fixture(autouse=True)
def _torch_multiplies(monkeypatch):
    """Let ``indexed`` gather rows, as for prompts: torch multiplies in them and in the oracles."""
    monkeypatch.setattr(product, "MOST_INPUTS", 0)


@torch.no_grad()
def test_masks_visibly_change_the_output(case):
    *_, expected = case
    for name in ("code", "law"):
        assert _difference(expected[name], expected[None]) > 1e-2
    assert _difference(expected["code"], expected["law"]) > 1e-2


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_pathway_equals_zeroed_weights(case, executor):
    _, _, model, expected = case
    _use(model, executor)
    for name in ("code", "law"):
        assert _difference(model(IDS, domain=name).logits, expected[name]) <= TOLERANCE


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_rows_choose_their_own_pathway(case, executor):
    _, _, model, expected = case
    _use(model, executor)
    logits = model(IDS, domain=["law", None]).logits
    assert _difference(logits[0], expected["law"][0]) <= TOLERANCE
    assert _difference(logits[1], expected[None][1]) <= TOLERANCE


@torch.no_grad()
def test_dense_is_bit_equal(case):
    dense, _, model, expected = case
    model.set_executor("auto")
    assert torch.equal(model(IDS).logits, expected[None])
    assert torch.equal(model(IDS, domain=None).logits, expected[None])
    everything = {"all": [torch.ones_like(keep) for keep in random_masks(dense)["code"]]}
    full = sp.SparsePathwaysForCausalLM.from_dense(
        dense, sp.Pathways.from_masks(dense, everything), executor="masked"
    )
    assert torch.equal(full(IDS, domain="all").logits, expected[None])


@torch.no_grad()
def test_gradients_equal_those_of_zeroed_weights(case):
    dense, masks, model, _ = case
    reference = zeroed(dense, masks["code"])
    with torch.enable_grad():
        reference(IDS, labels=IDS).loss.backward()
        model(IDS, labels=IDS, domain="code").loss.backward()
    embedding = model.get_input_embeddings().weight.grad
    assert _difference(embedding, reference.get_input_embeddings().weight.grad) <= TOLERANCE
    model.zero_grad()


@torch.no_grad()
def test_to_dense_undoes_everything(case):
    dense, _, model, expected = case
    plain = model.to_dense()
    assert type(plain) is type(dense)
    assert type(plain.config) is type(dense.config)
    assert [type(module) for module in plain.modules()] == [type(m) for m in dense.modules()]
    assert torch.equal(plain(IDS).logits, expected[None])
    state, original = plain.state_dict(), dense.state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[name], original[name]) for name in state)


@torch.no_grad()
def test_saved_and_loaded_is_equal(case, tmp_path):
    _, _, model, _ = case
    model.set_executor("auto")
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(loaded, sp.SparsePathwaysForCausalLM)
    assert loaded.domains == ["code", "law"]
    for domain in ("code", None, ["law", "code"]):
        assert torch.equal(loaded(IDS, domain=domain).logits, model(IDS, domain=domain).logits)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies_choose_independently(case, duplicate):
    _, _, model, expected = case
    model.set_executor("compact")
    model(IDS, domain="code")
    twin = duplicate(model)
    with twin.pathway("code"):
        assert torch.equal(model(IDS).logits, expected[None])
        with model.pathway("law"):
            assert _difference(twin(IDS).logits, expected["code"]) <= TOLERANCE
            assert _difference(model(IDS).logits, expected["law"]) <= TOLERANCE


@torch.no_grad()
def test_compact_really_computes_fewer_neurons(case):
    _, masks, model, _ = case
    model.set_executor("compact")
    model(IDS, domain="code")
    for attached, keep in zip(model._attachment.blocks, masks["code"], strict=True):
        assert attached.block.entangled is None
        for leaf in attached.leaves.values():
            width = leaf.copies[0].product.weight.shape[leaf.neuron_dim]
            assert width == int(keep.sum()) * leaf.rows_per_neuron


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def repaired_case(request):
    """A model whose pathways hold every compensation, and plain references of both domains."""
    dense = build(request.param)
    pathways = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    references = {name: repaired(dense, pathways[name]) for name in pathways.domains}
    return dense, model, references


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_compensation_equals_changed_weights(repaired_case, executor):
    dense, model, references = repaired_case
    _use(model, executor)
    for name, reference in references.items():
        expected = reference(IDS).logits
        assert _difference(expected, dense(IDS).logits) > 1e-2
        assert _difference(model(IDS, domain=name).logits, expected) <= TOLERANCE
    assert _difference(model(IDS).logits, dense(IDS).logits) <= TOLERANCE


@pytest.mark.parametrize("names", [("law", None, "code"), ("law", "code", "law")])
@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_rows_have_their_own_compensation(repaired_case, executor, names):
    dense, model, references = repaired_case
    _use(model, executor)
    ids = prompt(rows=3)
    logits = model(ids, domain=[*names]).logits
    for row, reference in enumerate({None: dense, **references}[name] for name in names):
        assert _difference(logits[row], reference(ids).logits[row]) <= TOLERANCE


@pytest.mark.needs_compiler
@pytest.mark.parametrize("domain", ["code", None, ["law", "code"], ["code", None]])
@torch.no_grad()
def test_the_kernel_computes_what_torch_does(repaired_case, domain, monkeypatch):
    _, model, _ = repaired_case
    _use(model, "indexed")
    monkeypatch.setattr(product, "_TILE_BYTES", 1024)
    gathered = model(IDS, domain=domain).logits
    monkeypatch.setattr(product, "MOST_INPUTS", 10**6)
    found = model(IDS, domain=domain).logits
    assert not torch.equal(found, gathered), "the same ran twice"
    assert _difference(found, gathered) <= TOLERANCE * gathered.abs().max()


def test_gradients_pass_through_the_compensation(repaired_case):
    _, model, references = repaired_case
    reference = references["code"]
    reference.zero_grad()
    reference(IDS, labels=IDS).loss.backward()
    model(IDS, labels=IDS, domain="code").loss.backward()
    embedding = model.get_input_embeddings().weight.grad
    assert _difference(embedding, reference.get_input_embeddings().weight.grad) <= TOLERANCE
    model.zero_grad()


@torch.no_grad()
def test_compensation_is_saved_and_loaded(repaired_case, tmp_path):
    _, model, _ = repaired_case
    model.set_executor("auto")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for domain in ("code", ["law", "code"]):
        assert torch.equal(loaded(IDS, domain=domain).logits, model(IDS, domain=domain).logits)
    for mine, theirs in zip(
        model.pathways["law"].blocks, loaded.pathways["law"].blocks, strict=True
    ):
        assert mine.parts().keys() == theirs.parts().keys()
        assert all(torch.equal(part, theirs.parts()[name]) for name, part in mine.parts().items())
