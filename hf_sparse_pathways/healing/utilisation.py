"""How evenly a pathway's groups of neurons are used: shares, entropy, dead groups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.healing.routed_student import RoutedStudent

DEAD = 0.01
"""A group is dead if fewer choices fall on it than this share of what would be even."""


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Of the blocks that have groups.

    Attributes:
        shares: Per block, the share of the choices that falls on each group; they add up to 1.
    """

    shares: tuple[tuple[float, ...], ...]

    @property
    def entropy(self) -> float:
        """Entropy of the shares over that of even ones, mean over blocks, from 0 to 1."""
        return sum(map(_evenness, self.shares)) / len(self.shares)

    @property
    def dead(self) -> int:
        """Groups that hardly any token has, in all blocks."""
        return sum(share * len(own) < DEAD for own in self.shares for share in own)

    @property
    def largest(self) -> float:
        """The largest share over an even one."""
        return max(share * len(own) for own in self.shares for share in own)

    def described(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {"entropy": self.entropy, "dead": self.dead, "largest": self.largest}


def _evenness(shares: Sequence[float]) -> float:
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 1.0


def mean_utilisation(shares: Sequence[Sequence[Tensor]]) -> Utilisation:
    """Return the mean over batches of what ``RoutedStudent`` told of each."""
    means = [torch.stack(list(own)).mean(0) for own in zip(*shares, strict=True)]
    return Utilisation(shares=tuple(tuple(own.tolist()) for own in means))


@torch.no_grad()
def measure_utilisation(
    student: RoutedStudent, windows: Sequence[Window], batch_size: int
) -> Utilisation:
    """Return how a student's groups are used on a text."""
    student.eval()
    device = next(student.parameters()).device
    batches = make_batches(windows, batch_size)
    told = [student(batch.ids.to(device), batch.mask.to(device)) for batch in batches]
    return mean_utilisation([each["shares"] for each in told])
