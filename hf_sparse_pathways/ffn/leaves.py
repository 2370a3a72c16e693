"""The linear leaves of an FFN block, able to compute one pathway's neurons alone.

The *class* of the block's own leaves is swapped for one that derives from both the role (incoming
or outgoing) and the leaf's own class. Names, parameters and hooks stay as they are, so the
block's forward, checkpoints, adapters and ``isinstance`` checks see no difference. Without a
choice for its model a leaf calls its own class's forward and nothing else.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.ffn.choices import Choice, ModelKey, find_choice
from hf_sparse_pathways.ffn.executors import EXECUTORS, Executor, KeptWeights


class BlockState:
    """What the leaves of one FFN block share: its pathways' keep masks and how they may run.

    Attributes:
        key: The model that the block belongs to.
        d_ff: Number of neurons.
        keep: One keep mask ``(d_ff,)``, bool, per pathway.
        masked_only: Whether the block must be masked whatever executor is chosen.
        masked_outside: Whether a hook before the outgoing leaf's wrapper does the masking.
    """

    def __init__(self, key: ModelKey, d_ff: int) -> None:
        self.key = key
        self.d_ff = d_ff
        self.keep: tuple[Tensor, ...] = ()
        self.masked_only = False
        self.masked_outside = False
        self._tables: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached tables behind."""
        return {**self.__dict__, "_tables": {}}

    def set_keep(self, keep: tuple[Tensor, ...]) -> None:
        """Replace the keep masks, in place."""
        self.keep = keep
        self._tables = {}

    def executor_name(self, choice: Choice) -> str:
        """Return the executor that this block uses under a choice."""
        if self.masked_only or type(choice.pathway) is not int:
            return "masked"
        return choice.executor

    def mask(self, activation: Tensor, pathway: int | Tensor) -> Tensor:
        """Return the activation with the removed neurons zeroed. Pure.

        Args:
            activation: ``(batch, tokens, d_ff)``, or ``(batch * tokens, d_ff)`` inside blocks
                that flatten their input.
            pathway: One pathway, or one per row of the batch as int64 ``(batch,)``, -1 for dense.

        Raises:
            PathwaysError: The activation is not d_ff wide, or not a multiple of the rows.
        """
        if activation.shape[-1] != self.d_ff:
            raise PathwaysError(
                f"An FFN block has {self.d_ff} neurons, but its activation is "
                f"{activation.shape[-1]} wide. Tensor parallelism is not supported here: load "
                "the model without tp_plan."
            )
        removed = self._removed(activation.device)[pathway]
        if removed.dim() == 2:
            removed = _spread(removed, activation)
        return activation.masked_fill(removed, 0)  # a product would turn infinity into NaN

    def _removed(self, device: torch.device) -> Tensor:
        """Return the masks inverted, bool ``(pathways + 1, d_ff)``; the last removes nothing."""
        table = self._tables.get(device)
        if table is None:
            with torch.inference_mode(False), torch.no_grad():
                everything = torch.ones(self.d_ff, dtype=torch.bool)
                table = ~torch.stack([*self.keep, everything]).to(device)
            if not torch.compiler.is_compiling():
                self._tables[device] = table
        return table


def _spread(masks: Tensor, activation: Tensor) -> Tensor:
    """Bring row masks ``(rows, d_ff)`` to the activation's shape, without a copy per token."""
    rows, length = masks.shape[0], activation.shape[0]
    if activation.dim() == 2 and length % rows == 0:
        return masks.repeat_interleave(length // rows, dim=0)
    if activation.dim() > 2 and length == rows:
        return masks.view(rows, *([1] * (activation.dim() - 2)), -1)
    raise PathwaysError(
        f"Domains were given for {rows} rows, but an FFN block received an input of shape "
        f"{tuple(activation.shape)}. Give one domain per row of the batch."
    )


class PathwayLeaf(nn.Module):
    """Base of the swapped leaves; the other base is the leaf's own class.

    Attributes:
        state: Shared with the block's other leaves.
        copies: Kept weights by pathway, made by executors.
        rows_per_neuron: 2 in a fused gate-up matrix, else 1.
        neuron_dim: Which dimension of the weight, in ``nn.Linear``'s order, runs over neurons.
    """

    state: BlockState
    copies: dict[int, KeptWeights]
    rows_per_neuron: int
    neuron_dim: ClassVar[int]
    weight: Tensor
    bias: Tensor | None

    def dense(self, x: Tensor) -> Tensor:
        """Compute as the leaf's own class does."""
        return super().forward(x)

    def kept_index(self, pathway: int) -> Tensor:
        """Return the kept rows (or columns) of a pathway, int64, ascending, on the weight's device.

        Row ``i`` and row ``i + d_ff`` of a fused matrix belong to neuron ``i``.
        """
        kept = self.state.keep[pathway].nonzero().flatten()
        parts = [kept + part * self.state.d_ff for part in range(self.rows_per_neuron)]
        return torch.cat(parts).to(self.weight.device)

    def _executor(self) -> tuple[Executor | None, Any]:
        """Return what computes this leaf now, with the pathway; None if it is dense."""
        choice = find_choice(self.state.key)
        if choice is None or choice.pathway is None:
            return None, None
        return EXECUTORS[self.state.executor_name(choice)], choice.pathway

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast as any module, and drop the copies of what was before."""
        self.copies.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the leaf's own class, without the weights' copies."""
        return _new_leaf, type(self).__bases__, {**self.__dict__, "copies": {}}


class IncomingLeaf(PathwayLeaf):
    """A leaf from d_model to d_ff."""

    neuron_dim = 0

    def forward(self, x: Tensor) -> Tensor:
        """Compute all neurons, or what the executor needs of them."""
        executor, pathway = self._executor()
        return self.dense(x) if executor is None else executor.incoming(self, x, pathway)


class OutgoingLeaf(PathwayLeaf):
    """The leaf from d_ff to d_model."""

    neuron_dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """Sum over all neurons, or over the kept ones."""
        executor, pathway = self._executor()
        if executor is None or self.state.masked_outside:
            return self.dense(x)
        return executor.outgoing(self, x, pathway)


def swap_leaf(leaf: nn.Module, role: type[PathwayLeaf], state: BlockState, rows: int = 1) -> None:
    """Make a linear module a pathway leaf, in place; ``rows`` is its rows per neuron."""
    leaf.__class__ = _leaf_class(role, type(leaf))
    leaf.state, leaf.copies, leaf.rows_per_neuron = state, {}, rows  # type: ignore[assignment]


def restore_leaf(leaf: PathwayLeaf) -> None:
    """Make a pathway leaf what it was before ``swap_leaf``, in place."""
    leaf.__class__ = type(leaf).__bases__[1]
    for name in ("state", "copies", "rows_per_neuron"):
        delattr(leaf, name)


_CLASSES: dict[tuple[type[PathwayLeaf], type[nn.Module]], type[PathwayLeaf]] = {}


def _leaf_class(role: type[PathwayLeaf], own: type[nn.Module]) -> type[PathwayLeaf]:
    if (role, own) not in _CLASSES:
        name = role.__name__.removesuffix("Leaf") + own.__name__
        namespace = {"__module__": __name__, "__doc__": role.__doc__}
        _CLASSES[role, own] = type(name, (role, own), namespace)
    return _CLASSES[role, own]


def _new_leaf(role: type[PathwayLeaf], own: type[nn.Module]) -> PathwayLeaf:
    cls = _leaf_class(role, own)
    return cls.__new__(cls)
