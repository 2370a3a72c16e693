"""The linear leaves of an FFN block, able to compute one pathway's neurons alone.

The *class* of the block's own leaves is swapped for one that derives from both the role (incoming
or outgoing) and the leaf's own class. Names, parameters and hooks stay as they are, so the
block's forward, checkpoints, adapters and ``isinstance`` checks see no difference. Without a
choice for its model a leaf calls its own class's forward and nothing else.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.active import active_incoming, active_outgoing, find_active
from hf_sparse_pathways.ffn.additions import needed_route
from hf_sparse_pathways.ffn.choices import Choice, find_choice
from hf_sparse_pathways.ffn.copies import WHOLE, KeptWeights, Own, kept_weights
from hf_sparse_pathways.ffn.executors import EXECUTORS, MASKED, Executor
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.ffn.picking import Picking
from hf_sparse_pathways.ffn.skipping import Example, up_part
from hf_sparse_pathways.ffn.state import BlockState


class PathwayLeaf(nn.Module):
    """Base of the swapped leaves; the other base is the leaf's own class.

    Attributes:
        state: Shared with the block's other leaves.
        copies: Kept weights by key, made by executors.
        rows_per_neuron: 2 in a fused gate-up matrix, else 1.
        position: Which of the block's incoming leaves it is.
        below: What the leaf was before, where it was a pathway leaf already; see ``swap_leaf``.
        neuron_dim: Which dimension of the weight, in ``nn.Linear``'s order, runs over neurons.
    """

    state: BlockState
    copies: dict[Own, KeptWeights]
    rows_per_neuron: int
    position: int
    below: dict[str, Any] | None
    neuron_dim: ClassVar[int]
    weight: Tensor
    bias: Tensor | None

    def dense(self, x: Tensor) -> Tensor:
        """Compute as the leaf's own class does."""
        return super().forward(x)

    def check_whole(self) -> None:
        """Check that the leaf has the rows (or columns) of all neurons.

        Raises:
            UnsupportedModelError: It holds a part of its weights.
        """
        found, rows = linear_weight(self).shape, self.state.d_ff * self.rows_per_neuron
        if found[self.neuron_dim] != rows:
            raise UnsupportedModelError(
                f"A leaf holds {found[self.neuron_dim]} of {rows} rows: its weights are "
                "sharded. Call model.set_executor('masked'), or load without tensor parallelism."
            )

    def _plan(self) -> tuple[Executor | None, Any, Choice | None]:
        """Return what computes this leaf now, which copies or pathway, and the choice.

        Without an executor it is dense.
        """
        choice = find_choice(self.state.key)
        if choice is None:
            return None, None, None
        if choice.copies is not None and not self.state.masked_only:
            return EXECUTORS[choice.executor], choice.copies, choice
        return (None if choice.pathway is None else MASKED), choice.pathway, choice

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast as any module, and drop the copies of what was before."""
        self.drop_copies()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def drop_copies(self) -> None:
        """Forget the copies of kept weights; no pathway is resident without them."""
        if not self.copies:
            return
        self.copies.clear()
        if self.state.residents is not None:
            self.state.residents.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the leaf's own class, without the weights' copies."""
        below = None if self.below is None else {**self.below, "copies": {}}
        return _new_leaf, type(self).__bases__, {**self.__dict__, "copies": {}, "below": below}


class IncomingLeaf(PathwayLeaf):
    """A leaf from d_model to d_ff."""

    neuron_dim = 0

    def forward(self, x: Tensor) -> Tensor:
        """Compute all neurons, or what the executor needs of them."""
        executor, pathway, choice = self._plan()
        if executor is None or choice is None:
            output = self.dense(x)
            if self.state.members.skips and choice is not None and choice.sees is not None:
                self._note_gate(choice, output)
            return output
        leaf = self if choice.picked is None else choice.picked.leaf(self)
        if self.state.members.bypassed:
            choice.inputs[id(self.state)] = x
        if leaf.state.members.routed:
            pathway = self._route(choice, executor, pathway, leaf.state, x)
        if leaf.state.members.skips:
            return self._gated(choice, executor, pathway, leaf, x)
        return executor.incoming(leaf, x, pathway)

    def _gated(
        self, choice: Choice, executor: Executor, pathway: Any, leaf: PathwayLeaf, x: Tensor
    ) -> Tensor:
        """Compute a gate, or what it is multiplied by as far as it is needed."""
        place = id(self.state)
        gate = choice.gates.get(place) if self.position else None
        active = None if gate is None else find_active(leaf, gate, pathway, executor.form)
        if active is None:
            output = executor.incoming(leaf, x, pathway)
        else:
            choice.active[place] = active
            output = active_incoming(leaf, x, pathway, active)
        self._note_gate(choice, output)
        return output

    def _note_gate(self, choice: Choice, output: Tensor) -> None:
        """Keep an output for the leaves that are called after this one."""
        place = id(self.state)
        if self.position == 0 and self.rows_per_neuron == 1:
            choice.gates[place] = output
        up = up_part(output, self.position, self.rows_per_neuron)
        if up is not None:
            choice.ups[place] = up

    def _route(
        self, choice: Choice, executor: Executor, pathway: Any, state: BlockState, x: Tensor
    ) -> Any:
        """Return where the tokens of the block's input go, found once for all incoming leaves."""
        known = choice.routes.get(id(self.state))
        if known is None or known[0] is not x:
            known = choice.routes[id(self.state)] = (x, executor.route(state, pathway, x))
        return known[1]


