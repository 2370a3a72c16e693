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

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grams import Gram, GramAccumulator
from hf_sparse_pathways.discovery.probes import Observer, Seen
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.layouts import outgoing_weight
from hf_sparse_pathways.ffn.skipping import gate_size

SAMPLE = 4096
"""Tokens, about, on which thresholds are found."""

FEWEST = 64
"""A cluster with fewer tokens in the sample has the thresholds of all tokens."""

_MOST_SCORES = 10**7
"""Scores of which a quantile is taken."""


def find_threshold(seen: Seen, weight: Tensor, width: int, active: float) -> Tensor:
    """Return the gates' thresholds of a block, float32 ``(d_ff,)``.

    Args:
        seen: What the block computes for a sample of tokens.
        weight: Of the outgoing leaf, ``(d_out, d_ff)``.
        width: How many neurons will be kept.
        active: The share of tokens that a kept neuron is computed for, on average.
    """
    activation = seen.activation.float()
    up = None if seen.up is None else seen.up.float()
    size = weight.float().norm(dim=0).to(activation.device)
    useful = activation.square().mean(0) * size.square()
    factor = size if up is None else size * up.square().mean(0).sqrt()
    likely = useful.topk(width).indices
    gates = gate_size(activation, up).nan_to_num_(0.0)
    scores = (gates * factor)[:, likely].flatten()
    scores = scores[:: max(1, len(scores) // _MOST_SCORES)]
    rank = min(len(scores), max(1, round((1.0 - active) * len(scores))))
    tau = scores.kthvalue(rank).values
    return (tau / factor.clamp_min(1e-30)).cpu()


def add_left(
    accumulator: GramAccumulator,
    weight: Tensor,
    seen: Seen,
    left: Tensor,
    given: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    """Add second moments of what is left of an activation, in place.

    What is not left is a second target beside what is missing.

    Args:
        accumulator: With two targets of the block's width.
        weight: Of the outgoing leaf, ``(d_out, d_ff)``.
        seen: What the block has computed.
        left: Of its activation, ``(tokens, d_ff)``.
        given: A workspace, what is missing, and the tokens' weights, as ``Observer.add`` has them.
    """
    space, missing, weights = given
    skipped = (seen.activation - left).float() @ weight.to(left.device).T
    missing = torch.zeros_like(skipped) if missing is None else missing.float()
    target = torch.cat([missing, skipped], dim=1)
    accumulator.add(left, seen.block_input, space, target=target, weights=weights)


class SkippedMoments:
    """Adds up a block's second moments with its activation thresholded, over some of its tokens."""

    def __init__(self, block: FfnBlock, threshold: Tensor, *, inputs: bool) -> None:
        self.weight = outgoing_weight(block.outgoing)
        self.threshold = threshold
        width = block.d_in if inputs else 0
        self.accumulator = GramAccumulator(width, block.d_ff, targets=2 * block.d_out)
        self._active = torch.zeros(block.d_ff, dtype=torch.float64)
        self._tokens = 0

    def add(
        self, seen: Seen, space: Tensor, missing: Tensor | None, weights: Tensor | None
    ) -> None:
        """Add tokens; what is skipped is a second target beside what is missing."""
        activation = seen.activation
        active = gate_size(activation, seen.up) > self.threshold.to(activation.device)
        left = activation.masked_fill(~active, 0)
        add_left(self.accumulator, self.weight, seen, left, (space, missing, weights))
        self._active += active.sum(0).double().cpu()
        self._tokens += len(activation)

    @property
    def active(self) -> Tensor:
        """The share of tokens for which each neuron is computed, float32 ``(d_ff,)``."""
        return (self._active / max(1, self._tokens)).float()

    def task(self, upper: Tensor, cross: Tensor) -> BlockTask:
        """Return the block as it is to be repaired, from moments that are made of these."""
        gram = Gram.of_upper(upper.cpu(), len(self.threshold))
        missing, skipped = (cross.cpu() / gram.tokens).chunk(2)
        return BlockTask(
            weight=self.weight,
            gram=gram,
            missing=missing,
            skipped=skipped,
            threshold=self.threshold,
            active=self.active,
        )


class SkippingProbe(Observer):
    """Adds up one block's second moments with its activation thresholded."""

    def __init__(
        self, block: FfnBlock, spaces: Workspaces, threshold: Tensor, *, inputs: bool
    ) -> None:
        super().__init__(block, inputs=inputs, ups=True)
        self.spaces, self.moments = spaces, SkippedMoments(block, threshold, inputs=inputs)

    def add(self, rows: Tensor, missing: Tensor | None, weights: Tensor | None) -> None:
        """Add what was seen last, padding left out."""
        space = self.spaces.gram(len(self.moments.accumulator.upper), rows.device)
        self.moments.add(self.seen_at(rows), space, missing, weights)

    def task(self) -> BlockTask:
        """Return the block as it is to be repaired."""
        own = self.moments.accumulator
        return self.moments.task(own.upper, own.cross)


def widest(order: Tensor, costs: Tensor, budget: float) -> int:
    """Return how many neurons may be kept, at least one.

    Args:
        order: Neurons in the order in which they are removed, int64 ``(d_ff,)``.
        costs: What each costs, ``(d_ff,)``.
        budget: What all kept ones may cost together.
    """
    kept = costs.double()[order].flip(0).cumsum(0)
    return max(1, int((kept <= budget + 1e-9).sum()))
