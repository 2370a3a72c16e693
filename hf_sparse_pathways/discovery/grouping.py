"""A block's neurons in groups, with a router in closed form: dense into experts.

The neurons that the block can spare least (``obs.py``) are computed for every token. What matters
of the others is what those do not tell of them: the residual r of their activation a, regressed on
the activation of the former. With w the column of the outgoing leaf:

- neurons whose |r_i| |w_i| is large for the same kinds of tokens make a group: k-means over their
  root mean squares in clusters of alike block inputs, then the assignment of least distance in
  which all groups are equally large;
- the router is the ridge regression of each group's ``sqrt(sum_i r_i^2 |w_i|^2)`` on the input,
  scaled so that groups of one token hardly differ in weight until it is trained.

Moments from which the block is then repaired are those of the weighted activation (``skipping.py``
has the same for thresholds).

Source: co-activation and balanced k-means as in Zhang et al. 2022, "MoEfication", arXiv:2110.01786;
residuals, kinds of tokens, and a router without training are ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.discovery.clustering import Clustering
from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grams import GramAccumulator
from hf_sparse_pathways.discovery.precision import full_precision
from hf_sparse_pathways.discovery.probes import Observer, Seen
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.discovery.skipping import add_left
from hf_sparse_pathways.errors import PathwaysError, option
from hf_sparse_pathways.ffn.additions import needed_input
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.layouts import outgoing_weight
from hf_sparse_pathways.ffn.neuron_groups import ALWAYS, NeuronGroups
from hf_sparse_pathways.limits import MOST_GROUPS
from hf_sparse_pathways.shares import is_number

KINDS = 128
"""Of tokens, over which neurons are compared."""

RIDGE = 0.01
"""Of the regressions, in units of the mean second moment."""

SPREAD = 0.1
"""Standard deviation of the logits before training: weights are within some percent of 1."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How a block's neurons are divided into groups of which each token has some.

    Attributes:
        count: Number of groups, G.
        top_k: How many of them a token has.
        always_on: The share of a token's neurons that every token has, at least: it is more where
            the others are then all in groups.
        seed: Of what is drawn.

    Raises:
        PathwaysError: A number is out of range, or scikit-learn is not installed.
    """

    count: int
    top_k: int = 2
    always_on: float = 0.85
    seed: int = 0

    def __post_init__(self) -> None:
        whole = type(self.count) is int and type(self.top_k) is int
        if not whole or not 0 < self.top_k < self.count <= MOST_GROUPS:
            raise PathwaysError(
                f"{self} does not fit: {option('mixture')} takes 2 to {MOST_GROUPS} groups, and a "
                f"token has at least one and not all of them, by {option('top_k')}."
            )
        if not is_number(self.always_on) or not 0.0 <= self.always_on < 1.0:
            raise PathwaysError(
                f"{option('always_on')} is a share in [0, 1); got {self.always_on!r:.200}."
            )
        Clustering(count=2)  # says so if scikit-learn is missing

    def divide(self, width: int, d_ff: int) -> tuple[int, int]:
        """Return how many neurons every token has, and how many each group; all and none if none.

        Args:
            width: Neurons that a token has together.
            d_ff: Neurons of the block.
        """
        most = min(width - 1, int((1.0 - self.always_on) * width + 1e-9)) // self.top_k
        size = max(0, min(most, (d_ff - width) // (self.count - self.top_k)))
        return width - self.top_k * size, size

    @full_precision()
    def fit(self, seen: Seen, weight: Tensor, order: Tensor, width: int) -> "Grouped | None":
        """Divide a block's neurons, and find their router.

        Args:
            seen: What the block computes for a sample of tokens.
            weight: Of the outgoing leaf, ``(d_out, d_ff)``.
            order: Neurons in the order in which they can be spared, int64 ``(d_ff,)``.
            width: How many a token has.

        Returns:
            None where there is no room for groups.
        """
        always, size = self.divide(width, len(order))
        if not size:
            return None
        most_needed = order.flip(0)
        core, others = most_needed[:always], most_needed[always:][: self.count * size]
        energy = _residual(seen.activation.float(), core, others).square_()
        energy *= weight.float().square().sum(0)[others].to(energy)
        x = needed_input(seen.block_input).float()
        labels = self._assign(_profiles(energy, _kinds(x, self.seed)))
        belongs = functional.one_hot(labels, self.count).to(energy)
        router = _regress(x, (energy @ belongs).sqrt())
        group = torch.full((len(order),), ALWAYS, dtype=torch.int32)
        group[others] = labels.int()
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[most_needed[: always + len(others)]] = True
        return Grouped(keep=keep, groups=self._routed(group[keep], router, x))

    def _assign(self, profiles: Tensor) -> Tensor:
        """Return the group of each neuron, int64, all groups equally large."""
        from scipy.optimize import linear_sum_assignment
        from sklearn.cluster import KMeans

        kmeans = KMeans(self.count, n_init=4, random_state=self.seed)
        distances = kmeans.fit_transform(profiles.cpu().numpy())
        size = len(profiles) // self.count
        _, places = linear_sum_assignment((distances**2).repeat(size, axis=1))
        return torch.from_numpy(places) // size

    def _routed(self, group: Tensor, router: tuple[Tensor, Tensor], x: Tensor) -> NeuronGroups:
        """Return groups with their router, scaled, and the share of tokens that have each."""
        weight, bias = router
        logits = x @ weight.T + bias
        scale = SPREAD / logits.std().clamp_min(1e-30)
        tokens = logits.topk(self.top_k).indices.flatten().bincount(minlength=self.count)
        return NeuronGroups(
            group=group,
            weight=(weight * scale).cpu(),
            bias=(bias * scale).cpu(),
            share=(tokens / len(x)).cpu(),
            top_k=self.top_k,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouped:
    """A block's neurons in groups.

    Attributes:
        keep: Those that any token has, bool ``(d_ff,)``.
        groups: Which of them each token has.
    """

    keep: Tensor
    groups: NeuronGroups


class GroupedProbe(Observer):
    """Adds up one block's second moments with each token's groups weighted, others zero."""

    def __init__(
        self, block: FfnBlock, spaces: Workspaces, grouped: Grouped, *, inputs: bool
    ) -> None:
        super().__init__(block, inputs=True)
        self.spaces, self.grouped, self._in_gram = spaces, grouped, inputs
        self._groups = grouped.groups.over(grouped.keep)
        self._weight = outgoing_weight(block.outgoing)
        width = block.d_in if inputs else 0
        self._own = GramAccumulator(width, block.d_ff, targets=2 * block.d_out)

    def add(self, rows: Tensor, missing: Tensor | None, weights: Tensor | None) -> None:
        """Add what was seen last, padding left out."""
        seen, space = self.seen_at(rows), self.spaces.gram(len(self._own.upper), rows.device)
        x = needed_input(seen.block_input)
        left = seen.activation * self._groups.to(x.device).factors(x).to(seen.activation.dtype)
        seen = seen if self._in_gram else seen.without_input()
        add_left(self._own, self._weight, seen, left, (space, missing, weights))

    def task(self) -> BlockTask:
        """Return the block as it is to be repaired."""
        gram = self._own.gram()
        missing, skipped = (self._own.cross.cpu() / gram.tokens).chunk(2)
        return BlockTask(
            weight=self._weight,
            gram=gram,
            missing=missing,
            skipped=skipped,
            keep=self.grouped.keep,
            groups=self.grouped.groups,
        )


def _residual(activation: Tensor, core: Tensor, others: Tensor) -> Tensor:
    """Return what some neurons' activations do not tell of others', ``(tokens, others)``."""
    known = activation[:, core.to(activation.device)]
    wanted = activation[:, others.to(activation.device)]
    weight, bias = _regress(known, wanted)
    return wanted - functional.linear(known, weight, bias)


def _regress(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of the ridge regression of y on x, float32."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    moments = (centred.T @ centred).double()
    ridge = RIDGE * moments.diagonal().mean()
    moments.diagonal().add_(ridge.clamp_min(1e-9))
    weight = torch.linalg.solve(moments, (centred.T @ (y - mean_y)).double()).T.float()
    return weight, mean_y - weight @ mean_x


def _kinds(x: Tensor, seed: int) -> Tensor:
    """Return the kind of each token of a block's inputs ``(tokens, d_in)``, int64."""
    count = max(2, min(KINDS, len(x) // 32))
    return Clustering(count=count, seed=seed).fit(x).to(x.device)(x)


def _profiles(energy: Tensor, kinds: Tensor) -> Tensor:
    """Return each neuron's root mean square by kind of tokens, centred and of length 1.

    Args:
        energy: ``(tokens, neurons)``.
        kinds: Of the tokens, int64.
    """
    sums = energy.new_zeros(int(kinds.max()) + 1, energy.shape[1]).index_add_(0, kinds, energy)
    profiles = (sums / kinds.bincount().clamp_min(1).unsqueeze(1)).sqrt().T
    profiles = profiles - profiles.mean(1, keepdim=True)
    return functional.normalize(profiles, dim=1)
