"""A sgatlin layer that learns a block's function, beside closed-form partners."""

import math

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.measure.distillation import Training, fit, in_place_of
from tests.architectures import build, prompt
from tests.texts import documents, tiny_tokenizer

FFN = sp.SgatlinConfig(n_experts=16, n_channels=4, top_k=4, d_key=8)
TEXT = documents("code", count=20)
TRAINING = Training(steps=60, batch=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def made():
    model = build("llama")
    return model, sp.distil_block(model, tiny_tokenizer(), TEXT, 1, FFN, training=TRAINING)


@torch.no_grad()
def test_figures_are_those_of_the_layer_in_the_block_s_place(made):
    model, found = made
    block = find_blocks(model)[1]
    assert found.block == block.name == "model.layers.1.mlp"
    assert found.dense_flops == 6 * 48 * 32
    assert [stand.name for stand in found.stands] == ["sgatlin", "linear map", "mean output"]
    assert found.stands[0].flops == FFN.flops(32)
    assert found.stands[2].error == pytest.approx(1.0)
    assert found.stands[1].error < 1.0
    assert all(0 < stand.ratio < math.inf for stand in found.stands)
    assert found.tokens[0] > 3 * found.tokens[1] > 0


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
@torch.no_grad()
def test_a_function_in_a_block_s_place(name):
    model, ids = build(name), prompt()
    expected = model(ids).logits
    block, other = find_blocks(model)[0], build(name)
    matrix = torch.randn(block.d_in, block.d_out)
    with in_place_of(block, matrix.__rmatmul__):
        found = model(ids).logits
    seen = []
    theirs = find_blocks(other)[0]
    theirs.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    theirs.outgoing.register_forward_hook(lambda *_: seen.pop() @ matrix)
    assert torch.equal(found, other(ids).logits)
    assert torch.equal(model(ids).logits, expected)


def test_a_layer_learns_another_layer_s_function():
    torch.manual_seed(0)
    layer, teacher = sp.SgatlinFFN(FFN, 16), sp.SgatlinFFN(FFN, 16)
    x = torch.randn(256, 16)
    with torch.no_grad():
        y = teacher(x)

    def error():
        with torch.no_grad():
            return float((layer(x) - y).square().sum() / (y - y.mean(0)).square().sum())

    before = error()
    fit(layer, x, y, Training(steps=200, batch=128, learning_rate=1e-2))
    assert error() < 0.3 < before


def test_the_model_is_as_before_and_seeds_decide(made):
    model, found = made
    fresh = build("llama")
    ids = prompt()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    again = sp.distil_block(fresh, tiny_tokenizer(), TEXT, 1, FFN, training=TRAINING)
    assert again.stands == found.stands
    assert "| sgatlin |" in found.to_markdown()


def test_what_does_not_fit_is_refused():
    with pytest.raises(sp.PathwaysError, match="no block 3: the model has 3"):
        sp.distil_block(build("llama"), tiny_tokenizer(), TEXT, 3, FFN)
    with pytest.raises(sp.PathwaysError):
        sp.distil_block(build("llama"), tiny_tokenizer(), ["def"], 0, FFN)
