"""Closed-form compensation: what the kept neurons and a thin bypass can make good of the rest.

Let a be the block's activation, x its input, z = [a, x, 1], G = E[z z^T].
A pathway computes ``W_K a_K`` and leaves ``W a - W_K a_K``, which is regressed on the kept neurons
(``delta``), if asked on x (the ``bypass``) and on one (the ``bias``) by ridge least squares::

    [delta, B, bias] = E[(W a - W_K a_K) r^T] (E[r r^T] + ridge)^-1,   r = [a_K, x, 1]

By itself a block should compute what it did, W a; in sequence ``W a + e``, where e is what blocks
before it have left wrong (``sequential.py``). Of e the activation says little, so that with a small
ridge its regression fits much noise, which every later block would carry on: it is regressed by
itself, on a_K and one, with a larger ridge. The bypass is cut to its rank by the reduced-rank
regression that is optimal under the metric on the output, and delta and bias are solved for anew.

Source: least squares on calibration activations after structured removal as in Kurtic et al. 2023,
"ZipLM", arXiv:2302.04089; reduced-rank regression: Izenman 1975. Using both together, and
the target of the residual stream, are ours.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.grams import Gram
from hf_sparse_pathways.discovery.precision import full_precision
from hf_sparse_pathways.errors import PathwaysError, named
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, Skipping
from hf_sparse_pathways.ffn.neuron_groups import NeuronGroups

LEAST_RIDGE = 1e-9
"""Absolute: keeps blocks whose neurons never fire solvable."""

TARGET_RIDGE = 0.1
"""The least with which e is regressed, in units of the mean second moment."""

STORED_DTYPE = torch.bfloat16
"""Of all compensation: its rounding is far below the sampling error of its estimate."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Which compensation is computed.

    Attributes:
        ridge: Added to the second moments' diagonal, in units of its mean.
        refit: Whether the kept columns are refitted.
        bias: Whether the output's bias is.
        bypass_rank: Rank of the linear bypass; 0 for none.
        patch_rank: Rank to which the refit is truncated when it is stored; None for in full.
        shared: Whether the experts of a block have one refit in common (``common_repair.py``).
    """

    ridge: float = 0.01
    refit: bool = True
    bias: bool = True
    bypass_rank: int = 0
    patch_rank: int | None = None
    shared: bool = False

    @property
    def target_ridge(self) -> float:
        """The ridge with which e is regressed."""
        return max(self.ridge, TARGET_RIDGE)

    @property
    def solves(self) -> bool:
        """Whether there is a least-squares problem that the ridge enters."""
        return self.refit or self.bypass_rank > 0

    @property
    def needs_grams(self) -> bool:
        """Whether anything has to be computed from second moments."""
        return self.solves or self.bias


NO_REPAIR = Repair(refit=False, bias=False)


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One FFN block to be repaired.

    Attributes:
        weight: Weight of the outgoing leaf, float32 ``(d_out, d_ff)``.
        gram: Second moments of the activation and the block's input.
        missing: E[e z^T], what earlier blocks have left wrong, ``(d_out, d_ff + d_in + 1)``; None
            if the block shall compute what it did.
        metric: Sensitivity of the loss to the block's output, ``(d_out, d_out)``; None for I.
        skipped: E[W (a - a') z^T] where neurons are skipped by token and a' is what is left of the
            activation, of which then the second moments are; like ``missing``. None if none is.
        threshold: What a neuron's gate has to exceed, float32 ``(d_ff,)``; None likewise.
        active: The share of tokens for which it does, float32 ``(d_ff,)``; None likewise.
        keep: The kept neurons, bool ``(d_ff,)``, where they are settled; None where they are not.
        groups: Which of them each token has; None for all.
    """

    weight: Tensor
    gram: Gram
    missing: Tensor | None = None
    metric: Tensor | None = None
    skipped: Tensor | None = None
    threshold: Tensor | None = None
    active: Tensor | None = None
    keep: Tensor | None = None
    groups: NeuronGroups | None = None

    def skipping(self, keep: Tensor) -> Skipping | None:
        """Return what is skipped of some kept neurons."""
        if self.threshold is None or self.active is None:
            return None
        return Skipping(self.threshold[keep], self.active[keep].mean().view(1))


