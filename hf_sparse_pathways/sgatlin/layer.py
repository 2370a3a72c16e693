"""What every FFN layer can do, whatever its kind."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.sgatlin.settings import FfnConfig


class FfnLayer(nn.Module, ABC):
    """A layer from ``(..., d_model)`` to the same, token by token.

    Attributes:
        config: What it is made of.
        d_model: Width of its input and output.
        config_class: Of its configurations.
    """

    config_class: ClassVar[type[FfnConfig]]
    config: FfnConfig
    d_model: int

    def __init__(self, config: FfnConfig, d_model: int) -> None:
        """Take what it is made of.

        Raises:
            PathwaysError: The configuration is another layer's, or the width is no width.
        """
        super().__init__()
        wanted = self.config_class
        if not isinstance(config, wanted) or type(d_model) is not int or d_model < 1:
            raise PathwaysError(
                f"{type(self).__name__} is made of a {wanted.__name__} and a width of at least 1; "
                f"got {config!r:.200} and {d_model!r:.200}."
            )
        self.config, self.d_model = config, d_model

    @property
    def flops(self) -> int:
        """FLOPs of a token's matrix products; see ``FfnConfig.flops``."""
        return self.config.flops(self.d_model)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights, in place."""

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """Return the output for tokens in one row, ``(tokens, d_model)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of the input's shape.

        Raises:
            PathwaysError: The input is of another width.
        """
        if x.shape[-1:] != (self.d_model,):
            raise self._refuse(x, "...")
        return self.compute(x.reshape(-1, self.d_model)).view(x.shape)

    def _refuse(self, x: Tensor, rows: str) -> PathwaysError:
        return PathwaysError(
            f"The layer takes inputs ({rows}, {self.d_model}), and was given {tuple(x.shape)}."
        )

    def extra_repr(self) -> str:
        """Say what it is made of."""
        return f"d_model={self.d_model}, {self.config}"


class _Collected(local):
    losses: list[Tensor] | None = None


_COLLECTED = _Collected()


@contextmanager
def collect_losses() -> Iterator[list[Tensor]]:
    """Within the block, on this thread, gather what layers add to the loss while they train."""
    before, _COLLECTED.losses = _COLLECTED.losses, []
    try:
        yield _COLLECTED.losses
    finally:
        _COLLECTED.losses = before


def add_loss(loss: Tensor) -> None:
    """Hand a layer's part of the loss to whoever collects, if anybody does."""
    if _COLLECTED.losses is not None:
        _COLLECTED.losses.append(loss)


def has_losses(config: Any) -> bool:
    """Whether layers of a configuration add to the loss."""
    return any(getattr(config, name, 0) for name in ("load_balancing", "z_loss"))
