"""Copies of kept weights stay within their limit, whoever asks for which domain in what order."""

import copy
import pickle
import threading

import peft
import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from tests.architectures import ARCHITECTURES, build, compensate, prompt, random_masks
from tests.modeling.copied import copied_bytes

DOMAINS = ("a", "b", "c", "d")
IDS = prompt()


def _sparse(name="llama", domains=DOMAINS, **arguments):
    dense = build(name).eval()
    paths = sp.Pathways.from_masks(dense, random_masks(dense, domains))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


def _sizes(model):
    """Bytes of each domain's copies."""
    limit = model.max_resident_bytes
    model.max_resident_bytes = "1GB"
    sizes = {domain: model.prepare(domain) and model.resident[domain] for domain in model.domains}
    model.max_resident_bytes = limit
    return sizes


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_books_are_right(name, compensated):
    dense = build(name).eval()
    masks = random_masks(dense, ("a", "b"))
    paths = compensate(dense, masks) if compensated else sp.Pathways.from_masks(dense, masks)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    model.max_resident_bytes = "1GB"
    for domain in ("a", "b", "a"):
        model(IDS, domain=domain)
        assert copied_bytes(model) == sum(model.resident.values())
    for domain in (["b", "a"], ["a", None], "a"):  # bypasses may be shared with those above
        model(IDS, domain=domain)
        assert copied_bytes(model) <= sum(model.resident.values())
    assert list(model.resident) == ["b", "a+b", "dense+a", "a"]


@pytest.mark.needs_compiler
@pytest.mark.needs_packing
@pytest.mark.usefixtures("every_form_pays")
@pytest.mark.parametrize("executor", ["packed", "packed-all", "indexed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_other_forms_take_no_more_than_the_books_say(name, executor):
    dense = build(name).eval()
    paths = compensate(dense, random_masks(dense, ("a", "b")))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor=executor)
    model.max_resident_bytes = "1GB"
    assert model.execution.executor == executor, model.execution.reason
    for domain in ("a", None, ["b", "a"]):
        model(IDS, domain=domain)
        assert 0 < copied_bytes(model) <= sum(model.resident.values())
    assert {"a", "dense", "a+b"} <= set(model.resident)
    assert ("attention and head" in model.resident) == (executor != "packed")
    model.set_executor("compact")
    assert (model.resident, copied_bytes(model)) == ({}, 0)


@torch.no_grad()
def test_by_default_copies_take_as_much_as_the_weights():
    model = _sparse()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model.max_resident_bytes == weights


@torch.no_grad()
def test_the_longest_unused_gives_way():
    model = _sparse()
    expected = {domain: model(IDS, domain=domain).logits for domain in DOMAINS}
    sizes = _sizes(model)
    model.max_resident_bytes = 2 * max(sizes.values())
    for domain, left in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("d", "cd")):
        assert torch.equal(model(IDS, domain=domain).logits, expected[domain])
        assert list(model.resident) == list(left)
        assert copied_bytes(model) == sum(model.resident.values()) <= model.max_resident_bytes


@torch.no_grad()
def test_a_pathway_that_does_not_fit_is_masked_and_nothing_gives_way_for_it():
    model = _sparse()
    dense = build("llama").eval()
    masks = random_masks(dense, DOMAINS)
    masks["d"] = [torch.ones_like(keep) for keep in masks["d"]]
    model.set_pathways(sp.Pathways.from_masks(dense, masks))
    sizes = _sizes(model)
    model.max_resident_bytes = sizes["d"] - 1
    model(IDS, domain="a")
    found = model(IDS, domain="d").logits
    assert torch.equal(found, model(IDS, domain=None).logits)
    assert list(model.resident) == ["a"]
    with pytest.raises(PathwaysError, match=r"(?s)'d'.* kB.*max_resident_bytes"):
        model.prepare("d")
    assert list(model.resident) == ["a"]


@torch.no_grad()
def test_prepare_makes_what_the_first_call_needs():
    model = _sparse()
    assert model.prepare("b")
    leaves = [leaf for block in model._attachment.blocks for leaf in block.leaves.values()]
    made = [leaf.copies[1] for leaf in leaves]
    model(IDS, domain="b")
    assert all(leaf.copies[1] is kept for leaf, kept in zip(leaves, made, strict=True))


@torch.no_grad()
def test_prepare_refuses_what_is_no_domain():
    model = _sparse()
    with pytest.raises(UnknownNameError, match="'a'"):
        model.prepare("e")
    for domain in (None, ["a", "b"]):
        with pytest.raises(PathwaysError, match="one domain"):
            model.prepare(domain)
    model.set_executor("masked")
    assert not model.prepare("a")
    assert model.resident == {}


@pytest.mark.parametrize("size", ["lots", 0, -1])
def test_a_limit_that_is_no_size_is_refused(size):
    model = _sparse()
    before = model.max_resident_bytes
    with pytest.raises(PathwaysError, match="no size of memory"):
        model.max_resident_bytes = size
    assert model.max_resident_bytes == before


