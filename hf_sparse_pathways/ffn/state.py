"""What the leaves of one FFN block share: its pathways, as masks and additions on each device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank
from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.mixtures import Union
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.runs import Run, few_runs
from hf_sparse_pathways.ffn.sharding import BlockShard


@dataclass(frozen=True)
class Addition:
    """A pathway's compensation in one dtype and on one device, as the masked executor adds it.

    Attributes:
        kept: The kept neurons, int64 ``(kept,)``.
        delta: As in ``BlockPathway``.
        bias: As in ``BlockPathway``.
        bypass: As in ``BlockPathway``.
    """

    kept: Tensor
    delta: Tensor | LowRank | None
    bias: Tensor | None
    bypass: LowRank | None

    @classmethod
    def of(cls, pathway: BlockPathway, like: Tensor) -> "Addition":
        """Take a pathway's compensation over to the dtype and device of a tensor."""
        return cls(
            kept=pathway.keep.nonzero().flatten().to(like.device),
            delta=None if pathway.delta is None else pathway.delta.to(like),
            bias=None if pathway.bias is None else pathway.bias.to(like),
            bypass=None if pathway.bypass is None else pathway.bypass.to(like),
        )

    def __call__(self, activation: Tensor, block_input: Tensor | None) -> Tensor:
        """Return what is added to the output, ``(..., d_out)`` or ``(d_out,)``."""
        terms = []
        if self.delta is not None:
            kept = activation.index_select(-1, self.kept)
            if isinstance(self.delta, LowRank):
                terms.append(self.delta(kept))
            else:
                terms.append(functional.linear(kept, self.delta))
        if self.bias is not None:
            terms.append(self.bias)
        if self.bypass is not None:
            terms.append(self.bypass(needed_input(block_input)))
        return sum(terms[1:], start=terms[0])


