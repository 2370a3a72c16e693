"""The sliced executor: the same numbers from views of the weights, and honest books of the rest."""

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.runs import MOST_RUNS
from hf_sparse_pathways.ffn.slices import Sliced
from tests.architectures import (
    ARCHITECTURES,
    build,
    compensate,
    prompt,
    random_masks,
    repaired,
    zeroed,
)
from tests.modeling.copied import copied_bytes

IDS = prompt()
TOLERANCE = 1e-5


def _close(left, right):
    assert (left - right).abs().max().item() <= TOLERANCE


def _permuted(name="llama", domains=("code", "law"), make=None):
    dense = build(name)
    masks = random_masks(dense, domains)
    paths = make(dense, masks) if make else sp.Pathways.from_masks(dense, masks)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="sliced")
    return dense, masks, sp.permute(model)


def _without_full_matrices(dense, masks):
    """Return compensation of which every part is small."""
    paths = compensate(dense, masks)
    thin = {}
    for name, pathway in paths.by_domain.items():
        blocks = [
            replace(
                part,
                delta=None if isinstance(part.delta, torch.Tensor) else part.delta,
                incoming=tuple(None if isinstance(c, torch.Tensor) else c for c in part.incoming),
            )
            for part in pathway.blocks
        ]
        thin[name] = sp.Pathway(blocks=tuple(blocks))
    return replace(paths, by_domain=thin)


class _Seen:
    """What the products of a forward pass were given."""

    def __init__(self, monkeypatch):
        self.storages, self.columns = set(), []
        linear = torch.nn.functional.linear

        def spy(x, weight, bias=None):
            self.storages.add(weight.untyped_storage().data_ptr())
            self.columns.append(tuple(weight.shape))
            return linear(x, weight, bias)

        monkeypatch.setattr("hf_sparse_pathways.ffn.slices.functional.linear", spy)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_masks_alone_take_no_memory(name):
    dense, masks, model = _permuted(name)
    for domain, keep in masks.items():
        _close(model(IDS, domain=domain).logits, zeroed(dense, keep)(IDS).logits)
    _close(model(IDS, domain=["law", None]).logits[0], zeroed(dense, masks["law"])(IDS).logits[0])
    assert model.resident == {"code": 0, "law": 0}
    assert copied_bytes(model) == 0


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_every_compensation_and_only_full_matrices_are_copied(name):
    dense, masks, model = _permuted(name, make=compensate)
    original = compensate(dense, masks)
    for domain in masks:
        _close(model(IDS, domain=domain).logits, repaired(dense, original[domain])(IDS).logits)
    assert copied_bytes(model) == sum(model.resident.values()) > 0
    for index, attached in enumerate(model._attachment.blocks):
        part = model.pathways["code"].blocks[index]
        *incoming, outgoing = attached.leaves.values()
        assert bool(outgoing.copies) == isinstance(part.delta, torch.Tensor)
        for leaf, change in zip(incoming, part.incoming, strict=True):
            assert bool(leaf.copies) == isinstance(change, torch.Tensor)


@pytest.mark.parametrize("name", ["llama_biased", "gpt2", "phi3", "falcon"])
@torch.no_grad()
def test_small_parts_take_no_copies(name):
    dense, masks, model = _permuted(name, make=_without_full_matrices)
    original = _without_full_matrices(dense, masks)
    for domain in masks:
        _close(model(IDS, domain=domain).logits, repaired(dense, original[domain])(IDS).logits)
    assert model.resident == {"code": 0, "law": 0}
    assert copied_bytes(model) == 0


@torch.no_grad()
def test_only_kept_neurons_are_computed_on_the_weights_themselves(monkeypatch):
    _, masks, model = _permuted()
    seen = _Seen(monkeypatch)
    model(IDS, domain="code")
    weights = {
        leaf.weight.untyped_storage().data_ptr()
        for attached in model._attachment.blocks
        for leaf in attached.leaves.values()
    }
    assert seen.storages >= weights
    for keep in masks["code"]:
        assert seen.columns.count((int(keep.sum()), 32)) >= 2
        assert (32, int(keep.sum())) in seen.columns


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_several_runs(name):
    domains = ("a", "b", "c", "d")
    dense, masks, model = _permuted(name, domains)
    counts = [len(runs) for block in model._attachment.blocks for runs in block.state.members.runs]
    assert max(counts) > 1
    for domain in domains:
        _close(model(IDS, domain=domain).logits, zeroed(dense, masks[domain])(IDS).logits)
    assert copied_bytes(model) == 0


