"""Oracles: groups of neurons equal a plain model whose activations are weighted token by token."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn import forms, group_products
from hf_sparse_pathways.ffn.copies import copy_bytes, copy_keys
from hf_sparse_pathways.ffn.forms import NATIVE
from hf_sparse_pathways.native import product
from tests.architectures import ARCHITECTURES, build, compensate, random_masks
from tests.architectures import repaired as repaired_model
from tests.by_token import (
    IDS,
    assert_computes,
    assert_computes_a_first_token,
    difference,
    expected_logits,
    make_model,
)
from tests.grouped import GROUPS, SIZE, TOP_K, factors_of, grouped, reference, weigh_leaves
from tests.modeling.test_generate import FORMS, _generate
from tests.skipping import skipping
from tests.survivors import survivors
from tests.test_exactness import EXECUTORS, TOLERANCE

pytestmark = pytest.mark.usefixtures("every_form_pays")


@pytest.fixture(autouse=True)
def _torch_multiplies(monkeypatch):
    monkeypatch.setattr(product, "MOST_INPUTS", 0)


def _make(name):
    dense = build(name)
    return dense, make_model(dense, grouped(compensate(dense, random_masks(dense))))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_equals_weighted_activations(name):
    dense, model = _make(name)
    own = model.pathways["code"]
    expected = expected_logits(dense, model, reference(dense, own))
    whole = repaired_model(dense, own)(IDS, use_cache=False).logits
    assert difference(expected["code"], whole) > 1e-3
    for executor in ("masked", "compact", "sliced", "indexed"):
        model.set_executor(executor)
        assert_computes(model, expected)
    token = model(IDS[:1, :1], domain="code").logits
    model.set_executor("masked")
    assert difference(token, model(IDS[:1, :1], domain="code").logits) <= 5 * TOLERANCE


def test_equal_logits_give_the_plain_sum():
    groups = _make("llama")[1].pathways["code"].blocks[0].groups
    even = sp.NeuronGroups(
        group=groups.group,
        weight=torch.zeros_like(groups.weight),
        bias=torch.zeros_like(groups.bias),
        share=groups.share,
        top_k=groups.top_k,
    )
    factors = even.factors(torch.randn(5, groups.weight.shape[1]))
    assert set(factors.flatten().tolist()) == {0.0, 1.0}
    assert bool((factors.sum(-1) == even.active).all())


@pytest.fixture(scope="module")
def llama():
    dense, model = _make("llama")
    dense.generation_config.pad_token_id = 0
    dense.generation_config.eos_token_id = None
    model.generation_config = copy.deepcopy(dense.generation_config)
    return dense, model, reference(dense, model.pathways["code"])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("form", FORMS)
def test_generates_as_the_reference(llama, executor, form):
    _, model, plain = llama
    model.set_executor(executor)
    ids = IDS[:1] if form == "prompt_lookup" else IDS
    expected = _generate(plain, ids, **FORMS[form])
    assert torch.equal(_generate(model, ids, domain="code", **FORMS[form]), expected)


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_padding_and_rows_of_other_domains_beside_it(llama, executor):
    dense, model, plain = llama
    model.set_executor(executor)
    expected = expected_logits(dense, model, plain)
    assert_computes(model, expected, rows=(None, "code", "law"))
    assert_computes_a_first_token(model, expected)
    padded = torch.cat([torch.zeros_like(IDS[:, :3]), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    logits = model(padded, attention_mask=mask, domain="code").logits[:, 3:]
    assert difference(logits, expected["code"]) <= 5 * TOLERANCE


@torch.no_grad()
def test_a_step_reads_only_what_its_token_has(llama, monkeypatch):
    _, model, _ = llama
    model.set_executor("compact")
    model(IDS, domain="code")
    asked = []
    wrapped = group_products.kept_weights
    monkeypatch.setattr(
        group_products,
        "kept_weights",
        lambda leaf, member, form: (
            asked.append(leaf.state.members.widths[member]),
            wrapped(leaf, member, form),
        )[1],
    )
    model(IDS[:1, :1], domain="code", use_cache=False)
    blocks = model.pathways["code"].blocks
    assert len(asked) == 3 * len(blocks) * (1 + TOP_K)  # gate, up and down
    assert sum(asked) == 3 * sum(block.groups.active for block in blocks)


@pytest.mark.needs_compiler
@torch.no_grad()
def test_in_place_a_step_reads_it_in_one_product_of_each_leaf(llama, monkeypatch):
    _, model, _ = llama
    model.set_executor("indexed")
    model(IDS, domain="code")
    read = {"linear_rows": [], "sum_rows": []}

    def count(name, wrapped, x, weight, index, *rest):
        if index is not None:
            read[name].append(len(index))
        return wrapped(x, weight, index, *rest)

    for name in read:
        monkeypatch.setattr(forms, name, partial(count, name, getattr(forms, name)))
    model(IDS[:1, :1], domain="code", use_cache=False)
    active = [block.groups.active for block in model.pathways["code"].blocks]
    assert read == {"linear_rows": [own for own in active for _ in range(2)], "sum_rows": active}


def _bytes_of(leaf, keys):
    """Return the bytes that some copies of a leaf hold, each storage once, but the leaf's own."""
    parts, own = {}, {leaf.weight.untyped_storage().data_ptr()}
    if leaf.bias is not None:
        own.add(leaf.bias.untyped_storage().data_ptr())
    for key in keys:
        copy, held = leaf.copies[key], []
        held += [copy.bias, *(vars(copy.bypass).values() if copy.bypass else ())]
        held += [part for part in vars(copy.product).values() if isinstance(part, torch.Tensor)]
        for part in held:
            if part is not None and part.untyped_storage().data_ptr() not in own:
                parts[part.untyped_storage().data_ptr()] = part.numel() * part.element_size()
    return sum(parts.values())


