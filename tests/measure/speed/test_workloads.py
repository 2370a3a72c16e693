"""What can be timed."""

import pytest

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.speed.workloads import (
    Workload,
    check_positions,
    most_tokens,
    plan_workloads,
)
from tests.architectures import build


def test_every_prefill_has_its_ffn_blocks_beside_it():
    labels = [workload.label for workload in plan_workloads((1, 4), (128,))]
    assert labels == [
        "decode, batch 1",
        "decode, batch 4",
        "prefill, 128 tokens",
        "FFN blocks alone, 128 tokens",
    ]
    assert len(plan_workloads()) == 3 + 2 * 2
    assert len(plan_workloads((2, 2), ())) == 1


@pytest.mark.parametrize(
    "options", [{"kind": "train"}, {"kind": "decode", "batch": 0}, {"kind": "ffn", "tokens": 0}]
)
def test_no_workload_is_refused(options):
    with pytest.raises(PathwaysError):
        Workload(**options)


@pytest.mark.parametrize(
    ("name", "positions"),
    [("llama", 128), ("gpt2", 128), ("gemma3", 128), ("mpt", 128), ("bloom", None)],
)
def test_positions_are_found(name, positions):
    assert most_tokens(build(name)) == positions


@pytest.mark.parametrize(("kind", "most"), [("decode", 120), ("prefill", 128), ("ffn", 128)])
def test_a_workload_has_to_fit_the_positions(kind, most):
    check_positions(Workload(kind=kind, tokens=most), 8, 128)
    check_positions(Workload(kind=kind, tokens=10**6), 8, None)
    with pytest.raises(PathwaysError, match=r"needs 129 positions, and the model has 128"):
        check_positions(Workload(kind=kind, tokens=most + 1), 8, 128)
