"""Layers run one at a time compute what they do in the whole model."""

import pytest
import torch

from hf_sparse_pathways.discovery.layerwise import LayerRunner, stacked_layers
from hf_sparse_pathways.discovery.passes import run_decoder
from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import ARCHITECTURES, build, prompt
from tests.discovery.untouched import remember

LENGTHS = (12, 7, 3)
IDS = prompt(rows=3, length=12)
WINDOWS = [Window(tuple(row[:n])) for row, n in zip(IDS.tolist(), LENGTHS, strict=True)]
[PADDED] = make_batches(WINDOWS, 3)
[SHORT] = make_batches([Window(tuple(IDS[0, 4:9].tolist()))], 1)
PROFILED = sorted(set(ARCHITECTURES) - {"cpmant"})  # its prompt tokens are in no batch


def _layers(model):
    return stacked_layers(model, [block.layer for block in find_blocks(model)])


def _behind(model, batch):
    """Return the hidden states behind each layer of a plain pass."""
    seen = []
    handles = [
        layer.register_forward_hook(
            lambda _module, _args, output: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in _layers(model)
    ]
    run_decoder(model, batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", PROFILED)
@torch.no_grad()
def test_layers_in_a_chain_are_the_plain_forward(architecture):
    model = build(architecture)
    layers = _layers(model)
    runner = LayerRunner(model, layers)
    runner.check(PADDED)
    for batch in (PADDED, SHORT):  # what was learnt of one batch holds for another
        hidden = None
        for index, expected in enumerate(_behind(model, batch)):
            hidden = runner.run(index, batch, hidden)
            torch.testing.assert_close(hidden[batch.mask], expected[batch.mask])
        assert index == len(layers) - 1


@pytest.mark.parametrize("architecture", PROFILED)
@torch.no_grad()
def test_layers_without_an_ffn_block_are_run_too(architecture):
    model = build(architecture)
    count = getattr(model.config, "num_hidden_layers", None) or model.config.n_layer
    assert len(_layers(model)) == count


def test_the_model_is_left_as_it_was():
    model = build("llama")
    check = remember(model)
    with torch.no_grad():
        runner = LayerRunner(model, _layers(model))
        runner.check(PADDED)
        hidden = runner.run(0, PADDED, None)
        runner.run(1, PADDED, hidden)
    check()


def test_a_forward_that_somebody_set_is_put_back():
    model = build("llama")
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = layer.forward
    with torch.no_grad():
        LayerRunner(model, _layers(model)).check(PADDED)
    assert layer.__dict__["forward"] is mine


def test_an_error_in_a_layer_leaves_the_model_as_it_was():
    model = build("llama")
    runner = LayerRunner(model, _layers(model))
    with torch.no_grad():
        hidden = runner.run(1, PADDED, runner.run(0, PADDED, None))

    def fail(*_):
        raise KeyboardInterrupt

    handle = find_blocks(model)[2].outgoing.register_forward_pre_hook(fail)
    check = remember(model)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        runner.run(2, PADDED, hidden)
    check()
    handle.remove()


@torch.no_grad()
def test_hidden_states_other_than_the_models_own_are_really_used():
    model = build("llama")
    runner = LayerRunner(model, _layers(model))
    hidden = runner.run(0, PADDED, None)
    changed = runner.run(1, PADDED, hidden + 0.5)
    assert (changed - runner.run(1, PADDED, hidden)).abs().max() > 1e-2


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_refused():
    model = build("llama")
    model.model.layers[2] = model.model.layers[0]
    runner = LayerRunner(model, list(model.model.layers)[:2])
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        runner.check(PADDED)


@torch.no_grad()
def test_a_layer_that_is_never_called_is_refused():
    model, other = build("llama"), build("llama")
    runner = LayerRunner(model, [*model.model.layers, other.model.layers[0]])
    with pytest.raises(UnsupportedModelError, match="layer 3"):
        runner.check(PADDED)


@torch.no_grad()
def test_layers_that_hand_on_more_than_hidden_states_are_refused():
    model = build("llama")
    first, last = model.model.layers[0], model.model.layers[2]
    memory = []
    first.register_forward_hook(lambda _m, _a, output: memory.append(output.mean()))
    last.register_forward_hook(lambda _m, _a, output: output * len(memory))
    with pytest.raises(UnsupportedModelError, match="layer 2"):
        LayerRunner(model, _layers(model)).check(PADDED)
