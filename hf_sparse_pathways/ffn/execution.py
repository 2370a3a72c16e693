"""Which executor a model uses, and why: asked for by name, or chosen for its weights and memory."""

from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING, Any

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn.executors import EXECUTORS, has_own_dense
from hf_sparse_pathways.ffn.forms import NATIVE, PACKED, PLAIN, Form
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.model_copies import ModelCopies
from hf_sparse_pathways.ffn.rest import REST
from hf_sparse_pathways.ffn.stored import stored_tensor
from hf_sparse_pathways.ffn.verdicts import Verdict, judge_all
from hf_sparse_pathways.memory import format_memory

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.attached_block import AttachedBlock

_WORTH_BYTES = 32 << 20
"""Below this all FFN weights may stay in the processor's caches, where no form gains anything."""

_WORTH_MEMORY = 1.25
"""How many times as fast packed weights have to be for their memory, beside reading in place."""


NO_COPIES = (
    "no block can be computed with copies: its weights are wrapped, offloaded, sharded or of an "
    "unknown kind"
)


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

    Executors with another form of weights stand for themselves where a test in this process found
    it equal and faster, else for ``"compact"``. ``"auto"`` takes one of them if the weights are
    large enough to gain from it: ``"indexed"``, which needs least memory, unless packing is much
    faster and fits ``max_resident_bytes``; then attention and head are packed only if every
    pathway fits beside them, so that none has to give way to them. Where not even plain copies
    fit, it takes views if the neurons are in order for them; and of experts rows in place.

    Where no block can be computed with copies, what is left is ``"masked"``.

    A model that was loaded with one domain's neurons has whole leaves only. ``"packed"`` is
    ``"packed-all"`` there, and ``"auto"`` never packs, which would take the memory that was saved.

    Args:
        name: ``"auto"`` or a name in ``EXECUTORS``.
        copies: The model's leaves.
    """
    if not copies.blocks:
        if copies.experts:
            return _choose_for_experts(name)
        return _choose_for_reduced(name, copies)
    possible = copies.are_possible()
    if not possible and not has_own_dense(name) and name != "masked":
        return Execution("masked", NO_COPIES)
    if name == "auto":
        return _choose_any(copies)
    if not has_own_dense(name):
        return Execution(name, "as asked for")
    verdict = _judge(copies, EXECUTORS[name].form)
    fallback = "compact" if possible else "masked"
    return Execution(name if verdict.usable else fallback, verdict.reason)


def _choose_any(copies: ModelCopies) -> Execution:
    """Return what ``"auto"`` stands for."""
    if not _fits(copies, copies.most(PLAIN)) and copies.are_views():
        return Execution("sliced", f"{_room(copies)} hold no pathway, and views take nothing")
    if small := _find_too_small(copies):
        return Execution("compact", small)
    return _choose_form(copies)


def _choose_form(copies: ModelCopies) -> Execution:
    """Return which form of weights is worth its memory."""
    native, packed = _judge(copies, NATIVE), _judge(copies, PACKED)
    in_place = _fits(copies, copies.most(NATIVE))
    if copies.clustered and native.gain and in_place and not _fits(copies, copies.most(PLAIN)):
        return Execution("indexed", f"{_room(copies)} hold no plain copies of all experts")
    indexed = native.usable and in_place
    if indexed and packed.gain < _WORTH_MEMORY * native.gain:
        return Execution("indexed", f"{native.reason}; {packed.reason}")
    if packed.usable and _fits(copies, copies.total()):
        return Execution("packed-all", packed.reason)
    if packed.usable and _fits(copies, copies.most(PACKED)):
        return Execution("packed", f"{packed.reason}; {_room(copies)} do not hold everything")
    if indexed:
        return Execution("indexed", f"{native.reason}; {_room(copies)} hold no packed pathway")
    if packed.usable:
        return Execution("compact", f"{_room(copies)} hold no packed pathway")
    return Execution("compact", f"{packed.reason}; {native.reason}")


def _choose_for_experts(name: str) -> Execution:
    """Return what a name stands for where all FFNs are routed experts, which have plain copies."""
    if name in ("masked", "compact"):
        return Execution(name, "as asked for")
    return Execution("compact", "routed experts have plain copies of kept neurons, or none")


def _choose_for_reduced(name: str, copies: ModelCopies) -> Execution:
    """Return what a name stands for where one domain's neurons were loaded alone."""
    alone = "one domain's neurons were loaded alone"
    if name != "auto" and not has_own_dense(name):
        return Execution("masked", alone)
    if name == "auto" and (small := _find_too_small(copies)):
        return Execution("masked", f"{alone}; {small}")
    if not copies.rest.reduced:
        return Execution("masked", f"{alone}; there are no FFN blocks beside routed experts")
    form = NATIVE if name == "auto" else EXECUTORS[name].form
    if name == "auto" and copies.form_bytes(REST, form):
        return Execution("masked", f"{alone}; to be read in place they would have to be copied")
    verdict = _judge_reduced(copies, form)
    if not verdict.usable:
        return Execution("masked", f"{alone}; {verdict.reason}")
    return Execution("indexed" if form is NATIVE else "packed-all", f"{alone}; {verdict.reason}")


def _find_too_small(copies: ModelCopies) -> str | None:
    """Return that the FFN weights are too small for any form to gain something, or None."""
    size = sum(stored_tensor(leaf.weight).nbytes for leaf in copies.ffn_leaves)
    if size >= _WORTH_BYTES:
        return None
    return f"the FFN weights take {format_memory(size)}, too little for another to be faster"


def _fits(copies: ModelCopies, size: int) -> bool:
    return copies.residents.limit is None or size <= copies.residents.limit


def _room(copies: ModelCopies) -> str:
    return f"{format_memory(copies.residents.limit or 0)} of max_resident_bytes"


def _judge(copies: ModelCopies, form: Form) -> Verdict:
    """Judge a form by a block of middling width, in the first pathway."""
    blocks = [block for block in copies.blocks if block.compact_leaves]
    if not blocks:
        return Verdict(False, NO_COPIES)

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
    stored = stored_tensor(leaves[0].weight)
    return judge_all(form, shapes, stored.dtype, stored.device)


def _judge_reduced(copies: ModelCopies, form: Form) -> Verdict:
    """Judge a form by the reduced block of middling width."""
    blocks = sorted(copies.rest.reduced, key=lambda leaves: linear_weight(leaves[-1]).shape[1])
    leaves: Any = blocks[(len(blocks) - 1) // 2]
    stored = stored_tensor(leaves[0].weight)
    shapes = {(rows, columns) for rows, columns in (linear_weight(leaf).shape for leaf in leaves)}
    return judge_all(form, shapes, stored.dtype, stored.device)
