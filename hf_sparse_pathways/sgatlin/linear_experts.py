"""sgatlin: an FFN of sparsely gated single-neuron experts without nonlinearity.

    y(x) = sum over channels c, sum over i in TopK_k(s_c(x)) of  s_{c,i}(x) * <u_{c,i}, x> * v_{c,i}

The scores ``s`` are the router's own, signed: no softmax, no auxiliary loss. All that is not linear
is which experts a token gets, and that their weights depend on it.

Source: Schug 2026, arXiv 2606.07414.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.sgatlin.initialisation import scale_variance
from hf_sparse_pathways.sgatlin.layer import FfnLayer
from hf_sparse_pathways.sgatlin.routers import make_router
from hf_sparse_pathways.sgatlin.rows import multiply_rows, sum_rows
from hf_sparse_pathways.sgatlin.settings import IDENTITY, SgatlinConfig


class SgatlinFFN(FfnLayer):
    """Sparsely gated linear experts.

    Attributes:
        u: What an expert multiplies its input with, ``(n_channels, n_experts, d_model)``.
        v: What it gives, of the same shape.
        router: Scores experts.
    """

    config_class = SgatlinConfig
    config: SgatlinConfig

    def __init__(self, config: SgatlinConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        shape = (config.n_channels, config.n_experts, d_model)
        self.u = nn.Parameter(torch.empty(shape))
        self.v = nn.Parameter(torch.empty(shape))
        self.router = make_router(config, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place; an expert's variance is 1 / n_experts."""
        scale_variance(self.u, self.config.n_experts)
        scale_variance(self.v, self.config.n_experts)
        self.router.reset_parameters()

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of each token's experts and their indices, the best first.

        Args:
            h: ``(tokens, d_model)``.

        Returns:
            Two tensors ``(tokens, n_channels, top_k)``; an index counts within its channel.

        Raises:
            PathwaysError: ``h`` is of another shape.
        """
        if h.shape[1:] != (self.d_model,):
            raise self._refuse(h, "tokens")
        scores, index = self.router(h, self.removed(h))
        return scores, index

    def all_scores(self, h: Tensor) -> Tensor:
        """Return every expert's score, ``(tokens, n_channels, n_experts)``.

        The best ``top_k`` of them are what ``route`` returns, without computing all. Those that
        are removed have minus infinity.

        Args:
            h: ``(tokens, d_model)``.

        Raises:
            PathwaysError: It is of another shape.
        """
        if h.shape[1:] != (self.d_model,):
            raise self._refuse(h, "tokens")
        scores, removed = self.router.all_scores(h), self.removed(h)
        return scores if removed is None else scores.masked_fill(removed, -torch.inf)

    def removed(self, h: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return which experts tokens may not get; None if they may get any, as here.

        A model with pathways has its domain's here (``ffn/attached_linear.py``).

        Args:
            h: ``(tokens, d_model)``.

        Returns:
            bool ``(n_channels, n_experts)``, or one such per token in front.
        """
        return None

    def rows(self, index: Tensor) -> Tensor:
        """Return where experts lie in the tables, the channels' one behind the other.

        Args:
            index: Within the channels, ``(tokens, n_channels, top_k)``.
        """
        first = torch.arange(self.config.n_channels, device=index.device) * self.config.n_experts
        return index + first[:, None]

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for tokens in one row; see the base."""
        scores, index = self.route(x)
        rows = self.rows(index).flatten(1)
        u, v = self.u.flatten(0, 1), self.v.flatten(0, 1)
        gated = scores.flatten(1).to(u.dtype) * multiply_rows(u, rows, x.to(u.dtype))
        if self.config.activation != IDENTITY:
            gated = getattr(functional, self.config.activation)(gated)
        return sum_rows(v, rows, gated).to(x.dtype)
