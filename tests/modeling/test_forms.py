"""Models whose weights are multiplied in another form: packed, or in place."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.leaves import RestLeaf
from tests.architectures import build, compensate, prompt, random_masks

pytestmark = pytest.mark.usefixtures("every_form_pays")


def _sparse(**arguments):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


@pytest.mark.parametrize("executor", ["packed", "packed-all", "indexed"])
def test_gradients_autocast_and_tracing_do_without(executor):
    model = _sparse(executor=executor)
    reference = _sparse(executor="masked")
    ids = prompt()
    for domain in ("code", None, ["code", "law"]):
        model.zero_grad()
        reference.zero_grad()
        model(ids, labels=ids, domain=domain).loss.backward()
        reference(ids, labels=ids, domain=domain).loss.backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mine, theirs = (m(ids, domain=domain).logits for m in (model, reference))
        assert (mine - theirs).abs().max() <= 0.1 * theirs.abs().max()


@pytest.mark.needs_compiler
@pytest.mark.needs_packing
@pytest.mark.parametrize("executor", ["packed-all", "indexed"])
@torch.no_grad()
def test_leaves_outside_the_blocks_are_swapped_only_while_in_use(executor):
    model = _sparse(executor=executor)
    attention = model.model.layers[0].self_attn.q_proj
    assert type(attention) is torch.nn.Linear
    model(prompt(), domain="code")
    assert type(attention) is not torch.nn.Linear
    assert type(model.to_dense().model.layers[0].self_attn.q_proj) is torch.nn.Linear
    model.set_executor("compact")
    assert type(attention) is torch.nn.Linear


@pytest.mark.needs_compiler
@pytest.mark.needs_packing
@pytest.mark.parametrize("executor", ["packed-all", "indexed"])
@torch.no_grad()
def test_the_attention_of_a_loaded_model_takes_part(executor, tmp_path):
    _sparse().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, executor=executor)
    model.max_resident_bytes = "1GB"
    expected = _sparse(executor="masked")(prompt(), domain="code").logits
    assert torch.allclose(model(prompt(), domain="code").logits, expected, atol=1e-5)
    assert list(model.resident) == ["code", "attention and head"]


@pytest.mark.parametrize("executor", ["packed-all", "indexed"])
@torch.no_grad()
def test_changed_attention_weights_are_noticed(executor):
    model = _sparse(executor=executor)
    model(prompt(), domain="code")
    for change in (lambda w: w.mul_(0.5), lambda w: w.data.mul_(3.0)):
        change(model.model.layers[1].self_attn.o_proj.weight)
        found = model(prompt(), domain="code").logits
        model.set_executor("masked")
        assert torch.allclose(found, model(prompt(), domain="code").logits, atol=1e-5)
        model.set_executor(executor)


@pytest.mark.parametrize("executor", ["packed-all", "indexed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_attention_weights_are_watched_from_their_first_copy_on(name, executor):
    dense = build(name)
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor=executor)
    model(prompt(), domain="code")
    weight = next(p for n, p in model.named_parameters() if "attn" in n and p.dim() == 2)
    weight.data.mul_(3)
    found = model(prompt(), domain="code").logits
    model.set_executor("masked")
    expected = model(prompt(), domain="code").logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("executor", ["masked", "compact", "packed", "indexed"])
@torch.no_grad()
def test_repaired_rows_mix_under_autocast(executor):
    dense = build("llama")
    paths = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor=executor)
    expected = model(prompt(), domain=["code", "law"]).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(prompt(), domain=["code", "law"]).logits
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()


class _Own(torch.nn.Linear):
    """A linear class with a forward of its own."""

    def forward(self, x):
        return x @ self.weight.T


class _Scaled(_Own):
    """One that computes something else than ``linear`` does."""

    def forward(self, x):
        return 2.0 * super().forward(x)


class _Two(_Own):
    """One that takes and returns two tensors."""

    def forward(self, x, other):
        return super().forward(x), other


@pytest.mark.needs_compiler
@pytest.mark.needs_packing
@pytest.mark.parametrize("executor", ["packed-all", "indexed"])
@torch.no_grad()
def test_only_leaves_that_compute_as_linear_are_swapped(executor):
    dense = build("llama")
    attention = dense.model.layers[0].self_attn
    attention.q_proj.__class__, attention.k_proj.__class__ = _Own, _Scaled
    attention.unused = _Two(4, 4, bias=False)
    torch.nn.utils.parametrizations.weight_norm(attention.v_proj)
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="masked")
    expected = model(prompt(), domain="code").logits
    model.set_executor(executor)
    model.max_resident_bytes = "1GB"
    assert torch.allclose(model(prompt(), domain="code").logits, expected, atol=1e-5)
    attention = model.model.layers[0].self_attn
    swapped = [name for name, one in attention.named_children() if isinstance(one, RestLeaf)]
    assert swapped == ["q_proj", "o_proj"]


@pytest.mark.needs_compiler
@torch.no_grad()
def test_the_attention_of_falcon_takes_part():
    dense = build("falcon")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="indexed")
    model(prompt(), domain="code")
    assert isinstance(model.transformer.h[0].self_attention.query_key_value, RestLeaf)