@pytest.mark.needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "phi"])
@torch.no_grad()
def test_a_single_token_by_the_kernel(name, dtype, monkeypatch):
    """Of two pathways with groups, also after the weights have changed; and what copies take."""
    monkeypatch.setattr(product, "MOST_INPUTS", 32)
    dense = build(name).to(dtype)
    made = grouped(compensate(dense, random_masks(dense)))
    model = make_model(dense, grouped(made, name="law", seed=1))
    for _ in range(2):
        for number, domain in enumerate(model.domains):
            model.set_executor("masked" if dtype == torch.float32 else "compact")
            expected = model(IDS[:1, :1], domain=domain).logits.float()
            model.set_executor("indexed")
            model(IDS, domain=domain)  # which needs the copies of all groups
            found = model(IDS[:1, :1], domain=domain).logits.float()
            limit = 5 * TOLERANCE if dtype == torch.float32 else 0.03
            assert difference(found, expected) <= limit * expected.abs().max(), domain
            for attached in model._attachment.blocks:
                for leaf in attached.leaves.values():
                    keys = [*copy_keys(leaf, number, NATIVE)]
                    assert _bytes_of(leaf, keys) == copy_bytes(leaf, number, NATIVE)
        for parameter in model.parameters():
            parameter.mul_(1.25)


@torch.no_grad()
def test_beside_a_pathway_that_skips():
    dense = build("llama")
    made = grouped(compensate(dense, random_masks(dense)))
    pathways = skipping(made, IDS, dense, "law")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    alone = sp.SparsePathwaysForCausalLM.from_dense(build("llama"), made)
    for executor in ("masked", "compact"):
        model.set_executor(executor)
        expected = alone(IDS, domain="code").logits
        assert difference(model(IDS, domain="code").logits, expected) <= 5 * TOLERANCE
        mixed = model(IDS, domain=["law", "code", None]).logits
        assert difference(mixed[1], expected[1]) <= 5 * TOLERANCE


