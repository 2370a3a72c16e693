"""Clusters of tokens: found by k-means, their moments, and experts that beat one set for all."""

import sys

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import expansion
from hf_sparse_pathways.discovery.clustering import Clustering, ClusterProbe
from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.probes import Change, Probe, attached, make_change
from hf_sparse_pathways.discovery.trials import computing, run_model
from hf_sparse_pathways.discovery.windows import make_batches
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, TokenRouter
from tests.architectures import build, prompt
from tests.clustered import clustered
from tests.discovery.untouched import remember
from tests.moe.architectures import build_moe
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = build("llama")
PROFILE = sp.profile(MODEL, TOKENIZER, {"code": documents("code", 20, 60)}, max_length=32)


def _inputs(tokens=300, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, width, generator=generator) * 3
    return centres[torch.arange(tokens) % 4] + torch.randn(tokens, width, generator=generator)


def test_tokens_go_to_the_nearest_centroid():
    inputs, others = _inputs(), _inputs(seed=1)
    router = Clustering(count=4, dimensions=3).fit(inputs)
    pca = PCA(3, random_state=0).fit(inputs.numpy())
    kmeans = KMeans(4, n_init=1, random_state=0).fit(pca.transform(inputs.numpy()))
    expected = torch.from_numpy(kmeans.predict(pca.transform(others.numpy())))
    assert torch.equal(router(others), expected.long())
    assert torch.equal(router(others.view(3, 100, 12)), expected.long().view(3, 100))
    assert torch.allclose(router.share, torch.full((4,), 0.25), atol=0.02)


def test_fewer_tokens_than_clusters_give_fewer():
    router = Clustering(count=8).fit(_inputs(5))
    assert router.weight.shape == (5, 12)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"count": 1}, "2 to 1024"),
        ({"count": 2000}, "2 to 1024"),
        ({"count": 4.0}, "2 to 1024"),
        ({"count": 4, "dimensions": 0}, "dimensions.*pca of sp.expand"),
        ({"count": 4, "dimensions": 0.9}, "a whole number of dimensions"),
        ({"count": 4, "dimensions": "x"}, "a whole number of dimensions"),
        ({"count": 4, "prior": "x"}, "a positive prior"),
        ({"count": 4, "prior": 0.0}, "a positive prior"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, told):
    with pytest.raises(PathwaysError, match=told):
        Clustering(**fields)


def test_without_scikit_learn_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(PathwaysError, match=r"hf-sparse-pathways\[clusters\]"):
        sp.select(MODEL, PROFILE, clusters=4)


def test_moments_of_clusters_add_up_to_the_block_s():
    block, router = find_blocks(MODEL)[1], None
    spaces = Workspaces()
    whole = Probe(block, spaces, inputs=False)
    router = TokenRouter(
        weight=torch.randn(3, block.d_in, generator=torch.Generator().manual_seed(0)),
        bias=torch.zeros(3),
        share=torch.zeros(3),
    )
    probe = ClusterProbe(block, spaces, router, prior=10.0, inputs=False)
    ids = prompt(4, 20)
    rows = torch.arange(80)[torch.arange(80) % 7 > 0]
    missing = torch.randn(len(rows), block.d_out, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attached([whole, probe]):
        MODEL(ids)
    for one in (whole, probe):
        one.add(rows, missing, None)
    expected, task = whole.task(), probe.task()
    assert task.router.share.sum() == pytest.approx(1.0)
    assert (task.router.share > 0).all()
    totals = [own.gram.total for own in task.tasks]
    prior = 10.0 * expected.gram.total / len(rows)
    assert torch.allclose(sum(totals), expected.gram.total + 3 * prior, rtol=1e-4, atol=1e-4)
    crosses = sum(own.missing * own.gram.tokens for own in task.tasks)
    assert torch.allclose(crosses, expected.missing * (len(rows) + 30.0), rtol=1e-4, atol=1e-4)
    own = (task.router(probe.seen_at(rows).block_input) == 1).float() @ torch.ones(len(rows))
    assert task.tasks[1].gram.tokens == pytest.approx(float(own) + 10.0, rel=1e-5)


def test_the_change_of_a_clustered_block_is_each_token_s_expert_s():
    block = find_blocks(MODEL)[0]
    pathway = clustered(MODEL, change_rows=False)["code"].blocks[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, block.d_in, generator=generator)
    activation = torch.randn(200, block.d_ff, generator=generator)
    found = make_change(block, pathway).of(activation, x)
    for number, expert in enumerate(pathway.experts):
        own = pathway.router(x) == number
        assert own.any()
        expected = Change(block, expert).of(activation[own], x[own])
        assert torch.allclose(found[own], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "phi3"])
def test_experts_beat_one_set_of_neurons_for_all(name):
    model = build(name)
    profile = sp.profile(model, TOKENIZER, {"code": documents("code", 20, 60)}, max_length=32)
    unchanged = remember(model)
    options = {"sparsity": 0.5, "allocation": "uniform", "ridge": 0.001}
    windows, losses = profile.by_domain["code"].windows, {}
    blocks = find_blocks(model)
    for clusters in (1, Clustering(count=4, prior=16.0)):
        pathways = sp.select(model, profile, clusters=clusters, **options)
        made = pathways["code"].blocks
        losses[len(losses)] = distance(model, windows, made, blocks)
        assert pathways.flops("code") <= 0.5 + 1e-9
    assert all(isinstance(block, ClusteredBlock) for block in made)
    assert losses[1] < 0.9 * losses[0]
    assert pathways["code"].provenance["clustering"]["count"] == 4
    unchanged()


