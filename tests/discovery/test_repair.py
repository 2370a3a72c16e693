"""Compensation against least squares on the raw samples."""

from dataclasses import replace

import pytest
import torch

from hf_sparse_pathways.discovery import repair as module
from hf_sparse_pathways.discovery.obs import rank_by_obs
from hf_sparse_pathways.discovery.repair import BlockTask, Repair, metric_root, repair
from tests.discovery.moments import draw_keep, draw_samples

TINY = 1e-9
KINDS = {"alone": {}, "target": {"earlier": True}, "metric": {"metric": True}}
KINDS |= {"both": {"earlier": True, "metric": True}}
OWN = ["alone", "metric"]


@pytest.fixture(autouse=True)
def _in_full_precision(request, monkeypatch):
    if "as_stored" not in request.fixturenames:
        monkeypatch.setattr(module, "STORED_DTYPE", torch.float64)
        monkeypatch.setattr(module, "TARGET_RIDGE", 0.0)


@pytest.fixture
def as_stored():
    """Let a test see compensation in the dtype in which it is stored, with the usual ridges."""


def _how(**parts):
    return Repair(**{"ridge": TINY, "refit": False, "bias": False, **parts})


def _output(samples, pathway):
    """Return what the pathway computes of the raw samples."""
    weight = samples.weight[:, pathway.keep]
    if pathway.delta is not None:
        weight = weight + pathway.full_delta.double()
    output = samples.activation[:, pathway.keep] @ weight.T
    if pathway.bias is not None:
        output = output + pathway.bias.double()
    if pathway.bypass is not None:
        output = output + samples.block_input @ pathway.bypass.product().double().T
    return output


def _error(samples, output):
    missing = samples.target - output
    if samples.metric is not None:
        missing = missing @ metric_root(samples.metric)
    return float(missing.square().sum(1).mean())


def _lstsq(regressors, target):
    return regressors @ torch.linalg.lstsq(regressors, target).solution


def _regressors(samples, keep, *, refit=False, bias=False, bypass=False):
    parts = [samples.activation[:, keep]] if refit else []
    parts += [samples.block_input] if bypass else []
    parts += [torch.ones(len(samples.activation), 1, dtype=torch.float64)] if bias else []
    return torch.cat(parts, 1)


def _expected(samples, keep, **parts):
    """Return the best output: kept neurons as they are, and least squares of what is missing.

    What earlier blocks have left wrong is regressed by itself, and not on the block's input.
    """
    kept = samples.activation[:, keep] @ samples.weight[:, keep].T
    own = samples.activation @ samples.weight.T - kept
    output = kept + _lstsq(_regressors(samples, keep, **parts), own)
    if samples.earlier is None or not {"refit", "bias"} & parts.keys():
        return output
    return output + _lstsq(
        _regressors(samples, keep, **{**parts, "bypass": False}), samples.earlier
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [1, 6, 12, 13])
@pytest.mark.parametrize(
    "parts", [{"refit": True}, {"bias": True}, {"refit": True, "bias": True}], ids=str
)
def test_refit_and_bias_are_least_squares(parts, kept, kind):
    samples, keep = draw_samples(**KINDS[kind]), draw_keep(13, kept)
    pathway = repair(samples.task, keep, _how(**parts))
    assert torch.equal(pathway.keep, keep)
    assert (pathway.delta is not None) == parts.get("refit", False)
    assert (pathway.bias is not None) == parts.get("bias", False)
    expected = _expected(samples, keep, **parts)
    torch.testing.assert_close(_output(samples, pathway), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["alone", "target"])
def test_a_bias_alone_is_the_mean_of_what_is_missing(kind):
    samples, keep = draw_samples(**KINDS[kind]), draw_keep(13, 6)
    pathway = repair(samples.task, keep, _how(bias=True))
    missing = samples.target - samples.activation[:, keep] @ samples.weight[:, keep].T
    torch.testing.assert_close(pathway.bias, missing.mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "parts", [{}, {"bias": True}, {"refit": True}, {"refit": True, "bias": True}], ids=str
)
def test_a_bypass_of_full_rank_is_joint_least_squares(parts, kind):
    samples, keep = draw_samples(**KINDS[kind]), draw_keep(13, 6)
    pathway = repair(samples.task, keep, _how(bypass_rank=6, **parts))
    expected = _expected(samples, keep, bypass=True, **parts)
    torch.testing.assert_close(_output(samples, pathway), expected, rtol=1e-4, atol=1e-4)


def _with_bypass(samples, keep, outer, inner):
    """Return the output with a given bypass, and refit and bias fitted to the rest."""
    kept = samples.activation[:, keep] @ samples.weight[:, keep].T
    own = _regressors(samples, keep, refit=True, bias=True)
    linear = samples.block_input @ (outer @ inner).T
    return kept + linear + _lstsq(own, samples.target - kept - linear)


