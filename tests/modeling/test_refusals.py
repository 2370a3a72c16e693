"""What cannot work is refused with a reason, before anything has changed."""

import copy
import json
import pickle

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import survey_model
from tests.architectures import LLAMA_LIKE, VOCAB, build, prompt, random_masks

IDS = prompt()


def _paths(model, **arguments):
    return sp.Pathways.from_masks(model, random_masks(model, **arguments))


def _jetmoe():
    sizes = {name: LLAMA_LIKE[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
    return hf.JetMoeForCausalLM(
        hf.JetMoeConfig(**sizes, num_hidden_layers=1, kv_channels=8, num_key_value_heads=2)
    )


def _mamba():
    return hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=4)
    )


def test_unknown_routed_experts_stay_dense_and_it_is_said():
    with pytest.raises(sp.PathwaysError, match=r"model\.layers\.0\.\S+: .*packed in a way"):
        sp.Pathways.from_masks(_jetmoe(), {})


def test_routed_experts_are_listed_apart():
    model = build("qwen3_moe")
    survey = survey_model(model)
    assert survey.routed == ("model.layers.1.mlp.experts",)
    assert [found.name for found in survey.experts] == ["model.layers.1.mlp.experts"]
    assert survey.dense == ()
    assert [refused.name for refused in survey.refused] == ["model.layers.1"]
    assert _paths(model).base.routed == ("layers.1.mlp.experts",)


def test_an_architecture_without_an_ffn_names_the_children():
    with pytest.raises(sp.PathwaysError, match=r"backbone\.layers\.0: .*norm.*mixer\(.*in_proj"):
        _paths(_mamba())


def test_pathways_of_another_base_say_both_shapes():
    paths = _paths(build("llama"))
    with pytest.raises(sp.PathwaysError, match=r"(?s)llama with 3.*d_ff 48.*qwen2 with 3"):
        sp.SparsePathwaysForCausalLM.from_dense(build("qwen2"), paths)
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA_LIKE, "intermediate_size": 40}))
    with pytest.raises(sp.PathwaysError, match=r"d_ff 48.*d_ff 40.*layers\.0\.mlp"):
        sp.SparsePathwaysForCausalLM.from_dense(other, paths)
    model = sp.SparsePathwaysForCausalLM.from_dense(build("llama"), paths)
    with pytest.raises(sp.PathwaysError, match="Made for"):
        model.set_pathways(_paths(other))
    assert model.pathways is paths


def test_adapter_folder_on_another_base(tmp_path):
    build("qwen2").save_pretrained(tmp_path / "base")
    _paths(build("llama")).save_pretrained(tmp_path / "paths")
    with pytest.raises(sp.PathwaysError, match="Made for"):
        sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path / "base", pathways=tmp_path / "paths")


def test_a_plain_base_without_pathways(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(sp.PathwaysError, match=r"no pathways\.json.*pathways=FOLDER"):
        sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is hf.LlamaForCausalLM


def test_a_dispatched_model():
    dense = build("llama")
    paths = _paths(dense)
    offloaded = cpu_offload(copy.deepcopy(dense), execution_device="cpu")
    with pytest.raises(sp.PathwaysError, match="already dispatched"):
        sp.SparsePathwaysForCausalLM.from_dense(offloaded, paths)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    devices = {"model": "cpu", "lm_head": "cpu"}
    dispatched = dispatch_model(copy.deepcopy(model), devices, force_hooks=True)
    with pytest.raises(sp.PathwaysError, match="already dispatched"):
        dispatched.to_dense()


@torch.no_grad()
def test_loading_with_disk_offload_is_exact(tmp_path):
    dense = build("llama")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, _paths(dense), executor="compact")
    model.save_pretrained(tmp_path)
    dense.save_pretrained(tmp_path / "base")
    places = {name: "cpu" for name, _ in dense.model.layers.named_children()}
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        **{f"model.layers.{name}": place for name, place in places.items()},
        "model.layers.1": "disk",
    }
    arguments = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    full = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
    adapter = sp.SparsePathwaysForCausalLM.from_pretrained(
        tmp_path / "base", pathways=tmp_path, **arguments
    )
    for loaded in (full, adapter):
        for domain in ("code", ["code", "law"], None):
            expected = model(IDS, domain=domain).logits
            assert torch.allclose(loaded(IDS, domain=domain).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "classifier", "sparse", "adapter"])
