"""Everything that decides how routers are trained, with its defaults in one place."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse_pathways.errors import PathwaysError, option
from hf_sparse_pathways.healing.settings import HealingSettings, parse_loss
from hf_sparse_pathways.shares import is_number


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """How the routers of a pathway with groups of neurons are trained.

    Attributes:
        loss: Terms joined by ``+``, as in ``HealingSettings``; the teacher is the dense model.
        balance: Factor of the load-balancing loss, of which 1 is the least.
        z_loss: Factor of the mean squared log-sum-exp of the logits, which keeps them small.
        refit: Whether the refitted columns of the outgoing leaves are trained, too.
        learning_rate: Highest rate of the routers, for AdamW.
        refit_rate: The same for the refitted columns.
        tokens: Training tokens.
        batch_size: Windows per forward pass.
        accumulate: Forward passes per optimiser step.
        max_length: Most tokens of a window; None for what the model takes, up to 512.
        validation_tokens: Tokens on which the best state is chosen.
        validations: How often that is measured.
        seed: Of the windows and their order.

    Raises:
        UnknownNameError: A name is unknown.
        PathwaysError: A number is out of range.
    """

    loss: str = "kl"
    balance: float = 0.01
    z_loss: float = 0.001
    refit: bool = True
    learning_rate: float = 3e-4
    refit_rate: float = 1e-4
    tokens: int = 65536
    batch_size: int = 2
    accumulate: int = 2
    max_length: int | None = None
    validation_tokens: int = 8192
    validations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("balance", "z_loss", "learning_rate", "refit_rate"):
            value, factor = getattr(self, name), name in ("balance", "z_loss")
            if not is_number(value) or not (0.0 if factor else 1e-12) <= value < math.inf:
                raise PathwaysError(
                    f"{option(name)} has to be a {'number from 0' if factor else 'positive number'}"
                    f", got {value!r}."
                )
        parse_loss(self.text.loss)  # the rest is checked as for healing

    @property
    def text(self) -> HealingSettings:
        """How windows are drawn: as for healing."""
        return HealingSettings(
            loss=self.loss,
            tokens=self.tokens,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            max_length=self.max_length,
            validation_tokens=self.validation_tokens,
            validations=self.validations,
            precision="model",
            seed=self.seed,
        )

    def described(self) -> dict[str, Any]:
        """Return the settings as JSON values, for the artefact."""
        return asdict(self)