@torch.no_grad()
def test_more_runs_than_the_limit_are_copied_and_counted():
    dense = build("llama")
    keep = torch.arange(48) % 2 == 0
    few = torch.arange(48) % (2 * 48 // (2 * MOST_RUNS)) < 48 // (2 * MOST_RUNS)
    paths = sp.Pathways.from_masks(dense, {"many": [keep] * 3, "mixed": [keep, few, few]})
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="sliced")
    for domain in paths.domains:
        _close(model(IDS, domain=domain).logits, zeroed(dense, paths[domain].keep)(IDS).logits)
    assert copied_bytes(model) == sum(model.resident.values())
    block = 3 * 24 * 32 * 4
    assert model.resident == {"many": 3 * block, "mixed": block}
    model.max_resident_bytes = block
    _close(model(IDS, domain="many").logits, zeroed(dense, paths["many"].keep)(IDS).logits)
    assert "many" not in model.resident  # masked: it does not fit
    with pytest.raises(sp.PathwaysError, match="max_resident_bytes"):
        model.prepare("many")
    assert model.prepare("mixed")


CHANGES = {
    "double": lambda model: model.double(),
    "one layer": lambda model: (model.double(), model.model.layers[1].float(), model.float()),
    "written": lambda model: [p.data.mul_(1.5) for p in model.parameters()],
    "replaced": lambda model: [
        setattr(leaf, "weight", torch.nn.Parameter(leaf.weight * 2))
        for block in model._attachment.blocks
        for leaf in block.leaves.values()
    ],
    "train": lambda model: model.train().eval(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_becomes_of_the_weights_is_seen(change):
    for make in (None, compensate):
        _, _, model = _permuted(make=make)
        model(IDS, domain="code")
        CHANGES[change](model)
        found = model(IDS, domain="code").logits
        reference = copy.deepcopy(model)
        reference.set_executor("masked")
        _close(found, reference(IDS, domain="code").logits)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_duplicates(duplicate):
    for make in (None, compensate):
        _, _, model = _permuted(make=make)
        expected = model(IDS, domain="law").logits
        twin = duplicate(model)
        with model.pathway("code"):
            assert torch.equal(twin(IDS, domain="law").logits, expected)
        own = {p.untyped_storage().data_ptr() for p in twin.parameters()}
        assert own.isdisjoint(p.untyped_storage().data_ptr() for p in model.parameters())


@pytest.mark.parametrize("make", [None, compensate])
@torch.no_grad()
def test_saved_loaded_and_switched(make, tmp_path):
    _, _, model = _permuted(make=make)
    model.save_pretrained(tmp_path)
    loaded = sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.executor == "sliced"
    expected = model(IDS, domain="code").logits
    assert torch.equal(loaded(IDS, domain="code").logits, expected)
    for executor in ("compact", "sliced", "masked", "sliced"):
        loaded.set_executor(executor)
        _close(loaded(IDS, domain="code").logits, expected)
        if executor != "masked":
            assert copied_bytes(loaded) == sum(loaded.resident.values())
    loaded.config.executor = "compact"  # not through set_executor
    sliced = dict(loaded.resident)
    _close(loaded(IDS, domain="code").logits, expected)
    assert loaded.resident["code"] > sliced["code"]
    assert copied_bytes(loaded) == sum(loaded.resident.values())


def test_threads_with_a_domain_each():
    domains = ("a", "b", "c", "d")
    for make in (None, compensate):
        _, _, model = _permuted(domains=domains, make=make)
        arguments = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        expected = {d: model.generate(IDS, domain=d, **arguments) for d in domains}
        wrong = []

        def work(domain, model=model, expected=expected, arguments=arguments, wrong=wrong):
            for _ in range(4):
                if not torch.equal(
                    model.generate(IDS, domain=domain, **arguments), expected[domain]
                ):
                    wrong.append(domain)

        threads = [threading.Thread(target=work, args=(domain,)) for domain in domains]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_gradients_are_the_masked_ones():
    _, _, model = _permuted()
    model(IDS, labels=IDS, domain="code").loss.backward()
    found = model.model.layers[0].mlp.up_proj.weight.grad
    keep = model.pathways["code"].blocks[0].keep
    assert found[keep].abs().min() > 0
    assert not found[~keep].any()


@torch.no_grad()
def test_half_a_leaf_is_refused():
    _, _, model = _permuted()
    leaf = model.model.layers[0].mlp.up_proj
    leaf.weight = torch.nn.Parameter(leaf.weight[:24].clone())
    with pytest.raises(sp.PathwaysError, match="sharded"):
        model(IDS, domain="code")


@torch.no_grad()
def test_one_run_of_all_neurons_is_dense():
    dense = build("llama")
    everything = {"all": [torch.ones_like(keep) for keep in random_masks(dense)["code"]]}
    paths = sp.Pathways.from_masks(dense, everything)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="sliced")
    assert torch.equal(model(IDS, domain="all").logits, dense(IDS).logits)


def test_it_is_registered():
    from hf_sparse_pathways.ffn.executors import EXECUTORS

    assert isinstance(EXECUTORS["sliced"], Sliced)
