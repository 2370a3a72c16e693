"""Clusters of a block's tokens, and what is known of each: the task of its expert.

Inputs of the block are reduced to their principal components and clustered by k-means. Second
moments are then added up cluster by cluster. A cluster has few tokens for the many coefficients of
a repair, so that each gets the block's mean as well, with the weight of some ``prior`` tokens::

    G_c = (sum of z z^T in c + prior * E[z z^T]) / (tokens in c + prior)

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756, for PCA and k-means of the
inputs; moments that shrink towards the block's are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grams import Gram, GramAccumulator
from hf_sparse_pathways.discovery.probes import Observer, Seen
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.discovery.skipping import SkippedMoments
from hf_sparse_pathways.errors import PathwaysError, option
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.clusters import TokenRouter
from hf_sparse_pathways.ffn.layouts import outgoing_weight
from hf_sparse_pathways.limits import MOST_CLUSTERS
from hf_sparse_pathways.memory import format_memory
from hf_sparse_pathways.shares import is_number

SAMPLE = 16384
"""Tokens, at least, that the clusters are found on."""

MOST_BYTES = 8 * 10**9
"""Of one block's moments of all clusters."""


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """How a block's tokens are clustered.

    Attributes:
        count: Number of clusters.
        dimensions: Principal components of the input; None for a sixteenth of its width.
        prior: Tokens' weight of the block's mean in every cluster's moments.
        seed: Of k-means.

    Raises:
        PathwaysError: A number is out of range, or scikit-learn is not installed.
    """

    count: int
    dimensions: int | None = None
    prior: float = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        fitting = {
            "clusters": type(self.count) is int and 1 < self.count <= MOST_CLUSTERS,
            "dimensions": self.dimensions is None
            or (type(self.dimensions) is int and self.dimensions > 0),
            "prior": is_number(self.prior) and 0 < self.prior < float("inf"),
        }
        for name, fits in fitting.items():
            if not fits:
                raise PathwaysError(
                    f"{self!r:.300} does not fit at its {name}: it takes 2 to {MOST_CLUSTERS} "
                    "clusters, a whole number of dimensions (the pca of sp.expand), at least one, "
                    "and a positive prior."
                )
        _import_sklearn()

    def check(self, blocks: Sequence[FfnBlock]) -> None:
        """Check that a model's moments of all clusters fit into memory.

        Raises:
            PathwaysError: They do not.
        """
        size = max((block.d_ff + 1) ** 2 for block in blocks) * 4 * self.count
        if size > MOST_BYTES:
            raise PathwaysError(
                f"The second moments of {self.count} clusters take {format_memory(size)} for one "
                f"FFN block, more than {format_memory(MOST_BYTES)}. Choose fewer "
                f"{option('clusters')}."
            )

    def fit(self, inputs: Tensor) -> TokenRouter:
        """Cluster a block's inputs ``(tokens, d_in)``.

        Fewer tokens than clusters give fewer clusters.
        """
        cluster, decomposition = _import_sklearn()
        values = inputs.float().cpu().numpy()
        width = self.dimensions or max(1, values.shape[1] // 16)
        pca = decomposition.PCA(min(width, *values.shape), random_state=self.seed)
        reduced = pca.fit_transform(values)
        kmeans = cluster.KMeans(min(self.count, len(values)), n_init=1, random_state=self.seed)
        labels = kmeans.fit_predict(reduced)
        return TokenRouter.nearest(
            centroids=torch.from_numpy(kmeans.cluster_centers_),
            components=torch.from_numpy(pca.components_),
            mean=torch.from_numpy(pca.mean_),
            share=torch.from_numpy(labels).bincount(minlength=kmeans.n_clusters) / len(labels),
        )


def _import_sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import cluster, decomposition
    except ImportError as error:
        raise PathwaysError(
            "Clusters of tokens are found by scikit-learn, which is not installed. Run "
            "`pip install 'hf-sparse-pathways[clusters]'`."
        ) from error
    return cluster, decomposition


@dataclass(frozen=True, kw_only=True)
class ClusteredTask:
    """One FFN block whose tokens are clustered, to be repaired.

    Attributes:
        router: Gives tokens to clusters.
        tasks: One per cluster.
    """

    router: TokenRouter
    tasks: tuple[BlockTask, ...]


class ClusterProbe(Observer):
    """Adds up one block's second moments by cluster."""

    def __init__(  # noqa: PLR0913
        self,
        block: FfnBlock,
        spaces: Workspaces,
        router: TokenRouter,
        prior: float,
        *,
        inputs: bool,
        thresholds: Sequence[Tensor] = (),
        leafwise: bool = False,
    ) -> None:
        """Begin with nothing.

        Args:
            block: The block.
            spaces: Where products are made.
            router: Gives tokens to clusters.
            prior: As in ``Clustering``.
            inputs: Whether a bypass needs the block's input in the moments.
            thresholds: Of each cluster's gates, where tokens skip neurons.
            leafwise: Whether only what each leaf needs by itself is added up.
        """
        super().__init__(block, inputs=True, ups=bool(thresholds))
        self.spaces, self.router, self._prior = spaces, router, prior
        width = block.d_in if inputs else 0
        self._in_gram = inputs
        self._skipped = [SkippedMoments(block, own, inputs=inputs) for own in thresholds]
        self._own = [one.accumulator for one in self._skipped] or [
            GramAccumulator(
                width, block.d_ff, targets=0 if leafwise else block.d_out, mixed=not leafwise
            )
            for _ in router.bias
        ]
        self._tokens = torch.zeros(len(router.bias))

    def add(self, rows: Tensor, missing: Tensor | None, weights: Tensor | None) -> None:
        """Add what was seen last, padding left out."""
        seen = self.seen_at(rows)
        assert seen.block_input is not None  # a probe of clusters sees it
        clusters = self.router.to(rows.device)(seen.block_input)
        if not self._in_gram:
            seen = seen.without_input()
        space = self.spaces.gram(len(self._own[0].upper), rows.device)
        self._tokens += clusters.bincount(minlength=len(self._own)).cpu()
        for number in torch.unique(clusters).tolist():
            own = (clusters == number).nonzero().flatten()
            self._add(number, seen.at(own), space, _rows(missing, own), _rows(weights, own))

    def _add(
        self,
        number: int,
        seen: Seen,
        space: Tensor,
        missing: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Add tokens of one cluster."""
        if self._skipped:
            self._skipped[number].add(seen, space, missing, weights)
            return
        self._own[number].add(
            seen.activation, seen.block_input, space, target=missing, weights=weights
        )

    def task(self) -> ClusteredTask:
        """Return the block as it is to be repaired."""
        weight = outgoing_weight(self.block.outgoing)
        d_ff = self.block.d_ff
        everything = sum(own.upper for own in self._own[1:]) + self._own[0].upper
        prior = self._prior / float(everything[-1, -1])
        cross = sum(own.cross for own in self._own[1:]) + self._own[0].cross
        tasks = []
        for number, own in enumerate(self._own):
            upper, targets = own.upper + prior * everything, own.cross + prior * cross
            if self._skipped:
                tasks.append(self._skipped[number].task(upper, targets))
                continue
            gram = Gram.of_upper(upper.cpu(), d_ff)
            missing = targets.cpu() / gram.tokens
            tasks.append(BlockTask(weight=weight, gram=gram, missing=missing))
        share = self._tokens / self._tokens.sum()
        router = TokenRouter(weight=self.router.weight, bias=self.router.bias, share=share)
        return ClusteredTask(router=router, tasks=tuple(tasks))


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
