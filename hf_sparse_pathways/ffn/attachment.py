"""The swapped leaves of one model: put on, given pathways, kept right, taken off.

A model can change under us: an adapter library wraps a leaf, a quantiser replaces one, a
dispatcher offloads its weights. ``settle`` looks at every block before a forward pass and keeps
the result exact: wrapped blocks are masked in front of the wrapper, offloaded ones are masked in
the leaf, and a replaced leaf is an error instead of silently dense output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.choices import Choice, ModelKey, find_choice, push_choice, remove_choice
from hf_sparse_pathways.ffn.copies import (
    WHOLE,
    Key,
    copy_bytes,
    copy_keys,
    drop_copies,
    kept_weights,
)
from hf_sparse_pathways.ffn.execution import PACKING, Execution, choose_execution
from hf_sparse_pathways.ffn.leaves import (
    IncomingLeaf,
    OutgoingLeaf,
    PathwayLeaf,
    restore_leaf,
    swap_leaf,
)
from hf_sparse_pathways.ffn.mixtures import Mixture
from hf_sparse_pathways.ffn.packing import Packed
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.rest import REST, RestLeaves
from hf_sparse_pathways.ffn.slices import has_views
from hf_sparse_pathways.ffn.state import BlockState

_MOST_MIXTURES = 16
"""How many mixed batches are remembered, so that a generation sorts its rows once."""


class Attachment:
    """The FFN blocks of one model with swapped leaves.

    Attributes:
        key: The model's identity among the choices.
        blocks: One entry per FFN block, in layer order.
        rest: The linear leaves outside of them.
        residents: Which pathways have copies of their kept weights.
    """

    def __init__(self, model: nn.Module) -> None:
        """Swap the leaves of a model, in place.

        Raises:
            UnsupportedModelError: No FFN block was found.
        """
        self.key = ModelKey()
        self.residents = Residents(self.copy_bytes, self._drop_key)
        self.blocks = tuple(
            AttachedBlock(block, self.key, self.residents) for block in find_blocks(model)
        )
        self.rest = RestLeaves(model, self.key, self.residents)
        self._execution: tuple[Any, Execution] | None = None
        self._samples: Tensor | None = None
        self._mixtures: dict[Any, Mixture] = {}

    def load(self, pathways: Sequence[Sequence[BlockPathway]]) -> None:
        """Replace the pathways, in place; each has one entry per block."""
        for index, attached in enumerate(self.blocks):
            attached.state.set_pathways(tuple(blocks[index] for blocks in pathways))
        self.reset()

    # -- executors --------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all copies, and which executor was chosen."""
        self._execution = None
        self._mixtures = {}
        self.drop_copies()
        self.rest.use(False)

    def execution(self, name: str) -> Execution:
        """Return what the name of an executor stands for now; see ``choose_execution``."""
        if not self.blocks:
            return Execution("masked", "one domain's neurons were loaded alone")
        if torch.compiler.is_compiling():  # nothing can be tested or packed while tracing
            return Execution(name if name in ("masked", "sliced") else "compact", "as traced")
        weight = self._ffn_leaves[0].weight
        now = (name, weight.dtype, weight.device, self.residents.limit, torch.get_num_threads())
        if self._execution is None or self._execution[0] != now:
            before, chosen = self._execution, choose_execution(name, self)
            self._execution = (now, chosen)
            if before is not None and before[1].executor != chosen.executor:
                self.drop_copies()
        return self._execution[1]

    def begin(self, pathway: int | Tensor | None, name: str, *, looked: bool) -> Choice:
        """Make the choice for one forward pass, its copies pinned; ``end`` takes it back.

        Args:
            pathway: What is computed.
            name: The executor that was asked for.
            looked: Whether ``check_copies`` has run for this pass.
        """
        executor, copies, rest = "masked", None, False
        if pathway is not None or name in PACKING:
            self.settle()
            if not torch.is_grad_enabled():  # copies carry no gradient, masks do
                executor = self.execution(name).executor
        if executor != "masked":
            if not looked:
                self.check_copies()
            copies = self._pin_copies(WHOLE if pathway is None else pathway)
        if executor in PACKING:
            self.rest.use(executor == "packed-all")
            if torch.is_autocast_enabled("cpu"):  # which oneDNN's operators do not follow
                executor = "compact"
            else:
                rest = bool(self.rest.leaves) and self._pin(REST)
        return push_choice(self.key, pathway, executor=executor, copies=copies, rest=rest)

    def hold(self, pathway: int | Tensor | None, name: str, *, plain: bool, expand: bool) -> Choice:
        """Make the choice for several forward passes; ``end`` takes it back.

        The copies of one pathway for all rows are made and pinned, so that each pass finds them,
        compiled ones too: while a graph is traced none can be made.

        Args:
            pathway: What is computed.
            name: The executor that was asked for.
            plain: Whether the copies must not be packed, as for compiled passes.
            expand: Whether rows may be repeated, as in ``Choice``.
        """
        choice = push_choice(self.key, pathway, expand=expand)
        if not isinstance(pathway, int) or torch.is_grad_enabled():
            return choice
        executor = self.execution(name).executor
        if executor != "masked" and self._pin(pathway):
            choice.held = pathway
            try:
                self.make_copies(pathway, packed=executor in PACKING and not plain)
            except BaseException:
                self.end(choice)
                raise
        return choice

    def end(self, choice: Choice) -> None:
        """Take back what ``begin`` or ``hold`` did."""
        remove_choice(choice)
        if choice.held is not None:
            self._unpin(choice.held)
        if choice.copies is not None:
            self._unpin(_key(choice.copies))
        if choice.rest:
            self._unpin(REST)

    def _pin_copies(self, pathway: int | Tensor) -> int | Mixture | None:
        """Return what a pass computes with, or None if there is no room for it."""
        if torch.compiler.is_compiling():  # neither can copies be made then, nor rows be sorted
            held = self._held_plain()
            return held if isinstance(pathway, int) and pathway == held else None
        if isinstance(pathway, int):
            return pathway if self._pin(pathway) else None
        if self._is_sliced:  # which promises to take no memory
            return None
        rows = (tuple(pathway.tolist()), pathway.device)
        mixture = self._mixtures.get(rows)
        if mixture is None:
            if len(self._mixtures) >= _MOST_MIXTURES:
                self._mixtures.clear()
            mixture = self._mixtures[rows] = Mixture.of(pathway)
        return mixture if self._pin(mixture.key) else None

    def _held_plain(self) -> int | None:
        """Return the pathway that is held on this thread, if its copies can be traced."""
        ambient = find_choice(self.key)
        held = None if ambient is None else ambient.held
        if held is None or any(not _is_traceable(leaf, held) for leaf in self._leaves_of(held)):
            return None
        return held

    def _pin(self, key: Key) -> bool:
        """Pin copies; a graph that is traced holds them itself."""
        return torch.compiler.is_compiling() or self.residents.pin(key)

    def _unpin(self, key: Key) -> None:
        if not torch.compiler.is_compiling():
            self.residents.unpin(key)

    # -- copies -----------------------------------------------------------------------------

    def drop_copies(self) -> None:
        """Forget all copies of weights; they are made again when needed."""
        for leaf in (*self._ffn_leaves, *self.rest.leaves):
            leaf.drop_copies()
        self.residents.clear()

    def copy_bytes(self, key: Key) -> int:
        """Return how many bytes the copies of a pathway take, or those of another key."""
        packed = self._execution is not None and self._execution[1].executor in PACKING
        return self._bytes(key, packed=packed)

    def make_copies(self, key: Key, *, packed: bool) -> None:
        """Make the copies of a key that are not there or out of date."""
        for leaf in self._leaves_of(key):
            for own in copy_keys(leaf, _of_leaf(key)):
                kept_weights(leaf, own, packed=packed)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the FFN weights."""
        return sum(leaf.weight.numel() * leaf.weight.element_size() for leaf in self._ffn_leaves)

    def most_bytes(self, executor: str) -> int:
        """Return how many bytes of packed copies the largest pathway needs under an executor."""
        pathways = range(len(self.blocks[0].state.pathways))
        most = max((self._bytes(pathway, packed=True) for pathway in pathways), default=0)
        return most + (self._bytes(REST, packed=True) if executor == "packed-all" else 0)

    def _bytes(self, key: Key, *, packed: bool) -> int:
        own = _of_leaf(key)
        return sum(copy_bytes(leaf, own, packed=packed) for leaf in self._leaves_of(key))

    def _drop_key(self, key: Key) -> None:
        for leaf in self.rest.leaves if key == REST else self._ffn_leaves:
            drop_copies(leaf, _of_leaf(key))

    def _leaves_of(self, key: Key) -> Sequence[PathwayLeaf]:
        """Return the leaves that have copies of a key."""
        if key == REST:
            return self.rest.candidates
        leaves = self._compact_leaves
        if self._is_sliced and isinstance(key, int) and key != WHOLE:
            return [leaf for leaf in leaves if not has_views(leaf, key)]
        return leaves

    @property
    def _is_sliced(self) -> bool:
        return self._execution is not None and self._execution[1].executor == "sliced"

    @property
    def _ffn_leaves(self) -> list[PathwayLeaf]:
        return [leaf for attached in self.blocks for leaf in attached.leaves.values()]

    @property
    def _compact_leaves(self) -> list[PathwayLeaf]:
        return [leaf for attached in self.blocks for leaf in attached.compact_leaves]

    def check_copies(self) -> None:
        """Drop copies whose weights were written past autograd's version counter.

        ``parameter.data`` (merging an adapter, averaging weights) leaves no trace that a copy's
        stamp could show. Samples of the weights do, unless a write touches single entries only:
        after such a write call ``set_executor``, ``train`` or ``eval``, which drop all copies.
        """
        leaves = [*self._compact_leaves, *self.rest.leaves]
        if torch.compiler.is_compiling() or not leaves:
            return
        samples = torch.stack([_sample(leaf) for leaf in leaves])
        if self._samples is not None:  # leaves outside the blocks come and go, at the end
            common = min(len(samples), len(self._samples))
            if not torch.equal(samples[:common], self._samples[:common]):
                self.drop_copies()
        self._samples = samples

    def settle(self) -> None:
        """Notice wrapped, replaced and offloaded leaves; called before each sparse forward.

        Raises:
            UnsupportedModelError: A leaf was replaced by a module that does not contain it.
        """
        for attached in self.blocks:
            attached.settle()

    def detach(self) -> None:
        """Restore the leaves' own classes, in place."""
        self.rest.use(False)
        for attached in self.blocks:
            attached.detach()


