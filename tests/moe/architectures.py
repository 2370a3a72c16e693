"""Tiny random mixture-of-experts models of many architectures, made from configurations alone."""

import torch
import transformers as hf

from tests.architectures import LLAMA_LIKE, VOCAB, draw_weights

_WIDE = {**LLAMA_LIKE, "num_key_value_heads": 4}


def _like(name, *, sizes=LLAMA_LIKE, **extra):
    config = getattr(hf, f"{name}Config")(**{**sizes, "num_hidden_layers": 2, **extra})
    return getattr(hf, f"{name}ForCausalLM")(config)


def _deepseek(name, **extra):
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    }
    routed = {"moe_intermediate_size": 12, "n_routed_experts": 16, "num_experts_per_tok": 3}
    return _like(name, sizes=_WIDE, **latent, **routed, first_k_dense_replace=1, **extra)


def _qwen(name, **extra):
    return _like(
        name, head_dim=8, moe_intermediate_size=12, num_experts=8, num_experts_per_tok=2, **extra
    )


def _local(name, **extra):
    return _like(name, num_local_experts=8, num_experts_per_tok=2, **extra)


MOE = {
    "mixtral": lambda: _local("Mixtral"),
    "qwen2_moe": lambda: _qwen("Qwen2Moe", shared_expert_intermediate_size=24),
    "qwen3_moe": lambda: _qwen("Qwen3Moe", norm_topk_prob=False),
    "qwen3_moe_mixed": lambda: _qwen("Qwen3Moe", mlp_only_layers=[0]),
    "olmoe": lambda: _like("Olmoe", num_experts=8, num_experts_per_tok=3),
    "deepseek_v2": lambda: _deepseek(
        "DeepseekV2", topk_method="group_limited_greedy", n_group=4, topk_group=2
    ),
    "deepseek_v3": lambda: _deepseek("DeepseekV3", n_group=2, topk_group=1),
    "gpt_oss": lambda: _local("GptOss", head_dim=8),
    "phimoe": lambda: _local("Phimoe"),
    "granitemoe": lambda: _local("GraniteMoe"),
    "dbrx": lambda: hf.DbrxForCausalLM(
        hf.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=VOCAB,
            max_seq_len=128,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        )
    ),
    "jamba": lambda: _like(
        "Jamba",
        num_experts=8,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=0,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "minimax": lambda: _local("MiniMax", head_dim=8, block_size=16),
    "glm4_moe": lambda: _like(
        "Glm4Moe",
        head_dim=8,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "ernie4_5_moe": lambda: _like(
        "Ernie4_5_Moe",
        moe_intermediate_size=12,
        moe_num_experts=8,
        moe_k=2,
        moe_layer_start_index=1,
        moe_num_shared_experts=1,
    ),
    "hunyuan_v1_moe": lambda: _like("HunYuanMoEV1", head_dim=8, num_experts=8, moe_topk=2),
    "nemotron_h": lambda: _like(
        "NemotronH",
        layers_block_type=["attention", "moe", "attention", "moe"],
        num_hidden_layers=4,
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=24,
    ),
}


def build_moe(name):
    """Build a tiny model in which every expert and every choice of the router counts."""
    torch.manual_seed(0)
    model = draw_weights(MOE[name]().eval())
    with torch.no_grad():
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:
                buffer.normal_(0, 0.3)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model
