"""One refit for all experts of a block: least squares over every cluster's own mask.

With mask M_c, activation a and target ``W a + e`` (``repair.py``), the experts of a block compute
``(W + D) M_c a + bias_c``, each on the tokens of its own cluster. D is what they have in common::

    D = B (A + ridge)^-1     A = sum_c s_c M_c C_c M_c
                             B = sum_c s_c (W (1 - M_c) C_c + E_c) M_c

with a cluster's share of the tokens s_c, the covariance of its activation C_c (its second moments
without a bias), and its covariance with e, E_c. The ridge of a neuron is that of the usual repair
times the share of tokens whose experts keep it. Each bias is the mean of what is then missing.

An expert then takes its mask and its bias alone; of the weights there is one set.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.clustering import ClusteredTask
from hf_sparse_pathways.discovery.precision import full_precision
from hf_sparse_pathways.discovery.repair import LEAST_RIDGE, STORED_DTYPE, BlockTask, Repair
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.clusters import ClusteredBlock


@full_precision()
def repair_together(task: ClusteredTask, keeps: Sequence[Tensor], how: Repair) -> ClusteredBlock:
    """Return a block's experts with one refit for all. Pure.

    Args:
        task: The block.
        keeps: Each expert's keep mask ``(d_ff,)``.
        how: Which ridge, and whether there are biases.
    """
    shares = task.router.share.tolist()
    clusters = [_Cluster(*own, centred=how.bias) for own in zip(task.tasks, keeps, strict=True)]
    delta = _solve(clusters, shares, how)
    experts = tuple(
        BlockPathway(
            keep=own.keep,
            bias=own.bias(delta) if how.bias else None,
            skipping=own.task.skipping(own.keep),
        )
        for own in clusters
    )
    return ClusteredBlock(router=task.router, experts=experts, shared=delta.to(STORED_DTYPE))


class _Cluster:
    """What one cluster says of the refit."""

    def __init__(self, task: BlockTask, keep: Tensor, *, centred: bool) -> None:
        self.task, self.keep, self.centred = task, keep, centred
        self.kept = keep.nonzero().flatten()
        self.removed = (~keep).nonzero().flatten()
        self.mean = self._moments(slice(task.gram.d_ff), -1)

    @property
    def unit(self) -> float:
        """The mean second moment of an activation."""
        gram = self.task.gram
        return float(gram.total.diagonal()[: gram.d_ff].double().mean()) / gram.tokens

    def _moments(self, rows: Tensor | slice, columns: Tensor | slice | int) -> Tensor:
        """Return a part of E[z z^T], float64."""
        return self.task.gram.total[rows][:, columns].double() / self.task.gram.tokens

    def covariance(self, rows: Tensor) -> Tensor:
        """Return that of some neurons with the kept ones, ``(rows, kept)``."""
        moments = self._moments(rows, self.kept)
        if self.centred:
            moments -= torch.outer(self.mean[rows], self.mean[self.kept])
        return moments

    def target(self) -> Tensor:
        """Return the covariance of what the removed neurons gave with the kept ones."""
        target = self.task.weight[:, self.removed].double() @ self.covariance(self.removed)
        return target if self.task.skipped is None else target + self._with_kept(self.task.skipped)

    def missing(self) -> Tensor | None:
        """Return the covariance of what earlier blocks have left wrong with the kept neurons."""
        return None if self.task.missing is None else self._with_kept(self.task.missing)

    def _with_kept(self, moments: Tensor) -> Tensor:
        """Return the covariance with the kept neurons of a target, from its moments with z."""
        found = moments[:, self.kept].double()
        if self.centred:
            found = found - torch.outer(moments[:, -1].double(), self.mean[self.kept])
        return found

    def bias(self, delta: Tensor) -> Tensor:
        """Return the mean of what is missing with a refit ``(d_out, d_ff)``."""
        bias = self.task.weight[:, self.removed].double() @ self.mean[self.removed]
        bias = bias - delta[:, self.kept] @ self.mean[self.kept]
        for target in (self.task.missing, self.task.skipped):
            bias = bias if target is None else bias + target[:, -1].double()
        return bias.to(STORED_DTYPE)


def _solve(clusters: Sequence[_Cluster], shares: Sequence[float], how: Repair) -> Tensor:
    """Return D, float64; columns that no expert keeps are zero."""
    weight = clusters[0].task.weight
    d_out, d_ff = weight.shape
    moments = torch.zeros(d_ff, d_ff, dtype=torch.float64)
    targets = [torch.zeros(d_out, d_ff, dtype=torch.float64) for _ in range(2)]
    covered = torch.zeros(d_ff, dtype=torch.float64)
    for own, share in zip(clusters, shares, strict=True):
        kept = own.kept
        moments[kept.unsqueeze(1), kept] += share * own.covariance(kept)
        targets[0][:, kept] += share * own.target()
        missing = own.missing()
        if missing is not None:
            targets[1][:, kept] += share * missing
        covered[kept] += share
    unit = sum(s * own.unit for own, s in zip(clusters, shares, strict=True))
    used = (covered > 0).nonzero().flatten()
    delta = torch.zeros(d_out, d_ff, dtype=torch.float64)
    for target, ridge in zip(targets, (how.ridge, how.target_ridge), strict=True):
        ridged = moments[used][:, used]
        ridged.diagonal().add_((covered[used] * unit * ridge).clamp_min(LEAST_RIDGE))
        factor = torch.linalg.cholesky(ridged)
        delta[:, used] += torch.cholesky_solve(target[:, used].T, factor).T
    return delta
