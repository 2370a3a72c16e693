"""Shares of time, on a clock that only known modules move."""

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.execution import Execution
from hf_sparse_pathways.measure.speed.arms import Arm, Lineup, line_up
from hf_sparse_pathways.measure.speed.shares import TimeShares, measure_shares
from hf_sparse_pathways.measure.speed.workloads import Workload
from tests.architectures import build, random_masks

ATTENTION = {
    "llama": "self_attn",
    "gpt2": "attn",
    "gemma3": "self_attn",
    "glm4": "self_attn",
    "opt": "self_attn",
    "gpt_neox": "attention",
    "falcon": "self_attention",
}
WORKLOADS = (Workload(kind="decode", tokens=4), Workload(kind="prefill", tokens=9))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.kind)
@pytest.mark.parametrize("name", ATTENTION)
def test_each_part_takes_what_its_modules_take(still, name, workload):
    dense = build(name)
    blocks = find_blocks(dense)
    for block in blocks:
        still.after(block.outgoing, 3.0)
        still.after(block.layer.get_submodule(ATTENTION[name]), 2.0)
    still.after(dense.get_output_embeddings(), 5.0)
    still.after(dense.get_input_embeddings(), 7.0)
    lineup = Lineup(dense, Execution("compact", "-"))
    found = measure_shares(lineup, Arm(label="dense"), workload)
    layers = len(blocks)
    assert found.seconds == 5.0 * layers + 12.0
    assert found.ffn == pytest.approx(3.0 * layers / found.seconds)
    assert found.attention == pytest.approx(2.0 * layers / found.seconds)
    assert found.head == pytest.approx(5.0 / found.seconds)
    assert found.rest == pytest.approx(7.0 / found.seconds)
    assert len(dense._forward_hooks) == 0, "hooks are taken off"
    assert not blocks[0].incoming[0]._forward_pre_hooks


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.kind)
def test_a_dense_pass_of_an_executor_is_measured_too(still, workload):
    dense = build("llama")
    lineup = line_up(dense, sp.Pathways.from_masks(dense, random_masks(dense)), ["law"])
    model = lineup.models["compact"]
    still.after(find_blocks(model)[0].outgoing, 1.0)
    still.after(model.get_output_embeddings(), 3.0)
    arm = Arm(label="x", executor="compact")
    found = measure_shares(lineup, arm, workload)
    assert (found.ffn, found.head, found.rest) == (0.25, 0.75, 0.0)


def test_the_ceiling_is_amdahls():
    shares = TimeShares(ffn=0.5, attention=0.25, head=0.125, seconds=1.0)
    assert shares.rest == 0.125
    assert shares.ceiling(0.0) == 1.0
    assert shares.ceiling(0.5) == pytest.approx(1 / 0.75)
    assert shares.ceiling(1.0) == 2.0
