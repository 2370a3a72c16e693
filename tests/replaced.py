"""Tiny models whose FFNs are layers of another kind."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse_pathways as sp
from tests.architectures import LLAMA_LIKE, prompt

IDS = prompt()
SGATLIN = sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=3, d_key=8)
KINDS = {
    "sgatlin": SGATLIN,
    "peer": sp.PeerConfig(n_experts=16, n_heads=2, top_k=3, d_key=8),
    "swiglu": sp.SwigluConfig(d_ff=24),
    "mlp": sp.MlpConfig(d_ff=24),
    "moe": sp.MoeConfig(n_experts=4, top_k=2, d_ff=8),
}
EVERY_KIND = pytest.mark.parametrize("ffn", KINDS.values(), ids=KINDS)


def make(ffn=SGATLIN, base=None, seed=0, **extra):
    """Return a new model, its layers' weights large enough to be seen in the logits."""
    base = base or LlamaConfig(**{**LLAMA_LIKE, **extra})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(sp.SparsePathwaysConfig.from_base(base, ffn=ffn)).eval()
