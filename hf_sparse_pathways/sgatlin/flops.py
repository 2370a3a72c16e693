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
        UnsupportedModelError: It has no such layers, or weights outside of them that are no linear
            leaf's, such as routed experts that stayed or a convolution; or it is known to multiply
            otherwise.
    """
    layers = [module for module in model.modules() if isinstance(module, FfnLayer)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no FFN layers of this package, whose FLOPs are known by "
            "formula. Build it with SparsePathwaysConfig.from_base(config, ffn=...)."
        )
    _check_known(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    linear = 0
    for name, module in model.named_modules():
        if id(module) in inside or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            linear += 2 * module.weight.numel()
        elif any(own.dim() > 1 for own in module.parameters(recurse=False)):
            raise _refuse(f"{name} ({type(module).__name__}) is no linear leaf")
    return linear + _attention_flops(model.config, tokens) + sum(layer.flops for layer in layers)


def _check_known(model: Any) -> None:
    """Check that nothing is known by which the architecture multiplies otherwise."""
    kind = model.config.base_config.model_type
    reason = next((why for name, why in _OTHERWISE.items() if kind.startswith(name)), None)
    if any(name.endswith("encoder_attn") for name, _ in model.named_modules()):
        reason = "has attention to an encoder, which a decoder by itself does not run"
    if reason is not None:
        raise _refuse(f"{kind} {reason}")


def _refuse(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The FLOPs are not known by formula: {reason}, and this counts decoders of softmax "
        "attention, linear leaves and FFN layers. Use torch.utils.flop_counter.FlopCounterMode."
    )


_OTHERWISE = {
    "diffllama": "multiplies the values of each head by two maps",
    "gemma3n": "mixes several streams between its layers by products of activations",
    "gemma4": "has heads of several widths",
}
"""Beginning of a model type -> what it does."""


def _attention_flops(config: Any, tokens: int) -> int:
    """Return what scores and values take of a token, in all layers."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths = [getattr(config, name, None) or width for name in ("qk_head_dim", "v_head_dim")]
    return 2 * heads * sum(widths) * tokens * int(config.num_hidden_layers)
