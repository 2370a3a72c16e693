"""Thresholds of gates, and moments of thresholded activations, against the tokens themselves."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.clustering import Clustering
from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grams import Gram
from hf_sparse_pathways.discovery.probes import Seen, attached
from hf_sparse_pathways.discovery.repair import BlockTask, Repair, repair
from hf_sparse_pathways.discovery.skipping import SkippingProbe, find_threshold, widest
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, prompt
from tests.discovery.test_clustering import MODEL, PROFILE, TOKENIZER, distance
from tests.discovery.untouched import remember
from tests.texts import documents

TINY = 1e-10


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("active", [0.25, 0.8])
def test_thresholds_leave_the_share_that_is_wanted(gated, active):
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(500, 12, generator=generator) * torch.arange(1, 13)
    up = torch.randn(500, 12, generator=generator) if gated else None
    activation = gate if up is None else gate * up
    weight = torch.randn(4, 12, generator=generator)
    threshold = find_threshold(Seen(activation, up=up), weight, 6, active)
    factor = weight.norm(dim=0) * (1.0 if up is None else up.square().mean(0).sqrt())
    likely = (activation.square().mean(0) * weight.square().sum(0)).topk(6).indices
    above = (gate.abs() > threshold)[:, likely].float().mean()
    assert above == pytest.approx(active, abs=0.01)
    assert torch.allclose(threshold * factor, (threshold * factor)[0].expand(12))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma3"])
@torch.no_grad()
def test_moments_are_those_of_what_is_left(name):
    model = build(name)
    block, ids = find_blocks(model)[1], prompt(2, 7)
    threshold = torch.full((block.d_ff,), 0.05)
    probe = SkippingProbe(block, Workspaces(), threshold, inputs=False)
    activations = []
    handle = block.outgoing.register_forward_pre_hook(lambda _, args: activations.append(args[0]))
    with attached([probe]):
        model(ids, use_cache=False)
    handle.remove()
    rows = torch.arange(3, 14)
    missing = torch.randn(len(rows), block.d_out)
    probe.add(rows, missing, None)
    task = probe.task()
    activation = activations[0].flatten(0, -2)[rows]
    up = probe.seen_at(rows).up
    gate = activation.abs() if up is None else activation.abs() / up.abs()
    left = torch.where(gate > threshold, activation, torch.zeros(()))
    assert 0.0 < float((left == 0).float().mean()) < 1.0
    z = torch.cat([left, torch.ones(len(left), 1)], 1)
    skipped = (activation - left) @ task.weight.T
    assert torch.allclose(task.gram.total, z.T @ z, atol=1e-5)
    assert torch.allclose(task.missing, missing.T @ z / len(z), atol=1e-5)
    assert torch.allclose(task.skipped, skipped.T @ z / len(z), atol=1e-5)
    assert torch.allclose(task.active, (gate > threshold).float().mean(0))


def test_what_is_skipped_is_regressed_on_what_is_left(monkeypatch):
    monkeypatch.setattr("hf_sparse_pathways.discovery.repair.STORED_DTYPE", torch.float64)
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(300, 9, generator=generator).double() + 0.5
    left = torch.where(activation.abs() > 0.4, activation, torch.zeros((), dtype=torch.float64))
    weight, keep = torch.randn(4, 9, generator=generator), torch.arange(9) < 6
    z = torch.cat([left, torch.ones(300, 1).double()], 1)
    skipped = ((activation - left) @ weight.double().T).T @ z / 300
    task = BlockTask(
        weight=weight,
        gram=Gram.of_upper((z.T @ z).triu(), 9),
        skipped=skipped,
        threshold=torch.arange(9.0),
        active=torch.linspace(0.1, 0.9, 9),
    )
    found = repair(task, keep, Repair(ridge=TINY))
    regressors = torch.cat([left[:, keep], torch.ones(300, 1).double()], 1)
    target = (activation @ weight.double().T) - left[:, keep] @ weight[:, keep].double().T
    solution = torch.linalg.lstsq(regressors, target).solution
    assert torch.allclose(found.delta, solution[:-1].T, atol=1e-6)
    assert torch.allclose(found.bias, solution[-1], atol=1e-6)
    assert torch.equal(found.skipping.threshold, torch.arange(6.0))
    assert float(found.skipping.active) == pytest.approx(float(task.active[:6].mean()))


def test_as_many_are_kept_as_their_costs_allow():
    order, costs = torch.tensor([2, 0, 1, 3]), torch.tensor([1.0, 2.0, 1.0, 3.0])
    assert [widest(order, costs, budget) for budget in (0.5, 3.0, 4.9, 5.0, 6.0, 7.0)] == [
        1, 1, 1, 2, 3, 4,
    ]  # fmt: skip


@pytest.mark.parametrize(("sparsity", "skip"), [(0.5, 0.4), (0.3, 0.9)])
def test_flops_are_within_the_sparsity(sparsity, skip, tmp_path):
    pathways = sp.select(MODEL, PROFILE, sparsity=sparsity, skip=skip)
    plain = sp.select(MODEL, PROFILE, sparsity=sparsity)
    for name in pathways.domains:
        assert 1 - sparsity - 0.08 < pathways.flops(name) <= 1 - sparsity + 1e-6
        assert pathways.sparsity(name) < plain.sparsity(name)
        assert pathways[name].provenance["skip"] == skip
        assert all(0 < float(b.skipping.active) < 1 for b in pathways[name].blocks)
    pathways.save_pretrained(tmp_path)
    loaded = sp.Pathways.from_pretrained(tmp_path)
    model = sp.SparsePathwaysForCausalLM.from_dense(MODEL, loaded)
    ids = prompt(2, 6)
    logits = model(ids, domain="code").logits
    assert (logits - model(ids, domain=None).logits).abs().max() > 1e-4


@pytest.mark.parametrize("compensation", ["refit+bias", "shared+bias", "patch:4+bias"])
def test_experts_of_clusters_skip_too(compensation, tmp_path):
    options = {"sparsity": 0.5, "clusters": 3, "compensation": compensation}
    pathways = sp.select(MODEL, PROFILE, skip=0.4, **options)
    for name in pathways.domains:
        assert 0.4 < pathways.flops(name) <= 0.5 + 1e-6
        for block in pathways[name].blocks:
            assert len(block.experts) > 1
            assert all(0 < float(expert.skipping.active) < 1 for expert in block.experts)
    pathways.save_pretrained(tmp_path)
    loaded = sp.Pathways.from_pretrained(tmp_path)
    model = sp.SparsePathwaysForCausalLM.from_dense(MODEL, loaded)
    ids = prompt(2, 40)
    logits = {}
    for executor in ("masked", "compact"):
        model.set_executor(executor)
        logits[executor] = model(ids, domain="code").logits
    assert torch.allclose(logits["masked"], logits["compact"], atol=1e-4)


@pytest.mark.parametrize("clusters", [1, Clustering(count=3, prior=16.0)])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_skipping_is_nearer_to_dense_than_fewer_neurons(name, clusters):
    model = build(name)
    profile = sp.profile(model, TOKENIZER, {"code": documents("code", 20, 60)}, max_length=32)
    unchanged = remember(model)
    options = {"sparsity": 0.5, "allocation": "uniform", "ridge": 0.001, "clusters": clusters}
    windows, blocks, losses = profile.by_domain["code"].windows, find_blocks(model), []
    for skip in (0.0, 0.5):
        pathways = sp.select(model, profile, skip=skip, **options)
        assert pathways.flops("code") <= 0.5 + 1e-9
        losses.append(distance(model, windows, pathways["code"].blocks, blocks))
    assert losses[1] < losses[0]
    unchanged()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": 1.0}, "share of kept neurons"),
        ({"skip": -0.1}, "share of kept neurons"),
        ({"skip": True}, "share of kept neurons"),
        ({"skip": 0.5, "method": "wanda"}, "leave out"),
        ({"skip": 0.5, "order": "one-shot"}, "leave out"),
    ],
)
def test_what_skipping_needs_is_said(options, message):
    with pytest.raises(PathwaysError, match=message):
        sp.select(MODEL, PROFILE, sparsity=0.5, **options)


def test_skipping_takes_one_sparsity():
    with pytest.raises(PathwaysError, match="one sparsity for all blocks"):
        sp.select(MODEL, PROFILE, sparsity=[0.5] * len(PROFILE.base.blocks), skip=0.5)
