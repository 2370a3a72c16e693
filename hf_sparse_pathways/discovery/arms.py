"""One pathway in the making: its text, and how each block is seen and pruned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_sparse_pathways.discovery.clustering import (
    SAMPLE,
    ClusteredTask,
    Clustering,
    ClusterProbe,
)
from hf_sparse_pathways.discovery.collectors import Workspaces
from hf_sparse_pathways.discovery.grouping import Grouped, GroupedProbe
from hf_sparse_pathways.discovery.probes import Observer, Probe, Seen
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.discovery.skipping import FEWEST, SkippingProbe
from hf_sparse_pathways.discovery.skipping import SAMPLE as SKIPPING_SAMPLE
from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.ffn.additions import needed_input
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.clusters import Kept

PruneBlock = Callable[[int, BlockTask | ClusteredTask], Kept]
"""From a block's number and its task to its pathway."""

AnyProbe = Probe | ClusterProbe | SkippingProbe | GroupedProbe

FindThreshold = Callable[[int, Seen], Tensor]
"""From a block's number and what it computes for some tokens to the thresholds of its gates."""

FindGroups = Callable[[int, Seen], Grouped | None]
"""The same to the groups of its neurons, if there is room for some."""


@dataclass
class Arm:
    """One pathway in the making.

    Attributes:
        name: What it is called.
        batches: Its calibration text; arms that hold the same batch share its dense pass.
        prune: Chooses and repairs each block.
        inputs: Whether a bypass needs the blocks' inputs.
        clustering: How each block's tokens are clustered; None where all have the same neurons.
        threshold: Finds what gates have to exceed; None where no token skips a neuron.
        groups: Finds the groups of neurons; None where every token has all that are kept.
        leafwise: Whether every leaf is pruned towards its own output, as in SparseGPT: the dense
            stream is not needed, and the activation changes.
        blocks: The pathways of the blocks that are done.
    """

    name: str
    batches: Sequence[Batch]
    prune: PruneBlock
    inputs: bool = True
    clustering: Clustering | None = None
    threshold: FindThreshold | None = None
    groups: FindGroups | None = None
    leafwise: bool = False
    blocks: list[Kept] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check that leaves that are pruned by themselves have all tokens."""
        assert not (self.leafwise and (self.threshold or self.groups))

    @property
    def needs_sample(self) -> bool:
        """Whether what sees a block depends on what it computes for some tokens."""
        return bool(self.threshold or self.clustering or self.groups)

    @property
    def sampled_tokens(self) -> int:
        """About how many tokens that takes."""
        return SKIPPING_SAMPLE if self.threshold and not self.clustering else SAMPLE

    @property
    def samples_neurons(self) -> bool:
        """Whether it takes the neurons, and not the block's inputs alone."""
        return bool(self.threshold or self.groups)

    def sampler(self, block: FfnBlock) -> Observer:
        """Return what sees some tokens of a block."""
        return Observer(block, inputs=True, ups=self.threshold is not None)

    def probe(self, block: FfnBlock, spaces: Workspaces) -> Probe:
        """Return what sees a block that computes the same neurons for all tokens."""
        return Probe(block, spaces, inputs=self.inputs, leafwise=self.leafwise)

    def sampled_probe(
        self, block: FfnBlock, spaces: Workspaces, number: int, seen: Seen
    ) -> AnyProbe:
        """Return what sees a block that does not.

        Args:
            block: The block.
            spaces: Shared memory.
            number: The block's.
            seen: What it computes for some tokens.
        """
        if self.groups is not None:
            grouped = self.groups(number, seen)
            if grouped is None:
                return self.probe(block, spaces)
            return GroupedProbe(block, spaces, grouped, inputs=self.inputs)
        if self.clustering is None:
            assert self.threshold is not None  # or there is no sample
            return SkippingProbe(block, spaces, self.threshold(number, seen), inputs=self.inputs)
        router = self.clustering.fit(needed_input(seen.block_input).float())
        thresholds: list[Tensor] = []
        if self.threshold is not None:
            clusters = router(needed_input(seen.block_input))
            for cluster in range(len(router.bias)):
                own = (clusters == cluster).nonzero().flatten()
                few = len(own) < FEWEST
                thresholds.append(self.threshold(number, seen if few else seen.at(own)))
        return ClusterProbe(
            block,
            spaces,
            router,
            self.clustering.prior,
            inputs=self.inputs,
            thresholds=thresholds,
            leafwise=self.leafwise,
        )