class OutgoingLeaf(PathwayLeaf):
    """The leaf from d_ff to d_model."""

    neuron_dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """Sum over all neurons, or over the kept ones."""
        executor, pathway, choice = self._plan()
        if choice is not None and choice.sees is not None:
            if not self.state.masked_outside:
                choice.sees.see(self.state, x)
            if choice.sees.has_later:
                return self._mask_later(choice, choice.sees, x)
        if executor is None or choice is None:
            return self.dense(x)
        leaf = self if choice.picked is None else choice.picked.leaf(self)
        block_input = self._see_input(choice)
        if leaf.state.members.routed:
            routed, member = needed_route(choice.routes.pop(id(self.state), None))
            if executor is MASKED and not self.state.masked_outside:
                x = leaf.state.weigh(x, pathway, routed)
            pathway = member
        if not leaf.state.members.skips:
            return executor.outgoing(leaf, x, pathway, block_input)
        return self._sum_active(choice, executor, pathway, leaf, x, block_input)

    def _sum_active(
        self,
        choice: Choice,
        executor: Executor,
        pathway: Any,
        leaf: PathwayLeaf,
        x: Tensor,
        block_input: Tensor | None,
    ) -> Tensor:
        """Sum over those of the kept neurons that each token does not skip."""
        active, up = self._see_gate(choice, x)
        if active is None:
            skipped = executor.skip(leaf.state, x, up, pathway)
            return executor.outgoing(leaf, skipped, pathway, block_input)
        if x.shape[:-1].numel() > 1:  # what any of them needs is there for all
            x = executor.skip(leaf.state, x, up, pathway)
        return active_outgoing(leaf, x, pathway, active, block_input)

    def _mask_later(self, choice: Choice, picking: Picking, x: Tensor) -> Tensor:
        """Compute a prompt's tokens densely, and those after it with what was picked from it."""
        leaf, members = picking.leaf(self), picking.later(x)
        block_input = self._see_input(choice)
        if leaf.state.members.routed:
            routed, _ = needed_route(choice.routes.pop(id(self.state), None))
            if not self.state.masked_outside:
                x = leaf.state.weigh(x, members, routed)
            members = leaf.state.choose_members(members, routed)
        if leaf.state.members.skips:
            _, up = self._see_gate(choice, x)
            x = MASKED.skip(leaf.state, x, up, members)
        return MASKED.outgoing(leaf, x, members, block_input)

    def _see_input(self, choice: Choice) -> Tensor | None:
        """Return the block's input, if a pathway has a bypass."""
        if not self.state.members.bypassed:
            return None
        return choice.inputs.pop(id(self.state), None)

    def _see_gate(self, choice: Choice, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return which kept neurons are computed, if not all, and what gates are multiplied by."""
        place = id(self.state)
        gate, up = choice.gates.pop(place, None), choice.ups.pop(place, None)
        wanted = not (self.state.told or self.state.members.grouped)
        unseen = wanted and not torch.compiler.is_compiling()
        if unseen and gate is not None and up is not None and x.numel():
            self.state.example = Example.of(gate, up, x)
        return choice.active.pop(place, None), up


class RestLeaf(PathwayLeaf):
    """A linear leaf outside the FFN blocks, of which there may be a copy in another form."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute as its own class does, or with the copy."""
        choice = find_choice(self.state.key)
        if choice is None or not choice.rest or is_offloaded(self):
            return self.dense(x)
        return kept_weights(self, WHOLE, EXECUTORS[choice.executor].form)(x)


_OWN = ("state", "copies", "rows_per_neuron", "position", "below")
"""Attributes that a module has as a pathway leaf."""


def swap_leaf(
    leaf: Any, role: type[PathwayLeaf], state: BlockState, *, rows: int = 1, position: int = 0
) -> None:
    """Make a linear module a pathway leaf, in place.

    One that is a pathway leaf already, of a model whose pathways are not in use, becomes one of
    another state for the time being.

    Args:
        leaf: The module.
        role: What it becomes.
        state: Shared with the block's other leaves.
        rows: Its rows per neuron.
        position: Which of the incoming leaves it is.
    """
    below = None
    if isinstance(leaf, role):
        below = {name: getattr(leaf, name) for name in _OWN}
    else:
        leaf.__class__ = _leaf_class(role, type(leaf))
    for name, value in zip(_OWN, (state, {}, rows, position, below), strict=True):
        setattr(leaf, name, value)


def restore_leaf(leaf: PathwayLeaf) -> None:
    """Make a pathway leaf what it was before ``swap_leaf``, in place."""
    below = leaf.below
    for name in _OWN:
        delattr(leaf, name)
    if below is None:
        leaf.__class__ = type(leaf).__bases__[1]
    for name, value in (below or {}).items():
        setattr(leaf, name, value)


def is_offloaded(leaf: Any) -> bool:
    """Whether accelerate brings a leaf's weights to it for each call, and takes them away again."""
    hook = getattr(leaf, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return leaf.weight.is_meta or any(getattr(one, "offload", False) for one in hooks)


@torch.no_grad()
def computes_linear(leaf: Any, own: Any) -> bool:
    """Whether a leaf's own class computes what ``linear`` does.

    A class with a forward of its own is compared with ``linear`` on one random vector.
    """
    if own.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = leaf.weight
    if weight.is_meta or not weight.is_floating_point():
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, weight.shape[1], generator=generator).to(weight)
    expected = functional.linear(probe, weight, leaf.bias)
    try:
        found = own.forward(leaf, probe)
    except (TypeError, RuntimeError):  # it takes something else
        return False
    equal = isinstance(found, Tensor) and found.shape == expected.shape
    return equal and torch.allclose(found, expected, rtol=1e-2, atol=1e-4)


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
