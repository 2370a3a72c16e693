"""How a layer's result depends on its FFN's output, by autograd and by running it."""

import pytest
import torch

from hf_sparse_pathways.discovery.layer_output import LayerOutput, Passed
from hf_sparse_pathways.discovery.layerwise import LayerRunner, stacked_layers
from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, prompt

PLAIN, POST_NORM = ["llama", "granite"], ["gemma2", "gemma3", "olmo2", "glm4"]
IDS = prompt(rows=3, length=12)
WINDOWS = [Window(tuple(row[:n])) for row, n in zip(IDS.tolist(), (12, 7, 3), strict=True)]
[BATCH] = make_batches(WINDOWS, 3)


def _second_layer(architecture):
    """Return a model's second layer, and the hidden states before it."""
    model = build(architecture)
    blocks = find_blocks(model)
    runner = LayerRunner(model, stacked_layers(model, [block.layer for block in blocks]))
    hidden = runner.run(0, BATCH, None)
    output = LayerOutput(runner, 1, blocks[1].outgoing)
    output.learn(BATCH, hidden, runner.run(1, BATCH, hidden))
    return output, hidden


def _derivative(output, hidden):
    """Return d(layer) / d(output) of the same token and channel, by autograd."""
    found = []

    def watch(_module, _args, output):
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = output.leaf.register_forward_hook(watch)
    with torch.enable_grad():
        behind = output.runner.run(output.index, BATCH, hidden)
        rows = [
            torch.autograd.grad(behind[..., c].sum(), found, retain_graph=True)[0][..., c]
            for c in range(behind.shape[-1])
        ]
    handle.remove()
    return torch.stack(rows, -1).flatten(0, -2)


@pytest.mark.parametrize("architecture", [*POST_NORM, *PLAIN])
@torch.no_grad()
def test_the_measured_gain_is_the_layers_derivative(architecture):
    output, hidden = _second_layer(architecture)
    expected = _derivative(output, hidden)
    assert (output.gain is None) == (architecture in POST_NORM)
    if output.gain is not None:
        assert output.gain == pytest.approx(float(expected.mean()), rel=1e-3)
    real = BATCH.mask.flatten()
    passed = output.run(BATCH, hidden)
    assert (passed.tape is None) == (architecture in PLAIN)
    untaped = Passed(passed.behind, None)
    for seen in (passed, untaped):
        error = (output.token_gains(BATCH, hidden, seen) - expected)[real].norm()
        assert error < 0.3 * expected[real].norm()


@pytest.mark.parametrize("architecture", [*POST_NORM, *PLAIN])
@torch.no_grad()
def test_what_a_layer_gives_with_another_output_is_what_it_gives_when_run(architecture):
    output, hidden = _second_layer(architecture)
    passed = output.run(BATCH, hidden)
    assert output.can_move(passed)
    added = torch.randn(IDS.numel(), passed.behind.shape[-1])
    moved = output.moved(BATCH, hidden, passed, added)
    handle = output.leaf.register_forward_hook(lambda _m, _a, own: own + added.view_as(own))
    expected = output.runner.run(1, BATCH, hidden)
    handle.remove()
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(moved, passed.behind, atol=1e-2)


@pytest.mark.parametrize("architecture", PLAIN)
@torch.no_grad()
def test_what_is_missing_makes_the_layer_give_what_it_should(architecture):
    output, hidden = _second_layer(architecture)
    passed = output.run(BATCH, hidden)
    aim = passed.behind + torch.randn_like(passed.behind)
    missing, weights = output.missing(BATCH, hidden, passed, aim, torch.arange(IDS.numel()))
    assert weights is None
    torch.testing.assert_close(output.moved(BATCH, hidden, passed, missing), aim)


@pytest.mark.parametrize("architecture", POST_NORM)
@torch.no_grad()
def test_with_a_norm_behind_it_what_is_missing_brings_the_layer_nearer(architecture):
    output, hidden = _second_layer(architecture)
    passed, rows = output.run(BATCH, hidden), torch.arange(IDS.numel())
    aim = passed.behind + 0.01 * torch.randn_like(passed.behind)
    missing, weights = output.missing(BATCH, hidden, passed, aim, rows)
    assert weights.shape == (IDS.numel(), 1)
    assert (weights > 0).all()
    moved = output.moved(BATCH, hidden, passed, missing)
    assert (moved - aim).norm() < (passed.behind - aim).norm()
