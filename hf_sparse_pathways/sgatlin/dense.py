"""Dense FFN layers, the partners of the sparse ones: with a gate, and without."""

from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.sgatlin.initialisation import scale_variance
from hf_sparse_pathways.sgatlin.layer import FfnLayer
from hf_sparse_pathways.sgatlin.settings import MlpConfig, SwigluConfig


class SwigluFFN(FfnLayer):
    """A gated dense FFN, without biases."""

    config_class = SwigluConfig
    config: SwigluConfig

    def __init__(self, config: SwigluConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.gate = nn.Linear(d_model, config.d_ff, bias=False)
        self.up = nn.Linear(d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place."""
        for leaf in (self.gate, self.up, self.down):
            scale_variance(leaf.weight, leaf.in_features)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for tokens in one row; see the base."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class MlpFFN(FfnLayer):
    """A dense FFN without gate and biases."""

    config_class = MlpConfig
    config: MlpConfig

    def __init__(self, config: MlpConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.up = nn.Linear(d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place."""
        for leaf in (self.up, self.down):
            scale_variance(leaf.weight, leaf.in_features)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for tokens in one row; see the base."""
        return self.down(getattr(functional, self.config.activation)(self.up(x)))