@torch.no_grad()
def test_a_mixed_batch_gives_way_and_makes_others_give_way():
    model = _sparse()
    expected = model(prompt(rows=3), domain=["a", "b", "c"]).logits
    union = model.resident["a+b+c"]
    model.max_resident_bytes = union
    model(IDS, domain="d")
    assert list(model.resident) == ["d"]
    assert torch.equal(model(prompt(rows=3), domain=["a", "b", "c"]).logits, expected)
    assert list(model.resident) == ["a+b+c"]
    model.max_resident_bytes = union - 1
    found = model(prompt(rows=3), domain=["a", "b", "c"]).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert model.resident == {}


@torch.no_grad()
def test_a_mixed_batch_computes_the_union_alone(monkeypatch):
    model = _sparse()
    ids, domains = prompt(rows=3), ["b", "a", "b"]
    expected = [model(ids[row : row + 1], domain=name).logits for row, name in enumerate(domains)]
    leaf = type(model._attachment.blocks[0].leaves["up_proj"])
    monkeypatch.setattr(leaf, "dense", None)
    found = model(ids, domain=domains).logits
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    for attached in model._attachment.blocks:
        one, other = (attached.state.pathways[index].keep for index in (0, 1))
        shape = attached.leaves["up_proj"].copies[0, 1].product.weight.shape
        assert shape[0] == int((one | other).sum()) < attached.state.d_ff


@torch.no_grad()
def test_where_nothing_is_left_out_a_mixed_batch_makes_no_copies():
    model = _sparse()
    model(IDS, domain=["a", None])
    assert model.resident == {"dense+a": 0}


CHANGES = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "one layer": lambda model: model.model.layers[1].double(),
    "executor": lambda model: model.set_executor("compact"),
    "train": lambda model: model.train().eval(),
    "written": lambda model: [p.data.mul_(1.5) for p in model.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_books_follow_what_becomes_of_the_weights(change):
    model = _sparse()
    model.max_resident_bytes = 2 * max(_sizes(model).values())
    for domain in DOMAINS:
        model(IDS, domain=domain)
    CHANGES[change](model)
    if change == "one layer":
        model.model.layers[1].float()
    assert copied_bytes(model) <= model.max_resident_bytes
    for domain in DOMAINS:
        model(IDS, domain=domain)
        assert copied_bytes(model) == sum(model.resident.values()) <= model.max_resident_bytes


@torch.no_grad()
def test_wrapped_blocks_have_no_copies():
    model = _sparse()
    model(IDS, domain="a")
    before = model.resident["a"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["down_proj"], layers_to_transform=[1]
    )
    peft.get_peft_model(model, config)
    model(IDS, domain="a")
    assert copied_bytes(model) == model.resident["a"] < before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_a_duplicate_begins_without_copies_and_keeps_books_of_its_own(duplicate):
    model = _sparse()
    model.max_resident_bytes = 2 * max(_sizes(model).values())
    expected = model(IDS, domain="a").logits
    other = duplicate(model)
    assert other.max_resident_bytes == model.max_resident_bytes
    assert (other.resident, copied_bytes(other)) == ({}, 0)
    for domain in ("b", "c", "a"):
        found = other(IDS, domain=domain).logits
    assert torch.equal(found, expected)
    assert list(other.resident) == ["c", "a"]
    assert list(model.resident) == ["a"]


@torch.no_grad()
def test_loading_takes_a_limit(tmp_path):
    model = _sparse()
    model.save_pretrained(tmp_path)
    loaded = sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path, max_resident_bytes="12kB")
    assert loaded.max_resident_bytes == 12_000


def test_four_threads_while_pathways_give_way():
    model = _sparse()
    arguments = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = {domain: model.generate(IDS, domain=domain, **arguments) for domain in DOMAINS}
    model.max_resident_bytes = 2 * max(_sizes(model).values())
    errors, highest = [], []

    def work(domain):
        for _ in range(6):
            found = model.generate(IDS, domain=domain, **arguments)
            highest.append(sum(model.resident.values()))
            if not torch.equal(found, expected[domain]):
                errors.append(domain)

    threads = [threading.Thread(target=work, args=(domain,)) for domain in DOMAINS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(highest) == 24
    assert max(highest) <= model.max_resident_bytes
    assert copied_bytes(model) == sum(model.resident.values()) <= model.max_resident_bytes


@torch.no_grad()
def test_what_a_pass_is_using_does_not_give_way():
    model = _sparse()
    model.max_resident_bytes = max(_sizes(model).values())
    inner, resident = [], []

    def other_domain(_module, _args):
        if not inner:
            inner.append(None)
            inner[0] = model(IDS, domain="b").logits
            resident.append(list(model.resident))

    expected = {domain: model(IDS, domain=domain).logits for domain in ("a", "b")}
    handle = model.model.layers[1].register_forward_pre_hook(other_domain)
    outer = model(IDS, domain="a").logits
    handle.remove()
    assert resident == [["a"]]
    assert torch.equal(outer, expected["a"])
    assert torch.allclose(inner[0], expected["b"], atol=1e-5)  # masked
    model(IDS, domain="b")
    assert list(model.resident) == ["b"]


@torch.no_grad()
def test_a_pass_that_fails_lets_go_of_its_pathway():
    model = _sparse()
    model.max_resident_bytes = max(_sizes(model).values())
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10**6), domain="a")
    model(IDS, domain="b")
    assert list(model.resident) == ["b"]
