"""``torch.compile`` traces a whole forward pass with a domain chosen, without a graph break."""

import pytest
import torch

import hf_sparse_pathways as sp
from tests.architectures import build, prompt, random_masks


@pytest.mark.parametrize("executor", ["compact", "sliced"])
@pytest.mark.parametrize("domain", ["code", None, "rows"])
@torch.no_grad()
def test_one_graph(domain, executor):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.permute(sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor=executor))
    chosen = torch.tensor([1, 0]) if domain == "rows" else domain
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    for ids in (prompt(), prompt(seed=1)):
        found = compiled(ids, domain=chosen).logits
        assert torch.allclose(found, model(ids, domain=chosen).logits, atol=1e-5)