def _is_traceable(leaf: PathwayLeaf, key: int) -> bool:
    return key in leaf.copies and not isinstance(leaf.copies[key].weight, Packed)


def _key(copies: int | Mixture) -> Key:
    return copies.key if isinstance(copies, Mixture) else copies


def _of_leaf(key: Key) -> Key:
    """Return the key of a leaf's copies: of a leaf outside the FFN blocks there is but one."""
    return WHOLE if key == REST else key


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
        self._hook: Any = None

    def drop_copies(self) -> None:
        """Forget the copies of kept weights."""
        for leaf in self.leaves.values():
            leaf.drop_copies()

    def settle(self) -> None:
        """See ``Attachment.settle``. Costs a few dictionary look-ups when nothing has changed."""
        for (children, key), seen in zip(self._places, self._seen, strict=False):
            if children[key] is not seen:
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
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        outside = seen[-1] is not leaves[-1]
        if outside:
            self._hook = seen[-1].register_forward_pre_hook(_MaskInput(self.state))
        self.state.masked_outside = outside
        self.state.masked_only = bool(
            _differ(seen, leaves) or self.block.entangled or not all(map(_is_plain, leaves))
        )
        self.drop_copies()
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
        choice = find_choice(self.state.key)
        if choice is None or choice.pathway is None:
            return None
        return (self.state.mask(args[0], choice.pathway), *args[1:])