def test_what_is_no_dense_causal_lm(kind):
    import peft

    dense = build("llama")
    paths = _paths(dense)
    given = {
        "decoder": lambda: dense.model,
        "classifier": lambda: hf.LlamaForSequenceClassification(dense.config),
        "sparse": lambda: sp.SparsePathwaysForCausalLM.from_dense(dense, paths),
        "adapter": lambda: peft.get_peft_model(
            copy.deepcopy(dense), peft.LoraConfig(target_modules=["q_proj"])
        ),
    }[kind]()
    with pytest.raises(sp.PathwaysError):
        sp.SparsePathwaysForCausalLM.from_dense(given, paths)


def test_wrong_names_have_a_suggestion():
    dense = build("llama")
    paths = _paths(dense)
    make = sp.SparsePathwaysForCausalLM.from_dense
    with pytest.raises(sp.PathwaysError, match="Did you mean 'compact'"):
        make(dense, paths, executor="compat")
    with pytest.raises(sp.PathwaysError, match="Did you mean 'code'"):
        make(dense, paths, default_domain="coed")
    model = make(dense, paths)
    with pytest.raises(sp.PathwaysError, match="Did you mean 'masked'"):
        model.set_executor("maske")
    with pytest.raises(sp.PathwaysError, match="Did you mean 'law'"), model.pathway("lwa"):
        pass
    with pytest.raises(sp.PathwaysError, match="Did you mean 'default_domain'"):
        sp.SparsePathwaysConfig.from_base(dense.config, default_domains="code")


def test_config_without_a_base_says_how():
    with pytest.raises(TypeError, match="from_base"):
        sp.SparsePathwaysConfig()


def test_config_round_trips():
    base = build("llama").config
    config = sp.SparsePathwaysConfig.from_base(base, domains=["code"], default_domain="code")
    assert type(config.base_config) is type(base)
    assert config.base_config.to_dict() == base.to_dict()
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is type(config)
        assert twin.to_dict() == config.to_dict()
    again = sp.SparsePathwaysConfig.from_base(config, domains=["law"])
    assert type(again) is type(config)
    assert again.domains == ["law"]


def test_default_fields_of_the_base_win_over_the_general_ones(tmp_path):
    config = sp.SparsePathwaysConfig.from_base(hf.LlamaConfig())
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):
        saved.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = sp.SparsePathwaysConfig.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("pathways_format", 99), ("pathways_format", "x"), ("base_model_type", "?")],
)
def test_a_newer_or_unknown_config(tmp_path, field, value):
    config = sp.SparsePathwaysConfig.from_base(hf.LlamaConfig())
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, field: value}))
    with pytest.raises(sp.PathwaysError, match="Upgrade"):
        hf.AutoConfig.from_pretrained(tmp_path)


def test_bloom_with_sliced_weights():
    model = build("bloom")
    for layer in model.transformer.h:
        layer.mlp.slow_but_exact, layer.mlp.pretraining_tp = True, 2
    with pytest.raises(sp.PathwaysError, match="slow_but_exact"):
        _paths(model)


class Wrapped(torch.nn.Module):
    """As what trains in several processes wraps a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_wrapped_model():
    dense = build("llama")
    paths = _paths(dense)
    with pytest.raises(sp.PathwaysError, match="unwrap_model"):
        sp.SparsePathwaysForCausalLM.from_dense(Wrapped(dense), paths)


def test_weights_that_were_put_away_in_another_shape():
    dense = build("llama")
    for layer in dense.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(sp.PathwaysError, match=r"no FFN block.*sharded"):
        _paths(dense)
