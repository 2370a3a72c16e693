"""The ridge that is cross-validated, against ridge regression on the raw samples."""

import pytest
import torch

from hf_sparse_pathways.discovery.halves import RIDGES, Moments, cross_validated_ridge
from hf_sparse_pathways.discovery.metrics import metric_root

D_FF, EXTRA, D_OUT = 24, 3, 5


def _draw(tokens, signal, seed=0):
    """Return z = [a, x, 1] and an error of which the activation says as much as ``signal``."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(tokens, D_FF, generator=generator) @ torch.diag(torch.linspace(0.2, 2, D_FF))
    x = torch.randn(tokens, EXTRA, generator=generator)
    z = torch.cat([a, x, torch.ones(tokens, 1)], 1)
    weight = torch.randn(D_OUT, D_FF, generator=generator)
    noise = torch.randn(tokens, D_OUT, generator=generator)
    return z, signal * a @ weight.T + noise + 0.5


def _sums(z, e):
    return Moments(z.T @ z, e.T @ z)


def _held_out_error(fit, test, index, ridge, unit, root):
    """Return the squared error on some tokens of ridge regression on others, float64."""
    (z, e), (others, theirs) = (tuple(part.double() for part in pair) for pair in (fit, test))
    r, q = z[:, index], others[:, index]
    penalty = torch.where(index < D_FF, ridge * unit, 0.0).double()
    solution = torch.linalg.solve(r.T @ r + torch.diag(penalty), r.T @ e)
    missing = theirs - q @ solution
    return float((missing if root is None else missing @ root).square().sum())


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("signal", [0.0, 0.03, 0.3, 10.0])
@pytest.mark.parametrize("kept", [range(0, D_FF, 2), range(D_FF)])
def test_the_ridge_has_the_least_error_on_the_other_half(kept, signal, with_metric):
    z, e = _draw(120, signal)
    index = torch.tensor([*kept, len(z[0]) - 1])
    root = torch.randn(D_OUT, D_OUT, generator=torch.Generator().manual_seed(1))
    metric = root @ root.T if with_metric else None
    one, other = (z[::2], e[::2]), (z[1::2], e[1::2])
    found = cross_validated_ridge(_sums(z, e), _sums(*one), index, D_FF, metric)
    unit = z[:, :D_FF].square().sum(0).mean()
    exact = None if metric is None else metric_root(metric)
    errors = {
        ridge: _held_out_error(one, other, index, ridge, unit, exact)
        + _held_out_error(other, one, index, ridge, unit, exact)
        for ridge in RIDGES
    }
    assert errors[found] <= min(errors.values()) * (1 + 1e-6)


def test_noise_is_shrunk_and_signal_is_not():
    index = torch.tensor([*range(D_FF), D_FF + EXTRA])
    found = []
    for signal in (0.0, 10.0):
        z, e = _draw(200, signal)
        found.append(cross_validated_ridge(_sums(z, e), _sums(z[::2], e[::2]), index, D_FF, None))
    noise, signal = found
    assert noise >= 10.0
    assert signal == RIDGES[0]


def test_neurons_that_never_fire_are_no_error():
    z, e = _draw(50, 0.0)
    z[:, :D_FF] = 0.0
    index = torch.tensor([0, 1, len(z[0]) - 1])
    found = cross_validated_ridge(_sums(z, e), _sums(z[::2], e[::2]), index, D_FF, None)
    assert found in RIDGES


def test_cross_validation_is_pure():
    z, e = _draw(50, 0.1)
    whole, half, metric = _sums(z, e), _sums(z[::2], e[::2]), torch.eye(D_OUT)
    before = [part.clone() for part in (whole.total, whole.cross, half.total, half.cross, metric)]
    cross_validated_ridge(whole, half, torch.arange(4), D_FF, metric)
    after = [whole.total, whole.cross, half.total, half.cross, metric]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
