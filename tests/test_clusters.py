"""Oracles: clustered pathways equal a model that computes every expert and picks by token."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.native import product
from tests.architectures import ARCHITECTURES, build, prompt
from tests.architectures import repaired as repaired_model
from tests.clustered import CLUSTERS, clustered, reference
from tests.modeling.test_generate import FORMS, _generate
from tests.survivors import survivors
from tests.test_exactness import EXECUTORS, TOLERANCE

IDS = prompt(3, 9)


pytestmark = pytest.mark.usefixtures("every_form_pays")


@pytest.fixture(autouse=True)
def _torch_multiplies(monkeypatch):
    """Let ``indexed`` gather rows: torch multiplies in them and in the oracles."""
    monkeypatch.setattr(product, "MOST_INPUTS", 0)


SHARED = ("bloom", "gemma3", "gpt2", "llama", "mpt", "phi3", "qwen3_moe")
"""Architectures, of each kind of block one, that are tried with one refit for all experts."""


@pytest.fixture(scope="module", params=[*sorted(ARCHITECTURES), *(f"{n}-shared" for n in SHARED)])
def case(request):
    dense = build(request.param.removesuffix("-shared"))
    pathways = clustered(dense, shared="-shared" in request.param)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.max_resident_bytes = "1GB"
    with torch.no_grad():
        expected = {
            "code": reference(dense, pathways["code"])(IDS, use_cache=False).logits,
            "law": repaired_model(dense, pathways["law"])(IDS, use_cache=False).logits,
            None: dense(IDS).logits,
        }
    return dense, model, expected


def _difference(left, right):
    return (left - right).abs().max().item()


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_equals_the_expert_of_each_token(case, executor):
    _, model, expected = case
    model.set_executor(executor)
    assert model.execution.executor == executor, model.execution.reason
    assert _difference(expected["code"], expected["law"]) > 1e-2
    for name in ("code", "law", None):
        assert _difference(model(IDS, domain=name).logits, expected[name]) <= 5 * TOLERANCE, name


@pytest.mark.parametrize("executor", EXECUTORS)
@torch.no_grad()
def test_rows_of_other_domains_beside_it(case, executor):
    _, model, expected = case
    model.set_executor(executor)
    rows = ["law", "code", None]
    logits = model(IDS, domain=rows).logits
    for row, name in enumerate(rows):
        assert _difference(logits[row], expected[name][row]) <= 5 * TOLERANCE, name


def test_gradients_equal_the_reference(case):
    dense, model, _ = case
    pathways = model.pathways
    plain = reference(dense, pathways["code"])
    plain(IDS, labels=IDS, use_cache=False).loss.backward()
    model(IDS, labels=IDS, domain="code", use_cache=False).loss.backward()
    expected = plain.get_input_embeddings().weight.grad
    assert _difference(model.get_input_embeddings().weight.grad, expected) <= TOLERANCE
    model.zero_grad()


@torch.no_grad()
def test_saved_copied_and_pickled_is_equal(case, tmp_path):
    _, model, _ = case
    model.set_executor("masked")
    logits = model(IDS, domain="code").logits
    for other in survivors(model, tmp_path):
        other.set_executor("masked")
        assert torch.equal(other(IDS, domain="code").logits, logits)
    alone = sp.Pathways.from_pretrained(tmp_path, only="code")
    assert alone.domains == ["code"]
    for mine, theirs in zip(alone["code"].blocks, model.pathways["code"].blocks, strict=True):
        assert mine.parts().keys() == theirs.parts().keys()
        assert all(torch.equal(mine.parts()[name], part) for name, part in theirs.parts().items())


@pytest.fixture(scope="module")
def llama():
    dense = build("llama")
    dense.generation_config.pad_token_id = 0
    dense.generation_config.eos_token_id = None
    pathways = clustered(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.max_resident_bytes = "1GB"
    references = {
        "code": reference(dense, pathways["code"]),
        "law": repaired_model(dense, pathways["law"]),
        None: dense,
    }
    return model, references


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("form", FORMS)
def test_generates_as_the_reference(llama, executor, form):
    model, references = llama
    model.set_executor(executor)
    ids = IDS[:1] if form == "prompt_lookup" else IDS
    expected = _generate(references["code"], ids, **FORMS[form])
    assert torch.equal(_generate(model, ids, domain="code", **FORMS[form]), expected)


def test_generates_rows_of_several_domains_with_padding(llama):
    model, references = llama
    model.set_executor("compact")
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :4], mask[1, :4] = 0, 0
    rows = ["code", "code", "law"]
    found = _generate(model, ids, attention_mask=mask, domain=rows)
    for row, name in enumerate(rows):
        expected = _generate(references[name], ids, attention_mask=mask)
        assert torch.equal(found[row], expected[row])


def test_threads_route_apart(llama):
    model, references = llama
    model.set_executor("compact")
    expected = {name: _generate(references[name], IDS) for name in ("code", "law")}
    found = {}

    def run(number, name):
        found[number] = name, _generate(model, IDS, domain=name)

    threads = [threading.Thread(target=run, args=(n, "code" if n % 2 else "law")) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert all(torch.equal(tokens, expected[name]) for name, tokens in found.values())


@torch.no_grad()
def test_copies_that_do_not_fit_are_masked(llama):
    model, references = llama
    model.set_executor("compact")
    before = model.max_resident_bytes
    model.max_resident_bytes = model._attachment.copies.size(0) - 1
    try:
        logits = model(IDS, domain="code").logits
        assert "code" not in model.resident
    finally:
        model.max_resident_bytes = before
    assert _difference(logits, references["code"](IDS).logits) <= TOLERANCE
    assert model.prepare("code")  # a call makes those of experts that have tokens
    assert model.resident["code"] == sum(
        kept.product.weight.nbytes
        + (0 if kept.bypass is None else _bytes(kept.bypass))
        + (0 if kept.bias is None else kept.bias.nbytes)
        for leaf in model._attachment.copies.leaves
        for kept in leaf.copies.values()
    )


def _bytes(low_rank):
    return low_rank.outer.nbytes + low_rank.inner.nbytes


@torch.no_grad()
def test_compiled_equals_eager(llama):
    model, references = llama
    model.set_executor("compact")
    compiled = torch.compile(lambda ids: model(ids, domain="code").logits, backend="eager")
    assert _difference(compiled(IDS), references["code"](IDS).logits) <= 10 * TOLERANCE


@torch.no_grad()
def test_wrapped_leaves_are_masked_by_token(llama):
    model, references = llama
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["down_proj"]))
    logits = adapted(IDS, domain="code").logits
    assert _difference(logits, references["code"](IDS).logits) <= TOLERANCE


@torch.no_grad()
def test_permuted_neurons_compute_the_same(llama):
    model, references = llama
    permuted = sp.permute(model)
    for name in ("code", "law"):
        logits = permuted(IDS, domain=name).logits
        assert _difference(logits, references[name](IDS).logits) <= TOLERANCE


@torch.no_grad()
def test_half_precision_routes_as_full(llama):
    model, _ = llama
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.max_resident_bytes = "1GB"
    block = find_blocks(half)[0]
    seen = []
    block.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = {}
    for executor in ("masked", "compact"):
        half.set_executor(executor)
        logits[executor] = half(IDS, domain="code").logits.float()
    router = model.pathways["code"].blocks[0].router
    assert torch.equal(router(seen[0]), router(seen[0].float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(seen[0].float()), router(seen[0]))
    assert _difference(logits["masked"], logits["compact"]) <= 0.05 * logits["masked"].abs().max()


def test_what_needs_the_same_neurons_for_all_is_refused(llama, tmp_path):
    model, _ = llama
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedModelError, match="3 clusters of tokens"):
        sp.export(model, "code", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedModelError, match="without domain="):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", domain="code")


def test_flops_are_the_mean_over_tokens(llama):
    model, _ = llama
    pathways = model.pathways
    total = dense = 0.0
    for block, shape in zip(pathways["code"].blocks, pathways.base.blocks, strict=True):
        total += CLUSTERS * shape.d_in
        for share, expert in zip((0.5, 0.3, 0.2), block.experts, strict=True):
            rank = 0 if expert.bypass is None else expert.bypass.rank
            total += share * expert.kept * (shape.branches * shape.d_in + shape.d_out)
            total += share * rank * (shape.d_in + shape.d_out)
        dense += shape.d_ff * (shape.branches * shape.d_in + shape.d_out)
    assert pathways.flops("code") == pytest.approx(total / dense)
    assert "in 3 clusters" in str(pathways.sections()[0].rows)


@pytest.mark.needs_compiler
def test_by_default_the_columns_of_all_experts_fit(llama):
    model, _ = llama
    pathways, dense = model.pathways, model.to_dense()
    code = pathways["code"]
    many = sp.Pathway(
        blocks=tuple(
            sp.ClusteredBlock(
                router=sp.TokenRouter(
                    weight=block.router.weight.repeat(40, 1),
                    bias=block.router.bias.repeat(40),
                    share=block.router.share.repeat(40) / 40,
                ),
                experts=block.experts * 40,
            )
            for block in code.blocks
        )
    )
    other = sp.SparsePathwaysForCausalLM.from_dense(
        dense, sp.Pathways(base=pathways.base, by_domain={"code": code, "many": many})
    )
    size = sum(parameter.nbytes for parameter in dense.parameters())
    other.set_executor("indexed")
    for name in ("many", "code"):
        assert other.prepare(name)
    assert other.max_resident_bytes - size >= other.resident["many"]
    plain = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways.subset(["law"]))
    assert plain.max_resident_bytes == size


@pytest.mark.needs_compiler
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_experts_with_one_refit_read_its_rows_in_place(architecture, monkeypatch):
    monkeypatch.undo()  # the kernel multiplies
    dense = build(architecture)
    pathways = clustered(dense, shared=True)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, executor="indexed")
    model.max_resident_bytes = "1GB"
    expected = reference(dense, pathways["code"])
    for ids in (IDS, IDS[:1, :1]):
        logits = model(ids, domain="code", use_cache=False).logits
        assert _difference(logits, expected(ids, use_cache=False).logits) <= 5 * TOLERANCE
    assert model.prepare("code")
    for block in model._attachment.copies.blocks:
        leaf = block.leaves[block.block.layout.outgoing]
        assert len({kept.product.transposed.data_ptr() for kept in leaf.copies.values()}) == 1
    assert model.resident["code"] == _native_bytes(model)
    model._attachment.residents.clear()
    assert not any(leaf.copies for leaf in model._attachment.copies.leaves)
    model.prepare("code")
    weight = find_blocks(model)[0].outgoing.weight
    weight.mul_(2.0)  # what was copied is out of date
    changed = model(IDS, domain="code", use_cache=False).logits
    model.set_executor("masked")
    assert _difference(changed, model(IDS, domain="code", use_cache=False).logits) <= 5 * TOLERANCE


def _native_bytes(model):
    """Return what the copies of ``indexed`` take, each tensor once."""
    held = {}
    for leaf in model._attachment.copies.leaves:
        own = {leaf.weight.data_ptr()} | (
            {leaf.bias.data_ptr()} if leaf.bias is not None else set()
        )
        for kept in leaf.copies.values():
            tensors = [kept.bias, *vars(kept.product).values()]
            tensors += [] if kept.bypass is None else [kept.bypass.outer, kept.bypass.inner]
            held |= {t.data_ptr(): t.nbytes for t in tensors if t is not None}
    return sum(size for place, size in held.items() if place not in own)
    return sum(held.values())
