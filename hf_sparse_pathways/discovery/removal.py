"""In which order a block's neurons are removed, and what that costs: all that methods differ in."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Removal:
    """In which order neurons are removed, and what that costs.

    Attributes:
        order: Neurons, first removed first, int64 ``(d_ff,)``.
        error: Error after removing the first n, float64 ``(d_ff + 1,)``, not decreasing.
    """

    order: Tensor
    error: Tensor

    def keep(self, count: int) -> Tensor:
        """Return the keep mask ``(d_ff,)`` of the ``count`` neurons that are removed last."""
        keep = torch.zeros(len(self.order), dtype=torch.bool)
        keep[self.order[len(self.order) - count :]] = True
        return keep

    @property
    def scores(self) -> Tensor:
        """The error when a neuron goes, by neuron, float64 ``(d_ff,)``: larger means keep."""
        scores = torch.empty(len(self.order), dtype=torch.float64)
        scores[self.order] = self.error[1:]
        return scores

    @classmethod
    def by_scores(cls, scores: Tensor) -> "Removal":
        """Remove in the order of scores that say what each neuron alone is worth.

        Args:
            scores: Larger means keep, float64 ``(d_ff,)``. Errors add up, counted from the least.
        """
        order = scores.argsort(stable=True)
        rises = (scores - scores.min())[order]
        error = torch.cat([torch.zeros(1, dtype=torch.float64), rises.cumsum(0)])
        return cls(order, error)
