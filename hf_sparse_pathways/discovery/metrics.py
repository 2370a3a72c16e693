"""Square roots of metrics: errors under a metric are plain ones of what they are multiplied by."""

import torch
from torch import Tensor


def metric_root(metric: Tensor) -> Tensor:
    """Return the symmetric square root of a metric, float64."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