def distance(model, windows, pathways, blocks):
    """Return how far the final logits are from the dense ones, squared, on calibration text."""
    total = 0.0
    for batch in make_batches(windows, 8):
        with torch.no_grad():
            dense = run_model(model, batch)
            with computing(blocks, pathways):
                total += float(((run_model(model, batch) - dense)[batch.mask]).square().sum())
    return total


def test_the_same_seed_gives_the_same_experts():
    first, again = (sp.select(MODEL, PROFILE, sparsity=0.4, clusters=3, seed=5) for _ in range(2))
    for mine, theirs in zip(first["code"].blocks, again["code"].blocks, strict=True):
        assert all(torch.equal(mine.parts()[name], part) for name, part in theirs.parts().items())


def test_the_pooled_control_is_clustered_too():
    texts = {name: documents(name, 12, 40) for name in ("code", "law")}
    profile = sp.profile(MODEL, TOKENIZER, texts, max_length=32)
    pathways = sp.select(MODEL, profile, sparsity=0.4, clusters=3)
    assert pathways["pooled"].clusters == pathways["law"].clusters == 3


@pytest.mark.parametrize(
    "options",
    [{"method": "wanda"}, {"order": "one-shot"}, {"compensation": "refit", "order": "one-shot"}],
)
def test_what_clusters_need_is_said(options):
    with pytest.raises(PathwaysError, match="Clusters of tokens"):
        sp.select(MODEL, PROFILE, clusters=4, **options)


def test_nothing_removed_needs_no_clusters():
    pathways = sp.select(MODEL, PROFILE, sparsity=0.0, clusters=4)
    assert pathways["code"].clusters == 1


def test_a_bypass_of_each_expert_is_within_the_budget():
    options = {"compensation": "refit+bias+bypass:2", "sparsity": 0.5, "clusters": 3}
    pathways = sp.select(MODEL, PROFILE, **options)
    assert pathways.flops("code") <= 0.5 + 1e-9
    assert all(e.bypass.rank == 2 for b in pathways["code"].blocks for e in b.experts)


def test_expand_by_one_cluster_is_one_static_choice():
    text = documents("code", 20, 60)
    pathways = sp.expand(MODEL, TOKENIZER, text, clusters=1, sparsity=0.4, max_length=32)
    taken = sp.profile(MODEL, TOKENIZER, {"expanded": text}, max_length=32, inputs=False)
    same = sp.select(MODEL, taken, sparsity=0.4)
    for own, other in zip(pathways["expanded"].blocks, same["expanded"].blocks, strict=True):
        assert torch.equal(own.keep, other.keep)
        assert torch.equal(own.delta, other.delta)
    with pytest.raises(PathwaysError, match="clusters=1 makes none"):
        sp.expand(MODEL, TOKENIZER, text, clusters=1, pca=5)
    with pytest.raises(UnknownNameError, match="Did you mean 'compensation'"):
        sp.expand(MODEL, TOKENIZER, text, compensatoin="bias")


def test_expand_is_one_domain_of_any_text(tmp_path):
    text = [*documents("code", 10, 40), *documents("law", 10, 40)]
    pathways = sp.expand(
        MODEL, TOKENIZER, text, clusters=3, sparsity=0.4, pca=5, max_length=32, seed=3
    )
    assert pathways.domains == ["expanded"]
    assert pathways["expanded"].clusters == 3
    assert pathways["expanded"].provenance["clustering"]["dimensions"] == 5
    assert pathways["expanded"].provenance["clustering"]["seed"] == 3
    pathways.save_pretrained(tmp_path)
    assert sp.Pathways.from_pretrained(tmp_path)["expanded"].clusters == 3


@pytest.mark.parametrize("experts", ["neurons", "copies"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sparsity": 1.5}, "1.5"),
        ({"sparsity": "half"}, "'half'"),
        ({"method": "nope"}, "nope|no method"),
        ({"mixture": 8}, "mixture"),
        ({"compensation": "x"}, "compensation"),
        ({"seed": "a"}, r"seed .* whole number, got 'a'"),
    ],
)
def test_expand_refuses_before_it_reads_the_text(monkeypatch, experts, options, told):
    monkeypatch.setattr(expansion, "profile", lambda *_, **__: pytest.fail("the text was run"))
    with pytest.raises(PathwaysError, match=told):
        sp.expand(MODEL, TOKENIZER, ["text"], clusters=2, experts=experts, **options)


@pytest.mark.parametrize(
    "options", [{}, {"clusters": 1}, {"experts": "copies"}, {"experts": "copies", "clusters": 1}]
)
def test_a_mixture_has_no_blocks_to_expand(options):
    with pytest.raises(UnsupportedModelError, match=r"sp\.select\(model, profile, experts=0\.5\)"):
        sp.expand(build_moe("mixtral"), TOKENIZER, documents("code", 20, 60), **options)
