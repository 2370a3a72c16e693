"""Fields of configurations are found by what they do, whatever they are called."""

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.modeling.fields import (
    Outline,
    find_bias_switch,
    find_width_fields,
    set_field,
)
from tests.architectures import build

WIDTHS = {
    "llama": "intermediate_size",
    "gpt2": "n_inner",
    "gpt_neo": "intermediate_size",
    "opt": "ffn_dim",
    "falcon": "ffn_hidden_size",
    "cpmant": "dim_ff",
    "moshi": "ffn_dim",
}
SWITCHES = {"llama": "mlp_bias", "falcon": "bias", "granite": "mlp_bias", "qwen3": None}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_width_has_a_field(name):
    config = build(name).config
    before = Outline.of(config)
    (field,) = find_width_fields(config, before, before.widths)
    assert field.name == WIDTHS[name]
    assert field.blocks == before.widths.keys()
    assert field.ratio == (0.5 if name == "moshi" else 1)
    set_field(config, field.name, 24)
    widths = {b for b in Outline.of(config).widths.values()}
    assert widths == {24 * field.ratio}


def test_a_value_that_is_a_width_by_chance_is_not_taken():
    """The vocabulary, the positions and d_ff are of one size, and only one of them is d_ff."""
    config = build("llama").config
    config.vocab_size = config.max_position_embeddings = config.hidden_size = 48
    before = Outline.of(config)
    assert [f.name for f in find_width_fields(config, before, before.widths)] == [
        "intermediate_size"
    ]


def test_several_fields_decide_different_blocks():
    config = build("qwen3_moe").config
    before = Outline.of(config)
    (field,) = find_width_fields(config, before, ["model.layers.0.mlp"])
    assert field.blocks == {"model.layers.0.mlp", "model.layers.2.mlp"}


def test_without_a_field_the_reason_is_said():
    config = build("bloom").config
    before = Outline.of(config)
    assert find_width_fields(config, before, []) == []
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.mlp.*'hidden_size' also"):
        find_width_fields(config, before, before.widths)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_gives_the_leaves_biases(name):
    config = build(name).config
    before = Outline.of(config)
    found = find_bias_switch(config, before, before.widths)
    if SWITCHES[name] is None:
        assert found is None
        return
    assert found == (SWITCHES[name], True)
    set_field(config, *found)
    model = AutoModelForCausalLM.from_config(config)
    assert all(model.get_submodule(leaf).bias is not None for leaf in before.outgoing.values())


def test_trials_leave_the_configuration_alone():
    config = build("gpt2").config
    before, fields = Outline.of(config), config.to_dict()
    find_width_fields(config, before, before.widths)
    find_bias_switch(config, before, before.widths)
    assert config.to_dict() == fields