def test_gradients_equal_the_reference(llama):
    _, model, plain = llama
    plain(IDS, labels=IDS, use_cache=False).loss.backward()
    model(IDS, labels=IDS, domain="code", use_cache=False).loss.backward()
    expected = plain.get_input_embeddings().weight.grad
    assert difference(model.get_input_embeddings().weight.grad, expected) <= TOLERANCE
    model.zero_grad()
    plain.zero_grad()


@torch.no_grad()
def test_saved_copied_pickled_and_permuted_is_equal(llama, tmp_path):
    _, model, plain = llama
    model.set_executor("masked")
    logits = model(IDS, domain="code").logits
    for other in survivors(model, tmp_path):
        other.set_executor("masked")
        assert torch.equal(other(IDS, domain="code").logits, logits)
    permuted = sp.permute(model)
    assert difference(permuted(IDS, domain="code").logits, plain(IDS).logits) <= 5 * TOLERANCE


@pytest.mark.parametrize(
    "executor", ["compact", pytest.param("indexed", marks=pytest.mark.needs_compiler)]
)
@torch.no_grad()
def test_compiled_equals_eager(llama, executor):
    _, model, plain = llama
    model.set_executor(executor)
    with model.pathway("code"):
        model(IDS)
        held = torch.compile(lambda ids: model(ids).logits, backend="eager", fullgraph=True)
        assert difference(held(IDS), plain(IDS).logits) <= 10 * TOLERANCE
    compiled = torch.compile(lambda ids: model(ids, domain="code").logits, backend="eager")
    assert difference(compiled(IDS), plain(IDS).logits) <= 10 * TOLERANCE
    rows = torch.compile(lambda ids: model(ids, domain=["code"] * 3).logits, backend="eager")
    assert difference(rows(IDS), plain(IDS).logits) <= 10 * TOLERANCE


@pytest.mark.parametrize("target", ["gate_proj", "down_proj"])
@torch.no_grad()
def test_an_adapter_sees_weighted_activations(llama, target):
    dense, model, plain = llama
    config = LoraConfig(target_modules=[target], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(0)
    other = get_peft_model(repaired_model(dense, model.pathways["code"]), config)
    for layer, part in zip(other.model.model.layers, model.pathways["code"].blocks, strict=True):
        weigh_leaves(layer.mlp.up_proj, layer.mlp.down_proj, part)
    logits = adapted(IDS, domain="code").logits
    assert difference(logits, plain(IDS).logits) > 1e-3
    assert difference(logits, other(IDS).logits) <= 10 * TOLERANCE


def test_autocast_does_not_change_what_is_chosen():
    groups = _make("llama")[1].pathways["code"].blocks[0].groups
    x = torch.randn(9, groups.weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = groups.factors(x)
    assert torch.equal(reduced, groups.factors(x))


def test_flops_are_those_of_what_a_token_has_and_of_the_router(llama):
    _, model, _ = llama
    pathways, total, dense = model.pathways, 0.0, 0.0
    for block, shape in zip(pathways["code"].blocks, pathways.base.blocks, strict=True):
        active = block.kept - (GROUPS - TOP_K) * SIZE
        assert block.groups.active == active
        total += active * (2 * shape.d_in + shape.d_out) + GROUPS * shape.d_in
        total += block.bypass.rank * (shape.d_in + shape.d_out)
        dense += shape.d_ff * (2 * shape.d_in + shape.d_out)
    assert pathways.flops("code") == pytest.approx(total / dense)
    assert "2 of 4 groups" in str(pathways.sections()[0].rows)


def test_what_computes_the_same_for_all_tokens_is_refused(llama, tmp_path):
    _, model, _ = llama
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedModelError, match="groups of neurons"):
        sp.export(model, "code", tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="groups of neurons"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", domain="code")


def test_factors_are_those_of_the_definition():
    groups = _make("llama")[1].pathways["code"].blocks[0].groups
    x = torch.randn(2, 5, groups.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(groups.factors(x), factors_of(groups, x), atol=1e-6)
