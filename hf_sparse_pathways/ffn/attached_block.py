"""One FFN block with swapped leaves, and what has become of them since.

An adapter library may wrap a leaf, a quantiser replace one, a dispatcher offload its weights.
Wrapped blocks are masked in front of the wrapper, offloaded ones in the leaf, and a replaced leaf
is an error instead of silently dense output.
"""

from typing import Any

from torch import nn

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.additions import needed_route
from hf_sparse_pathways.ffn.blocks import FfnBlock
from hf_sparse_pathways.ffn.choices import ModelKey, find_choice
from hf_sparse_pathways.ffn.leaves import (
    IncomingLeaf,
    OutgoingLeaf,
    PathwayLeaf,
    computes_linear,
    is_offloaded,
    restore_leaf,
    swap_leaf,
)
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.sharding import find_shard
from hf_sparse_pathways.ffn.skipping import up_part
from hf_sparse_pathways.ffn.state import BlockState
from hf_sparse_pathways.ffn.stored import lies_in_memory


class AttachedBlock:
    """One FFN block with swapped leaves."""

    def __init__(self, block: FfnBlock, key: ModelKey, residents: Residents | None = None) -> None:
        self.block = block
        self.state = BlockState(key, block.d_ff, residents)
        rows = 2 if block.layout.fused else 1
        for position, leaf in enumerate(block.incoming):
            swap_leaf(leaf, IncomingLeaf, self.state, rows=rows, position=position)
        swap_leaf(block.outgoing, OutgoingLeaf, self.state)
        names = (*block.layout.incoming, block.layout.outgoing)
        self.leaves: dict[str, Any] = {name: block.parent.get_submodule(name) for name in names}
        self._places = [_place(block.parent, name) for name in names]
        self._seen: list[nn.Module] = []
        self._kinds: list[tuple[dict[str, Any], tuple[type, bool]]] = []
        self._hooks: list[Any] = []

    def drop_copies(self) -> None:
        """Forget the copies of kept weights."""
        for leaf in self.leaves.values():
            leaf.drop_copies()

    def settle(self) -> None:
        """See ``Attachment.settle``. Costs a few dictionary look-ups when nothing has changed."""
        if self.state.example is not None:
            self.state.learn_function(self.block.parent)
        for (children, key), seen, (parameters, kind) in zip(
            self._places, self._seen, self._kinds, strict=False
        ):
            if children[key] is not seen or _kind(parameters) != kind:
                break
        else:
            if self._seen:
                return
        self._adapt()

    def _adapt(self) -> None:
        """Look at the leaves anew: where they are masked, and whether they can run compact."""
        leaves = [*self.leaves.values()]
        seen = [
            self._holder(name, children[key])
            for name, (children, key) in zip(self.leaves, self._places, strict=True)
        ]
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        outside = seen[-1] is not leaves[-1]
        if outside:
            self._hooks.append(seen[-1].register_forward_pre_hook(_MaskInput(self.state)))
        if seen[-2] is not leaves[-2]:
            self._hooks.append(seen[-2].register_forward_hook(_SeeUp(self.state, leaves[-2])))
        self.state.masked_outside = outside
        shard = find_shard(leaves[:-1], leaves[-1])
        if shard != self.state.shard:
            self.state.set_shard(shard)
        self.state.masked_only = bool(
            _differ(seen, leaves) or self.block.entangled or not all(map(_is_plain, leaves))
        )
        self.drop_copies()
        parameters = [leaf._parameters for leaf in leaves]
        self._kinds = [(own, _kind(own)) for own in parameters]
        self._seen = seen  # last: another thread takes it as a sign that the rest is done

    @property
    def wrapped(self) -> bool:
        """Whether an adapter wraps a leaf, as of the last ``settle``."""
        return _differ(self._seen, [*self.leaves.values()])

    @property
    def compact_leaves(self) -> tuple[PathwayLeaf, ...]:
        """The leaves of which copies may be resident, as of the last ``settle``."""
        return () if self.state.masked_only else tuple(self.leaves.values())

    def _holder(self, name: str, module: nn.Module | None) -> nn.Module:
        """Return what sits at a leaf's place, if the leaf is in it."""
        leaf = self.leaves[name]
        if module is None or not any(inner is leaf for inner in module.modules()):
            raise UnsupportedModelError(
                f"{self.block.name}.{name} was replaced by {type(module).__name__} after the "
                "pathways were attached, so they cannot be computed. Quantise or convert the "
                "dense model first, then attach pathways to it."
            )
        return module

    def detach(self) -> None:
        """Restore the leaves' own classes, in place.

        Raises:
            UnsupportedModelError: An adapter wraps a leaf.
        """
        self.settle()
        if self.wrapped or not all(map(_is_swapped, self.leaves.values())):
            raise UnsupportedModelError(
                f"An adapter wraps leaves of {self.block.name}, or a parametrisation has changed "
                "them. Merge, unload or remove it first."
            )
        for leaf in self.leaves.values():
            restore_leaf(leaf)


def _place(parent: nn.Module, path: str) -> tuple[dict[str, nn.Module | None], str]:
    """Return the dictionary of children, and the key, under which a leaf is found."""
    holder, _, key = path.rpartition(".")
    return parent.get_submodule(holder)._modules, key


class _MaskInput:
    """Forward pre-hook that masks the input of an outgoing leaf's wrapper."""

    def __init__(self, state: BlockState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG002
        choice, state = find_choice(self.state.key), self.state
        if choice is None:
            return None
        member: Any = choice.pathway
        if choice.sees is not None:
            choice.sees.see(state, args[0])
        if choice.sees is not None and choice.sees.has_later:
            state, member = choice.sees.state(state), choice.sees.later(args[0])
        elif choice.picked is not None:
            state = choice.picked.state(state)
        if member is None:
            return None
        activation = args[0]
        if state.members.routed:
            routed, found = needed_route(choice.routes.get(id(self.state)))
            activation, member = state.weigh(activation, member, routed), found
        activation = state.skip(activation, choice.ups.get(id(self.state)), member)
        return (state.mask(activation, member), *args[1:])


class _SeeUp:
    """Forward hook that sees what an adapter around the last incoming leaf makes of its output."""

    def __init__(self, state: BlockState, leaf: PathwayLeaf) -> None:
        self.state, self.place = state, (leaf.position, leaf.rows_per_neuron)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        choice = find_choice(self.state.key)
        if choice is not None and id(self.state) in choice.ups:
            up = up_part(output, *self.place)
            if up is not None:
                choice.ups[id(self.state)] = up


def _differ(modules: list[nn.Module], leaves: list[Any]) -> bool:
    return any(module is not leaf for module, leaf in zip(modules, leaves, strict=True))


def _kind(parameters: dict[str, Any]) -> tuple[type, bool]:
    """Return of which class a leaf's weight is, and whether it lies elsewhere."""
    weight = parameters.get("weight")
    return type(weight), getattr(weight, "is_meta", False)


def _is_swapped(leaf: nn.Module) -> bool:
    """Whether a leaf's class is still the one made here; a parametrisation changes it again."""
    return len(type(leaf).__bases__) == 2


def _is_plain(leaf: PathwayLeaf) -> bool:
    """Whether a leaf computes what ``linear`` does with weights that lie in memory as they are."""
    if not _is_swapped(leaf):
        return False
    if is_offloaded(leaf) or not lies_in_memory(leaf.weight):
        return False
    return computes_linear(leaf, type(leaf).__bases__[1])
