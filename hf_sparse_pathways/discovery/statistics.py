"""Activation statistics of one FFN block: what each neuron does by itself.

Sums are kept instead of means, in float64, so that statistics of two token streams merge to those
of both.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from hf_sparse_pathways.files import check_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockStatistics:
    """Statistics of one FFN block's activations over a domain's tokens.

    Attributes:
        tokens: Number of tokens, padding excluded.
        abs_sum: Sum of |a|, float64 ``(d_ff,)``, unit a.
        sum: Sum of a, float64 ``(d_ff,)``, unit a.
        square_sum: Sum of a^2, float64 ``(d_ff,)``, unit a^2.
        positive: Count of a > 0, float64 ``(d_ff,)``, tokens.
        abs_max: Largest |a|, float64 ``(d_ff,)``, unit a.
        share_square_sum: Sum of (a / |a|_2)^2, the norm over the token's neurons, float64
            ``(d_ff,)``.
    """

    tokens: int
    abs_sum: Tensor
    sum: Tensor
    square_sum: Tensor
    positive: Tensor
    abs_max: Tensor
    share_square_sum: Tensor

    @classmethod
    def empty(cls, d_ff: int) -> Self:
        """Return the statistics of no tokens."""
        return cls(tokens=0, **{name: torch.zeros(d_ff, dtype=torch.float64) for name in TENSORS})

    @property
    def mean_abs(self) -> Tensor:
        """E[|a|], float64 ``(d_ff,)``."""
        return self.abs_sum / self.tokens

    @property
    def mean(self) -> Tensor:
        """E[a], float64 ``(d_ff,)``."""
        return self.sum / self.tokens

    @property
    def second_moment(self) -> Tensor:
        """E[a^2], float64 ``(d_ff,)``."""
        return self.square_sum / self.tokens

    @property
    def positive_fraction(self) -> Tensor:
        """P(a > 0), float64 ``(d_ff,)``."""
        return self.positive / self.tokens

    def copy(self) -> Self:
        """Return the same in tensors of its own. Pure."""
        return replace(self, **{name: getattr(self, name).clone() for name in TENSORS})

    def merged(self, other: Self) -> Self:
        """Return the statistics of both token streams together. Pure."""
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            abs_sum=self.abs_sum + other.abs_sum,
            sum=self.sum + other.sum,
            square_sum=self.square_sum + other.square_sum,
            positive=self.positive + other.positive,
            abs_max=torch.maximum(self.abs_max, other.abs_max),
            share_square_sum=self.share_square_sum + other.share_square_sum,
        )


TENSORS = tuple(field.name for field in fields(BlockStatistics) if field.name != "tokens")


def check_statistics(domain: str, block: str, statistics: BlockStatistics) -> None:
    """Check that statistics are numbers.

    Raises:
        ArtefactError: One is NaN or infinite.
    """
    for name in TENSORS:
        check_finite(f"Domain {domain!r}, {block}: {name}", getattr(statistics, name))
