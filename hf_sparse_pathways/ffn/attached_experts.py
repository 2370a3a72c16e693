"""The router and the experts of one layer with swapped classes, able to compute one pathway's.

As with the leaves of FFN blocks, the class of the layer's own modules is swapped for one that
derives from the role and from the module's own class. The router's own forward runs under a
``Restriction`` to the kept experts; the experts' own forward runs on all weights, or on those of
the kept neurons. Without a choice for its model a module does what its own class does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.choices import Choice, ModelKey, find_choice
from hf_sparse_pathways.ffn.expert_layouts import find_parameter
from hf_sparse_pathways.ffn.expert_state import ExpertState
from hf_sparse_pathways.ffn.experts import RoutedExperts
from hf_sparse_pathways.ffn.kept_experts import KeptExperts
from hf_sparse_pathways.ffn.restriction import Restriction


class PathwayRouted(nn.Module):
    """Base of the swapped modules; the other base is the module's own class.

    Attributes:
        expert_state: Shared by the router and the experts of a layer.
    """

    expert_state: ExpertState

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the module's own class."""
        return _new_routed, type(self).__bases__, self.__dict__

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast as any module, and drop the copies of what was before."""
        self.expert_state.drop()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def find_removed(self, hidden_states: Tensor) -> Tensor | None:
        """Return which experts are removed for some tokens now; see ``ExpertState.removed``."""
        state, device = self.expert_state, hidden_states.device
        if state.alone is not None:
            return ~state.alone.keep.to(device)
        choice = find_choice(state.key)
        pathway = None if choice is None else choice.own
        if pathway is None:
            return None
        return state.removed(pathway, hidden_states.shape[:-1].numel(), device)


class PathwayRouter(PathwayRouted):
    """A router that chooses among the kept experts."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Choose among all experts, or among those that are kept."""
        removed = self.find_removed(hidden_states)
        if removed is None:
            return super().forward(hidden_states, *args, **kwargs)
        with Restriction(removed) as restriction:
            chosen = super().forward(hidden_states, *args, **kwargs)
        restriction.check(type(self).__bases__[-1].__name__)
        return chosen


