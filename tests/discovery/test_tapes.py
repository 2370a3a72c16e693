"""A layer played from a tape with another FFN output is the layer run with that output."""

import pytest
import torch
from torch import nn

from hf_sparse_pathways.discovery import sequential
from hf_sparse_pathways.discovery.arms import Arm
from hf_sparse_pathways.discovery.layerwise import LayerRunner, stacked_layers
from hf_sparse_pathways.discovery.repair import Repair, repair
from hf_sparse_pathways.discovery.sequential import prune_sequentially
from hf_sparse_pathways.discovery.tapes import Recorder, replaced_forwards
from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import ARCHITECTURES, build, prompt
from tests.discovery.moments import draw_keep
from tests.discovery.untouched import remember

IDS = prompt(rows=3, length=12)
LENGTHS = (12, 7, 3)
WINDOWS = [Window(tuple(row[:n])) for row, n in zip(IDS.tolist(), LENGTHS, strict=True)]
[PADDED] = make_batches(WINDOWS, 3)
PROFILED = sorted(set(ARCHITECTURES) - {"cpmant"})  # its prompt tokens are in no batch
IN_PLACE = {"falcon", "falcon_new_decoder"}  # add the attention's result to the FFN's in place
POST_NORM = ["gemma2", "gemma3", "olmo2", "glm4"]


def _runner(model):
    blocks = find_blocks(model)
    runner = LayerRunner(model, stacked_layers(model, [block.layer for block in blocks]))
    runner.check(PADDED)
    return runner, blocks


def _with_output(runner, index, hidden, leaf, change):
    handle = leaf.register_forward_hook(lambda _m, _a, output: output + change.view_as(output))
    try:
        return runner.run(index, PADDED, hidden)
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", PROFILED)
@torch.no_grad()
def test_a_replay_is_the_layer_with_another_output(architecture):
    model = build(architecture)
    runner, blocks = _runner(model)
    hidden, played = None, 0
    for index, layer in enumerate(runner.layers):
        own = [block for block in blocks if block.layer is layer]
        if own and runner.tape_size(index, PADDED, hidden, own[-1].outgoing):
            leaf = own[-1].outgoing
            _, tape = runner.record(index, PADDED, hidden, leaf)
            change = torch.randn(tape.output.shape, generator=torch.Generator().manual_seed(index))
            found = runner.replay(index, PADDED, hidden, tape, tape.output + change)
            expected = _with_output(runner, index, hidden, leaf, change)
            torch.testing.assert_close(found[PADDED.mask], expected[PADDED.mask])
            played += 1
        hidden = runner.run(index, PADDED, hidden)
    assert (played == 0) == (architecture in IN_PLACE)


@pytest.mark.parametrize("architecture", POST_NORM)
@torch.no_grad()
def test_neither_attention_nor_ffn_is_run_again(architecture):
    model = build(architecture)
    runner, blocks = _runner(model)
    _, tape = runner.record(0, PADDED, None, blocks[0].outgoing)
    calls = []
    for name, module in runner.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    runner.replay(0, PADDED, None, tape, tape.output)
    assert calls == []
    runner.run(0, PADDED, None)
    assert len(calls) >= 6


class _Layer(nn.Module):
    """One norm before and behind the FFN, or an attention that is changed in place."""

    def __init__(self, kind):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.Linear(8, 8)
        self.up, self.down, self.kind = nn.Linear(8, 16), nn.Linear(16, 8), kind

    def forward(self, x):
        attended = self.attention(self.norm(x))
        if self.kind == "in place":
            attended += x
        elif self.kind == "twice":
            return self.down(self.down(self.up(attended)).repeat(1, 2)) + x
        out = self.down(self.up(attended).relu())
        return attended + (self.norm(out) if self.kind == "shared" else out)


@torch.no_grad()
def _play(layer, x, output=None):
    with Recorder(layer, layer.down) as recorder:
        behind = layer(x)
    tape = recorder.tape()
    if tape is None:
        return behind, None
    with tape.playing(tape.output if output is None else output):
        return behind, layer(x)


def test_a_module_that_is_called_on_both_sides_is_run_again():
    layer, x, output = _Layer("shared"), torch.randn(3, 8), torch.randn(3, 8)
    _, played = _play(layer, x, output)
    with torch.no_grad():
        expected = layer.attention(layer.norm(x)) + layer.norm(output)
    torch.testing.assert_close(played, expected)


def test_an_ffn_that_is_called_twice_gives_no_tape():
    assert _play(_Layer("twice"), torch.randn(3, 8))[1] is None


def test_what_is_changed_in_place_shows():
    """``tape_size`` compares the two: such a layer is run in full."""
    behind, played = _play(_Layer("in place"), torch.randn(3, 8))
    assert not torch.equal(behind, played)


def test_an_error_leaves_the_forwards_as_they_were():
    model = build("gemma3")
    runner, blocks = _runner(model)
    check = remember(model)
    with torch.no_grad():
        _, tape = runner.record(0, PADDED, None, blocks[0].outgoing)
        with pytest.raises(RuntimeError):
            runner.replay(0, PADDED, None, tape, torch.zeros(1, 2, 3))
    check()


def test_a_forward_that_somebody_set_is_put_back():
    module = nn.Linear(2, 2)
    mine = module.forward = lambda x: x
    with replaced_forwards({module: lambda x: x + 1}):
        assert module(torch.zeros(1)) == 1
    assert module.forward is mine


@pytest.mark.parametrize("limit", [0, 10**9], ids=["run again", "tapes"])
@pytest.mark.parametrize("architecture", POST_NORM)
def test_pathways_do_not_depend_on_tapes(architecture, limit, monkeypatch):
    model = build(architecture)

    def prune(index, task):
        d_ff = task.gram.d_ff
        return repair(task, draw_keep(d_ff, d_ff // 2, seed=index), Repair(bypass_rank=2))

    def blocks():
        return prune_sequentially(model, [Arm(name="code", batches=[PADDED], prune=prune)])["code"]

    usual = blocks()
    monkeypatch.setattr(sequential, "MOST_KEPT", limit)
    if limit:
        monkeypatch.setattr(LayerRunner, "tape_size", lambda *_: None)
    for mine, theirs in zip(blocks(), usual, strict=True):
        parts = theirs.parts()
        for name, part in mine.parts().items():
            torch.testing.assert_close(part.float(), parts[name].float(), rtol=0.05, atol=1e-2)


def test_a_batch_without_a_tape_is_run_in_full(monkeypatch):
    model, batches = build("gemma3"), [*make_batches(WINDOWS, 1)]

    def prune(index, task):
        d_ff = task.gram.d_ff
        return repair(task, draw_keep(d_ff, d_ff // 2, seed=index), Repair())

    def made():
        return prune_sequentially(model, [Arm(name="code", batches=batches, prune=prune)])["code"]

    usual, record, calls = made(), LayerRunner.record, []

    def forget(self, index, *args):
        behind, tape = record(self, index, *args)
        calls.append(index)
        return behind, None if calls.count(index) == 3 else tape  # after the layer's trial

    monkeypatch.setattr(LayerRunner, "record", forget)
    for mine, theirs in zip(made(), usual, strict=True):
        torch.testing.assert_close(mine.full_delta, theirs.full_delta, rtol=0.05, atol=1e-2)
