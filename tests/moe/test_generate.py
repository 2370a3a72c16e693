"""``generate`` in all its forms equals the same form on a plain model without the other experts."""

import threading

import pytest
import torch

import hf_sparse_pathways as sp
from tests.architectures import prompt
from tests.by_rows import assert_rows_with_padding
from tests.modeling.test_generate import FORMS, _generate
from tests.moe.architectures import build_moe
from tests.moe.oracles import KINDS, expert_pathways, pruned

IDS = prompt(3, 9)


@pytest.fixture(scope="module", params=["deepseek_v3", "gpt_oss"])
def case(request):
    """The model with pathways, and a plain model per domain."""
    dense = build_moe(request.param)
    pathways = expert_pathways(dense)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.max_resident_bytes = "1GB"
    references = {kind: pruned(dense, pathways[kind]) for kind in KINDS}
    return model, {**references, None: dense}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(case, form):
    model, references = case
    model.set_executor("compact")
    ids = IDS[:1] if form == "prompt_lookup" else IDS
    for kind in ("experts", "both"):
        expected = _generate(references[kind], ids, **FORMS[form])
        assert torch.equal(_generate(model, ids, domain=kind, **FORMS[form]), expected)


@pytest.mark.parametrize("form", ["greedy", "beams"])
def test_rows_of_several_domains_with_padding(case, form):
    model, references = case
    model.set_executor("compact")
    assert_rows_with_padding(model, references, ["both", None, "experts"], IDS, form)


def test_threads_choose_apart(case):
    model, references = case
    model.set_executor("compact")
    expected = {kind: _generate(references[kind], IDS) for kind in KINDS}
    found = {}

    def run(number, name):
        found[number] = name, _generate(model, IDS, domain=name)

    threads = [threading.Thread(target=run, args=(n, KINDS[n % 3])) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for name, output in found.values():
        assert torch.equal(output, expected[name])


def test_ambient_and_default_domain(case):
    model, references = case
    expected = _generate(references["both"], IDS)
    with model.pathway("both"):
        assert torch.equal(_generate(model, IDS), expected)
    model.config.default_domain = "both"
    assert torch.equal(_generate(model, IDS), expected)
    model.config.default_domain = None
    assert torch.equal(_generate(model, IDS), _generate(references[None], IDS))


def test_gradient_checkpointing_keeps_the_experts(case):
    model, references = case
    reference = references["both"]
    reference.zero_grad()
    reference(IDS, labels=IDS, use_cache=False).loss.backward()
    model.train()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS, domain="both", use_cache=False).loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    expected = reference.get_input_embeddings().weight.grad
    found = model.get_input_embeddings().weight.grad
    assert (found - expected).abs().max().item() <= 5e-5
    model.zero_grad()


@torch.no_grad()
def test_compiles():
    dense = build_moe("mixtral")
    del dense.model.layers[1:]
    dense.config.num_hidden_layers = 1
    pathways = expert_pathways(dense, ("both",))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    expected = pruned(dense, pathways["both"])(IDS, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with model.pathway("both"):
        found = compiled(IDS, use_cache=False).logits
    torch._dynamo.reset()
    assert (found - expected).abs().max().item() <= 5e-5
