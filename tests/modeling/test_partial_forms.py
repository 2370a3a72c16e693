"""A model loaded with one domain's neurons computes the same with every form of its weights."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn import execution
from hf_sparse_pathways.ffn.leaves import RestLeaf
from tests.architectures import ARCHITECTURES, build, compensate, prompt, random_masks

IDS = prompt()
EVERY_LEAF = {"packed": "packed-all", "packed-all": "packed-all", "indexed": "indexed"}

pytestmark = [
    pytest.mark.usefixtures("every_form_pays"),
    pytest.mark.needs_compiler,
    pytest.mark.needs_packing,
]


def _load(folder, name="llama", **options):
    dense = build(name)
    paths = compensate(dense, random_masks(dense))
    sp.SparsePathwaysForCausalLM.from_dense(dense, paths).save_pretrained(folder)
    options = {"max_resident_bytes": "1GB", **options}  # packing pads what is as small as here
    return AutoModelForCausalLM.from_pretrained(folder, domain="code", **options).eval()


def _swapped(model):
    return [module for module in model.modules() if isinstance(module, RestLeaf)]


def _close(left, right):
    assert (left - right).abs().max().item() <= 1e-5 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("executor", EVERY_LEAF)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_every_form_equals_plain_weights(name, executor, tmp_path):
    model = _load(tmp_path, name, executor="masked")
    plain = model(IDS).logits
    assert not _swapped(model)
    model.set_executor(executor)
    assert model.execution.executor == EVERY_LEAF[executor]
    _close(model(IDS).logits, plain)
    reduced = [leaf for leaves in model._attachment.copies.rest.reduced for leaf in leaves]
    assert reduced
    assert {*map(id, reduced)} <= {*map(id, _swapped(model))}
    assert all(leaf.copies for leaf in reduced)
    model.set_executor("compact")
    assert torch.equal(model(IDS).logits, plain)
    assert not _swapped(model)


@pytest.mark.parametrize(
    ("name", "chosen", "part"),
    [("llama", "indexed", "read in place"), ("gpt2", "masked", "copied")],
)
@torch.no_grad()
def test_auto_reads_in_place_where_that_takes_no_memory(name, chosen, part, tmp_path, monkeypatch):
    model = _load(tmp_path, name)
    assert model.execution.executor == "masked"
    assert "too little" in model.execution.reason
    plain = model(IDS).logits
    monkeypatch.setattr(execution, "_WORTH_BYTES", 0)
    model.set_executor("auto")
    assert model.execution.executor == chosen
    assert "loaded alone" in model.execution.reason
    assert part in model.execution.reason
    _close(model(IDS).logits, plain)
    assert model.resident == ({"every leaf": 0} if chosen == "indexed" else {})


@torch.no_grad()
def test_a_form_that_does_not_pay_is_not_used(tmp_path, monkeypatch):
    model = _load(tmp_path)
    slow = execution.Verdict(False, "slower here")
    monkeypatch.setattr(execution, "judge_all", lambda *_: slow)
    for executor in EVERY_LEAF:
        model.set_executor(executor)
        assert model.execution.executor == "masked"
        assert "slower here" in model.execution.reason


CHANGES = {
    "double": lambda model: model.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "train": lambda model: model.train().eval(),
    "nothing": lambda model: model,
}


@pytest.mark.parametrize("executor", EVERY_LEAF)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_while_a_form_is_in_use(change, executor, tmp_path):
    model = _load(tmp_path, executor=executor)
    model(IDS)
    changed = CHANGES[change](model)
    leaf = changed.model.layers[1].mlp.down_proj
    leaf.weight.data *= 2.0
    output = changed(IDS).logits
    assert changed.resident.keys() == {"every leaf"}
    changed.set_executor("masked")
    _close(output, changed(IDS).logits)


@pytest.mark.parametrize("executor", EVERY_LEAF)
@torch.no_grad()
def test_generation(executor, tmp_path):
    model = _load(tmp_path, executor="masked")
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(IDS, **options)
    beams = model.generate(IDS, num_beams=3, **options)
    model.set_executor(executor)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(IDS, num_beams=3, domain="code", **options), beams)
    assert not model.prepare("code"), "nothing is copied for a domain"


def test_gradients_come_from_the_weights(tmp_path):
    model = _load(tmp_path, executor="indexed")
    with torch.no_grad():
        model(IDS)
    gradients = []
    for executor in ("indexed", "masked"):
        model.set_executor(executor)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.model.layers[1].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("executor", EVERY_LEAF)
@torch.no_grad()
def test_compiled(executor, tmp_path):
    model = _load(tmp_path, executor=executor)
    expected = model(IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    _close(compiled(IDS).logits, expected)
    _close(model(IDS).logits, expected)


@torch.no_grad()
def test_without_room_the_weights_are_plain(tmp_path):
    model = _load(tmp_path, executor="packed", max_resident_bytes=10)
    expected = _load(tmp_path, executor="masked")(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert model.resident == {}


@pytest.mark.parametrize("executor", EVERY_LEAF)
@torch.no_grad()
def test_threads_that_begin_together(executor, tmp_path):
    model = _load(tmp_path, executor="masked")
    inputs = [prompt(seed=seed) for seed in range(4)]
    expected = [model(ids).logits for ids in inputs]

    @torch.no_grad()
    def work(index):
        for _ in range(4):
            _close(model(inputs[index]).logits, expected[index])
        return index

    for _ in range(5):
        model.set_executor(executor)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize("executor", EVERY_LEAF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_another_dtype_while_a_form_is_in_use(dtype, executor, tmp_path):
    model = _load(tmp_path, executor=executor)
    model(IDS)
    model.to(dtype)
    found = model(IDS).logits
    model.set_executor("masked")
    expected = model(IDS).logits
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("executor", EVERY_LEAF)
@torch.no_grad()
def test_an_adapter_around_leaves_in_a_form(executor, tmp_path):
    model = _load(tmp_path, executor=executor)
    model(IDS)
    settings = peft.LoraConfig(target_modules=["up_proj", "down_proj", "q_proj"], r=2)
    adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.1)

    def both():
        model.set_executor(executor)
        found = adapted(IDS).logits
        model.set_executor("masked")
        return found, adapted(IDS).logits

    before, plain = both()
    _close(before, plain)
    adapted.merge_adapter()
    merged, plain = both()
    _close(merged, plain)
    assert (merged - before).abs().max() <= 1e-4
    adapted.unmerge_adapter()
    _close(*both())
