"""A ridge that is cross-validated over two halves of a text, from sums over each alone.

With fit and test the two halves in turn, S = sum z z^T and C = sum e z^T over one half's tokens,
and ``delta = C_fit (S_fit + ridge)^-1``, the error on the other half is up to a constant::

    tr(M (delta S_test delta^T - 2 delta C_test^T))

A ridge keeps its absolute size from a half to the whole: it stands for what is known before any
token is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.metrics import metric_root

RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""In units of the whole text's mean second moment. The least is enough for float32."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens.

    Attributes:
        total: Sum of z z^T, float32, symmetric, ``(size, size)``.
        cross: Sum of e z^T, float32 ``(d_out, size)``.
    """

    total: Tensor
    cross: Tensor


def cross_validated_ridge(
    whole: Moments, half: Moments, index: Tensor, d_ff: int, metric: Tensor | None
) -> float:
    """Return the ridge of least error, each half predicted from the other. Pure.

    Args:
        whole: Over all tokens.
        half: Over some of them.
        index: The regressors, entries of z; those from ``d_ff`` on bear no ridge.
        d_ff: Number of neurons.
        metric: M, ``(d_out, d_out)``; None for I.

    Returns:
        One of ``RIDGES``.
    """
    root = None if metric is None else metric_root(metric).float()
    one, both = _part(half, index, root), _part(whole, index, root)
    other = Moments(both.total - one.total, both.cross - one.cross)
    unit = whole.total.diagonal()[:d_ff].mean().clamp_min(1e-30)
    penalty = torch.where(index < d_ff, unit, 0.0)

    def error(ridge: float) -> float:
        return _error(one, other, ridge * penalty) + _error(other, one, ridge * penalty)

    return _lowest(error)


def _part(sums: Moments, index: Tensor, root: Tensor | None) -> Moments:
    """Return the sums of some regressors, the target in the metric."""
    cross = sums.cross[:, index]
    return Moments(sums.total[index][:, index], cross if root is None else root @ cross)


def _error(fit: Moments, test: Moments, penalty: Tensor) -> float:
    """Return the error on one part of what was fitted to another."""
    ridged = fit.total.clone()
    ridged.diagonal().add_(penalty)
    solution = torch.cholesky_solve(fit.cross.T, torch.linalg.cholesky(ridged))
    return float(((test.total @ solution - 2 * test.cross.T) * solution).sum())


def _lowest(error: Callable[[float], float]) -> float:
    """Return the ridge of least error, which has one minimum over the ridges, from the middle."""
    place = len(RIDGES) // 2
    least = error(RIDGES[place])
    for step in (1, -1):
        start = place
        while 0 <= place + step < len(RIDGES) and (found := error(RIDGES[place + step])) < least:
            place, least = place + step, found
        if place != start:
            break
    return RIDGES[place]
