"""One refit for all experts against least squares on the tokens themselves."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.clustering import ClusteredTask
from hf_sparse_pathways.discovery.common_repair import repair_together
from hf_sparse_pathways.discovery.grams import Gram
from hf_sparse_pathways.discovery.repair import BlockTask, Repair
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.clusters import TokenRouter
from hf_sparse_pathways.pathways.summary import describe_compensation
from tests.discovery.test_clustering import MODEL, PROFILE

D_FF, D_OUT, COUNTS = 9, 4, (200, 120, 80)
TINY = 1e-10


def _draw(seed=0):
    """Return per cluster the activations, what is missing and a mask; and the weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D_FF, D_FF, generator=generator)
    parts = []
    for number, count in enumerate(COUNTS):
        shift = torch.randn(D_FF, generator=generator)
        activation = (torch.randn(count, D_FF, generator=generator) @ mixing + shift).double()
        missing = torch.randn(count, D_OUT, generator=generator).double() + number
        keep = torch.rand(D_FF, generator=generator) < 0.6
        keep[0], keep[8] = True, False  # one neuron that all keep, one that none does
        parts.append((activation, missing, keep))
    return parts, torch.randn(D_OUT, D_FF, generator=generator)


def _task(parts, weight, *, with_missing):
    tasks = []
    for activation, missing, _ in parts:
        z = torch.cat([activation, torch.ones(len(activation), 1).double()], 1)
        gram = Gram.of_upper((z.T @ z).triu(), D_FF)
        cross = missing.T @ z / len(z)
        tasks.append(BlockTask(weight=weight, gram=gram, missing=cross if with_missing else None))
    share = torch.tensor(COUNTS) / sum(COUNTS)
    router = TokenRouter(weight=torch.zeros(3, 2), bias=torch.zeros(3), share=share)
    return ClusteredTask(router=router, tasks=tuple(tasks))


@pytest.mark.parametrize("with_missing", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_least_squares_on_the_tokens(bias, with_missing, monkeypatch):
    monkeypatch.setattr("hf_sparse_pathways.discovery.repair.TARGET_RIDGE", TINY)
    monkeypatch.setattr("hf_sparse_pathways.discovery.common_repair.STORED_DTYPE", torch.float64)
    parts, weight = _draw()
    block = repair_together(
        _task(parts, weight, with_missing=with_missing),
        [keep for _, _, keep in parts],
        Repair(ridge=TINY, bias=bias, shared=True),
    )
    rows, targets = [], []
    for number, (activation, missing, keep) in enumerate(parts):
        own = torch.zeros(len(activation), len(parts)).double()
        own[:, number] = float(bias)
        rows.append(torch.cat([activation * keep, own], 1))
        rest = (activation * ~keep) @ weight.double().T
        targets.append(rest + missing if with_missing else rest)
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gelsd").solution
    assert torch.allclose(block.shared, solution[:D_FF].T, atol=1e-5)
    for number, expert in enumerate(block.experts):
        assert (expert.bias is None) == (not bias)
        if bias:
            assert torch.allclose(expert.bias, solution[D_FF + number], atol=1e-5)


def test_columns_that_no_expert_keeps_are_not_changed():
    parts, weight = _draw(1)
    keeps = [keep for _, _, keep in parts]
    block = repair_together(_task(parts, weight, with_missing=True), keeps, Repair(shared=True))
    assert not block.shared[:, 8].any()
    assert block.shared[:, 0].any()
    assert block.shared.dtype == torch.bfloat16


def test_pathways_with_one_refit_are_smaller_and_load_again(tmp_path):
    shared, own = (
        sp.select(MODEL, PROFILE, sparsity=0.5, clusters=3, compensation=compensation)
        for compensation in ("shared+bias", "refit+bias")
    )
    assert all(block.shared is not None for block in shared["code"].blocks)
    assert shared["code"].provenance["compensation"] == "shared+bias"
    assert describe_compensation(shared["code"]) == "shared+bias in 3 clusters"
    assert _bytes(shared) < _bytes(own)
    shared.save_pretrained(tmp_path)
    loaded = sp.Pathways.from_pretrained(tmp_path)
    for mine, theirs in zip(loaded["code"].blocks, shared["code"].blocks, strict=True):
        assert torch.equal(mine.shared, theirs.shared)


def _bytes(pathways):
    return sum(p.nbytes for block in pathways["code"].blocks for p in block.parts().values())


def test_refits_take_what_the_documentation_says():
    """In 16 bits: of every cluster its own, one for all, or one of low rank of each."""
    made = {
        compensation: sp.select(
            MODEL, PROFILE, sparsity=0.5, clusters=3, compensation=compensation, controls=False
        )["code"]
        for compensation in ("refit", "patch:2", "shared+bias")
    }
    for index, shape in enumerate(PROFILE.base.blocks):
        own, thin, shared = (pathway.blocks[index] for pathway in made.values())
        assert _refit_bytes(own.experts) == 2 * sum(e.kept for e in own.experts) * shape.d_out
        widths = [expert.kept + shape.d_out for expert in thin.experts]
        assert _refit_bytes(thin.experts) == 2 * 2 * sum(widths)
        assert shared.shared.nbytes == 2 * shape.d_ff * shape.d_out


def _refit_bytes(experts):
    parts = [part for expert in experts for part in expert.parts().items()]
    return sum(tensor.nbytes for name, tensor in parts if name.startswith("delta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "shared+bias"}, r"or write 'refit'"),
        ({"compensation": "shared+refit", "clusters": 3}, "stands alone"),
        ({"compensation": "shared+patch:4", "clusters": 3}, "stands alone"),
        ({"compensation": "shared+bypass:4", "clusters": 3}, "stands alone"),
    ],
)
def test_what_one_refit_needs_is_said(options, message):
    with pytest.raises(PathwaysError, match=message):
        sp.select(MODEL, PROFILE, sparsity=0.5, **options)
