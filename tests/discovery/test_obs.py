"""Optimal Brain Surgeon against one that inverts anew at every step, and against least squares."""

import pytest
import torch

from hf_sparse_pathways.discovery import obs
from hf_sparse_pathways.discovery.obs import remove_by_obs
from hf_sparse_pathways.discovery.removal import Removal


def _block(d_ff, d_out, seed=0, ridge=0.01):
    """Return a weight and a ridged second moment of correlated activations, float64."""
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(3 * d_ff, d_ff, generator=generator, dtype=torch.float64)
    activation = activation @ torch.randn(d_ff, d_ff, generator=generator, dtype=torch.float64)
    moment = activation.T @ activation / len(activation)
    moment += ridge * moment.diagonal().mean() * torch.eye(d_ff, dtype=torch.float64)
    return torch.randn(d_out, d_ff, generator=generator, dtype=torch.float64), moment


def _refit(weight, moment, keep):
    """Return the columns of least error that are zero outside ``keep``."""
    columns = torch.zeros_like(weight)
    inner, cross = moment[keep][:, keep], (weight @ moment)[:, keep]
    columns[:, keep] = torch.linalg.solve(inner, cross.T).T
    return columns


def _least_error(weight, moment, keep, metric=None):
    """Return the error of the refit on the kept neurons, by definition."""
    missing = weight - _refit(weight, moment, keep)
    error = missing @ moment @ missing.T
    return float(error.trace() if metric is None else (metric @ error).trace())


def _naive(weight, moment, batch):
    """Remove neurons in batches; invert what is left and refit from scratch before each."""
    left, order = list(range(weight.shape[1])), []
    while left:
        keep = torch.zeros(weight.shape[1], dtype=torch.bool)
        keep[left] = True
        columns = _refit(weight, moment, keep)
        inverse = torch.linalg.inv(moment[left][:, left])
        costs = {
            neuron: float(columns[:, neuron].square().sum() / inverse[place, place])
            for place, neuron in enumerate(left)
        }
        chosen = sorted(left, key=costs.__getitem__)[:batch]
        order += chosen
        left = [neuron for neuron in left if neuron not in chosen]
    return order


@pytest.mark.parametrize(("d_ff", "d_out"), [(1, 1), (2, 3), (7, 5), (23, 4), (48, 32), (101, 9)])
def test_the_order_is_that_of_inverting_anew(d_ff, d_out):
    weight, moment = _block(d_ff, d_out)
    removal = remove_by_obs(weight.float(), moment.float())
    naive = _naive(weight, moment, batch=max(1, -(-d_ff // obs.STEPS)))
    assert removal.order.tolist() == naive


@pytest.mark.parametrize("steps", [1, 3, 5, 100])
def test_the_order_holds_for_any_number_of_steps(monkeypatch, steps):
    monkeypatch.setattr(obs, "STEPS", steps)
    weight, moment = _block(20, 6, seed=1)
    removal = remove_by_obs(weight.float(), moment.float())
    assert removal.order.tolist() == _naive(weight, moment, batch=max(1, -(-20 // steps)))


@pytest.mark.parametrize(("d_ff", "batch"), [(30, 1), (61, 2), (150, 4)])
def test_the_error_is_that_of_the_best_refit(d_ff, batch):
    weight, moment = _block(d_ff, 7, seed=2)
    removal = remove_by_obs(weight.float(), moment.float())
    assert removal.error[0] == 0
    for count in range(0, d_ff, 3 * batch):  # between batches the curve is interpolated
        expected = _least_error(weight, moment, removal.keep(d_ff - count))
        assert float(removal.error[count]) == pytest.approx(expected, rel=2e-3, abs=1e-6)
    everything = float((weight @ moment @ weight.T).trace())
    assert float(removal.error[-1]) == pytest.approx(everything, rel=1e-3)


def test_with_a_metric_the_error_is_measured_in_it():
    weight, moment = _block(24, 6, seed=3)
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(4)).double()
    metric = root @ root.T
    removal = remove_by_obs((root.T @ weight).float(), moment.float())
    for count in range(0, 24, 5):
        expected = _least_error(weight, moment, removal.keep(24 - count), metric)
        assert float(removal.error[count]) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_the_error_never_falls_and_every_neuron_is_removed_once():
    for seed in range(5):
        removal = remove_by_obs(*(part.float() for part in _block(53, 3, seed=seed)))
        assert (removal.error.diff() >= 0).all()
        assert sorted(removal.order.tolist()) == list(range(53))


def test_neurons_that_do_nothing_go_first():
    weight, moment = _block(20, 6, seed=5)
    weight[:, [3, 11]] = 0
    removal = remove_by_obs(weight.float(), moment.float())
    assert set(removal.order[:2].tolist()) == {3, 11}
    assert float(removal.error[2]) == pytest.approx(0, abs=1e-6)


def test_one_of_two_equal_neurons_costs_nothing():
    activation = torch.randn(200, 9, generator=torch.Generator().manual_seed(6)).double()
    activation[:, 4] = activation[:, 7]
    moment = activation.T @ activation / 200 + 1e-4 * torch.eye(9).double()
    removal = remove_by_obs(torch.ones(3, 9), moment.float())
    assert removal.order[0] in (4, 7)
    assert float(removal.error[1]) < 1e-3


@pytest.mark.parametrize("most", [0, 1, 13, 14, 53])
def test_fewer_are_removed_as_if_all_were(most):
    weight, moment = (part.float() for part in _block(53, 3, seed=8))
    whole, part = remove_by_obs(weight, moment), remove_by_obs(weight, moment, most)
    for count in range(most + 1):
        assert torch.equal(part.keep(53 - count), whole.keep(53 - count))
        assert part.error[count] == whole.error[count]
    assert sorted(part.order.tolist()) == list(range(53))
    assert len(part.error) == 54


def test_removing_is_pure():
    parts = [part.float() for part in _block(17, 4)]
    copies = [part.clone() for part in parts]
    remove_by_obs(*parts)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))


def test_a_removal_keeps_what_goes_last_and_scores_by_the_error():
    removal = Removal(torch.tensor([2, 0, 1]), torch.tensor([0.0, 1.0, 3.0, 7.0]).double())
    assert removal.keep(3).tolist() == [True] * 3
    assert removal.keep(2).tolist() == [True, True, False]
    assert removal.keep(1).tolist() == [False, True, False]
    assert removal.scores.tolist() == [3.0, 7.0, 1.0]


def test_scores_become_a_removal_whose_errors_add_up():
    removal = Removal.by_scores(torch.tensor([-1.0, 4.0, 2.0, 2.0]).double())
    assert removal.order.tolist() == [0, 2, 3, 1]
    assert removal.error.tolist() == [0.0, 0.0, 3.0, 6.0, 11.0]
