"""One-shot pruned copies: each cluster of a block's tokens has the block's leaves, made sparse.

Block after block, on what the pruned blocks before it give, SparseGPT prunes the incoming leaves by
the second moments of the cluster's inputs and the outgoing leaf by those of its activation. With
one cluster it is SparseGPT on the FFN.

A copy keeps all neurons. It is stored as the change of every weight, ``-w`` where a weight goes, so
that their sum is zero exactly. Copies are computed as dense matrices, zeros included: nothing is
faster, and each takes the FFN's size in bytes.

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756. Ours: a cluster's moments shrink
towards the block's (``clustering.py``).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.discovery.arms import Arm
from hf_sparse_pathways.discovery.clustering import ClusteredTask, Clustering
from hf_sparse_pathways.discovery.grams import Gram
from hf_sparse_pathways.discovery.precision import calibration_precision
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.repair import BlockTask
from hf_sparse_pathways.discovery.selection import BATCH_SIZE, dense_of
from hf_sparse_pathways.discovery.sequential import prune_sequentially
from hf_sparse_pathways.discovery.sparsegpt import InverseFactor, Pattern, prune_weights
from hf_sparse_pathways.discovery.weights import check_in_memory
from hf_sparse_pathways.discovery.windows import make_batches
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, as_matrix
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, Kept, experts_of
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.stored import is_int8
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

NONZERO = "nonzero_flops"
"""Name in the provenance of what ``nonzero_flops`` returns."""


@dataclass(frozen=True, kw_only=True)
class CopyRecipe:
    """How copies are pruned.

    Attributes:
        pattern: Which weights of a leaf may go together.
        clustering: How each block's tokens are clustered; None for one copy for all.
        precision: Of the model's products while it runs over calibration text.
    """

    pattern: Pattern
    clustering: Clustering | None
    precision: str = "model"

    def described(self) -> dict[str, Any]:
        """Return the recipe as JSON values, for the artefact."""
        clustering = {} if self.clustering is None else {"clustering": asdict(self.clustering)}
        return {
            "method": f"sparsegpt, {self.pattern} copies computed as dense matrices",
            "experts": "copies",
            "pattern": str(self.pattern),
            "sparsity": self.pattern.sparsity,
            "order": "sequential",
            "precision": self.precision,
            **clustering,
        }


def make_copies(model: nn.Module, profile: Profile, recipe: CopyRecipe) -> Pathways:
    """Return a pathway of pruned copies for each domain. The model is left as it was.

    Args:
        model: The profiled model.
        profile: Its profile, of which only the windows are used.
        recipe: How.

    Raises:
        MismatchError: The profile was taken from another model.
        PathwaysError: A leaf's inputs are no whole groups of the pattern, or the moments of all
            clusters do not fit into memory.
        UnsupportedModelError: The layers cannot be run one at a time, or weights are offloaded or
            quantised.
    """
    profile.base.check_same(BaseModel.of(model))
    check_in_memory(model)
    dense = dense_of(model)
    blocks = find_blocks(dense)
    _check_weights(blocks, recipe.pattern)
    if recipe.clustering is not None:
        recipe.clustering.check(blocks)

    def prune(index: int, task: BlockTask | ClusteredTask) -> Kept:
        if isinstance(task, ClusteredTask):
            tasks = task.tasks
            experts = tuple(prune_copy(blocks[index], own.gram, recipe.pattern) for own in tasks)
            return ClusteredBlock(router=task.router, experts=experts)
        return prune_copy(blocks[index], task.gram, recipe.pattern)

    arms = [
        Arm(
            name=domain,
            batches=list(make_batches(known.windows, BATCH_SIZE)),
            prune=prune,
            clustering=recipe.clustering,
            leafwise=True,
        )
        for domain, known in profile.by_domain.items()
    ]
    with torch.inference_mode(False), calibration_precision(dense, recipe.precision):
        made = prune_sequentially(dense, arms)
    return Pathways(
        base=profile.base,
        by_domain={
            domain: Pathway(
                blocks=kept,
                provenance={
                    **recipe.described(),
                    NONZERO: nonzero_flops(blocks, kept),
                    "text": dict(profile[domain].provenance),
                },
                signature=profile.signature(domain),
            )
            for domain, kept in made.items()
        },
    )


@torch.no_grad()
def prune_copy(block: FfnBlock, gram: Gram, pattern: Pattern) -> BlockPathway:
    """Return a block's leaves, pruned, as the change of their weights. Pure.

    Args:
        block: The block.
        gram: Second moments of its activation and its input.
        pattern: Which weights may go together.
    """
    d_ff = gram.d_ff
    inputs = InverseFactor.of(gram.total[d_ff:-1, d_ff:-1])
    activation = InverseFactor.of(gram.total[:d_ff, :d_ff])
    return BlockPathway(
        keep=torch.ones(d_ff, dtype=torch.bool),
        delta=_change(block.outgoing, activation, pattern),
        incoming=tuple(_change(leaf, inputs, pattern) for leaf in block.incoming),
    )


def nonzero_flops(blocks: Sequence[FfnBlock], kept: Sequence[Kept]) -> float:
    """Return the FFN FLOPs of copies as the paper counts them, as a fraction of dense.

    A weight that is not zero is a multiply-add per token; those of routers are counted, too. Of
    clusters it is the mean over the calibration tokens.
    """
    total = dense = 0.0
    for block, own in zip(blocks, kept, strict=True):
        experts = [
            sum(int(weight.count_nonzero()) for weight in copy_weights(block, expert))
            for expert in experts_of(own)
        ]
        if isinstance(own, ClusteredBlock):
            total += own.mean(experts) + own.router.weight.numel()
        else:
            total += experts[0]
        dense += sum(linear_weight(leaf).numel() for leaf in block.leaves)
    return total / dense


def copy_weights(block: FfnBlock, copy: BlockPathway) -> list[Tensor]:
    """Return what a copy's leaves are, incoming ones first, in the dtype of the block's own."""
    changed = []
    for leaf, change in zip(block.leaves, (*copy.incoming, copy.delta), strict=True):
        weight = linear_weight(leaf).detach().cpu()
        if change is not None:
            weight = (weight.float() + as_matrix(change)).to(weight.dtype)
        changed.append(weight)
    return changed


def _change(leaf: Any, inputs: InverseFactor, pattern: Pattern) -> Tensor:
    """Return what pruning adds to a leaf's weight, in its dtype: all of ``-w`` where w goes."""
    weight = linear_weight(leaf).detach().cpu()
    pruned = prune_weights(weight, inputs, pattern)
    return (pruned - weight.to(pruned.dtype)).to(weight.dtype)


def _check_weights(blocks: Sequence[FfnBlock], pattern: Pattern) -> None:
    for block in blocks:
        for leaf in block.leaves:
            if is_int8(leaf.weight):
                raise UnsupportedModelError(
                    f"The weights of {block.name} are quantised, and pruned copies are made of "
                    "plain ones. Load the model without quantisation."
                )
            pattern.check_columns(linear_weight(leaf).shape[1])