def _differ(modules: list[nn.Module], leaves: list[Any]) -> bool:
    return any(module is not leaf for module, leaf in zip(modules, leaves, strict=True))


def _is_swapped(leaf: nn.Module) -> bool:
    """Whether a leaf's class is still the one made here; a parametrisation changes it again."""
    return len(type(leaf).__bases__) == 2


@torch.no_grad()
def _sample(leaf: PathwayLeaf) -> Tensor:
    """Return a weighted sum of about a hundred entries of a leaf's weight, on the CPU."""
    values = leaf.weight.detach().flatten()
    values = values[:: max(1, len(values) // 101)].float()
    return (values * torch.arange(1, len(values) + 1, device=values.device)).sum().cpu()


def _is_plain(leaf: PathwayLeaf) -> bool:
    """Whether a leaf computes what ``linear`` does with weights that lie in memory as they are."""
    if not _is_swapped(leaf):
        return False
    hook = getattr(leaf, "_hf_hook", None)
    if getattr(hook, "offload", False) or type(leaf.weight.data) is not Tensor:
        return False
    own: Any = type(leaf).__bases__[1]
    return own.forward in (nn.Linear.forward, Conv1D.forward) or _behaves_linearly(leaf)


@torch.no_grad()
def _behaves_linearly(leaf: PathwayLeaf) -> bool:
    """Compare a leaf whose class has its own forward with ``linear`` on one random vector."""
    weight = leaf.weight
    if weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, weight.shape[1], generator=generator).to(weight)
    expected = functional.linear(probe, weight, leaf.bias)
    return torch.allclose(leaf.dense(probe), expected, rtol=1e-2, atol=1e-4)
