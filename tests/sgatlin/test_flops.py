"""FLOPs by formula are those that torch counts, of the layers with gathered rows and of models."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    DiffLlamaConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
)

import hf_sparse_pathways as sp
from hf_sparse_pathways.sgatlin import linear_experts, peer
from hf_sparse_pathways.sgatlin.flops import count_flops
from tests.architectures import ARCHITECTURES, LLAMA_LIKE, build, tiny_llama
from tests.sgatlin.cases import CONFIGS, D_MODEL, layer_of


@pytest.fixture
def gathered(monkeypatch):
    """Layers whose rows are gathered and multiplied as matrices, which torch counts."""

    def multiply(table, index, x):
        return torch.bmm(table[index], x.unsqueeze(-1)).squeeze(-1)

    def sum_rows(table, index, weights):
        return torch.bmm(weights.unsqueeze(1), table[index]).squeeze(1)

    for module in (linear_experts, peer):
        monkeypatch.setattr(module, "multiply_rows", multiply)
        monkeypatch.setattr(module, "sum_rows", sum_rows)


def _count(module, *args):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*args)
    return counter.get_total_flops()


@pytest.mark.usefixtures("gathered")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_layer(name, tokens):
    layer, _ = layer_of(name, torch.float32)
    assert layer.flops == layer.config.flops(D_MODEL)
    assert _count(layer, torch.randn(tokens, D_MODEL)) == tokens * layer.flops


@pytest.mark.usefixtures("gathered")
@pytest.mark.parametrize("kind", ["sgatlin-product_dense", "peer", "swiglu", "mlp", "moe"])
@pytest.mark.parametrize(
    "base",
    [
        LlamaConfig(**{**LLAMA_LIKE, "num_key_value_heads": 4}),
        LlamaConfig(**{**LLAMA_LIKE, "tie_word_embeddings": True}),
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=128),
    ],
    ids=["llama", "grouped", "gpt2"],
)
def test_a_model(kind, base):
    config = sp.SparsePathwaysConfig.from_base(base, ffn=CONFIGS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 99, (2, 10))
    assert _count(model, ids) == 20 * count_flops(model, 10)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_of_every_architecture_it_is_right_or_refused(name):
    base = build(name).config
    if name == "deepseek_v3":
        base.first_k_dense_replace = base.num_hidden_layers  # experts stay where they are
    config = sp.SparsePathwaysConfig.from_base(base, ffn=CONFIGS["swiglu"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if name in ("cpmant", "falcon_h1", "qwen3_moe"):
        with pytest.raises(sp.PathwaysError, match="FlopCounterMode"):
            count_flops(model, 10)
        return
    assert _count(model, torch.randint(3, 90, (2, 10))) == 20 * count_flops(model, 10)


@pytest.mark.parametrize(
    "base",
    [
        DiffLlamaConfig(**LLAMA_LIKE),
        BartConfig(
            d_model=32,
            decoder_layers=2,
            decoder_ffn_dim=48,
            decoder_attention_heads=4,
            vocab_size=99,
        ),
        Gemma3nTextConfig(
            **LLAMA_LIKE,
            head_dim=8,
            vocab_size_per_layer_input=99,
            laurel_rank=4,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=None,
        ),
        Gemma4TextConfig(**LLAMA_LIKE, head_dim=8),
    ],
    ids=["diffllama", "bart", "gemma3n", "gemma4"],
)
def test_what_is_known_to_multiply_otherwise_is_refused(base):
    config = sp.SparsePathwaysConfig.from_base(base, ffn=CONFIGS["swiglu"])
    with pytest.raises(sp.PathwaysError, match="known by formula"):
        count_flops(AutoModelForCausalLM.from_config(config), 10)


def test_a_plain_model_is_refused():
    with pytest.raises(sp.PathwaysError, match="no FFN layers"):
        count_flops(tiny_llama(), 10)


def test_more_experts_cost_no_more_but_for_the_router():
    small = sp.SgatlinConfig(n_experts=1024)
    added = replace(small, n_experts=4096).flops(256) - small.flops(256)
    assert added == 2 * 128 * 2 * 8 * (64 - 32)
