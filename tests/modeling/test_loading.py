"""Checkpoints: the same names on disk as the base's, from every way of loading, in every order."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from tests.architectures import build, prompt, random_masks

IDS = prompt()
NAMES = ["llama", "gpt_neox", "falcon_h1", "qwen3_moe", "gemma3", "gpt2", "deepseek_v3", "moshi"]


def _keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_base_and_adapter_equal_the_full_checkpoint(name, tmp_path):
    dense = build(name)
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    dense.save_pretrained(tmp_path / "base")
    paths.save_pretrained(tmp_path / "paths")
    model.save_pretrained(tmp_path / "full")
    assert _keys(tmp_path / "full") == _keys(tmp_path / "base")
    adapter, info = sp.SparsePathwaysForCausalLM.from_pretrained(
        tmp_path / "base", pathways=tmp_path / "paths", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    for domain in ("code", None):
        expected = model(IDS, domain=domain).logits
        assert torch.equal(adapter(IDS, domain=domain).logits, expected)
        assert torch.equal(full(IDS, domain=domain).logits, expected)
    plain = full.to_dense()
    plain.save_pretrained(tmp_path / "plain")
    assert _keys(tmp_path / "plain") == _keys(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(again) is type(dense)
    assert torch.equal(again(IDS).logits, dense(IDS).logits)


@torch.no_grad()
def test_sharded_and_half_precision(tmp_path):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS, domain="law").logits, model(IDS, domain="law").logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(IDS, domain="law").logits.dtype == torch.bfloat16


@torch.no_grad()
def test_weights_are_shared_and_the_dense_model_stays_dense():
    dense = build("llama")
    before = dense(IDS).logits
    kinds = [type(module) for module in dense.modules()]
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    for (_, mine), (_, theirs) in zip(
        model.named_parameters(), dense.named_parameters(), strict=True
    ):
        assert mine is theirs
    model(IDS, domain="code")
    assert [type(module) for module in dense.modules()] == kinds
    assert torch.equal(dense(IDS).logits, before)
    assert not hasattr(dense.config, "domains")


@torch.no_grad()
def test_executor_and_other_pathways_at_load_time(tmp_path):
    dense = build("llama")
    first = sp.Pathways.from_masks(dense, random_masks(dense))
    second = sp.Pathways.from_masks(dense, random_masks(dense, ("chat",), seed=7))
    sp.SparsePathwaysForCausalLM.from_dense(dense, first).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, executor="masked", pathways=second)
    assert loaded.config.executor == "masked"
    assert loaded.domains == ["chat"]
    expected = sp.SparsePathwaysForCausalLM.from_dense(dense, second, executor="masked")
    assert torch.equal(loaded(IDS, domain="chat").logits, expected(IDS, domain="chat").logits)
    merged = first.merged(second)
    expected.set_pathways(merged)
    assert expected.domains == ["code", "law", "chat"]
    assert torch.equal(expected(IDS, domain="chat").logits, loaded(IDS, domain="chat").logits)


def test_outputs_of_hidden_states_and_attentions_match():
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    with torch.no_grad():
        expected = dense(IDS, output_hidden_states=True)
        found = model(IDS, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
