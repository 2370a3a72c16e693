"""The paper's rule: remove every neuron that scores below a percentile.

Source: A. Young 2026, "Sparse Pathways" (negative selection at p50). The paper does not say what
the percentile is pooled over, hence ``pool``. A block always keeps at least its best neuron.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError

POOLS = ("layer", "model")
"""The default first."""


def check_percentile(percentile: float, pool: str) -> None:
    """Check the rule's numbers.

    Raises:
        PathwaysError: The percentile is outside [0, 100).
        UnknownNameError: An unknown pool.
    """
    if pool not in POOLS:
        raise UnknownNameError("pool", pool, POOLS)
    number = isinstance(percentile, (int, float)) and math.isfinite(percentile)
    if not number or not 0.0 <= percentile < 100.0:
        raise PathwaysError(f"percentile has to be in [0, 100), got {percentile!r}.")


def keep_above(scores: Sequence[Tensor], percentile: float, pool: str) -> list[Tensor]:
    """Return one keep mask ``(d_ff,)`` per block.

    Args:
        scores: One tensor ``(d_ff,)`` per block.
        percentile: In [0, 100).
        pool: What the percentile is taken over, ``"layer"`` (one FFN block) or ``"model"``.
    """
    common = _threshold(torch.cat(list(scores)), percentile) if pool == "model" else None
    masks = []
    for block in scores:
        keep = block >= (_threshold(block, percentile) if common is None else common)
        keep[block.argmax()] = True
        masks.append(keep)
    return masks


def _threshold(scores: Tensor, percentile: float) -> Tensor:
    ranked = scores.sort().values  # quantile() refuses more than 2**24 values
    return ranked[min(math.ceil(percentile * len(ranked) / 100), len(ranked) - 1)]
