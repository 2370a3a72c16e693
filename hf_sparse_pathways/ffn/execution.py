"""Which executor a model uses, and why: asked for by name, or chosen for its weights and memory."""

from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn.executors import EXECUTORS
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.packing import Verdict, judge
from hf_sparse_pathways.memory import format_memory

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.attachment import AttachedBlock, Attachment

PACKING = ("packed-all", "packed")
"""Executors with packed copies, the one that packs more first."""

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


def choose_execution(name: str, attachment: "Attachment") -> Execution:
    """Return what a name stands for in a model.

    ``"packed"`` and ``"packed-all"`` stand for themselves where a test in this process found packed
    weights equal and faster, else for ``"compact"``. ``"auto"`` packs as much as fits
    ``max_resident_bytes`` beside the largest pathway, if the weights are large enough.

    Args:
        name: ``"auto"`` or a name in ``EXECUTORS``.
        attachment: The model's leaves.
    """
    if name != "auto" and name not in PACKING:
        return Execution(name, "as asked for")
    verdict = _judge(attachment)
    if not verdict.usable:
        return Execution("compact", verdict.reason)
    if name != "auto":
        return Execution(name, verdict.reason)
    size = attachment.weight_bytes
    if size < _WORTH_BYTES:
        small = f"the FFN weights take {format_memory(size)}, too little for packing to matter"
        return Execution("compact", small)
    limit = attachment.residents.limit
    for candidate in PACKING:
        needed = attachment.most_bytes(candidate)
        if limit is None or needed <= limit:
            return Execution(candidate, verdict.reason)
    room = f"{format_memory(limit or 0)} of max_resident_bytes hold no packed pathway"
    return Execution("compact", room)


def _judge(attachment: "Attachment") -> Verdict:
    """Judge packing by a block of middling width, in the first pathway."""
    blocks = [block for block in attachment.blocks if block.compact_leaves]
    if not blocks:
        return Verdict(False, "no block can be computed with copies")
    reasons = []
    for shape in sorted(_shapes(blocks)):
        weight = blocks[0].compact_leaves[0].weight
        verdict = judge(shape, weight.dtype, weight.device)
        if not verdict.usable:
            return verdict
        reasons.append(verdict.reason)
    return Verdict(True, reasons[-1])


def _shapes(blocks: "list[AttachedBlock]") -> set[tuple[int, int]]:
    """Return the shapes of one block's kept weights."""

    def kept(block: "AttachedBlock") -> int:
        pathways = block.state.pathways
        return pathways[0].kept if pathways else block.state.d_ff

    width = median_low(map(kept, blocks))
    block = next(block for block in blocks if kept(block) == width)
    shapes = set()
    for leaf in block.compact_leaves:
        rows, columns = linear_weight(leaf).shape
        incoming = (width * leaf.rows_per_neuron, columns)
        shapes.add(incoming if leaf.neuron_dim == 0 else (rows, width))
    return shapes