@dataclass(frozen=True)
class IncomingAddition:
    """A pathway's change of an incoming leaf's kept rows, in one dtype and on one device.

    Attributes:
        rows: The rows, int64.
        delta: The change of their weights, ``(rows, d_in)``.
        width: Rows of the leaf, as far as this process holds it.
    """

    rows: Tensor
    delta: Tensor | LowRank
    width: int

    def cut(self, held: Run) -> "IncomingAddition":
        """Return the part for a leaf that holds a run of all rows. Pure."""
        limits = torch.tensor(held, device=self.rows.device)
        part = slice(*torch.searchsorted(self.rows, limits).tolist())
        if isinstance(self.delta, LowRank):
            delta: Tensor | LowRank = LowRank(self.delta.outer[part], self.delta.inner)
        else:
            delta = self.delta[part]
        return IncomingAddition(self.rows[part] - held[0], delta, held[1] - held[0])

    def __call__(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        """Return what is added to the leaf's output, ``(..., width)``."""
        change = self.product(x)
        nothing = change.new_zeros(*change.shape[:-1], self.width)
        return nothing.index_copy(-1, self.rows, change)

    def product(self, x: Tensor) -> Tensor:
        """Return what is added to the changed rows alone, ``(..., rows)``."""
        if isinstance(self.delta, LowRank):
            return self.delta(x)
        return functional.linear(x, self.delta)


def needed_input(block_input: Tensor | None) -> Tensor:
    """Return a block's input, which its bypass needs.

    Raises:
        UnsupportedModelError: The incoming leaf did not run before the outgoing one.
    """
    if block_input is None:
        raise UnsupportedModelError(
            "A pathway has a linear bypass, but the block's incoming leaf was not called before "
            "its outgoing leaf, so the block's input is not known. Build the pathways without a "
            "bypass for this model."
        )
    return block_input


_MOST_UNIONS = 64
"""How many different mixtures of pathways are remembered; each takes little."""


class BlockState:
    """What the leaves of one FFN block share: its pathways and how they may run.

    Attributes:
        key: The model that the block belongs to.
        d_ff: Number of neurons.
        pathways: What each pathway keeps of the block.
        runs: Each pathway's runs of kept neurons, None where they are too many to slice.
        bypassed: Whether any pathway has a bypass, so that the block's input is needed.
        masked_only: Whether the block must be masked whatever executor is chosen.
        masked_outside: Whether a hook before the outgoing leaf's wrapper does the masking.
        residents: Which of the model's pathways have copies; None if nobody counts them.
        shard: What this process holds of the block, if it is cut among several.
    """

    def __init__(self, key: ModelKey, d_ff: int, residents: Residents | None = None) -> None:
        self.key = key
        self.d_ff = d_ff
        self.pathways: tuple[BlockPathway, ...] = ()
        self.runs: tuple[tuple[Run, ...] | None, ...] = ()
        self.bypassed = False
        self.masked_only = False
        self.masked_outside = False
        self.residents = residents
        self.shard: BlockShard | None = None
        self._own: tuple[BlockPathway, ...] = ()
        self._tables: dict[torch.device, Tensor] = {}
        self._additions: dict[tuple[int, torch.device, torch.dtype], Addition] = {}
        self._incoming: dict[tuple[int, int, torch.device, torch.dtype], IncomingAddition] = {}
        self._unions: dict[tuple[tuple[int, ...], torch.device], Union] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached tables behind."""
        empty: dict[str, Any] = {"_tables": {}, "_additions": {}, "_incoming": {}, "_unions": {}}
        return {**self.__dict__, **empty}

    def set_pathways(self, pathways: tuple[BlockPathway, ...]) -> None:
        """Replace the pathways, in place."""
        self.pathways = pathways
        self.runs = tuple(few_runs(pathway.keep) for pathway in pathways)
        self.bypassed = any(pathway.bypass is not None for pathway in pathways)
        self.set_shard(self.shard)
        self._unions = {}

    def set_shard(self, shard: BlockShard | None) -> None:
        """Say what this process holds of the block, in place."""
        self.shard = shard
        self._own = self.pathways if shard is None else tuple(map(shard.cut, self.pathways))
        self._tables, self._additions, self._incoming = {}, {}, {}

    def addition(self, pathway: int, like: Tensor) -> "Addition":
        """Return what a pathway adds to its kept neurons' sum, in a tensor's dtype and device."""
        key = (pathway, like.device, like.dtype)
        addition = self._additions.get(key)
        if addition is None:
            with torch.inference_mode(False), torch.no_grad():
                addition = Addition.of(self._own[pathway], like)
            if not torch.compiler.is_compiling():
                self._additions[key] = addition
        return addition

    def add(
        self,
        output: Tensor,
        activation: Tensor,
        block_input: Tensor | None,
        pathway: int | Tensor,
    ) -> Tensor:
        """Return a masked block's output with its pathways' compensation added. Pure.

        Args:
            output: What the outgoing leaf made of the masked activation, ``(..., d_out)``.
            activation: The masked activation ``(..., d_ff)``.
            block_input: The block's input ``(..., d_in)``, for the bypass.
            pathway: As in ``mask``.
        """
        if not isinstance(pathway, Tensor):
            if self._own[pathway].compensated:
                output = output + self.addition(pathway, output)(activation, block_input)
            return output
        pathway = pathway.to(output.device)
        for index, candidate in enumerate(self._own):
            if candidate.compensated:
                rows = spread((pathway == index).unsqueeze(1), output)
                addition = self.addition(index, output)
                output = _add_to_rows(output, rows, addition, activation, block_input)
        return output

    def add_incoming(
        self, output: Tensor, x: Tensor, place: tuple[int, int], pathway: int | Tensor
    ) -> Tensor:
        """Return an incoming leaf's output with its pathways' change of weights. Pure.

        Args:
            output: ``(..., rows)``.
            x: The leaf's input ``(..., d_in)``.
            place: Which of the block's incoming leaves it is, and its rows per neuron.
            pathway: As in ``mask``.
        """
        position, rows_per_neuron = place
        if not isinstance(pathway, Tensor):
            change = self.change(pathway, position, rows_per_neuron, output)
            return output if change is None else output + change(x)
        pathway = pathway.to(output.device)
        for index in range(len(self.pathways)):
            change = self.change(index, position, rows_per_neuron, output)
            if change is not None:
                rows = spread((pathway == index).unsqueeze(1), output)
                output = _add_to_rows(output, rows, change, x, None)
        return output

    def change(
        self, pathway: int, position: int, rows_per_neuron: int, like: Tensor
    ) -> IncomingAddition | None:
        """Return a pathway's change of an incoming leaf, in a tensor's dtype and device."""
        changes = self.pathways[pathway].incoming
        delta = changes[position] if position < len(changes) else None
        if delta is None:
            return None
        key = (pathway, position, like.device, like.dtype)
        found = self._incoming.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                rows = self.kept_rows(pathway, rows_per_neuron).to(like.device)
                found = IncomingAddition(rows, delta.to(like), self.d_ff * rows_per_neuron)
                if self.shard is not None:
                    found = found.cut(self.shard.rows[position])
            if not torch.compiler.is_compiling():
                self._incoming[key] = found
        return found

    def kept(self, pathway: int) -> Tensor:
        """Return the neurons that a pathway keeps, int64, ascending."""
        return self.pathways[pathway].keep.nonzero().flatten()

    def kept_rows(self, pathway: int, rows_per_neuron: int) -> Tensor:
        """Return the kept rows of a leaf, int64, ascending."""
        return self.rows_of(self.kept(pathway), rows_per_neuron)

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
        return any(index >= 0 and self.pathways[index].delta is not None for index in key)

    def mask(self, activation: Tensor, pathway: int | Tensor) -> Tensor:
        """Return the activation with the removed neurons zeroed. Pure.

        Args:
            activation: ``(batch, tokens, d_ff)``, or ``(batch * tokens, d_ff)`` inside blocks
                that flatten their input; of a block that is cut, this process's neurons.
            pathway: One pathway, or one per row of the batch as int64 ``(batch,)``, -1 for dense.

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
        if isinstance(pathway, Tensor):
            pathway = pathway.to(activation.device)
        removed = self._removed(activation.device)[pathway]
        if removed.dim() == 2:
            removed = spread(removed, activation)
        return activation.masked_fill(removed, 0)  # a product would turn infinity into NaN

    def _removed(self, device: torch.device) -> Tensor:
        """Return the masks inverted, bool ``(pathways + 1, width)``; the last removes nothing."""
        table = self._tables.get(device)
        if table is None:
            with torch.inference_mode(False), torch.no_grad():
                kept = [pathway.keep for pathway in self._own]
                table = ~torch.stack([*kept, torch.ones_like(kept[0])]).to(device)
            if not torch.compiler.is_compiling():
                self._tables[device] = table
        return table


def spread(masks: Tensor, activation: Tensor) -> Tensor:
    """Bring one row of values per row of the batch, ``(rows, n)``, to an activation's shape.

    Nothing is copied per token, unless the block has flattened its input.
    """
    rows, length = masks.shape[0], activation.shape[0]
    if activation.dim() == 2 and length % rows == 0:
        return masks.repeat_interleave(length // rows, dim=0)
    if activation.dim() > 2 and length == rows:
        return masks.view(rows, *([1] * (activation.dim() - 2)), -1)
    raise PathwaysError(
        f"Domains were given for {rows} rows, but an FFN block received an input of shape "
        f"{tuple(activation.shape)}. Give one domain per row of the batch."
    )


def _add_to_rows(
    output: Tensor,
    rows: Tensor,
    addition: Addition | IncomingAddition,
    activation: Tensor,
    block_input: Tensor | None,
) -> Tensor:
    """Add something of a pathway to its own rows of a batch. Pure.

    Args:
        output: ``(batch, ..., d_out)``.
        rows: bool, one entry per row of the output's first dimension, and trailing ones.
        addition: What is added.
        activation: What it is made of, ``(batch, ..., d_ff)``, or the input of an incoming leaf.
        block_input: ``(batch, ..., d_in)``.
    """
    if torch.compiler.is_compiling():  # which rows these are is not known while tracing
        return output + torch.where(rows, addition(activation, block_input), 0)
    selected = rows.flatten().nonzero().flatten()
    if len(selected) == 0:
        return output
    theirs = None if block_input is None else block_input.index_select(0, selected)
    added = addition(activation.index_select(0, selected), theirs)
    added = added.expand(len(selected), *output.shape[1:])
    return output.index_add(0, selected, added.to(output.dtype))  # autocast may have cast one
