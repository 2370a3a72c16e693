"""A mixture of SwiGLU experts: a token gets ``top_k`` of them, weighed by a softmax over those.

Computed by expert: the tokens that chose it are gathered, multiplied, and added to what they have.
While it trains, it adds a load-balancing loss and a z-loss; see ``MoeConfig``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.sgatlin.initialisation import scale_variance
from hf_sparse_pathways.sgatlin.layer import FfnLayer, add_loss, has_losses
from hf_sparse_pathways.sgatlin.settings import MoeConfig


class MoeFFN(FfnLayer):
    """A mixture of experts.

    Attributes:
        router: Logits of the experts.
        gate_up: Gates and, below them, ups of the experts, ``(n_experts, 2 * d_ff, d_model)``.
        down: ``(n_experts, d_model, d_ff)``.
    """

    config_class = MoeConfig
    config: MoeConfig

    def __init__(self, config: MoeConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.router = nn.Linear(d_model, config.n_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.n_experts, 2 * config.d_ff, d_model))
        self.down = nn.Parameter(torch.empty(config.n_experts, d_model, config.d_ff))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place."""
        for weight in (self.router.weight, self.gate_up, self.down):
            scale_variance(weight, weight.shape[-1])

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for tokens in one row; see the base."""
        logits = self.router(x)
        best, index = logits.topk(self.config.top_k)
        if self.training and torch.is_grad_enabled() and has_losses(self.config):
            add_loss(self.losses(logits, index))
        weights = best.softmax(-1)
        output = torch.zeros_like(x)
        for expert in range(self.config.n_experts):
            token, place = (index == expert).nonzero(as_tuple=True)
            if len(token) or not len(x):  # of no tokens, too, the output is made from the weights
                made = self._compute_expert(expert, x[token]) * weights[token, place, None]
                output = output.index_add(0, token, made.to(output.dtype))
        return output

    def _compute_expert(self, expert: int, x: Tensor) -> Tensor:
        gate, up = functional.linear(x, self.gate_up[expert]).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down[expert])

    def losses(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return what is added to the loss, weighted.

        Args:
            logits: The router's, ``(tokens, n_experts)``.
            index: int64, of the experts that tokens get, ``(tokens, top_k)``.
        """
        config, logits = self.config, logits.float()
        if not len(logits):
            return logits.sum()  # 0, where means would be NaN
        counts = index.flatten().bincount(minlength=config.n_experts)
        shares, probabilities = counts / index.numel(), logits.softmax(-1).mean(0)
        balance = config.n_experts * (shares * probabilities).sum()
        z = logits.logsumexp(-1).square().mean()
        return config.load_balancing * balance + config.z_loss * z
