"""Models that accelerate has spread over devices, memory and disk equal those in memory."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.executors import EXECUTORS
from tests.architectures import build, compensate, prompt, random_masks
from tests.texts import documents, tiny_tokenizer

IDS = prompt()
TEXTS = {"code": documents("code")}
DEVICES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
}
load = AutoModelForCausalLM.from_pretrained


def _used(folder, executor):
    """Load a model that has used its copies already."""
    model = load(folder, executor=executor)
    with torch.no_grad():
        model(IDS, domain="code")
        model(IDS, domain=["code", "law"])
    return model


LOADED = {
    "auto": {"device_map": "auto"},
    "one device": {"device_map": {"": "cpu"}},
    "a block on disk": {"device_map": DEVICES},
    "little memory": {"device_map": "auto", "max_memory": {"cpu": "60KB"}},
}
WAYS = {
    **{
        name: lambda folder, executor, place, options=options: load(
            folder, executor=executor, offload_folder=place, **options
        )
        for name, options in LOADED.items()
    },
    "cpu_offload": lambda folder, executor, _: cpu_offload(
        load(folder, executor=executor), execution_device="cpu"
    ),
    "cpu_offload after use": lambda folder, executor, _: cpu_offload(
        _used(folder, executor), execution_device="cpu"
    ),
    "disk_offload": lambda folder, executor, place: disk_offload(
        load(folder, executor=executor), place, execution_device="cpu"
    ),
    "dispatch_model": lambda folder, executor, _: dispatch_model(
        _used(folder, executor), {"model": "cpu", "lm_head": "cpu"}, force_hooks=True
    ),
    "dispatch_model with disk": lambda folder, executor, place: dispatch_model(
        _used(folder, executor), DEVICES, main_device="cpu", offload_dir=place, force_hooks=True
    ),
}


@functools.cache
def _model():
    dense = build("llama")
    paths = compensate(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="masked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    _model().save_pretrained(place)
    _model().to_dense().save_pretrained(place / "base")
    return place


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("every_form_pays")
@torch.no_grad()
def test_equal_to_the_model_in_memory(way, executor, folder, tmp_path):
    model = WAYS[way](folder, executor, tmp_path)
    for domain in ("code", None, ["code", None], "code"):
        expected = _model()(IDS, domain=domain).logits
        assert torch.allclose(model(IDS, domain=domain).logits, expected, atol=1e-4)
    generate = functools.partial(
        type(model).generate, inputs=IDS, domain=["law", "code"], max_new_tokens=4, do_sample=False
    )
    assert torch.equal(generate(model), generate(_model()))


@pytest.mark.parametrize("way", ["little memory", "cpu_offload", "cpu_offload after use"])
def test_what_is_offloaded_is_masked_and_it_is_said(way, folder, tmp_path):
    model = WAYS[way](folder, "compact", tmp_path)
    offloaded = [p.is_meta for p in model.parameters()]
    assert any(offloaded)
    if all(offloaded):
        assert model.execution.executor == "masked"
        assert "offloaded" in model.execution.reason
        assert not model.prepare("code")
        assert model.resident == {}
    with torch.no_grad():
        model(IDS, domain="code")
    assert sum(model.resident.values()) < model.max_resident_bytes


PARTIAL = {
    "auto": lambda folder, _: load(folder, domain="code", device_map="auto"),
    "one device": lambda folder, _: load(folder, domain="code", device_map={"": "cpu"}),
    "cpu_offload": lambda folder, _: cpu_offload(
        load(folder, domain="code"), execution_device="cpu"
    ),
    "disk_offload": lambda folder, place: disk_offload(
        load(folder, domain="code"), place, execution_device="cpu"
    ),
}


@pytest.mark.parametrize("executor", ["auto", "indexed", "packed"])
@pytest.mark.parametrize("way", PARTIAL)
@pytest.mark.usefixtures("every_form_pays")
@torch.no_grad()
def test_one_domains_neurons(way, executor, folder, tmp_path):
    model = PARTIAL[way](folder, tmp_path)
    model.set_executor(executor)
    expected = _model()(IDS, domain="code").logits
    for _ in range(2):
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


@torch.no_grad()
def test_one_domains_neurons_that_go_away_after_use(folder):
    model = load(folder, domain="code", executor="indexed")
    expected = model(IDS).logits
    offloaded = cpu_offload(model, execution_device="cpu")
    assert torch.allclose(offloaded(IDS).logits, expected, atol=1e-4)


def test_a_profile_and_an_evaluation_of_an_offloaded_model(folder, tmp_path):
    dense = load(folder / "base")
    offloaded = load(folder / "base", offload_folder=tmp_path, **LOADED["little memory"])
    found, expected = (
        sp.profile(model, tiny_tokenizer(), TEXTS, precision="fastest", work_folder=tmp_path)
        for model in (offloaded, cpu_offload(copy.deepcopy(dense), execution_device="cpu"))
    )
    plain = sp.profile(dense, tiny_tokenizer(), TEXTS, precision="fastest")
    for profile in (found, expected):
        assert torch.equal(profile["code"].blocks[1].abs_sum, plain["code"].blocks[1].abs_sum)
    with pytest.raises(sp.PathwaysError, match="weights are offloaded"):
        sp.select(offloaded, found, sparsity=0.5)
    rows = [
        sp.evaluate(model, tiny_tokenizer(), TEXTS, max_tokens=100).rows
        for model in (_model(), cpu_offload(load(folder), execution_device="cpu"))
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert mine.perplexity == pytest.approx(theirs.perplexity, rel=1e-5)


@pytest.mark.parametrize("way", ["a block on disk", "little memory"])
def test_what_is_dispatched_already_is_refused(way, folder, tmp_path):
    options = {"offload_folder": tmp_path, **LOADED[way]}
    dense = load(folder / "base", **options)
    with pytest.raises(sp.PathwaysError, match=r"already dispatched.*pathways=\.\.\., device_map"):
        sp.SparsePathwaysForCausalLM.from_dense(dense, _model().pathways)
    with pytest.raises(sp.PathwaysError, match=r"domain= loads.*'disk'"):
        load(folder, domain="code", **options)
