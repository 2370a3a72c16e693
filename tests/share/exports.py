"""Tiny models with pathways that a plain FFN has a place for, or almost."""

from dataclasses import replace

import hf_sparse_pathways as sp
from tests.architectures import build, compensate, random_masks

NO_FORM = {
    "bloom": "no field of BloomConfig",
    "mpt": "no field of MptConfig",
    "deepseek_v3": "'moe_intermediate_size' also decides model.layers.1.mlp.experts.down_proj",
}
"""Architectures in which no field decides the blocks' widths alone, and what is said of them."""

NO_BIAS = {
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "phi3",
    "cohere",
    "stablelm",
    "olmo2",
    "glm4",
    "moshi",
    "cpmant",
}
"""Architectures that have a form, but no place for a bias."""


def with_blocks(pathways, **changes):
    """Return pathways with something else in every block."""
    changed = {
        name: replace(pathway, blocks=tuple(replace(block, **changes) for block in pathway.blocks))
        for name, pathway in pathways.by_domain.items()
    }
    return replace(pathways, by_domain=changed)


def fitting(name, **changes):
    """Return a dense model, and pathways whose compensation it has a place for."""
    dense = build(name)
    pathways = with_blocks(compensate(dense, random_masks(dense)), bypass=None, **changes)
    return dense, with_blocks(pathways, bias=None) if name in NO_BIAS else pathways


def sparse(name, **changes):
    """Return a model with such pathways."""
    return sp.SparsePathwaysForCausalLM.from_dense(*fitting(name, **changes))
