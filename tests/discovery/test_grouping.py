"""Groups of neurons: found, routed in closed form, and repaired as they are weighted."""

import pytest
import torch
from torch.nn import functional

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grouping import Grouped, GroupedProbe, Grouping
from hf_sparse_pathways.discovery.probes import Seen, attached
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, compensate, prompt, random_masks
from tests.discovery.test_clustering import MODEL, PROFILE, TOKENIZER, distance
from tests.discovery.untouched import remember
from tests.grouped import factors_of, grouped
from tests.texts import documents


@pytest.mark.parametrize(("width", "d_ff"), [(24, 48), (10, 48), (40, 48), (47, 48), (768, 1536)])
@pytest.mark.parametrize("always_on", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("count", "top_k"), [(4, 1), (8, 3), (16, 2)])
def test_a_token_has_as_many_as_it_may(width, d_ff, always_on, count, top_k):
    always, size = Grouping(count=count, top_k=top_k, always_on=always_on).divide(width, d_ff)
    assert always + top_k * size == width
    assert always + count * size <= d_ff
    assert always >= max(1, always_on * width)
    larger = size + 1  # would take neurons that there are not, or too many from all tokens
    left = width - top_k * larger
    assert left + count * larger > d_ff or left < max(1, always_on * width)


def _planted(tokens=2000):
    """Return a block's view of tokens of four kinds, each of which has four neurons of its own."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(tokens) % 4
    x = functional.one_hot(kind, 4).float() * 3
    x = torch.cat([x, torch.zeros(tokens, 4)], 1)
    x += 0.1 * torch.randn(x.shape, generator=generator)
    owner = torch.cat([torch.full((8,), -1), torch.arange(4).repeat(4)])
    uses = (owner == -1) | (owner == kind.unsqueeze(1))
    activation = torch.randn(tokens, 24, generator=generator) * torch.where(uses, 1.0, 0.05)
    return Seen(activation, x), owner, kind


def test_what_is_used_together_is_a_group_and_is_found_from_the_input():
    seen, owner, kind = _planted()
    order = torch.arange(23, -1, -1)  # the first eight are needed most
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    found = Grouping(count=4, top_k=1, always_on=0.0).fit(seen, weight, order, 12)
    assert found.keep.all()
    groups = found.groups
    assert (groups.always, groups.size, groups.active) == (8, 4, 12)
    names = {}
    for number in range(4):
        owners = owner[groups.group == number].unique()
        assert len(owners) == 1
        names[number] = int(owners)
    chosen, weights = groups(seen.block_input)
    assert torch.equal(torch.tensor([names[int(g)] for g in chosen]), kind)
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.allclose(groups.share, torch.full((4,), 0.25), atol=0.01)


def test_weights_are_near_one_before_training():
    seen, _, _ = _planted()
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    found = Grouping(count=4, top_k=2).fit(seen, weight, torch.arange(24), 16)
    _, weights = found.groups(seen.block_input)
    assert float((weights - 1).abs().max()) < 0.2
    assert torch.allclose(weights.sum(-1), torch.full((len(weights),), 2.0))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_moments_are_those_of_weighted_activations(name):
    model = build(name)
    part = grouped(compensate(model, random_masks(model)))["code"].blocks[0]
    block, ids = find_blocks(model)[0], prompt(2, 7)
    probe = GroupedProbe(
        block, Workspaces(), Grouped(keep=part.keep, groups=part.groups), inputs=False
    )
    with attached([probe]):
        model(ids, use_cache=False)
    rows = torch.arange(3, 14)
    missing = torch.randn(len(rows), block.d_out)
    probe.add(rows, missing, None)
    task, seen = probe.task(), probe.seen_at(rows)
    factors = torch.ones_like(seen.activation)
    factors[:, part.keep] = factors_of(part.groups, seen.block_input)
    left = seen.activation * factors
    z = torch.cat([left, torch.ones(len(left), 1)], 1)
    skipped = (seen.activation - left) @ task.weight.T
    assert torch.allclose(task.gram.total, z.T @ z, atol=1e-5)
    assert torch.allclose(task.missing, missing.T @ z / len(z), atol=1e-5)
    assert torch.allclose(task.skipped, skipped.T @ z / len(z), atol=1e-5)


@pytest.mark.parametrize("compensation", ["refit+bias", "patch:4+bias", "refit+bias+bypass:2"])
def test_flops_are_the_sparsity(compensation, tmp_path):
    unchanged = remember(MODEL)
    given = sp.Grouping(count=6, top_k=2, always_on=0.5)
    pathways = sp.select(MODEL, PROFILE, sparsity=0.4, mixture=given, compensation=compensation)
    unchanged()
    for name in pathways.domains:
        assert 0.6 - 0.05 < pathways.flops(name) <= 0.6 + 1e-6
        assert pathways[name].provenance["mixture"]["top_k"] == 2
        assert any(block.groups for block in pathways[name].blocks)
    pathways.save_pretrained(tmp_path)
    model = sp.SparsePathwaysForCausalLM.from_dense(MODEL, sp.Pathways.from_pretrained(tmp_path))
    ids, logits = prompt(2, 40), {}
    for executor in ("masked", "compact"):
        model.set_executor(executor)
        logits[executor] = model(ids, domain="code").logits
    assert torch.allclose(logits["masked"], logits["compact"], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_router_is_better_than_chance(name):
    model = build(name)
    profile = sp.profile(model, TOKENIZER, {"code": documents("code", 20, 60)}, max_length=32)
    how = sp.Grouping(count=4, top_k=1, always_on=0.0)
    options = {"sparsity": 0.4, "allocation": "uniform", "ridge": 0.001}
    pathways = sp.select(model, profile, mixture=how, **options)
    windows, blocks = profile.by_domain["code"].windows, find_blocks(model)
    found = distance(model, windows, pathways["code"].blocks, blocks)
    generator = torch.Generator().manual_seed(0)
    for block in pathways["code"].blocks:
        if block.groups is not None:
            block.groups.weight.normal_(generator=generator)
    assert found < distance(model, windows, pathways["code"].blocks, blocks)


def test_nothing_removed_has_no_groups():
    pathways = sp.select(MODEL, PROFILE, sparsity=0.0, mixture=4)
    assert all(block.groups is None and block.keep.all() for block in pathways["code"].blocks)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mixture": 2}, "2 to 1024 groups"),
        ({"mixture": 5000}, "2 to 1024 groups"),
        ({"mixture": 4.0}, "2 to 1024 groups"),
        ({"mixture": 4, "skip": 0.5}, "leave out skip"),
        ({"mixture": 4, "clusters": 3}, "leave out clusters"),
        ({"mixture": 4, "multiple": 2}, "leave out multiple"),
        ({"mixture": 4, "method": "wanda"}, "leave out"),
        ({"mixture": 4, "order": "one-shot"}, "leave out"),
        ({"mixture": 47}, "Routing with 47 rows costs"),
    ],
)
def test_what_groups_need_is_said(options, told):
    with pytest.raises(PathwaysError, match=told):
        sp.select(MODEL, PROFILE, sparsity=0.7, **options)


@pytest.mark.parametrize(
    "fields", [{"top_k": 0}, {"top_k": 4}, {"always_on": 1.0}, {"always_on": "x"}]
)
def test_numbers_that_do_not_fit_are_refused(fields):
    with pytest.raises(PathwaysError):
        Grouping(count=4, **fields)


def test_groups_take_a_sparsity():
    with pytest.raises(PathwaysError, match="give that"):
        sp.select(MODEL, PROFILE, percentile=20, method="obs", mixture=4)
