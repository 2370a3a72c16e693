"""Pruned copies: exact patterns, SparseGPT in sequence, and the experts that tokens are given."""

import copy
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.clustering import Clustering
from hf_sparse_pathways.discovery.pruned_copies import (
    CopyRecipe,
    copy_weights,
    make_copies,
    nonzero_flops,
)
from hf_sparse_pathways.discovery.sparsegpt import InverseFactor, Pattern, prune_weights
from hf_sparse_pathways.discovery.trials import computing, mean_loss, run_model
from hf_sparse_pathways.discovery.windows import make_batches
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, experts_of
from hf_sparse_pathways.ffn.layouts import linear_weight
from tests.architectures import build, prompt
from tests.clustered import reference
from tests.discovery.untouched import remember
from tests.modeling.test_generate import _generate
from tests.test_exactness import TOLERANCE
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = [*documents("code", 15, 40), *documents("law", 15, 40)]
IDS = prompt(3, 9)
NAMES = ("llama", "gpt2", "phi3", "opt")

pytestmark = pytest.mark.usefixtures("every_form_pays", "no_background")


def _expand(model, **options):
    options = {"clusters": 3, "experts": "copies", "max_length": 32, **options}
    return sp.expand(model, TOKENIZER, TEXT, **options)


@pytest.fixture(scope="module", params=NAMES)
def made(request):
    model = build(request.param)
    unchanged = remember(model)
    pathways = {
        "unstructured": _expand(model, sparsity=0.7),
        "2:4": _expand(model, pattern="2:4"),
    }
    unchanged()
    return model, pathways


def test_patterns_are_exact(made):
    model, pathways = made
    for block, unstructured, grouped in zip(
        find_blocks(model),
        pathways["unstructured"]["expanded"].blocks,
        pathways["2:4"]["expanded"].blocks,
        strict=True,
    ):
        assert isinstance(grouped, ClusteredBlock)
        assert len(grouped.experts) == 3
        for expert in unstructured.experts:
            for weight in copy_weights(block, expert):
                assert int((weight == 0).sum()) == round(0.7 * weight.numel())
        for expert in grouped.experts:
            for leaf, weight in zip(block.leaves, copy_weights(block, expert), strict=True):
                assert weight.dtype == leaf.weight.dtype
                groups = (weight != 0).view(len(weight), -1, 4).sum(-1)
                assert bool((groups == 2).all())


def test_experts_have_patterns_of_their_own(made):
    model, pathways = made
    block, kept = find_blocks(model)[0], pathways["2:4"]["expanded"].blocks[0]
    first, second = (copy_weights(block, expert)[0] for expert in kept.experts[:2])
    assert not torch.equal(first == 0, second == 0)


@torch.no_grad()
def test_each_token_is_computed_by_its_copy(made):
    model, pathways = made
    for own in pathways.values():
        sparse = sp.SparsePathwaysForCausalLM.from_dense(model, own)
        sparse.max_resident_bytes = "1GB"
        expected = reference(model, own["expanded"])(IDS, use_cache=False).logits
        dense = model(IDS).logits
        assert (expected - dense).abs().max() > 1e-2
        for executor in ("masked", "compact", "indexed"):
            sparse.set_executor(executor)
            logits = sparse(IDS, domain="expanded").logits
            assert (logits - expected).abs().max() <= 10 * TOLERANCE, executor


def test_what_is_not_zero_is_counted(made):
    model, pathways = made
    blocks = find_blocks(model)
    routers = sum(3 * block.d_in for block in blocks)
    dense = sum(linear_weight(leaf).numel() for block in blocks for leaf in block.leaves)
    for own, share in ((pathways["unstructured"], 0.3), (pathways["2:4"], 0.5)):
        found = own["expanded"].provenance["nonzero_flops"]
        assert found == pytest.approx(share + routers / dense, abs=1e-3)
        assert own.flops("expanded") == pytest.approx(1.0 + routers / dense)
        assert own.sparsity("expanded") == 0