def _alternate(samples, keep, outer, steps=60):
    """Return the error after alternating least squares over the bypass's two halves."""
    kept = samples.activation[:, keep] @ samples.weight[:, keep].T
    own = _regressors(samples, keep, refit=True, bias=True)
    rest = samples.target - kept
    rest, x = (part - _lstsq(own, part) for part in (rest, samples.block_input))
    root = torch.eye(len(outer)).double()
    if samples.metric is not None:
        root = metric_root(samples.metric)
    rest, outer = rest @ root, root @ outer
    for _ in range(steps):
        codes = torch.linalg.lstsq(outer, rest.T).solution.T
        inner = torch.linalg.lstsq(x, codes).solution.T
        outer = torch.linalg.lstsq(x @ inner.T, rest).solution.T
    return float((rest - x @ (outer @ inner).T).square().sum(1).mean())


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_bypass_of_a_lower_rank_is_the_best_of_its_rank(rank, kind):
    samples, keep = draw_samples(**KINDS[kind]), draw_keep(13, 5)
    pathway = repair(samples.task, keep, _how(refit=True, bias=True, bypass_rank=rank))
    assert pathway.bypass.rank == rank
    mine = _error(samples, _output(samples, pathway))
    outer, inner = pathway.bypass.outer, pathway.bypass.inner
    assert mine == pytest.approx(_error(samples, _with_bypass(samples, keep, outer, inner)))
    assert _alternate(samples, keep, outer) >= mine * (1 - 1e-5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        guess = torch.randn(6, rank, generator=generator).double()
        assert _alternate(samples, keep, guess, steps=3) >= mine * (1 - 1e-6)
        guess = outer + 0.1 * guess
        assert _error(samples, _with_bypass(samples, keep, guess, inner)) > mine


@pytest.mark.parametrize("metric", [False, True])
def test_what_earlier_blocks_have_left_does_not_change_the_bypass(metric):
    samples, keep = draw_samples(earlier=True, metric=metric), draw_keep(13, 5)
    alone = replace(samples, earlier=None)
    how = _how(refit=True, bias=True, bypass_rank=2, ridge=0.01)
    mine, theirs = (repair(each.task, keep, how).bypass for each in (samples, alone))
    assert torch.equal(mine.outer, theirs.outer)
    assert torch.equal(mine.inner, theirs.inner)


@pytest.mark.parametrize(("ridge", "least", "expected"), [(0.2, 3.0, 3.0), (0.2, 0.05, 0.2)])
def test_what_earlier_blocks_have_left_has_a_larger_ridge(monkeypatch, ridge, least, expected):
    samples, keep = draw_samples(earlier=True), draw_keep(13, 6)
    monkeypatch.setattr(module, "TARGET_RIDGE", least)
    how = _how(refit=True, ridge=ridge)
    delta = repair(samples.task, keep, how).delta
    own = repair(replace(samples, earlier=None).task, keep, how).delta
    kept = samples.activation[:, keep]
    scale = expected * samples.activation.square().mean() * len(kept)
    normal = kept.T @ kept + scale * torch.eye(6).double()
    earlier = torch.linalg.solve(normal, kept.T @ samples.earlier).T
    torch.testing.assert_close(delta, own + earlier, rtol=1e-6, atol=1e-8)


def test_more_rank_never_hurts():
    samples, keep = draw_samples(), draw_keep(13, 4)
    errors = [
        _error(samples, _output(samples, repair(samples.task, keep, _how(refit=True, **parts))))
        for parts in ({}, *({"bypass_rank": rank} for rank in range(1, 7)))
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_patch_is_the_best_refit_of_its_rank(rank):
    samples, keep = draw_samples(), draw_keep(13, 6)
    full = repair(samples.task, keep, _how(refit=True)).delta
    patch = repair(samples.task, keep, _how(refit=True, patch_rank=rank)).delta
    assert patch.rank == rank
    kept = samples.activation[:, keep]
    effect = kept @ full.T
    left, values, right = torch.linalg.svd(effect, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(kept @ patch.product().double().T, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [6, 7, 100])
def test_a_patch_of_full_rank_is_stored_as_the_refit(rank):
    samples, keep = draw_samples(), draw_keep(13, 6)
    full = repair(samples.task, keep, _how(refit=True)).delta
    assert torch.equal(repair(samples.task, keep, _how(refit=True, patch_rank=rank)).delta, full)


@pytest.mark.parametrize("kind", ["alone", "target"])
def test_with_a_patch_the_bias_is_still_the_mean_of_what_is_missing(kind):
    samples, keep = draw_samples(**KINDS[kind]), draw_keep(13, 6)
    pathway = repair(samples.task, keep, _how(refit=True, bias=True, patch_rank=1))
    left = (samples.target - _output(samples, pathway)).mean(0)
    assert left.abs().max() < 1e-5


def test_a_whole_block_without_a_target_needs_nothing():
    samples, keep = draw_samples(), torch.ones(13, dtype=torch.bool)
    pathway = repair(samples.task, keep, Repair(bypass_rank=2))
    assert pathway.bypass is None
    assert max(pathway.delta.abs().max(), pathway.bias.abs().max()) < 1e-10
    assert not repair(samples.task, keep, _how(bypass_rank=2)).bypass


def test_no_repair_is_the_mask_alone():
    pathway = repair(draw_samples().task, draw_keep(13, 6), _how())
    assert not pathway.compensated


def test_a_large_ridge_leaves_the_columns_but_not_the_mean():
    samples, keep = draw_samples(), draw_keep(13, 6)
    pathway = repair(samples.task, keep, Repair(ridge=1e5))
    assert pathway.delta.abs().max() < 1e-3
    missing = samples.target - samples.activation[:, keep] @ samples.weight[:, keep].T
    torch.testing.assert_close(pathway.bias, missing.mean(0), rtol=1e-3, atol=1e-2)


def test_the_ridge_is_that_of_the_normal_equations():
    samples, keep = draw_samples(), draw_keep(13, 6)
    kept = samples.activation[:, keep]
    missing = samples.target - kept @ samples.weight[:, keep].T
    scale = 0.2 * samples.activation.square().mean() * len(kept)
    normal = kept.T @ kept + scale * torch.eye(6).double()
    expected = torch.linalg.solve(normal, kept.T @ missing).T
    delta = repair(samples.task, keep, _how(refit=True, ridge=0.2)).delta
    torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("as_stored")
def test_repair_is_pure_and_stores_half_precision():
    samples, keep = draw_samples(earlier=True, metric=True), draw_keep(13, 6)
    task = samples.task
    before = [task.weight, task.gram.total, task.missing, task.metric]
    copies = [part.clone() for part in before]
    pathway = repair(task, keep, Repair(bypass_rank=2))
    assert all(torch.equal(part, copy) for part, copy in zip(before, copies, strict=True))
    parts = pathway.parts()
    assert {part.dtype for name, part in parts.items() if name != "keep"} == {torch.bfloat16}
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert shapes == {
        "keep": (13,),
        "delta": (6, 6),
        "bias": (6,),
        "bypass_outer": (6, 2),
        "bypass_inner": (2, 5),
    }


@pytest.mark.usefixtures("as_stored")
def test_rounding_of_what_is_stored_hardly_matters():
    samples, keep = draw_samples(earlier=True), draw_keep(13, 6)
    rounded = repair(samples.task, keep, _how(refit=True, bias=True, bypass_rank=2))
    module.STORED_DTYPE, stored = torch.float64, module.STORED_DTYPE
    try:
        exact = repair(samples.task, keep, _how(refit=True, bias=True, bypass_rank=2))
    finally:
        module.STORED_DTYPE = stored
    errors = [_error(samples, _output(samples, pathway)) for pathway in (rounded, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_removals_error_is_that_of_the_repair(kind, bias):
    samples = draw_samples(**KINDS[kind])
    removal = rank_by_obs(samples.task, _how(refit=True, bias=bias, ridge=1e-6))
    errors = []
    for kept in range(13, 0, -1):
        pathway = repair(samples.task, removal.keep(kept), _how(refit=True, bias=bias))
        errors.append(_error(samples, _output(samples, pathway)))
    for index, error in enumerate(errors):
        rise = float(removal.error[index])
        assert error - errors[0] == pytest.approx(rise, rel=1e-2, abs=1e-3 * errors[-1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_known_bypass_the_removals_error_is_what_that_leaves(kind, bias):
    samples = draw_samples(**KINDS[kind])
    inner = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double()
    removal = rank_by_obs(samples.task, _how(refit=True, bias=bias, ridge=1e-6), inner)
    known = samples.block_input @ inner.T
    errors = []
    for kept in range(13, 0, -1):
        own = _regressors(samples, removal.keep(kept), refit=True, bias=bias)
        best = _lstsq(torch.cat([own, known], 1), samples.target)
        errors.append(_error(samples, best))
    for index, error in enumerate(errors):
        rise = float(removal.error[index])
        assert error - errors[0] == pytest.approx(rise, rel=1e-2, abs=1e-3 * errors[-1])


def test_ranking_is_pure():
    task = draw_samples(earlier=True, metric=True).task
    before = [task.weight, task.gram.total, task.missing, task.metric]
    copies = [part.clone() for part in before]
    rank_by_obs(task, Repair())
    assert all(torch.equal(part, copy) for part, copy in zip(before, copies, strict=True))


def test_a_metrics_root_is_one():
    metric = draw_samples(metric=True).metric
    root = metric_root(metric.float())
    torch.testing.assert_close(root @ root, metric, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(root, root.T)


@pytest.mark.parametrize("how", [Repair(), Repair(bypass_rank=2)], ids=["refit", "bypass"])
def test_a_block_whose_neurons_never_fire_is_repaired_with_nothing(how):
    samples = draw_samples()
    silent = replace(samples, activation=torch.zeros_like(samples.activation))
    task: BlockTask = silent.task
    keep = rank_by_obs(task, how).keep(6)
    pathway = repair(task, keep, how)
    assert pathway.delta.isfinite().all()
    assert pathway.bias.abs().max() == 0
