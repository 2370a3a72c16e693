"""Tiny random causal LMs of many architectures, made from configurations alone."""

import functools

import torch
import transformers as hf
from torch import nn

VOCAB = 99
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama_like(name, **extra):
    config = getattr(hf, f"{name}Config")(**{**LLAMA_LIKE, **extra})
    return getattr(hf, f"{name}ForCausalLM")(config)


def _falcon(**extra):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return hf.FalconForCausalLM(hf.FalconConfig(**{n: LLAMA_LIKE[n] for n in names}, **extra))


def _gpt2(**extra):
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=128, **extra)
    )


def _deepseek_v3():
    sizes = {**LLAMA_LIKE, "num_key_value_heads": 4, "moe_intermediate_size": 16}
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **sizes,
            first_k_dense_replace=1,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
    )


ARCHITECTURES = {
    "llama": lambda: _llama_like("Llama"),
    "llama_biased": lambda: _llama_like("Llama", mlp_bias=True),
    "mistral": lambda: _llama_like("Mistral"),
    "qwen2": lambda: _llama_like("Qwen2"),
    "qwen3": lambda: _llama_like("Qwen3", head_dim=8),
    "qwen3_moe": lambda: _llama_like(
        "Qwen3Moe",
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 2],
    ),
    "gemma2": lambda: _llama_like("Gemma2", head_dim=8),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8)),
    "phi": lambda: _llama_like("Phi", num_key_value_heads=4),
    "phi3": lambda: _llama_like("Phi3"),
    "cohere": lambda: _llama_like("Cohere"),
    "stablelm": lambda: _llama_like("StableLm"),
    "olmo2": lambda: _llama_like("Olmo2"),
    "granite": lambda: _llama_like("Granite"),
    "glm4": lambda: _llama_like("Glm4", head_dim=8),
    "nemotron": lambda: _llama_like("Nemotron"),
    "starcoder2": lambda: _llama_like("Starcoder2"),
    "deepseek_v3": _deepseek_v3,
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"})
    ),
    "gpt2": _gpt2,
    "gpt2_odd": lambda: _gpt2(n_inner=37),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            vocab_size=VOCAB,
            max_position_embeddings=128,
        )
    ),
    "gptj": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, vocab_size=VOCAB)
    ),
    "codegen": lambda: hf.CodeGenForCausalLM(
        hf.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, vocab_size=VOCAB)
    ),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(
        hf.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=128)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB)
    ),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCAB, max_seq_len=128)
    ),
    "falcon": _falcon,
    "falcon_new_decoder": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": lambda: _falcon(alibi=True, parallel_attn=False, bias=True, multi_query=False),
}


ARCHITECTURES |= {
    "bert": lambda: hf.BertLMHeadModel(
        hf.BertConfig(
            **{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}, is_decoder=True
        )
    ),
    "moshi": lambda: _llama_like("Moshi", ffn_dim=64),
    "falcon_h1": lambda: _llama_like(
        "FalconH1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=8
    ),
    "cpmant": lambda: hf.CpmAntForCausalLM(
        hf.CpmAntConfig(
            hidden_size=32,
            dim_head=8,
            dim_ff=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            prompt_length=4,
        )
    ),
    "modernbert_decoder": lambda: hf.ModernBertDecoderForCausalLM(
        hf.ModernBertDecoderConfig(
            **{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
        )
    ),
}


def build(name):
    """Build a tiny model whose weights are large enough that a mask visibly changes its output."""
    torch.manual_seed(0)
    return draw_weights(ARCHITECTURES[name]().eval())


@torch.no_grad()
def draw_weights(model):
    """Give a model weights that are large enough, in place; return it."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.2)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@functools.cache
def tiny_llama():
    """Return one shared tiny Llama; tests that change a model build their own."""
    return build("llama")


def random_masks(model, domains=("code", "law"), keep=0.5, seed=0):
    """Return one random keep mask per domain and FFN block."""
    from hf_sparse_pathways.ffn.blocks import find_blocks

    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for domain in domains:
        masks[domain] = [
            torch.rand(block.d_ff, generator=generator) < keep for block in find_blocks(model)
        ]
    return masks


def zeroed(model, masks):
    """Return a plain copy whose removed neurons' weight rows and columns are zero."""
    import copy

    from hf_sparse_pathways.ffn.blocks import find_blocks

    reference = copy.deepcopy(model)
    with torch.no_grad():
        for block, keep in zip(find_blocks(reference), masks, strict=True):
            rows = torch.cat([keep, keep]) if block.layout.fused else keep
            for leaf in block.incoming:
                weight = leaf.weight if isinstance(leaf, nn.Linear) else leaf.weight.T
                weight[~rows] = 0
                if leaf.bias is not None:
                    leaf.bias[~rows] = 0
            outgoing = block.outgoing
            weight = outgoing.weight if isinstance(outgoing, nn.Linear) else outgoing.weight.T
            weight[:, ~keep] = 0
    return reference


def prompt(rows=2, length=7, seed=0):
    """Return random token ids ``(rows, length)`` without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def compensate(model, masks, seed=0):
    """Return pathways with every addition, refits in full or low rank by turns."""
    import hf_sparse_pathways as sp
    from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank
    from hf_sparse_pathways.ffn.blocks import find_blocks

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    base = sp.Pathways.from_masks(model, masks).base
    by_domain = {}
    for domain, keep in masks.items():
        blocks = []
        for index, (block, mask) in enumerate(zip(find_blocks(model), keep, strict=True)):
            kept = int(mask.sum())
            low_rank = LowRank(draw(block.d_out, 3), draw(3, kept))
            rows = kept * (2 if block.layout.fused else 1)
            changes = [draw(rows, block.d_in) for _ in block.layout.incoming]
            if index % 2:
                changes[-1] = LowRank(draw(rows, 2), draw(2, block.d_in))
            blocks.append(
                BlockPathway(
                    keep=mask,
                    delta=low_rank if index % 2 else draw(block.d_out, kept),
                    bias=draw(block.d_out),
                    bypass=LowRank(draw(block.d_out, 2), draw(2, block.d_in)),
                    incoming=tuple(changes),
                )
            )
        by_domain[domain] = sp.Pathway(blocks=tuple(blocks))
    return sp.Pathways(base=base, by_domain=by_domain)


def repaired(model, pathway):
    """Return a plain copy with zeroed weights, in which hooks and weights do the compensation."""
    from hf_sparse_pathways.ffn.blocks import find_blocks

    reference = zeroed(model, pathway.keep)
    for block, part in zip(find_blocks(reference), pathway.blocks, strict=True):
        outgoing = block.outgoing
        weight = outgoing.weight if isinstance(outgoing, nn.Linear) else outgoing.weight.T
        if part.delta is not None:
            with torch.no_grad():
                weight[:, part.keep] += part.full_delta.to(weight)
        for leaf, change in zip(block.incoming, part.incoming, strict=False):
            if change is None:
                continue
            rows = torch.cat([part.keep, part.keep]) if block.layout.fused else part.keep
            weight = leaf.weight if isinstance(leaf, nn.Linear) else leaf.weight.T
            full = change if isinstance(change, torch.Tensor) else change.product()
            with torch.no_grad():
                weight[rows] += full.to(weight)
        _add_bias_and_bypass(block, part)
    return reference


def _add_bias_and_bypass(block, part):
    seen = []

    def add(_module, _args, output):
        block_input = seen.pop()
        if part.bias is not None:
            output = output + part.bias.to(output)
        if part.bypass is not None:
            output = output + block_input @ part.bypass.product().T.to(output)
        return output

    block.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.outgoing.register_forward_hook(add)
