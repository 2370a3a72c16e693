"""Finding FFN blocks: the right leaves, in order, and nothing else."""

import pytest
from torch import nn

from hf_sparse_pathways.ffn.blocks import find_blocks, survey_model
from hf_sparse_pathways.ffn.layouts import LAYOUTS, match_layout
from tests.architectures import ARCHITECTURES, build


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_blocks_are_in_layer_order_and_complete(name):
    model = build(name)
    survey = survey_model(model)
    numbers = [
        next(int(part) for part in block.name.split(".") if part.isdigit())
        for block in survey.blocks
    ]
    assert numbers == sorted(numbers)
    layers = model.config.num_hidden_layers
    assert len(survey.blocks) + len(survey.refused) == layers
    if name != "qwen3_moe":
        assert len(survey.blocks) == layers
    for block in survey.blocks:
        assert block.d_in == block.d_out == model.config.hidden_size
        assert "attn" not in block.name


def test_shapes_decide_and_not_names_alone():
    class Block(nn.Module):
        def __init__(self, up):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, up), nn.Linear(16, 8)

    assert match_layout(Block(16)) == next(each for each in LAYOUTS if each.incoming == ("fc1",))
    assert match_layout(Block(32)).fused
    assert match_layout(Block(12)) is None


@pytest.mark.parametrize("kind", ["norm", "adapter", "threshold"])
def test_what_mixes_neurons_is_seen(kind):
    model = build("llama")
    mlp = model.model.layers[1].mlp
    if kind == "norm":
        mlp.sub_norm = nn.LayerNorm(48)
    elif kind == "adapter":
        mlp.adapter = nn.Linear(32, 48)
    else:
        mlp.activation_sparsity = 0.5
    reasons = [block.entangled for block in find_blocks(model)]
    assert reasons[0] is reasons[2] is None
    assert reasons[1] is not None


def test_a_vision_tower_is_not_taken_for_the_decoder():
    import transformers as hf

    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 99,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = hf.Gemma3ForConditionalGeneration(config)
    names = [block.name for block in find_blocks(model)]
    assert len(names) == 2
    assert not any("vision" in name for name in names)