def _naive(model, windows, pattern):
    """Prune block after block of a plain model, by moments that are gathered anew for each."""
    pruned = copy.deepcopy(model)
    for block in find_blocks(pruned):
        seen = [[], []]
        handles = [
            leaf.register_forward_pre_hook(
                lambda _, args, own=own: own.append(args[0].flatten(0, -2))
            )
            for leaf, own in zip((block.incoming[0], block.outgoing), seen, strict=True)
        ]
        with torch.no_grad():
            for window in windows:
                pruned(torch.tensor([window.ids]))
        for handle in handles:
            handle.remove()
        moments = [torch.cat(own).double() for own in seen]
        inputs, activation = (InverseFactor.of(x.T @ x) for x in moments)
        for leaf in block.leaves:
            own = activation if leaf is block.outgoing else inputs
            weight = linear_weight(leaf).data
            weight.copy_(prune_weights(weight, own, pattern))
    return pruned


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3"])
def test_one_copy_is_sparsegpt_block_after_block(name):
    model = build(name)
    profile = sp.profile(model, TOKENIZER, {"any": TEXT[:8]}, max_length=32, grams=False)
    recipe = CopyRecipe(pattern=Pattern(0.5), clustering=None)
    kept = make_copies(model, profile, recipe)["any"].blocks
    expected = _naive(model, profile["any"].windows, Pattern(0.5))
    for block, plain, own in zip(find_blocks(model), find_blocks(expected), kept, strict=True):
        assert not isinstance(own, ClusteredBlock)
        for weight, leaf in zip(copy_weights(block, own), plain.leaves, strict=True):
            theirs = linear_weight(leaf)
            assert ((weight == 0) == (theirs == 0)).float().mean() > 0.99
            close = (weight - theirs).abs() <= 1e-3 * theirs.abs().amax()
            assert close.float().mean() > 0.98


def test_copies_of_clusters_lose_less_than_one_copy():
    model = build("llama")
    profile = sp.profile(model, TOKENIZER, {"any": TEXT}, max_length=32, grams=False)
    losses = []
    for clustering in (None, Clustering(count=8, prior=4.0)):
        kept = make_copies(model, profile, CopyRecipe(pattern=Pattern(0.7), clustering=clustering))
        losses.append(_distance(model, profile["any"].windows, kept["any"].blocks))
    assert losses[1] < 0.9 * losses[0]


def _distance(model, windows, kept):
    total = 0.0
    for batch in make_batches(windows, 8):
        with torch.no_grad():
            dense = run_model(model, batch)
            with computing(find_blocks(model), kept):
                total += float((run_model(model, batch) - dense)[batch.mask].square().sum())
    return total


