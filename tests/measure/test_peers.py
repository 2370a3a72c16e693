"""Other methods as arms: each computes what its definition says."""

import pytest
import torch

from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.measure.peers import PEERS
from tests.architectures import build, prompt

WINDOWS = tuple(Window(tuple(row)) for row in prompt(rows=12, length=20).tolist())
CONTEXT = 0.5
GATED = ("llama", "gemma3")
ALL = (*GATED, "gpt2", "phi3", "opt", "falcon")


def _batch(rows=2):
    return next(make_batches(WINDOWS[:rows], rows))


def _arm(name, model, sparsity):
    return PEERS[name](model, WINDOWS, sparsity, CONTEXT)


def _run(arm, model, batch):
    with torch.no_grad():
        return arm.forward(model, batch)


@torch.no_grad()
def _dense(model, batch):
    return model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("name", PEERS)
def test_little_sparsity_changes_little_and_much_changes_much(name, architecture):
    model, batch = build(architecture), _batch()
    arms = [_arm(name, model, sparsity) for sparsity in (0.0, 0.5)]
    if architecture not in GATED and name == "cats":
        assert arms == [None, None]
        return
    dense = _dense(model, batch)
    small, large = ((_run(arm, model, batch) - dense).abs().max() for arm in arms)
    assert small < 0.1 * large
    assert large > 1e-2
    assert torch.equal(_dense(model, batch), dense), "no hook is left"
    assert arms[1].flops == 0.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
@torch.no_grad()
def test_griffin_prunes_after_the_prompt_by_the_prompt(architecture):
    model, batch = build(architecture), _batch(rows=3)
    seen = {block.name: [] for block in find_blocks(model)}
    for block in find_blocks(model):
        _spy(block.outgoing, seen[block.name])
    _run(_arm("griffin", model, 0.5), model, batch)
    start = 10
    for block in find_blocks(model):
        statistics, masked = (values.view(3, 20, -1) for values in seen[block.name])
        for row in range(3):
            prompts = statistics[row, :start]
            used = (prompts / prompts.norm(dim=1, keepdim=True)).pow(2).sum(0)
            kept = set(used.topk(block.d_ff // 2).indices.tolist())
            alive = masked[row, start:].abs().sum(0).nonzero().flatten().tolist()
            assert set(alive) <= kept
            assert set(masked[row, :start].abs().sum(0).nonzero().flatten().tolist()) - kept


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@torch.no_grad()
def test_teal_zeroes_its_share_of_every_input(sparsity):
    model = build("llama")
    arm, inputs = _arm("teal", model, sparsity), []
    for block in find_blocks(model):
        for leaf in (*block.incoming, block.outgoing):
            _spy(leaf, inputs)
    _run(arm, model, _batch(rows=8))
    assert len(inputs) == 9
    for values in inputs[:3]:  # later blocks see what the earlier have changed
        assert float((values == 0).float().mean()) == pytest.approx(sparsity, abs=0.05)


@torch.no_grad()
def test_cats_keeps_what_its_budget_leaves_after_the_gate():
    model = build("llama")
    assert _arm("cats", model, 0.7) is None, "the gate alone costs a third"
    arm, inputs = _arm("cats", model, 0.5), []
    _spy(find_blocks(model)[0].outgoing, inputs)
    _run(arm, model, _batch(rows=8))
    kept = float((inputs[0] != 0).float().mean())
    assert kept == pytest.approx(0.25, abs=0.05), "(1 + 2 q) / 3 = 0.5"


def _spy(leaf, seen):
    """Keep what a leaf computes on, after every pre-hook."""
    own = leaf.forward

    def forward(x):
        seen.append(x.clone())
        return own(x)

    leaf.forward = forward
