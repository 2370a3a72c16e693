"""Which executor a model uses, and why: asked for by name, or chosen for its weights and memory."""

from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn.executors import EXECUTORS, PACKING
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.model_copies import ModelCopies
from hf_sparse_pathways.ffn.packing import Verdict, judge_all
from hf_sparse_pathways.memory import format_memory

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.attached_block import AttachedBlock

_WORTH_BYTES = 32 << 20
"""Below this all FFN weights may stay in the processor's caches, where packing gains nothing."""


@dataclass(frozen=True)
class Execution:
    """What computes a model's kept neurons.

    Attributes:
        executor: A name in ``EXECUTORS``.
        reason: Why it is this one, a sentence.
    """

    executor: str
    reason: str

    def __str__(self) -> str:
        return f"{self.executor} ({self.reason})"


def check_executor(name: str) -> None:
    """Check the name of an executor.

    Raises:
        UnknownNameError: Neither ``"auto"`` nor registered.
    """
    if name != "auto" and name not in EXECUTORS:
        raise UnknownNameError("executor", name, ["auto", *EXECUTORS])


def choose_execution(name: str, copies: ModelCopies) -> Execution:
    """Return what a name stands for in a model.

    ``"packed"`` and ``"packed-all"`` stand for themselves where a test in this process found packed
    weights equal and faster, else for ``"compact"``. ``"auto"`` packs if the weights are large
    enough to gain from it: attention and head only if ``max_resident_bytes`` holds them beside
    every pathway, so that no pathway has to give way to them. Where not even plain copies fit, it
    takes views if the neurons are in order for them.

    Args:
        name: ``"auto"`` or a name in ``EXECUTORS``.
        copies: The model's leaves.
    """
    if name not in ("auto", *PACKING):
        return Execution(name, "as asked for")
    if name == "auto" and (other := _without_packing(copies)) is not None:
        return other
    verdict = _judge(copies)
    if not verdict.usable:
        return Execution("compact", verdict.reason)
    if name != "auto":
        return Execution(name, verdict.reason)
    limit = copies.residents.limit
    if limit is None or copies.total() <= limit:
        return Execution("packed-all", verdict.reason)
    if copies.most(packed=True) <= limit:
        return Execution("packed", f"{verdict.reason}; {_room(copies)} do not hold everything")
    return Execution("compact", f"{_room(copies)} hold no packed pathway")


def _without_packing(copies: ModelCopies) -> Execution | None:
    """Return what ``"auto"`` stands for where packing is out of the question."""
    limit = copies.residents.limit
    if limit is not None and copies.most(packed=False) > limit and copies.are_views():
        return Execution("sliced", f"{_room(copies)} hold no pathway, and views take nothing")
    size = sum(leaf.weight.numel() * leaf.weight.element_size() for leaf in copies.leaves)
    if size < _WORTH_BYTES:
        small = f"the FFN weights take {format_memory(size)}, too little for packing to matter"
        return Execution("compact", small)
    return None


def _room(copies: ModelCopies) -> str:
    return f"{format_memory(copies.residents.limit or 0)} of max_resident_bytes"


def _judge(copies: ModelCopies) -> Verdict:
    """Judge packing by a block of middling width, in the first pathway."""
    blocks = [block for block in copies.blocks if block.compact_leaves]
    if not blocks:
        return Verdict(False, "no block can be computed with copies")

    def kept(block: "AttachedBlock") -> int:
        pathways = block.state.pathways
        return pathways[0].kept if pathways else block.state.d_ff

    width = median_low(map(kept, blocks))
    leaves = next(block for block in blocks if kept(block) == width).compact_leaves
    shapes = set()
    for leaf in leaves:
        rows, columns = linear_weight(leaf).shape
        incoming = (width * leaf.rows_per_neuron, columns)
        shapes.add(incoming if leaf.neuron_dim == 0 else (rows, width))
    return judge_all(shapes, leaves[0].weight.dtype, leaves[0].weight.device)