def test_nothing_goes_at_sparsity_zero():
    model = build("llama")
    pathways = _expand(model, sparsity=0.0)
    for kept in pathways["expanded"].blocks:
        for expert in experts_of(kept):
            changes = (expert.delta, *expert.incoming)
            assert all(torch.equal(change, torch.zeros_like(change)) for change in changes)
    windows = sp.profile(model, TOKENIZER, {"a": TEXT}, max_length=32, grams=False)["a"].windows
    losses = [
        mean_loss(model, windows, kept, find_blocks(model))
        for kept in (None, pathways["expanded"].blocks)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_zeros_are_exact_in_bfloat16():
    model = build("llama").to(torch.bfloat16)
    pathways = _expand(model, clusters=2, pattern="2:4")
    for block, kept in zip(find_blocks(model), pathways["expanded"].blocks, strict=True):
        for expert in kept.experts:
            assert expert.delta.dtype == torch.bfloat16
            for weight in copy_weights(block, expert):
                assert bool(((weight == 0).view(len(weight), -1, 4).sum(-1) == 2).all())
    assert nonzero_flops(find_blocks(model), pathways["expanded"].blocks) < 0.52


@pytest.fixture(scope="module")
def llama():
    dense = build("llama")
    dense.generation_config.pad_token_id = 0
    dense.generation_config.eos_token_id = None
    pathways = _expand(dense, pattern="2:4")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.max_resident_bytes = "1GB"
    return model, reference(dense, pathways["expanded"])


@pytest.mark.parametrize("executor", ["masked", "compact"])
@pytest.mark.parametrize(
    "form", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_generates_as_the_reference(llama, executor, form):
    model, expected = llama
    model.set_executor(executor)
    found = _generate(model, IDS, domain="expanded", **form)
    assert torch.equal(found, _generate(expected, IDS, **form))


def test_generates_padded_rows_beside_dense_ones(llama):
    model, expected = llama
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :4], mask[1, :4] = 0, 0
    found = _generate(model, ids, attention_mask=mask, domain=["expanded", "expanded", None])
    theirs = _generate(expected, ids, attention_mask=mask)
    dense = _generate(model.to_dense(), ids, attention_mask=mask)
    assert torch.equal(found[:2], theirs[:2])
    assert torch.equal(found[2], dense[2])


def test_saved_and_loaded_is_equal(llama, tmp_path):
    model, _ = llama
    model.set_executor("masked")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.set_executor("masked")
    assert torch.equal(loaded(IDS, domain="expanded").logits, model(IDS, domain="expanded").logits)
    told = str(loaded.pathways.sections()[0].rows)
    assert re.search(r"copies pruned 2:4 \(5\d\.\d% not zero\) in 3 clusters", told)
    assert loaded.pathways["expanded"].provenance["pattern"] == "2:4"
    for block, kept in zip(find_blocks(loaded), loaded.pathways["expanded"].blocks, strict=True):
        for expert in kept.experts:
            for weight in copy_weights(block, expert):
                assert bool(((weight == 0).view(len(weight), -1, 4).sum(-1) == 2).all())


def test_one_copy_is_exported_as_a_sparse_checkpoint(tmp_path):
    model = build("llama")
    pathways = _expand(model, clusters=1, pattern="2:4")
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model, pathways)
    sp.export(sparse, "expanded", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "LlamaForCausalLM"
    for block in find_blocks(plain):
        for leaf in block.leaves:
            groups = (leaf.weight == 0).view(len(leaf.weight), -1, 4).sum(-1)
            assert bool((groups >= 2).all())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pattern": "2:4", "sparsity": 0.7}, "Pattern 2:4 removes 0.5 of the weights"),
        ({"pattern": "banded"}, "There is no pattern 'banded'"),
        ({"sparsity": 1.0}, r"in \[0, 1\)"),
        ({"clusters": 0}, "2 to 1024"),
        ({"compensation": "bias", "ridge": 0.1}, "have no compensation, ridge"),
        ({"experts": "neurons", "pattern": "2:4"}, "experts='copies'"),
        ({"pattern": "3:7", "sparsity": 4 / 7}, "a multiple of 7 columns, but a weight has 32"),
    ],
)
def test_what_does_not_fit_is_refused(options, told):
    with pytest.raises(PathwaysError, match=told):
        _expand(build("llama"), **options)


def test_unknown_experts_are_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="Did you mean 'copies'"):
        _expand(build("llama"), experts="copys")


def test_neurons_stay_the_default():
    pathways = sp.expand(build("llama"), TOKENIZER, TEXT, clusters=3, max_length=32)
    assert pathways.flops("expanded") <= 0.5 + 1e-9
    assert pathways["expanded"].provenance["method"] == "obs"


@torch.no_grad()
def test_pushed_and_pulled_is_equal(llama, hub):
    model, _ = llama
    model.set_executor("masked")
    model.push_to_hub("me/copies")
    pulled = AutoModelForCausalLM.from_pretrained("me/copies")
    pulled.set_executor("masked")
    assert torch.equal(pulled(IDS, domain="expanded").logits, model(IDS, domain="expanded").logits)
    card = hub.repos["me/copies"].at("main").files["README.md"].content.decode()
    assert "sparsegpt, 2:4 copies computed as dense matrices" in card