class PathwayExperts(PathwayRouted):
    """Experts of which some neurons are kept."""

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute each token's experts with all of their neurons, or with the kept ones.

        Args:
            hidden_states: ``(tokens, d_model)``, or ``(batch, tokens, d_model)``.
            index: The experts of each token, int64 ``(tokens, top_k)``.
            weights: Their weights, ``(tokens, top_k)``.
        """
        state = self.expert_state
        if state.places is not None:
            return self.dense(hidden_states, state.places.to(index.device)[index], weights)
        choice = find_choice(state.key)
        if choice is None or (pathway := choice.own) is None:
            return self.dense(hidden_states, index, weights)
        if isinstance(pathway, int):
            return self._narrowed(choice, pathway, (hidden_states, index, weights))
        return self._mixed(choice, pathway, (hidden_states, index, weights))

    def dense(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as the module's own class does."""
        output: Tensor = super().forward(hidden_states, index, weights)
        return output

    def may_have_copies(self) -> bool:
        """Whether the weights lie in memory as they are, and stay there.

        Those of a parametrisation are made anew for each call, and offloaded ones come and go.
        """
        hook = getattr(self, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        names = [packing.name for packing in self.expert_state.packed.packings]
        weights = [find_parameter(self, name) for name in names]
        still = all(isinstance(w, nn.Parameter) and not w.is_meta for w in weights)
        return still and not any(getattr(one, "offload", False) for one in hooks)

    def _narrowed(self, choice: Choice, pathway: int, given: tuple[Tensor, ...]) -> Tensor:
        """Compute what one pathway keeps, for all tokens."""
        state = self.expert_state
        if not state.narrows(pathway):
            return self.dense(*given)
        check_whole(self)
        hidden_states, index, weights = given
        copied = choice.picked is None and choice.copies == pathway
        if copied and self.may_have_copies():
            cut = state.copy(self, pathway)
        else:
            cut = state.cut_for(self, pathway, index)
        own: Any = state.own
        output: Tensor = own.forward(cut.module, hidden_states, cut.places[index], weights)
        return output

    def _mixed(self, choice: Choice, pathways: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """Compute the tokens of each pathway together."""
        state = self.expert_state
        used = (choice.rows or []) if choice.picked is None else pathways.tolist()
        every = range(-1, len(state.pathways)) if _compiling() else sorted({*used})
        if not any(map(state.narrows, every)):
            return self.dense(*given)
        hidden_states, index, weights = given
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = pathways.to(flat.device).repeat_interleave(len(flat) // len(pathways))
        output = torch.zeros_like(flat)
        for pathway in every:
            theirs = tokens == pathway
            if _compiling():  # which tokens these are is not known while tracing
                part = self._narrowed(choice, pathway, (flat, index, weights))
                output = torch.where(theirs.unsqueeze(1), part.view_as(flat), output)
                continue
            rows = theirs.nonzero().flatten()
            part = self._narrowed(choice, pathway, (flat[rows], index[rows], weights[rows]))
            output = output.index_copy(0, rows, part.reshape(len(rows), -1))
        return output.view_as(hidden_states)


class AttachedExperts:
    """The routed experts of one layer with swapped classes."""

    def __init__(self, found: RoutedExperts, key: ModelKey) -> None:
        """Swap the classes of the router and the experts, in place."""
        self.found = found
        self.state = ExpertState(key, found)
        self.experts: Any = found.module
        self.router: Any = found.router
        self._places = {
            name: module
            for name, module in found.parent._modules.items()
            if module is self.experts or module is self.router
        }
        for module, role in self._roles():
            module.__class__ = _routed_class(role, type(module))
            module.expert_state = self.state

    def _roles(self) -> list[tuple[Any, type[PathwayRouted]]]:
        """Return the modules whose classes are swapped, and what they become."""
        return [(self.experts, PathwayExperts), (self.router, PathwayRouter)]

    def settle(self) -> None:
        """Check that the swapped modules are still what the layer calls.

        Raises:
            UnsupportedModelError: One was replaced by a module that does not contain it.
        """
        children = self.found.parent._modules
        for name, module in self._places.items():
            held = children.get(name)
            if held is module:
                continue
            if held is None or not any(inner is module for inner in held.modules()):
                raise UnsupportedModelError(
                    f"{self.state.name} or its router was replaced by {type(held).__name__} after "
                    "the pathways were attached, so they cannot be computed. Quantise or convert "
                    "the dense model first, then attach pathways to it."
                )

    def set_pathways(self, pathways: tuple[KeptExperts | None, ...]) -> None:
        """Replace what the pathways keep, in place."""
        self.state.set_pathways(pathways)

    def make(self, pathway: int) -> None:
        """Make a pathway's copy, if it needs one and can have it."""
        if self.state.narrows(pathway) and self.experts.may_have_copies():
            self.state.copy(self.experts, pathway)

    def copy_bytes(self, pathway: int) -> int:
        """Return how many bytes a pathway's copy takes."""
        return self.state.copy_bytes(self.experts, pathway)

    @property
    def weight(self) -> Tensor:
        """The outgoing weights."""
        weight: Tensor = find_parameter(self.experts, self.state.packed.packings[0].name)
        return weight

    def reduce(self, alone: KeptExperts) -> None:
        """Note that the weights are those of one pathway alone, in place."""
        self.state.alone = alone
        self.state.places = (alone.keep.cumsum(0) - 1).clamp_min(0)

    def detach(self) -> None:
        """Restore the modules' own classes, in place.

        Raises:
            UnsupportedModelError: A parametrisation, as of an adapter, has changed them.
        """
        modules = [module for module, _ in self._roles()]
        for module in modules:
            if len(type(module).__bases__) != 2:
                raise UnsupportedModelError(
                    f"An adapter or a parametrisation has changed {self.state.name} or its "
                    "router. Merge, unload or remove it first."
                )
        for module in modules:
            module.__class__ = type(module).__bases__[1]
            del module.expert_state


def check_whole(experts: Any) -> None:
    """Check that this process has all experts of a layer, whole.

    Raises:
        UnsupportedModelError: It has a part of them.
    """
    state: ExpertState = experts.expert_state
    packing = state.packed.packings[0]
    found = packing.apart(find_parameter(experts, packing.name))
    whole = (len(found), found.shape[packing.dim or 0])
    expected = (state.packed.experts, state.packed.d_ff)
    if whole != expected or getattr(experts, "_is_expert_parallel", False):
        raise UnsupportedModelError(
            f"{state.name} holds {whole[0]} experts of {whole[1]} neurons, of {expected[0]} of "
            f"{expected[1]}: they are sharded, and neurons of experts can only be chosen on the "
            "whole. Load the model without tensor or expert parallelism."
        )


def _compiling() -> bool:
    return torch.compiler.is_compiling()


_CLASSES: dict[tuple[type[PathwayRouted], type[nn.Module]], type[PathwayRouted]] = {}


def _routed_class(role: type[PathwayRouted], own: type[nn.Module]) -> type[PathwayRouted]:
    if (role, own) not in _CLASSES:
        namespace = {"__module__": __name__, "__doc__": role.__doc__}
        _CLASSES[role, own] = type(f"Pathway{own.__name__}", (role, own), namespace)
    return _CLASSES[role, own]


def _new_routed(role: type[PathwayRouted], own: type[nn.Module]) -> PathwayRouted:
    cls = _routed_class(role, own)
    return cls.__new__(cls)
