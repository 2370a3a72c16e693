"""PEER: single-neuron experts of one pool, each with a GELU, weighed by a softmax.

    y(x) = sum over heads h, sum over i in TopK_k(s_h(x)) of  softmax(s_h)_i * gelu(<u_i, x>) * v_i

Source: He 2024, arXiv 2407.04153; see ``PeerConfig`` for what differs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.sgatlin.initialisation import scale_variance
from hf_sparse_pathways.sgatlin.layer import FfnLayer
from hf_sparse_pathways.sgatlin.routers import ProductKeyRouter
from hf_sparse_pathways.sgatlin.rows import multiply_rows, sum_rows
from hf_sparse_pathways.sgatlin.settings import PeerConfig


class PeerFFN(FfnLayer):
    """Experts of one pool.

    Attributes:
        u: What an expert multiplies its input with, ``(n_experts, d_model)``.
        v: What it gives, of the same shape.
        router: Scores the pool for every head.
    """

    config_class = PeerConfig
    config: PeerConfig

    def __init__(self, config: PeerConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.u = nn.Parameter(torch.empty(config.n_experts, d_model))
        self.v = nn.Parameter(torch.empty(config.n_experts, d_model))
        self.router = ProductKeyRouter(config, d_model, config.n_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place; an expert's variance is 1 / n_experts."""
        scale_variance(self.u, self.config.n_experts)
        scale_variance(self.v, self.config.n_experts)
        self.router.reset_parameters()

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for tokens in one row; see the base."""
        scores, index = self.router(x)
        rows, weights = index.flatten(1), scores.softmax(-1).flatten(1).to(self.u.dtype)
        activation = functional.gelu(multiply_rows(self.u, rows, x.to(self.u.dtype)))
        return sum_rows(self.v, rows, weights * activation).to(x.dtype)
