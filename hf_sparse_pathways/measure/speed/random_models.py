"""Models and pathways of given shapes with random contents: speed depends on shapes alone."""

import re
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse_pathways.discovery.goal import check_sparsity
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway

VOCABULARY = 32000
HEAD_WIDTHS = (128, 64, 32, 16, 8)
"""Of which the first one is taken that gives at least 8 heads, or else the last that fits."""

_SEED = 0


@dataclass(frozen=True)
class ModelShape:
    """Layers, d_model and d_ff of a Llama."""

    layers: int
    d_model: int
    d_ff: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"16x2048x8192"``: layers x d_model x d_ff.

        Raises:
            PathwaysError: It is no such shape, or d_model cannot be split into heads.
        """
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)x([1-9]\d*)\s*", text.lower())
        if match is None:
            raise PathwaysError(
                f"--shape {text!r} does not fit; write LAYERSxD_MODELxD_FF, as in 16x2048x8192."
            )
        shape = cls(*map(int, match.groups()))
        if shape.d_model % HEAD_WIDTHS[-1]:
            raise PathwaysError(
                f"--shape {text!r} does not fit: d_model {shape.d_model} has to be a multiple of "
                f"{HEAD_WIDTHS[-1]}, to be split into attention heads."
            )
        return shape

    def __str__(self) -> str:
        return f"{self.layers}x{self.d_model}x{self.d_ff}"

    @property
    def heads(self) -> int:
        """Attention heads."""
        counts = [self.d_model // width for width in HEAD_WIDTHS if self.d_model % width == 0]
        return next((count for count in counts if count >= 8), counts[-1])


def random_llama(shape: ModelShape, dtype: torch.dtype = torch.float32) -> Any:
    """Return a Llama with random weights, the same every time; the global seed is left alone.

    Args:
        shape: Its layers and widths; it has 32000 tokens, and four heads per key and value head.
        dtype: Of its weights.
    """
    heads = shape.heads
    config = LlamaConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    config._name_or_path = f"random Llama {shape}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_pathway(base: BaseModel, sparsity: float) -> Pathway:
    """Return a pathway of random neurons, the same every time.

    Args:
        base: The model it is for.
        sparsity: Fraction of every block's neurons that is removed.

    Raises:
        PathwaysError: The sparsity is outside [0, 1).
    """
    fractions = check_sparsity(sparsity, len(base.blocks))
    generator = torch.Generator().manual_seed(_SEED)
    keep = [
        torch.randperm(block.d_ff, generator=generator) >= fraction * block.d_ff
        for block, fraction in zip(base.blocks, fractions, strict=True)
    ]
    return Pathway.from_keep(keep, {"method": "random"})
