"""How a model computes kept neurons, and which copies of its weights lie in memory for that."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.attachment import Attachment
from hf_sparse_pathways.ffn.copies import WHOLE, Key
from hf_sparse_pathways.ffn.execution import Execution, check_executor
from hf_sparse_pathways.ffn.executors import EXECUTORS
from hf_sparse_pathways.ffn.picking import Picking
from hf_sparse_pathways.ffn.rest import REST
from hf_sparse_pathways.memory import format_memory, parse_memory
from hf_sparse_pathways.pathways.names import PROMPT
from hf_sparse_pathways.pathways.pathway import Pathways

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class Executing(_Base):
    """The part of ``SparsePathwaysModel`` that is about executors and their memory."""

    config: Any
    _attachment: Attachment
    _pathways: Pathways | None
    _resolve: Any
    check_has_parts: Any

    def set_executor(self, executor: str) -> None:
        """Choose how kept neurons are computed: ``"auto"`` or a name in ``EXECUTORS``, in place.

        Where one domain's neurons were loaded alone, its leaves are ordinary ones: they are
        multiplied by the kernels of ``"indexed"`` or packed, every leaf alike, or plain as they
        are, which is what ``"masked"``, ``"compact"`` and ``"sliced"`` come to.

        Raises:
            UnknownNameError: There is no such executor.
            PathwaysError: The model has FFN layers without neurons to keep.
        """
        check_executor(executor)
        if executor != "auto":
            self.check_has_parts(f"executor {executor!r} computes kept neurons")
        self.config.executor = executor
        self._attachment.reset()

    @property
    def execution(self) -> Execution:
        """Which executor computes kept neurons now, and why.

        Raises:
            PathwaysError: The model has FFN layers without neurons to keep.
        """
        self.check_has_parts("there are no kept neurons to compute")
        self._attachment.settle()
        return self._attachment.execution(self.config.executor)

    @property
    def max_resident_bytes(self) -> int:
        """Most bytes that copies of kept weights take; by default the bytes of all weights.

        Where there is a pathway with clusters, the columns of its experts come on top.
        Where a pathway does not fit, others that were used longer ago give way; if it does not
        fit alone, or because other threads are using theirs, it is computed by ``masked``.
        """
        limit = self._attachment.residents.limit
        return 0 if limit is None else limit  # None before there are pathways: see set_pathways

    @max_resident_bytes.setter
    def max_resident_bytes(self, size: int | str) -> None:
        self._attachment.residents.limit = parse_memory(size)
        self._attachment.copies.drop()

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of the copies by pathway, those used longest ago first.

        What calls have picked from their prompts stands together as ``prompt``, while they run.
        """
        rest = "attention and head" if self._attachment.sparse else "every leaf"
        names = {WHOLE: "dense", REST: rest, **dict(enumerate(self._named))}

        def name(key: Key | Picking) -> str:
            if isinstance(key, Picking):
                return PROMPT
            return "+".join(names[one] for one in (key if isinstance(key, tuple) else (key,)))

        sizes: Counter[str] = Counter()
        for key, size in self._attachment.residents.sizes.items():
            sizes[name(key)] += size
        return dict(sizes)

    def prepare(self, domain: str) -> bool:
        """Make the copies that a domain's first call would make, ahead of it.

        Args:
            domain: A domain.

        Returns:
            Whether they are there. They are not where other threads are using the memory, and
            where none are needed: by ``masked``, and where one domain's neurons were loaded alone.

        Raises:
            UnknownNameError: An unknown domain.
            PathwaysError: They would take more than ``max_resident_bytes``.
        """
        pathway = self._resolve(domain)
        if not isinstance(pathway, int):
            raise PathwaysError(f"prepare takes one domain, got {domain!r}.")
        self._look_at_weights()
        if self.execution.executor == "masked" or not self._attachment.sparse:
            return False
        needed = self._attachment.copies.size(pathway)
        if needed > self.max_resident_bytes:
            raise PathwaysError(
                f"The kept weights of {domain!r} take {format_memory(needed)}, and "
                f"max_resident_bytes is {format_memory(self.max_resident_bytes)}. Raise it "
                "(model.max_resident_bytes = ...), or let 'masked' compute this domain."
            )
        residents = self._attachment.residents
        if not residents.pin(pathway):
            return False
        try:
            self._attachment.copies.make(pathway, EXECUTORS[self.execution.executor].form)
        finally:
            residents.unpin(pathway)
        return True

    def train(self, mode: bool = True) -> Self:
        """Set the mode; copies of kept weights are dropped, since training changes weights."""
        self._attachment.copies.drop()
        return super().train(mode)

    def _look_at_weights(self) -> None:
        """Notice what has become of the leaves and their weights since the last call."""
        self._attachment.settle()
        if self.config.executor != "masked":
            self._attachment.copies.check()

    @property
    def _named(self) -> list[str]:
        """Names of all pathways, in the order of their indices."""
        if self._pathways is None:
            return []
        return [*self._pathways.by_domain, *self._pathways.controls]
