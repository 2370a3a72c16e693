"""What a model costs per token, counted from its weights: the FFN's share bounds every speed-up.

Every weight matrix counts one multiply-add per element and token; embeddings are looked up and
count nothing, except that a tied head multiplies. Attention over the context, which grows with it,
is left out, so the FFN's share (and with it a speed-up) is that of a short context. Of routed
experts the share that a token visits is counted.
"""

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from hf_sparse_pathways.ffn.blocks import survey_model
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.sgatlin.layer import FfnLayer

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_VISITED = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters, and multiply-adds per token of a model's parts.

    Attributes:
        parameters: All parameters, tied ones once.
        ffn: Multiply-adds of the FFN blocks in which neurons can be skipped.
        experts: Of routed experts that a token visits; of FFN layers of this package, all.
        other: Of attention's projections and whatever else lies between embedding and head.
        head: Of the language model head.
    """

    parameters: int
    ffn: int
    experts: int
    other: int
    head: int

    @classmethod
    def of(cls, model: Any) -> Self:
        """Count a live dense model.

        Raises:
            UnsupportedModelError: It has no FFN blocks.
        """
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        routed = tuple(f"{name}." for name in survey_model(model).routed)
        ffn = sum(shape.dense_flops for shape in BaseModel.of(model).blocks)
        layers = [module for module in model.modules() if isinstance(module, FfnLayer)]
        apart = {id(module) for layer in layers for module in layer.modules()}
        inside = experts = 0
        for name, module in model.named_modules():
            if module is head or isinstance(module, nn.Embedding) or id(module) in apart:
                continue
            count = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2)
            if f"{name}.".startswith(routed):
                experts += count
            else:
                inside += count
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            ffn=ffn,
            experts=round(experts * _visited_share(model)) + sum(own.flops for own in layers) // 2,
            other=inside - ffn,
            head=int(head.weight.numel()) if head is not None else 0,
        )

    @property
    def ffn_share(self) -> float:
        """The FFN blocks' fraction of all multiply-adds per token."""
        return self.ffn / (self.ffn + self.experts + self.other + self.head)

    def speedup(self, removed: float) -> float:
        """Return the model's speed-up by Amdahl's law when part of the FFN costs nothing.

        Args:
            removed: Fraction of the FFN's multiply-adds that is not computed.
        """
        return 1.0 / (1.0 - removed * self.ffn_share)


def _visited_share(model: Any) -> float:
    """Return the fraction of a layer's routed experts that a token visits; 1 if unknown."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), None)
    visited = next((n for name in _VISITED if (n := getattr(config, name, None))), None)
    return visited / experts if experts and visited else 1.0
