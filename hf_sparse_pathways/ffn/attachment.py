"""The swapped leaves of one model: put on, given pathways, told what to compute, taken off.

A model can change under us: ``settle`` looks at every block before a forward pass and keeps the
result exact (``attached_block``). ``begin`` then says what the pass computes, and with which
copies (``model_copies``); ``hold`` says it for several passes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.ffn.attached_block import AttachedBlock
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.choices import Choice, ModelKey, find_choice, push_choice, remove_choice
from hf_sparse_pathways.ffn.clusters import Kept
from hf_sparse_pathways.ffn.copies import WHOLE, Key
from hf_sparse_pathways.ffn.execution import Execution, choose_execution
from hf_sparse_pathways.ffn.executors import EXECUTORS, has_own_dense
from hf_sparse_pathways.ffn.forms import PACKED, PLAIN
from hf_sparse_pathways.ffn.kept_experts import KeptExperts
from hf_sparse_pathways.ffn.members import Members
from hf_sparse_pathways.ffn.mixtures import Mixture
from hf_sparse_pathways.ffn.model_copies import ModelCopies
from hf_sparse_pathways.ffn.picking import Picking
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.rest import REST

_MOST_MIXTURES = 16
"""How many mixed batches are remembered, so that a generation sorts its rows once."""


class Attachment:
    """The FFN blocks of one model with swapped leaves.

    Attributes:
        key: The model's identity among the choices.
        copies: The leaves, and the copies of their weights.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[FfnBlock] | None = None) -> None:
        """Swap the leaves of a model, in place.

        Args:
            model: The model.
            blocks: Its FFN blocks; by default those that are found.

        Raises:
            UnsupportedModelError: Neither an FFN block nor routed experts were found.
        """
        self.key = ModelKey()
        blocks = find_blocks(model) if blocks is None else blocks
        self.copies = ModelCopies(model, blocks, self.key)
        self._execution: tuple[Any, Execution] | None = None
        self._mixtures: dict[Any, Mixture] = {}

    @property
    def blocks(self) -> tuple[AttachedBlock, ...]:
        """One entry per FFN block, in layer order."""
        return self.copies.blocks

    @property
    def sparse(self) -> bool:
        """Whether there is anything of which pathways keep a part."""
        return bool(self.blocks or self.copies.experts)

    @property
    def residents(self) -> Residents:
        """Which pathways have copies of their kept weights."""
        return self.copies.residents

    @property
    def without_pathways(self) -> dict[int, Any]:
        """What a copy of the model has instead of what holds pathways, by ``id``."""
        none = Members(())
        members = {id(attached.state.members): none for attached in self.blocks}
        return {**members, **{id(routed.state.pathways): () for routed in self.copies.experts}}

    def load(
        self,
        pathways: Sequence[Sequence[Kept]],
        experts: Sequence[Sequence[KeptExperts | None]] = (),
    ) -> None:
        """Replace the pathways, in place.

        Args:
            pathways: Of each, one entry per block.
            experts: Of each, one entry per layer with routed experts, or none.

        Raises:
            MismatchError: One changes leaves that a block does not have; then nothing is replaced.
        """
        for blocks in pathways:
            for attached, part in zip(self.blocks, blocks, strict=True):
                attached.block.check_leaves(part)
        for index, attached in enumerate(self.blocks):
            attached.state.set_pathways(tuple(blocks[index] for blocks in pathways))
        for index, routed in enumerate(self.copies.experts):
            routed.set_pathways(tuple(own[index] if own else None for own in experts))
        members = [attached.state.members for attached in self.blocks]
        self.copies.clustered = frozenset(index for own in members for index in own.clustered)
        self.copies.skipping = frozenset(index for own in members for index in own.skipping)
        self.copies.grouped = frozenset(index for own in members for index in own.grouped)
        self.reset()

    # -- executors --------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all copies, and which executor was chosen."""
        self._execution = None
        self._mixtures = {}
        self.copies.drop()
        self.copies.rest.use(False)

    def execution(self, name: str) -> Execution:
        """Return what the name of an executor stands for now; see ``choose_execution``."""
        if torch.compiler.is_compiling():  # nothing can be tested or packed while tracing
            return Execution(name if name in ("masked", "sliced") else "compact", "as traced")
        weight = self.copies.weight
        threads, possible = torch.get_num_threads(), self.copies.are_possible()
        now = (name, weight.dtype, weight.device, self.residents.limit, threads, possible)
        if self._execution is None or self._execution[0] != now:
            chosen = choose_execution(name, self.copies)
            self._execution = (now, chosen)
            if self.copies.executor != chosen.executor:
                self.copies.drop()
            self.copies.executor = chosen.executor
        return self._execution[1]

    def begin(
        self,
        pathway: int | Tensor | None,
        name: str,
        *,
        looked: bool,
        sees: Picking | None = None,
        picked: Picking | None = None,
    ) -> Choice:
        """Make the choice for one forward pass, its copies pinned; ``end`` takes it back.

        Args:
            pathway: What is computed.
            name: The executor that was asked for.
            looked: Whether ``ModelCopies.check`` has run for this pass.
            sees: What picks from the prompt that passes.
            picked: What has picked the neurons that are computed.
        """
        executor, copies, rest = "masked", None, False
        if pathway is not None or has_own_dense(name):
            self.settle()
            if not torch.is_grad_enabled():  # copies carry no gradient, masks do
                executor = self.execution(name).executor
            if pathway is None and not has_own_dense(executor):
                executor = "masked"  # of nothing: the leaves compute as their own class does
        if executor != "masked":
            if not looked:
                self.copies.check()
            whole = WHOLE if pathway is None else pathway
            copies = self._pin_picked(picked, whole) if picked else self._pin_copies(whole)
        if has_own_dense(executor):
            if torch.is_autocast_enabled("cpu") and EXECUTORS[executor].form is PACKED:
                executor = "compact"  # oneDNN's operators do not follow autocast
            else:
                rest = self._pin_rest(executor)
        choice = push_choice(self.key, pathway, executor=executor, copies=copies, rest=rest)
        choice.sees, choice.picked = sees, picked
        return choice

    def hold(self, pathway: int | Tensor | None, name: str, *, plain: bool, expand: bool) -> Choice:
        """Make the choice for several forward passes; ``end`` takes it back.

        The copies of one pathway for all rows are made and pinned, so that each pass finds them,
        compiled ones too: while a graph is traced none can be made.

        Args:
            pathway: What is computed.
            name: The executor that was asked for.
            plain: Whether the copies must be traceable, as for compiled passes.
            expand: Whether rows may be repeated, as in ``Choice``.
        """
        choice = push_choice(self.key, pathway, expand=expand)
        if not isinstance(pathway, int) or torch.is_grad_enabled() or not self.sparse:
            return choice
        executor = self.execution(name).executor
        if plain and pathway in self.copies.routed:  # where tokens go is not known while tracing
            return choice
        if executor != "masked" and self._pin(pathway):
            choice.held = pathway
            try:
                form = EXECUTORS[executor].form
                self.copies.make(pathway, form if form.traceable or not plain else PLAIN)
            except BaseException:
                self.end(choice)
                raise
        return choice

    def hold_picked(
        self, pathway: int | Tensor | None, name: str, picked: Picking, *, expand: bool
    ) -> Choice:
        """Make the choice of what was picked, for several forward passes; see ``hold``."""
        choice = push_choice(self.key, pathway, expand=expand)
        choice.picked = picked
        copied = pathway is not None and not torch.is_grad_enabled()
        if copied and self.execution(name).executor != "masked" and self._pin(picked):
            choice.held = picked
        return choice

    def end(self, choice: Choice) -> None:
        """Take back what ``begin`` or ``hold`` did."""
        remove_choice(choice)
        if choice.held is not None:
            self._unpin(choice.held)
        if choice.copies is not None:
            self._unpin(choice.picked or _key(choice.copies))
        if choice.rest:
            self._unpin(REST)

    def _pin_copies(self, pathway: int | Tensor) -> int | Mixture | None:
        """Return what a pass computes with, or None if there is no block or no room for it."""
        if not self.sparse:
            return None
        if torch.compiler.is_compiling():  # neither can copies be made then, nor rows be sorted
            held = self._held_plain()
            return held if isinstance(pathway, int) and pathway == held else None
        if isinstance(pathway, int):
            return pathway if self._pin(pathway) else None
        if self.copies.executor == "sliced":  # which promises to take no memory
            return None
        rows = (tuple(pathway.tolist()), pathway.device)
        mixture = self._mixtures.get(rows)
        if mixture is None:
            if len(self._mixtures) >= _MOST_MIXTURES:
                self._mixtures.clear()
            mixture = self._mixtures[rows] = Mixture.of(pathway)
        if not self.copies.by_token.isdisjoint(mixture.key):  # rows are not all there is to it
            return None
        return mixture if self._pin(mixture.key) else None

    def _pin_picked(self, picked: Picking, pathway: int | Tensor) -> int | Mixture | None:
        """Return what a pass computes with of what was picked for its call.

        The first pass of a call pins it for all.
        """
        copies, ambient = picked.copies_of(pathway), find_choice(self.key)
        mixed = isinstance(copies, Mixture)
        if copies is None or (mixed and self.copies.executor == "sliced") or not self._pin(picked):
            return None
        if ambient is not None and ambient.call is picked and ambient.held is None:
            self._pin(picked)
            ambient.held = picked
        return copies

    def _pin_rest(self, executor: str) -> bool:
        """Pin the copies of the leaves outside the blocks, if the executor has some."""
        if self.copies.rest.use(EXECUTORS[executor].everywhere):
            self.copies.check()  # from now on their weights are looked at, too
        return bool(self.copies.rest.leaves) and self._pin(REST)

    def _held_plain(self) -> int | None:
        """Return the pathway that is held on this thread, if its copies can be traced."""
        ambient = find_choice(self.key)
        held = None if ambient is None else ambient.held
        return held if isinstance(held, int) and self.copies.are_traceable(held) else None

    def _pin(self, key: Key | Picking) -> bool:
        """Pin copies; a graph that is traced holds them itself."""
        return torch.compiler.is_compiling() or self.residents.pin(key)

    def _unpin(self, key: Key | Picking) -> None:
        if not torch.compiler.is_compiling():
            self.residents.unpin(key, forget=isinstance(key, Picking))

    def settle(self) -> None:
        """Notice wrapped, replaced and offloaded leaves; called before each sparse forward.

        Raises:
            UnsupportedModelError: A leaf was replaced by a module that does not contain it.
        """
        for attached in self.blocks:
            attached.settle()
        for routed in self.copies.experts:
            routed.settle()

    def detach(self) -> None:
        """Restore the leaves' own classes, in place."""
        self.copies.rest.use(False)
        for attached in self.blocks:
            attached.detach()
        for routed in self.copies.experts:
            routed.detach()


def _key(copies: int | Mixture) -> Key:
    return copies.key if isinstance(copies, Mixture) else copies
