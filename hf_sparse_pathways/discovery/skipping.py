"""Which neurons a token skips: thresholds of gates, and the moments of what is left.

The score of neuron i for a token, with h the output of its activation function, is about what it
would add to the block's output, as far as that is known before the rest is computed::

    s_i = |h_i| c_i      c_i = rms(up_i) |w_i|

with w_i its column of the outgoing leaf (and rms(up) = 1 where nothing multiplies the gate). One
threshold tau per block leaves the wanted share of scores above it, over tokens and over those
neurons that are likely to be kept; of each neuron it is ``tau / c_i``.

All moments from which the block is then pruned and repaired are those of the thresholded
activation a', and what skipping leaves out, ``W (a - a')``, is regressed on what is kept as well.

Source: refitting columns to thresholded activations is ours; thresholds as in Lee et al. 2024,
"CATS", arXiv:2404.08763.
"""

from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grams import GramAccumulator
from hf_sparse_pathways.discovery.probes import Observer
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.layouts import outgoing_weight
from hf_sparse_pathways.ffn.skipping import gate_size, up_part

SAMPLE = 4096
"""Tokens, at most, on which thresholds are found."""

_MOST_SCORES = 10**7
"""Scores of which a quantile is taken."""


def find_threshold(
    activation: Tensor, up: Tensor | None, weight: Tensor, width: int, active: float
) -> Tensor:
    """Return the gates' thresholds of a block, float32 ``(d_ff,)``.

    Args:
        activation: On a sample of tokens, ``(tokens, d_ff)``.
        up: What the gates are multiplied by, of the same shape; None where nothing is.
        weight: Of the outgoing leaf, ``(d_out, d_ff)``.
        width: How many neurons will be kept.
        active: The share of tokens that a kept neuron is computed for, on average.
    """
    size = weight.float().norm(dim=0).to(activation.device)
    useful = activation.float().square().mean(0) * size.square()
    factor = size if up is None else size * up.float().square().mean(0).sqrt()
    likely = useful.topk(width).indices
    gates = gate_size(activation.float(), None if up is None else up.float()).nan_to_num_(0.0)
    scores = (gates * factor)[:, likely].flatten()
    scores = scores[:: max(1, len(scores) // _MOST_SCORES)]
    rank = min(len(scores), max(1, round((1.0 - active) * len(scores))))
    tau = scores.kthvalue(rank).values
    return (tau / factor.clamp_min(1e-30)).cpu()


class SkippingObserver(Observer):
    """Sees a block's activation, input, and what its gates are multiplied by."""

    def __init__(self, block: FfnBlock) -> None:
        super().__init__(block, inputs=True)
        self._up: Tensor | None = None

    def attach(self) -> list[Any]:
        """Hook the block; return the handles."""
        place = len(self.block.incoming) - 1, 2 if self.block.layout.fused else 1

        def see_up(module: Any, args: Any, output: Tensor) -> None:  # noqa: ARG001
            up = up_part(output, *place)
            self._up = None if up is None else up.flatten(0, -2)

        return [*super().attach(), self.block.incoming[-1].register_forward_hook(see_up)]

    def up_at(self, rows: Tensor) -> Tensor | None:
        """Return what the gates of some tokens are multiplied by."""
        return None if self._up is None else self._up.index_select(0, rows)


class SkippingProbe(SkippingObserver):
    """Adds up one block's second moments with its activation thresholded."""

    def __init__(
        self, block: FfnBlock, spaces: Workspaces, threshold: Tensor, *, inputs: bool
    ) -> None:
        super().__init__(block)
        self.spaces, self.threshold, self._in_gram = spaces, threshold, inputs
        self.weight = outgoing_weight(block.outgoing)
        width = block.d_in if inputs else 0
        self.accumulator = GramAccumulator(width, block.d_ff, targets=2 * block.d_out)
        self._active = torch.zeros(block.d_ff, dtype=torch.float64)
        self._tokens = 0

    def add(self, rows: Tensor, missing: Tensor | None, weights: Tensor | None) -> None:
        """Add what was seen last, padding left out."""
        activation, block_input = self.seen_at(rows)
        space = self.spaces.gram(len(self.accumulator.upper), rows.device)
        active = gate_size(activation, self.up_at(rows)) > self.threshold.to(activation.device)
        left = activation.masked_fill(~active, 0)
        skipped = (activation - left).float() @ self.weight.to(activation.device).T
        missing = torch.zeros_like(skipped) if missing is None else missing.float()
        self.accumulator.add(
            left,
            block_input if self._in_gram else None,
            space,
            target=torch.cat([missing, skipped], dim=1),
            weights=weights,
        )
        self._active += active.sum(0).double().cpu()
        self._tokens += len(rows)

    def task(self) -> BlockTask:
        """Return the block as it is to be repaired."""
        gram = self.accumulator.gram()
        missing, skipped = (self.accumulator.cross.cpu() / gram.tokens).chunk(2)
        return BlockTask(
            weight=self.weight,
            gram=gram,
            missing=missing,
            skipped=skipped,
            threshold=self.threshold,
            active=(self._active / max(1, self._tokens)).float(),
        )


def widest(order: Tensor, costs: Tensor, budget: float) -> int:
    """Return how many neurons may be kept, at least one.

    Args:
        order: Neurons in the order in which they are removed, int64 ``(d_ff,)``.
        costs: What each costs, ``(d_ff,)``.
        budget: What all kept ones may cost together.
    """
    kept = costs.double()[order].flip(0).cumsum(0)
    return max(1, int((kept <= budget + 1e-9).sum()))