@full_precision()
def repair(task: BlockTask, keep: Tensor, how: Repair) -> BlockPathway:
    """Return a block's pathway with its compensation. Pure.

    Args:
        task: The block.
        keep: Keep mask ``(d_ff,)``.
        how: Which compensation.
    """
    d_ff = task.gram.d_ff
    kept = keep.nonzero().flatten()
    own = [kept] if how.refit else []
    one = [torch.tensor([len(task.gram.total) - 1])] if how.bias else []
    if not own and not one and not how.bypass_rank:
        return BlockPathway(keep=keep, skipping=task.skipping(keep), groups=task.groups)
    index = torch.cat([*own, *one]) if own or one else torch.empty(0, dtype=torch.int64)
    system = _System(task.gram, index, how.ridge)
    removed = (~keep).nonzero().flatten()
    target = task.weight[:, removed].double() @ system.moments(removed)
    if task.skipped is not None:
        target = target + task.skipped.double()
    bypass = None
    if how.bypass_rank and len(removed):
        if not task.gram.has_input:
            raise PathwaysError(
                "A bypass is regressed on the block's input, which the Gram matrices do not hold. "
                f"Take the profile with {named('inputs', True)}, or use "
                f"{named('order', 'sequential')}."
            )
        bypass = system.bypass(target, how.bypass_rank, task.metric)
        target = target - bypass.product().double() @ system.moments(slice(d_ff, -1))
    solution = system.solve(target)
    if task.missing is not None and len(index):
        solution = solution + system.with_ridge(how.target_ridge).solve(task.missing.double())
    delta: Tensor | LowRank | None = None
    bias = solution[:, -1] if how.bias else None
    if how.refit:
        delta = _stored(solution[:, : len(kept)], system, kept, how.patch_rank)
    if bias is not None and isinstance(delta, LowRank):  # the mean that truncation leaves over
        mean = system.moments(kept, slice(-1, None))[:, 0]
        bias = bias + (solution[:, : len(kept)] - delta.product().double()) @ mean
    stored = None if bias is None else bias.to(STORED_DTYPE)
    return BlockPathway(
        keep=keep,
        delta=delta,
        bias=stored,
        bypass=bypass,
        skipping=task.skipping(keep),
        groups=task.groups,
    )


@dataclass(frozen=True)
class _System:
    """The normal equations of one block.

    Attributes:
        gram: The sums of which G is the mean.
        index: The regressors besides the bypass, entries of z.
        ridge: In units of the mean second moment, for activations and for inputs.
    """

    gram: Gram
    index: Tensor
    ridge: float

    def moments(self, rows: Tensor | slice, columns: Tensor | slice | None = None) -> Tensor:
        """Return a part of G, float64; no more of it is held than is needed."""
        part = self.gram.total[rows]
        return (part if columns is None else part[:, columns]).double() / self.gram.tokens

    def with_ridge(self, ridge: float) -> "_System":
        """Return the same equations with another ridge; what is factored already stays so."""
        return self if ridge == self.ridge else replace(self, ridge=ridge)

    @cached_property
    def factor(self) -> Tensor:
        """Cholesky factor of the regressors' ridged second moments."""
        own = self.moments(self.index, self.index)
        ridge = (self._mean(slice(self.gram.d_ff)) * self.ridge).clamp_min(LEAST_RIDGE)
        own.diagonal().add_(torch.where(self.index < self.gram.d_ff, ridge, 1e-9))
        return torch.linalg.cholesky(own)

    def solve(self, target: Tensor) -> Tensor:
        """Return the coefficients ``(d_out, regressors)`` for E[target z^T]."""
        return torch.cholesky_solve(target[:, self.index].T, self.factor).T

    def bypass(self, target: Tensor, rank: int, metric: Tensor | None) -> LowRank:
        """Return the best map of a rank from the block's input, given the other regressors."""
        inputs = slice(self.gram.d_ff, -1)
        own_inputs = self.moments(self.index, inputs)
        explained = torch.cholesky_solve(own_inputs, self.factor)
        rest = self.moments(inputs, inputs) - own_inputs.T @ explained
        rest.diagonal().add_((self._mean(inputs) * self.ridge).clamp_min(LEAST_RIDGE))
        cross = target[:, inputs] - target[:, self.index] @ explained
        full = torch.linalg.solve(rest, cross.T).T
        root, inverse_root = _roots(metric, len(full))
        weighted = root @ full
        vectors = torch.linalg.eigh(weighted @ rest @ weighted.T).eigenvectors[:, -rank:]
        outer, inner = inverse_root @ vectors, vectors.T @ weighted
        return LowRank(outer.to(STORED_DTYPE), inner.to(STORED_DTYPE))

    def _mean(self, entries: slice) -> Tensor:
        """Return the mean second moment of some entries of z."""
        return self.gram.total.diagonal()[entries].double().mean() / self.gram.tokens


def metric_root(metric: Tensor) -> Tensor:
    """Return the symmetric square root of a metric, float64."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _roots(metric: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Return a metric's square root and the inverse of that, float64."""
    if metric is None:
        identity = torch.eye(size, dtype=torch.float64)
        return identity, identity
    root = metric_root(metric)
    return root, torch.linalg.inv(root)


def _stored(delta: Tensor, system: _System, kept: Tensor, rank: int | None) -> Tensor | LowRank:
    """Return a refit as it is stored: whole, or truncated where the activation is least."""
    if rank is None or rank >= min(delta.shape):
        return delta.to(STORED_DTYPE)
    moments = system.moments(kept, kept)
    vectors = torch.linalg.eigh(delta @ moments @ delta.T).eigenvectors[:, -rank:]
    return LowRank(vectors.to(STORED_DTYPE), (vectors.T @ delta).to(STORED_DTYPE))
