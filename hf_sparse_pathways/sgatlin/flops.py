"""The FLOPs of a model's forward pass, by formula: matrix products, two per multiply-add.

Every linear leaf outside the FFN layers (attention's, the head) counts ``2 * inputs * outputs``,
each attention ``4 * width * tokens`` for scores and values over the whole sequence (a causal mask
saves nothing in a product), and each FFN layer what its configuration says.
"""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.sgatlin.layer import FfnLayer


def count_flops(model: Any, tokens: int) -> int:
    """Return the FLOPs per token of a forward pass over sequences of some length.

    Args:
        model: A decoder whose FFNs are layers of this package, with softmax attention over
            everything before.
        tokens: Length of the sequences.

    Raises:
        UnsupportedModelError: It has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, FfnLayer)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no FFN layers of this package, whose FLOPs are known by "
            "formula. Build it with SparsePathwaysConfig.from_base(config, ffn=...)."
        )
    inside = {id(module) for layer in layers for module in layer.modules()}
    leaves = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in inside
    ]
    linear = sum(2 * leaf.weight.numel() for leaf in leaves)
    return linear + _attention_flops(model.config, tokens) + sum(layer.flops for layer in layers)


def _attention_flops(config: Any, tokens: int) -> int:
    """Return what scores and values take of a token, in all layers."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4 * width * tokens * int(config.num_hidden_layers)
