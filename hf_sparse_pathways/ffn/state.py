"""What the leaves of one FFN block share: its pathways, as masks and additions on each device."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.additions import Addition, IncomingAddition, add_to_rows, spread
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, Kept, TokenRouter
from hf_sparse_pathways.ffn.members import Members
from hf_sparse_pathways.ffn.mixtures import Union
from hf_sparse_pathways.ffn.neuron_groups import NeuronGroups
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.sharding import BlockShard
from hf_sparse_pathways.ffn.skipping import (
    Example,
    Function,
    find_function,
    of_tokens,
    skip_small,
    threshold_table,
)

_MOST_UNIONS = 64
"""How many different mixtures of pathways are remembered; each takes little."""

_CACHES = (
    "_additions",
    "_groups",
    "_places",
    "_incoming",
    "_routers",
    "_tables",
    "_thresholds",
    "_unions",
)
"""Attributes that are filled as they are asked for."""


class BlockState:
    """What the leaves of one FFN block share: its pathways and how they may run.

    Attributes:
        key: The model that the block belongs to.
        d_ff: Number of neurons.
        members: All that may compute a token.
        example: A token's way through the block, where some are skipped and a pass has shown one,
            until it has told the activation function.
        told: Whether it has, or cannot.
        function: The activation function, if it is known.
        masked_only: Whether the block must be masked whatever executor is chosen.
        masked_outside: Whether a hook before the outgoing leaf's wrapper does the masking.
        residents: Which of the model's pathways have copies; None if nobody counts them.
        shard: What this process holds of the block, if it is cut among several.
    """

    def __init__(self, key: ModelKey, d_ff: int, residents: Residents | None = None) -> None:
        self.key = key
        self.d_ff = d_ff
        self.members = Members(())
        self.example: Example | None = None
        self.told = False
        self.function: Function | None = None
        self.masked_only = False
        self.masked_outside = False
        self.residents = residents
        self.shard: BlockShard | None = None
        self._cut: tuple[BlockPathway, ...] | None = None
        self._cut_kept: tuple[Tensor, ...] = ()
        self._tables: dict[torch.device, Tensor] = {}
        self._thresholds: dict[torch.device, Tensor] = {}
        self._additions: dict[tuple[int, torch.device, torch.dtype], Addition] = {}
        self._incoming: dict[tuple[int, int, torch.device, torch.dtype], IncomingAddition] = {}
        self._routers: dict[tuple[int, torch.device], TokenRouter] = {}
        self._groups: dict[tuple[int, torch.device], NeuronGroups] = {}
        self._places: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._unions: dict[tuple[tuple[int, ...], torch.device], Union] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached tables behind."""
        unknown = {"example": None, "told": False, "function": None}
        return {**self.__dict__, **{name: {} for name in _CACHES}, **unknown}

    @property
    def pathways(self) -> tuple[Kept, ...]:
        """What each pathway keeps of the block."""
        return self.members.pathways

    def set_pathways(self, pathways: tuple[Kept, ...]) -> None:
        """Replace the pathways, in place."""
        self.members = Members(pathways)
        self.set_shard(self.shard)
        self._routers, self._unions = {}, {}

    def set_shard(self, shard: BlockShard | None) -> None:
        """Say what this process holds of the block, in place."""
        self.shard = shard
        self._cut = None if shard is None else tuple(map(shard.cut, self.members.all))
        self._cut_kept = tuple(member.neurons for member in self._cut or ())
        self._tables, self._thresholds, self._additions, self._incoming = {}, {}, {}, {}
        self._groups, self._places = {}, {}

    @property
    def _own(self) -> tuple[BlockPathway, ...]:
        """What this process holds of each member."""
        return self.members.all if self._cut is None else self._cut

    @property
    def _own_kept(self) -> tuple[Tensor, ...]:
        """Which neurons of its own each of them keeps."""
        return self.members.kept if self._cut is None else self._cut_kept

    def choose_members(self, pathway: int | Tensor, x: Tensor) -> int | Tensor:
        """Return which members compute a block's input: one for all, one per row, or per token.

        Args:
            pathway: One pathway, or one per row of the batch as int64 ``(batch,)``, -1 for dense.
            x: The block's input ``(..., d_in)``.
        """
        if isinstance(pathway, int):
            if pathway not in self.members.clustered:
                return pathway
            return self.members.clustered[pathway] + self.router(pathway, x.device)(x)
        members = pathway.to(x.device)
        for index, first in self.members.clustered.items():
            own = members == index
            if torch.compiler.is_compiling() or bool(own.any()):
                if members.shape != x.shape[:-1]:
                    members = spread(members.unsqueeze(1), x).squeeze(-1).expand(x.shape[:-1])
                experts = first + self.router(index, x.device)(x)
                members = torch.where(members == index, experts, members)
        return members

    def router(self, pathway: int, device: torch.device) -> TokenRouter:
        """Return what gives tokens to a pathway's experts, on a device."""
        router = self._routers.get((pathway, device))
        if router is None:
            own = self.pathways[pathway]
            assert isinstance(own, ClusteredBlock)  # or there is none: see Members.clustered
            with torch.inference_mode(False), torch.no_grad():
                router = own.router.to(device)
            if not torch.compiler.is_compiling():
                self._routers[pathway, device] = router
        return router

    def groups(self, pathway: int, device: torch.device) -> NeuronGroups:
        """Return a pathway's groups, of all neurons of this process, on a device."""
        found = self._groups.get((pathway, device))
        if found is None:
            own = self._own[pathway]
            assert own.groups is not None  # or there are none: see Members.grouped
            with torch.inference_mode(False), torch.no_grad():
                found = own.groups.over(own.keep).to(device)
            if not torch.compiler.is_compiling():
                self._groups[pathway, device] = found
        return found

    def places(self, pathway: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where the neurons of a pathway's groups stand, on a device: see its groups."""
        found = self._places.get((pathway, device))
        if found is None:
            groups = self.members.all[pathway].groups
            assert groups is not None  # or there are none: see Members.grouped
            with torch.inference_mode(False), torch.no_grad():
                always, several = groups.places()
                found = self._places[pathway, device] = always.to(device), several.to(device)
        return found

    def weigh(self, activation: Tensor, pathway: int | Tensor, x: Tensor) -> Tensor:
        """Return the activation with each token's groups of neurons weighted, others zero. Pure.

        Args:
            activation: As in ``mask``; what is in no group is left as it is.
            pathway: As in ``choose_members``.
            x: The block's input ``(..., d_in)``.
        """
        if isinstance(pathway, int):
            grouped = pathway in self.members.grouped
            return self._weigh(activation, pathway, x) if grouped else activation
        for index in self.members.grouped:
            rows = pathway.to(x.device) == index
            if torch.compiler.is_compiling() or bool(rows.any()):
                own = rows.unsqueeze(-1)
                if rows.shape != activation.shape[:-1]:  # one per row of the batch
                    own = spread(own, activation)
                activation = torch.where(own, self._weigh(activation, index, x), activation)
        return activation

    def _weigh(self, activation: Tensor, pathway: int, x: Tensor) -> Tensor:
        """Weight the groups of one pathway, for all tokens."""
        factors = self.groups(pathway, x.device).factors(x).to(activation.dtype)
        return (activation * factors).masked_fill(factors == 0, 0)  # infinity too

    def addition(self, member: int, like: Tensor) -> "Addition":
        """Return what a member adds to its kept neurons' sum, in a tensor's dtype and device.

        Those of experts are many, and are not kept.
        """
        key = (member, like.device, like.dtype)
        addition = self._additions.get(key)
        if addition is None:
            with torch.inference_mode(False), torch.no_grad():
                addition = Addition.of(self._own[member], self._own_kept[member], like)
            if not torch.compiler.is_compiling() and member < len(self.pathways):
                self._additions[key] = addition
        return addition

    def add(
        self,
        output: Tensor,
        activation: Tensor,
        block_input: Tensor | None,
        member: int | Tensor,
    ) -> Tensor:
        """Return a masked block's output with its pathways' compensation added. Pure.

        Args:
            output: What the outgoing leaf made of the masked activation, ``(..., d_out)``.
            activation: The masked activation ``(..., d_ff)``.
            block_input: The block's input ``(..., d_in)``, for the bypass.
            member: As in ``mask``.
        """
        if not isinstance(member, Tensor):
            if self._own[member].compensated:
                output = output + self.addition(member, output)(activation, block_input)
            return output
        shape, member = output.shape, member.to(output.device)
        if member.dim() > 1:  # one per token
            member, output, activation = member.flatten(), _flat(output), _flat(activation)
            block_input = None if block_input is None else _flat(block_input)
        for index in self.members.whole:
            if (
                self._own[index].compensated
                and (rows := _rows_of(index, member, output)) is not None
            ):
                addition = self.addition(index, output)
                output = add_to_rows(output, rows, addition, activation, block_input)
        return output.view(shape)

    def add_incoming(
        self, output: Tensor, x: Tensor, place: tuple[int, int], member: int | Tensor
    ) -> Tensor:
        """Return an incoming leaf's output with its pathways' change of weights. Pure.

        Args:
            output: ``(..., rows)``.
            x: The leaf's input ``(..., d_in)``.
            place: Which of the block's incoming leaves it is, and its rows per neuron.
            member: As in ``mask``.
        """
        position, rows_per_neuron = place
        if not isinstance(member, Tensor):
            change = self.change(member, position, rows_per_neuron, output)
            return output if change is None else output + change(x)
        shape, member = output.shape, member.to(output.device)
        if member.dim() > 1:
            member, output, x = member.flatten(), _flat(output), _flat(x)
        for index in range(len(self.members.all)):
            change = self.change(index, position, rows_per_neuron, output)
            if change is not None and (rows := _rows_of(index, member, output)) is not None:
                output = add_to_rows(output, rows, change, x, None)
        return output.view(shape)

    def change(
        self, member: int, position: int, rows_per_neuron: int, like: Tensor
    ) -> IncomingAddition | None:
        """Return a member's change of an incoming leaf, in a tensor's dtype and device."""
        changes = self.members.all[member].incoming
        delta = changes[position] if position < len(changes) else None
        if delta is None:
            return None
        key = (member, position, like.device, like.dtype)
        found = self._incoming.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                rows = self.rows_of(self.members.kept[member], rows_per_neuron).to(like.device)
                found = IncomingAddition(rows, delta.to(like), self.d_ff * rows_per_neuron)
                if self.shard is not None:
                    found = found.cut(self.shard.rows[position])
            if not torch.compiler.is_compiling():
                self._incoming[key] = found
        return found

    def rows_of(self, neurons: Tensor, rows_per_neuron: int) -> Tensor:
        """Return the rows of some neurons in a leaf, int64.

        Row ``i`` and row ``i + d_ff`` of a fused matrix belong to neuron ``i``.
        """
        return torch.cat([neurons + part * self.d_ff for part in range(rows_per_neuron)])

    def union(self, key: tuple[int, ...], device: torch.device | None = None) -> Union:
        """Return what the pathways of a mixed batch keep together; on the CPU by default."""
        device = torch.device("cpu") if device is None else device
        found = self._unions.get((key, device))
        if found is None:
            masks = [None if index < 0 else self.pathways[index].keep for index in key]
            if len(self._unions) >= _MOST_UNIONS:
                self._unions.clear()
            with torch.inference_mode(False), torch.no_grad():
                found = self._unions[key, device] = Union.of(masks, self.d_ff, device)
        return found

    def apart(self, key: tuple[int, ...]) -> bool:
        """Whether a pathway of a mixed batch has columns of its own, so that none are shared."""
        return any(index >= 0 and self.members.all[index].delta is not None for index in key)

    def mask(self, activation: Tensor, member: int | Tensor) -> Tensor:
        """Return the activation with the removed neurons zeroed. Pure.

        Args:
            activation: ``(batch, tokens, d_ff)``, or ``(batch * tokens, d_ff)`` inside blocks
                that flatten their input; of a block that is cut, this process's neurons.
            member: One, or one per row of the batch as int64 ``(batch,)``, or per token; -1 for
                dense.

        Raises:
            UnsupportedModelError: The activation has another width.
            PathwaysError: It is not a multiple of the rows.
        """
        start, stop = (0, self.d_ff) if self.shard is None else self.shard.neurons
        if activation.shape[-1] != stop - start:
            raise UnsupportedModelError(
                f"An FFN block has {stop - start} neurons in this process, but its activation is "
                f"{activation.shape[-1]} wide: its weights are sharded in a way that is not known "
                "here. Load the model without tp_plan, or with tp_plan='auto'."
            )
        if isinstance(member, Tensor):
            member = member.to(activation.device)
        removed = self._removed(activation.device)[member]
        if removed.dim() > 2:
            removed = removed.reshape(activation.shape)
        elif removed.dim() == 2:
            removed = spread(removed, activation)
        return activation.masked_fill(removed, 0)  # a product would turn infinity into NaN

    def learn_function(self, parent: nn.Module) -> None:
        """Find out the activation function of the block's module by the example, in place, once."""
        if self.example is not None:
            self.function, self.example, self.told = find_function(parent, self.example), None, True

    def skip(self, activation: Tensor, up: Tensor | None, member: int | Tensor) -> Tensor:
        """Return a masked activation with those neurons zeroed that each token skips. Pure.

        Args:
            activation: As in ``mask``.
            up: The other factor of a gated block's activation.
            member: As in ``mask``.
        """
        if not self.members.skips:
            return activation
        table = self._thresholds.get(activation.device)
        if table is None:
            with torch.inference_mode(False), torch.no_grad():
                table = threshold_table(self._own, activation.device)
            if not torch.compiler.is_compiling():
                self._thresholds[activation.device] = table
        return skip_small(activation, up, of_tokens(table, member, activation))

    def skip_kept(self, activation: Tensor, up: Tensor | None, member: int) -> Tensor:
        """Return one member's kept activation ``(..., kept)`` with skipped neurons zeroed. Pure."""
        skipping = self.members.all[member].skipping
        if skipping is None:
            return activation
        return skip_small(activation, up, skipping.threshold.to(activation.device))

    def _removed(self, device: torch.device) -> Tensor:
        """Return the masks inverted, bool ``(members + 1, width)``; the last removes nothing."""
        table = self._tables.get(device)
        if table is None:
            with torch.inference_mode(False), torch.no_grad():
                kept = [pathway.keep for pathway in self._own]
                table = ~torch.stack([*kept, torch.ones_like(kept[0])]).to(device)
            if not torch.compiler.is_compiling():
                self._tables[device] = table
        return table


def _rows_of(index: int, member: Tensor, output: Tensor) -> Tensor | None:
    """Return which rows of an output are a member's, as a mask; None if none is, if known."""
    rows = member == index
    if not torch.compiler.is_compiling() and not bool(rows.any()):
        return None
    return spread(rows.unsqueeze(1), output)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2)
