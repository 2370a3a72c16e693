"""Oracles: pathways that skip by token equal a plain model whose activations are thresholded."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn import active, leaves
from hf_sparse_pathways.ffn.blocks import find_blocks
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
from tests.modeling.test_generate import FORMS, _generate
from tests.skipping import reference, skipping, threshold_leaves
from tests.survivors import survivors
from tests.test_exactness import EXECUTORS, TOLERANCE

pytestmark = pytest.mark.usefixtures("every_form_pays")


@pytest.fixture(autouse=True)
def _torch_multiplies(monkeypatch):
    monkeypatch.setattr(product, "MOST_INPUTS", 0)


def _make(name):
    dense = build(name)
    return dense, make_model(dense, skipping(compensate(dense, random_masks(dense)), IDS, dense))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_equals_thresholded_activations(name):
    dense, model = _make(name)
    own = model.pathways["code"]
    expected = expected_logits(dense, model, reference(dense, own))
    whole = repaired_model(dense, own)(IDS, use_cache=False).logits
    assert difference(expected["code"], whole) > 1e-3
    for executor in ("masked", "compact", "sliced"):
        model.set_executor(executor)
        assert_computes(model, expected)


@pytest.fixture(scope="module")
def llama():
    dense, model = _make("llama")
    dense.generation_config.pad_token_id = 0
    dense.generation_config.eos_token_id = None
    model.generation_config = copy.deepcopy(dense.generation_config)
    return dense, model, reference(dense, model.pathways["code"])


@pytest.mark.parametrize("executor", ["masked", "compact"])
@torch.no_grad()
def test_what_is_thresholded_is_the_activation_function_s_output(executor):
    dense = build("llama")
    masks = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, skipping(masks, IDS, dense))
    model.set_executor(executor)
    block, part = find_blocks(dense)[0], model.pathways["code"].blocks[0]
    x = torch.randn(1, 50, block.d_in, generator=torch.Generator().manual_seed(0))
    gate, up = (leaf(x)[..., part.keep] for leaf in block.incoming)
    size = block.parent.act_fn(gate)
    active = size.abs() > part.skipping.threshold
    assert 0.1 < active.float().mean() < 0.9
    expected = (size * up * active) @ block.outgoing.weight[:, part.keep].T
    with model.pathway("code"):
        found = find_blocks(model)[0].parent(x)
    assert difference(found, expected) <= TOLERANCE


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
def test_dense_passes_and_rows_of_other_domains_beside_it(llama, executor):
    dense, model, plain = llama
    model.set_executor(executor)
    expected = expected_logits(dense, model, plain)
    assert_computes(model, expected, rows=(None, "code", "law"))
    assert_computes_a_first_token(model, expected)


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


@torch.no_grad()
def test_compiled_equals_eager(llama):
    _, model, plain = llama
    model.set_executor("compact")
    compiled = torch.compile(lambda ids: model(ids, domain="code").logits, backend="eager")
    assert difference(compiled(IDS), plain(IDS).logits) <= 10 * TOLERANCE


@pytest.mark.parametrize("target", ["up_proj", "down_proj"])
@torch.no_grad()
def test_an_adapter_s_share_is_looked_at(llama, target):
    dense, model, plain = llama
    config = LoraConfig(target_modules=[target], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(0)
    other = get_peft_model(repaired_model(dense, model.pathways["code"]), config)
    for layer, part in zip(other.model.model.layers, model.pathways["code"].blocks, strict=True):
        threshold_leaves(layer.mlp.up_proj, layer.mlp.down_proj, part)
    logits = adapted(IDS, domain="code").logits
    assert difference(logits, plain(IDS).logits) > 1e-3
    assert difference(logits, other(IDS).logits) <= 10 * TOLERANCE


def test_flops_count_the_gate_of_what_is_skipped(llama):
    _, model, _ = llama
    pathways, total, dense = model.pathways, 0.0, 0.0
    for block, shape in zip(pathways["code"].blocks, pathways.base.blocks, strict=True):
        rank = 0 if block.bypass is None else block.bypass.rank
        total += block.kept * (shape.d_in + 0.5 * (shape.d_in + shape.d_out))
        total += rank * (shape.d_in + shape.d_out)
        dense += shape.d_ff * (2 * shape.d_in + shape.d_out)
    assert pathways.flops("code") == pytest.approx(total / dense)
    assert "skipping" in str(pathways.sections()[0].rows)


def test_what_computes_the_same_for_all_tokens_is_refused(llama, tmp_path):
    _, model, _ = llama
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedModelError, match="skips neurons token by token"):
        sp.export(model, "code", tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="skips neurons token by token"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", domain="code")


@pytest.mark.needs_compiler
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "glm4", "gpt2"])
@torch.no_grad()
def test_a_step_reads_only_what_its_token_needs(name, monkeypatch):
    monkeypatch.undo()  # the kernel multiplies
    dense, model = _make(name)
    model.set_executor("indexed")
    plain = reference(dense, model.pathways["code"])
    read = []
    wrapped = active.active_outgoing
    monkeypatch.setattr(
        leaves, "active_outgoing", lambda *a: (read.append(len(a[3])), wrapped(*a))[1]
    )
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    expected = plain.generate(IDS[:1], **how)
    found = model.generate(IDS[:1], domain="code", **how)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        assert difference(mine, theirs) <= 10 * TOLERANCE
    two_leaves = len(find_blocks(dense)[0].incoming) == 2
    assert bool(read) == two_leaves
    if two_leaves:
        kept = sum(block.kept for block in model.pathways["code"].blocks) / len(find_blocks(dense))
        assert 0 < sum(read) / len(read) < 0.9 * kept
    rows = model(IDS[:, :1], domain="code", use_cache=False).logits  # a token of each row
    assert difference(rows, plain(IDS[:, :1], use_cache=False).logits) <= 10 * TOLERANCE
