"""All that may compute a token of one FFN block, each under a number: its members.

Besides one number per pathway there is one per expert of a pathway whose tokens are clustered, so
that a batch of tokens with different experts is masked as one of rows with different pathways;
and of a pathway with groups of neurons one for what all tokens have, then one per group. A pathway
with neither is a member by itself, under its own number. Under the number of one with clusters
stands its first expert, and under that of one with groups all that it keeps.
"""

from collections.abc import Sequence

from torch import Tensor

from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, Kept, experts_of
from hf_sparse_pathways.ffn.runs import Run, few_runs


class Members:
    """What the pathways of a block are computed by; nothing of it changes.

    Attributes:
        pathways: What each pathway keeps of the block.
        all: The same by member: each pathway (or its first expert), then all experts and groups.
        clustered: The pathways that have experts, with their first member.
        grouped: The pathways that have groups of neurons, with their first member.
        whole: The members that may compute a token alone: all but groups.
        widths: How many neurons each member keeps.
        kept: Each member's kept neurons, int64, ascending.
        runs: Each pathway's runs of kept neurons, None where they are too many to slice.
        bypassed: Whether any member has a bypass, so that the block's input is needed.
        skips: Whether any skips neurons token by token, so that gates are looked at.
        routed: Whether any pathway looks at the block's input to choose what computes a token.
    """

    def __init__(self, pathways: Sequence[Kept]) -> None:
        """Number what some pathways are computed by."""
        members = [experts_of(pathway)[0] for pathway in pathways]
        self.clustered: dict[int, int] = {}
        self.grouped: dict[int, int] = {}
        self._ranges: list[range] = []
        for index, pathway in enumerate(pathways):
            first = len(members)
            if isinstance(pathway, ClusteredBlock):
                self.clustered[index] = first
                members.extend(experts_of(pathway))
            elif pathway.groups is not None:
                self.grouped[index] = first
                members.extend(pathway.divided())
            self._ranges.append(range(first, len(members)) or range(index, index + 1))
        self.pathways = tuple(pathways)
        self.all: tuple[BlockPathway, ...] = tuple(members)
        parts = {member for index in self.grouped for member in self._ranges[index]}
        self.whole = tuple(member for member in range(len(members)) if member not in parts)
        self.widths = tuple(member.kept for member in members)
        self.kept: tuple[Tensor, ...] = tuple(member.neurons for member in members)
        self.routed = bool(self.clustered or self.grouped)
        self.runs: tuple[tuple[Run, ...] | None, ...] = tuple(
            None if index in self.clustered or index in self.grouped else few_runs(pathway.keep)
            for index, pathway in enumerate(pathways)
        )
        self.bypassed = any(member.bypass is not None for member in members)
        self.skips = any(member.skipping is not None for member in members)

    @property
    def skipping(self) -> set[int]:
        """The pathways that skip neurons token by token."""
        return {
            index
            for index in range(len(self.pathways))
            if any(self.all[member].skipping for member in self.of_pathway(index))
        }

    @property
    def by_token(self) -> set[int]:
        """The pathways that compute different neurons for different tokens."""
        return {*self.clustered, *self.grouped, *self.skipping}

    def of_pathway(self, pathway: int) -> range:
        """Return what has copies of a pathway: itself, its experts, or its groups."""
        if 0 <= pathway < len(self._ranges):
            return self._ranges[pathway]
        return range(pathway, pathway + 1)  # of what had copies and is no more

    def owner(self, member: int) -> int | None:
        """Return the pathway of which a member is a group, or what all tokens have."""
        return next((index for index in self.grouped if member in self._ranges[index]), None)

    def shared(self, member: int) -> int | None:
        """Return the pathway whose experts have one refit, if a member is one of them."""
        owners = (pathway for pathway in self.clustered if member in self.of_pathway(pathway))
        owner = next(owners, None)
        own = None if owner is None else self.pathways[owner]
        return owner if isinstance(own, ClusteredBlock) and own.shared is not None else None
