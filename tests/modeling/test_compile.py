"""``torch.compile`` traces a whole forward pass with a domain chosen, without a graph break."""

import pytest
import torch

import hf_sparse_pathways as sp
from tests.architectures import build, compensate, prompt, random_masks

GENERATION = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
DOMAINS = ("code", "law", "math")


def _sparse(**arguments):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense, DOMAINS))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


class _Graphs:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self):
        torch._dynamo.reset()
        self.seen = []

    def __call__(self, graph, _):
        self.seen.append(graph)
        return graph.forward

    def compile(self, model):
        model.forward = torch.compile(model.forward, backend=self, fullgraph=True)
        return model

    @property
    def widths(self):
        """Rows of the matrices that the last graph multiplies with."""
        shapes = set()
        for node in self.seen[-1].graph.nodes:
            if node.target is torch.nn.functional.linear:
                shapes.add(node.args[1].meta["example_value"].shape[0])
        return shapes


@pytest.mark.parametrize("domain", ["code", None, "rows"])
@torch.no_grad()
def test_one_graph(domain):
    model = _sparse()
    chosen = torch.tensor([1, 0]) if domain == "rows" else domain
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    for ids in (prompt(), prompt(seed=1)):
        found = compiled(ids, domain=chosen).logits
        assert torch.allclose(found, model(ids, domain=chosen).logits, atol=1e-5)


@pytest.mark.parametrize("domain", ["code", "rows"])
@torch.no_grad()
def test_a_function_around_a_model_with_compensation(domain):
    dense = build("llama")
    paths = compensate(dense, random_masks(dense, DOMAINS))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    chosen = torch.tensor([1, 0]) if domain == "rows" else domain
    graphs = _Graphs()
    compiled = torch.compile(lambda ids: model(ids, domain=chosen).logits, backend=graphs)
    found = compiled(prompt())
    assert len(graphs.seen) == 1  # a break would forget the choice
    assert torch.allclose(found, model(prompt(), domain=chosen).logits, atol=1e-5)


@pytest.mark.parametrize("executor", ["auto", "compact", "packed-all", "indexed"])
def test_static_cache_traces_each_domain_once(executor, every_form_pays):  # noqa: ARG001
    model = _sparse(executor="compact")
    expected = {name: model.generate(prompt(), domain=name, **GENERATION) for name in DOMAINS}
    expected[None] = model.generate(prompt(), domain=None, **GENERATION)
    graphs = _Graphs()
    compiled = graphs.compile(_sparse(executor=executor))
    for name in ("code", None, "law", "math"):
        before = len(graphs.seen)
        for _ in range(2):
            found = compiled.generate(
                prompt(), domain=name, cache_implementation="static", **GENERATION
            )
            assert torch.equal(found, expected[name])
        assert len(graphs.seen) - before == 2  # the prompt, and one token
    for name in ("law", None, "code"):
        compiled.generate(prompt(), domain=name, cache_implementation="static", **GENERATION)
    assert len(graphs.seen) == 8


@torch.no_grad()
def test_a_held_pathway_is_traced_with_its_copies_alone():
    graphs = _Graphs()
    model = graphs.compile(_sparse(executor="compact"))
    with model.pathway("code"):
        found = model(prompt()).logits
    kept = [int(mask.sum()) for mask in model.pathways["code"].keep]
    assert set(kept) <= graphs.widths
    assert model._attachment.blocks[0].state.d_ff not in graphs.widths
    assert not any("index_select" in str(n.target) for n in graphs.seen[-1].graph.nodes)
    assert torch.allclose(found, _sparse(executor="masked")(prompt(), domain="code").logits)


@pytest.mark.needs_compiler
@torch.no_grad()
def test_rows_in_place_are_an_operator_of_the_graph(every_form_pays):  # noqa: ARG001
    graphs = _Graphs()
    model = graphs.compile(_sparse(executor="indexed"))
    with model.pathway("code"):
        found = model(prompt()).logits
    targets = [str(node.target) for node in graphs.seen[-1].graph.nodes]
    assert sum("hf_sparse_pathways.linear_rows" in target for target in targets) == len(
        model._attachment.copies.leaves
    )
    assert model._attachment.blocks[0].state.d_ff not in graphs.widths
    expected = _sparse(executor="masked")(prompt(), domain="code").logits
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_graphs_follow_changed_weights():
    graphs = _Graphs()
    model = graphs.compile(_sparse(executor="compact"))
    reference = _sparse(executor="masked")
    for write in (lambda w: w.mul_(2.0), lambda w: w.data.mul_(0.5), lambda w: w.add_(0.1)):
        for own in (model, reference):
            write(own.model.layers[1].mlp.up_proj.weight)
        with model.pathway("law"):
            found = model(prompt()).logits
        assert torch.allclose(found, reference(prompt(), domain="law").logits, atol=1e-5)
    assert len(graphs.seen) == 1


@torch.no_grad()
def test_what_is_held_does_not_give_way():
    model = _sparse(executor="compact")
    size = model._attachment.copies.size(0) + model._attachment.copies.size(1) // 2
    model.max_resident_bytes = size
    with model.pathway("code"):
        assert list(model.resident) == ["code"]
        model(prompt(), domain="law")
        assert list(model.resident) == ["code"]
    model(prompt(), domain="law")
    assert list(model.resident) == ["law"]


def test_nothing_is_held_where_gradients_are_recorded():
    model = _sparse(executor="compact")
    with model.pathway("code"):
        model(prompt(), labels=prompt()).loss.backward()
    assert model.resident == {}
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@torch.no_grad()
def test_a_held_pathway_is_traced_with_views():
    model = sp.permute(_sparse(executor="sliced"))
    expected = model(prompt(), domain="code").logits
    graphs = _Graphs()
    graphs.compile(model)
    with model.pathway("code"):
        found = model(prompt()).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert model._attachment.blocks[0].state.d_ff not in graphs.widths
    assert not any(leaf.copies for b in model._attachment.blocks for leaf in b.leaves.values())
