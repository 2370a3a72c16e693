"""Leaves of which each process holds a part: what tensor parallelism (``tp_plan``) makes of them.

The outgoing leaf's columns, and the rows of each incoming leaf, are cut into one run per process.
The outgoing leaf's outputs are then added up over the processes. A fused gate-up leaf is cut as one
matrix, and its output put together before the block goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, SharedColumns
from hf_sparse_pathways.ffn.runs import Run


@dataclass(frozen=True)
class BlockShard:
    """What one process holds of an FFN block.

    Attributes:
        neurons: The columns of the outgoing leaf, a run.
        rows: The rows of each incoming leaf, a run.
        adds: Whether this process adds what is added once to the sum of all outputs.
    """

    neurons: Run
    rows: tuple[Run, ...]
    adds: bool

    def cut(self, pathway: BlockPathway) -> BlockPathway:
        """Return a pathway's part for the outgoing leaf, without changes of incoming ones. Pure."""
        start, stop = self.neurons
        columns = slice(int(pathway.keep[:start].sum()), int(pathway.keep[:stop].sum()))
        keep, delta, skipping = pathway.keep[start:stop], pathway.delta, pathway.skipping
        groups = None if pathway.groups is None else pathway.groups.at(columns)
        if skipping is not None:
            skipping = replace(skipping, threshold=skipping.threshold[columns])
        if isinstance(delta, SharedColumns):
            own = torch.zeros_like(delta.keep)
            own[delta.keep.nonzero().flatten()[columns]] = True
            delta = SharedColumns(delta.matrix, own)
        elif isinstance(delta, LowRank):
            delta = LowRank(delta.outer, delta.inner[:, columns])
        elif delta is not None:
            delta = delta[:, columns]
        return BlockPathway(
            keep=keep,
            delta=delta,
            bias=pathway.bias if self.adds else None,
            bypass=pathway.bypass if self.adds else None,
            skipping=skipping,
            groups=groups,
        )


def find_shard(incoming: Sequence[Any], outgoing: Any) -> BlockShard | None:
    """Return what this process holds of a block's leaves, or None if it holds all of them.

    Raises:
        UnsupportedModelError: They are cut in another way.
    """
    if not is_sharded(outgoing):
        return None
    mesh = outgoing.weight.device_mesh
    runs = [_own_run(leaf, dim) for leaf, dim in ((outgoing, 1), *((leaf, 0) for leaf in incoming))]
    if mesh.ndim != 1 or None in runs:
        raise UnsupportedModelError(
            "An FFN block's weights are sharded in a way in which pathways cannot be computed: "
            f"{_placements((*incoming, outgoing))}. What can is one tensor-parallel mesh that cuts "
            "the incoming leaves by rows and the outgoing one by columns, as tp_plan='auto' does."
        )
    neurons, *rows = (run for run in runs if run is not None)
    return BlockShard(neurons, tuple(rows), mesh.get_local_rank() == 0)


def is_sharded(leaf: Any) -> bool:
    """Whether a process holds some of a linear leaf's columns only.

    FSDP's shards are rows, which it gathers before a leaf is called.
    """
    return isinstance(leaf.weight, DTensor) and 1 in _dims(leaf.weight)


def check_gathered(leaf: Any, x: Tensor) -> None:
    """Check that a sharded leaf computes with plain tensors, as it does without gradients.

    Raises:
        UnsupportedModelError: It does not.
    """
    if isinstance(x, DTensor) or isinstance(leaf.weight, DTensor):
        raise UnsupportedModelError(
            "Under tensor parallelism pathways are computed without gradients only. Use "
            "torch.no_grad(), or train without tp_plan."
        )


def _dims(weight: DTensor) -> list[int | None]:
    """Return which dimension each placement cuts, None for none."""
    return [
        placement.dim % weight.dim() if type(placement) is Shard else None  # not a strided one
        for placement in weight.placements
    ]


def _own_run(leaf: Any, dim: int) -> Run | None:
    """Return the rows (0) or columns (1) that this process holds, or None if that is not a run."""
    weight = leaf.weight
    if not isinstance(weight, DTensor) or _dims(weight) != [dim]:
        return None
    width, mesh = weight.shape[dim], weight.device_mesh
    size = -(-width // mesh.size())  # as torch.chunk does
    start = min(mesh.get_local_rank() * size, width)
    stop = min(start + size, width)
    return (start, stop) if weight.to_local().shape[dim] == stop - start else None


def _placements(leaves: Sequence[Any]) -> str:
    return ", ".join(str(getattr(leaf.weight, "placements", "whole")) for leaf in leaves)
