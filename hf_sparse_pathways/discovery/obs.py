"""Optimal Brain Surgeon over whole neurons: which to remove first, and what that costs.

Removing neuron i of ``y = W a`` and adjusting all other columns by least squares raises the error
E|y - y'|^2 by ``|w_i|^2 / [H^-1]_ii`` with H = E[a a^T]. The neurons with the least are removed in
small batches B; then the columns that remain and H^-1 are updated::

    W    -= W_B S H^-1_B,:      S = ([H^-1]_BB)^-1
    H^-1 -= H^-1_:,B S H^-1_B,:

With a metric M on the output the error is E[(y - y')^T M (y - y')], and M^(1/2) W takes W's place.

Source: Hassibi & Stork 1992, "Second order derivatives for network pruning: Optimal Brain Surgeon",
applied to columns as in Kurtic et al. 2023, "ZipLM", arXiv:2302.04089; batches are ours.
"""

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.precision import full_precision
from hf_sparse_pathways.discovery.removal import Removal
from hf_sparse_pathways.discovery.repair import LEAST_RIDGE, BlockTask, Repair, metric_root

STEPS = 48
"""Number of batches in which the neurons are removed; more follow OBS closer and cost more."""


def remove_by_obs(weight: Tensor, second_moment: Tensor, most: int | None = None) -> Removal:
    """Return the order in which a block's neurons are removed. Pure.

    Args:
        weight: Columns of the outgoing leaf, ``(rows, d_ff)``; premultiplied by the metric's root.
        second_moment: H, symmetric and positive definite (with its ridge), ``(d_ff, d_ff)``.
        most: How many are removed at most: the order of the others is not asked for, and they
            stand last, as if they cost nothing more. All by default.
    """
    d_ff = weight.shape[1]
    most = d_ff if most is None else most
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second_moment.float()))
    columns = weight.float().clone()
    names = torch.arange(d_ff, device=columns.device)  # of the columns that are left
    alive = torch.ones(d_ff, dtype=torch.bool, device=columns.device)
    batch = max(1, -(-d_ff // STEPS))
    order: list[int] = []
    error = [0.0]
    while len(order) < most:
        if int(alive.sum()) <= 0.8 * len(alive):  # work on what is left only
            left = alive.nonzero().flatten()
            columns, names, alive = columns.index_select(1, left), names[left], alive[left]
            inverse = inverse.index_select(0, left).index_select(1, left)
        cost = columns.square().sum(0) / inverse.diagonal().clamp_min(1e-30)
        cost[~alive] = torch.inf
        chosen = cost.topk(min(batch, d_ff - len(order)), largest=False).indices
        inner = torch.linalg.inv(inverse[chosen][:, chosen].double()).float()
        share = inner @ inverse[chosen]
        removed = columns[:, chosen]
        rise = float(((removed @ inner) * removed).sum())
        columns.addmm_(removed, share, alpha=-1)
        inverse.addmm_(inverse[:, chosen], share, alpha=-1)
        alive[chosen] = False
        steps = torch.linspace(0, max(rise, 0.0), len(chosen) + 1)[1:]
        error.extend((error[-1] + steps.double()).tolist())
        order.extend(names[chosen].tolist())
    order.extend(names[alive].tolist())
    error.extend([error[-1]] * (d_ff + 1 - len(error)))
    return Removal(torch.tensor(order), torch.tensor(error, dtype=torch.float64))


@full_precision()
def rank_by_obs(
    task: BlockTask, how: Repair, bypass: Tensor | None = None, *, most: int | None = None
) -> Removal:
    """Rank a block's neurons by OBS, towards its target and under its metric.

    The weights that fit the target best with all neurons take the place of W. What the bias, and a
    bypass that is known, can say of the activation is taken out of its second moments.

    Args:
        task: The block.
        how: Which compensation there will be.
        bypass: The inner matrix of the bypass, ``(rank, d_in)``.
        most: How many are removed at most; all by default.
    """
    d_ff = task.gram.d_ff
    moments = task.gram.total.to(torch.float64, copy=True).div_(task.gram.tokens)
    unit = moments.diagonal()[:d_ff].mean()
    missing = moments.new_zeros(len(task.weight), len(moments))
    for what in (task.missing, task.skipped):
        missing = missing if what is None else missing + what.double()
    if how.bias:
        one = moments.new_zeros(1, len(moments))
        one[0, -1] = 1.0
        moments, missing = _without(moments, missing, one, 0.0)
    if bypass is not None:
        known = moments.new_zeros(len(bypass), len(moments))
        known[:, d_ff:-1] = bypass.double()
        moments, missing = _without(moments, missing, known, how.ridge)
    own = moments[:d_ff, :d_ff]
    ridge = (how.ridge * unit).clamp_min(LEAST_RIDGE)
    weight = task.weight.float()
    if task.missing is not None:
        more = (how.target_ridge * unit).clamp_min(LEAST_RIDGE)
        own.diagonal().add_(more)
        factor = torch.linalg.cholesky(own.float())  # with its ridge well enough conditioned
        weight = weight + torch.cholesky_solve(missing[:, :d_ff].float().T, factor).T
        ridge = ridge - more
    own.diagonal().add_(ridge)
    if task.metric is not None:
        weight = _any_root(task.metric).float() @ weight
    reduced = own.float()
    del own, moments, missing
    return remove_by_obs(weight, reduced, most)


def _any_root(metric: Tensor) -> Tensor:
    """Return a matrix R with R^T R the metric, float64; of its definite ones the cheapest."""
    factor, failed = torch.linalg.cholesky_ex(metric.double())
    return metric_root(metric) if failed else factor.T


def _without(moments: Tensor, cross: Tensor, known: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Regress linear functions of z out of E[z z^T], in place, and out of E[e z^T].

    Args:
        moments: E[z z^T].
        cross: E[e z^T].
        known: The functions, ``(count, len(z))``.
        ridge: Of their second moments, in units of the mean.
    """
    theirs = known @ moments
    inner = theirs @ known.T
    inner.diagonal().add_(ridge * inner.diagonal().mean() + 1e-12)
    shares = torch.linalg.solve(inner, theirs)
    return moments.addmm_(theirs.T, shares, alpha=-1), cross - cross @ known.T @ shares
