"""Which pathway is on: a per-thread stack of choices, one model's apart from another's.

Decoder layers call their FFN without keyword arguments, so the choice travels as state. The stack
is a linked list in one ``threading.local``: threads do not see each other, a reader takes one
attribute, and an entry that has ended is passed over wherever it stands. (A ContextVar would break
Dynamo; attributes of the modules would break threads.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_sparse_pathways.ffn.mixtures import Mixture

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.picking import Picking


class ModelKey:
    """Identity of one model. A deep copy or unpickled model has another, so it chooses alone."""


@dataclass(eq=False)
class Choice:
    """What one model computes, until the choice below it is restored.

    Attributes:
        key: The model it holds for; None means every model.
        pathway: The index of one pathway for all rows; an int64 tensor ``(batch,)`` with one index
            per row, -1 for dense rows; or None for dense.
        executor: Name of the executor that computes with the copies.
        copies: Key of the copies to compute with, or how a batch is mixed; they are resident until
            the choice is taken back. Without, and in blocks that cannot use any, it is masked.
        rest: Whether the leaves outside the FFN blocks have copies too.
        held: The pathway whose copies are resident as long, for the passes within; or what was
            picked from the call's prompt.
        expand: Whether per-row indices may be repeated to fit a larger batch (beams).
        below: The choice made before.
        ended: Whether it holds no more.
        asked: What a scope asks each call within to decide from its own prompt, ``"auto"`` for all
            rows or some; None where all is decided.
        guard: What watches the text of a generation, and changes ``pathway`` between its passes.
        routed: The domain of each row, where a router has decided; or what is picked from each.
        call: What picks neurons from the prompt of a call, for the passes within.
        sees: The same in a pass of the prompt, which shows its activations.
        picked: The same in a pass of what comes after; ``pathway`` is then a number of its own.
        inputs: Inputs of the FFN blocks that are running, for their bypasses; by block state.
        routes: Where the tokens of those with clusters go, with the input that was routed.
        ups: What the gates of blocks that skip neurons are multiplied by; by block state.
        gates: What they make of the gates; until the rest of the neuron is computed.
        active: Which of the kept neurons any token of a short input needs.
    """

    key: ModelKey | None
    pathway: int | Tensor | None
    executor: str = "masked"
    copies: int | Mixture | None = None
    rest: bool = False
    expand: bool = False
    below: "Choice | None" = None
    ended: bool = False
    held: "int | Picking | None" = None
    asked: Any = None
    guard: Any = None
    routed: Any = None
    call: "Picking | None" = None
    sees: "Picking | None" = None
    picked: "Picking | None" = None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    routes: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    ups: dict[int, Tensor] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)
    active: dict[int, Tensor] = field(default_factory=dict)

    @property
    def own(self) -> int | Tensor | None:
        """``pathway`` in the numbers of the model's own pathways, -1 where neurons were picked."""
        if self.picked is None or self.pathway is None:
            return self.pathway
        return self.picked.own(self.pathway)

    @cached_property
    def rows(self) -> list[int] | None:
        """The index of each row, taken off the device once; None if all rows have the same."""
        return self.pathway.tolist() if isinstance(self.pathway, Tensor) else None


class _Local(threading.local):
    top: Choice | None = None


_LOCAL = _Local()


def find_choice(key: ModelKey) -> Choice | None:
    """Return the newest choice that holds for a model, or None if there is none."""
    choice = _LOCAL.top
    while choice is not None and (choice.ended or choice.key not in (key, None)):
        choice = choice.below
    return choice


def push_choice(
    key: ModelKey | None,
    pathway: int | Tensor | None,
    *,
    executor: str = "masked",
    copies: int | Mixture | None = None,
    rest: bool = False,
    expand: bool = False,
) -> Choice:
    """Make a choice on this thread; return it for ``remove_choice``. See ``Choice``."""
    _LOCAL.top = Choice(key, pathway, executor, copies, rest, expand, _LOCAL.top)
    return _LOCAL.top


def remove_choice(choice: Choice) -> None:
    """Take a choice back, wherever it stands by now.

    Scopes held open by generators need not end in the order in which they began; putting back a
    remembered head would then bring back a choice that has ended.
    """
    choice.ended = True
    top = _LOCAL.top
    while top is not None and top.ended:
        top = top.below
    _LOCAL.top = top


@contextmanager
def all_dense() -> Iterator[None]:
    """Within the block, every model on this thread computes densely."""
    choice = push_choice(None, None)
    try:
        yield
    finally:
        remove_choice(choice)


def _snapshot(choice: Choice | None) -> Choice | None:
    """Copy the choices that hold now, so that they hold in the copy after they have ended."""
    if choice is None:
        return None
    below = _snapshot(choice.below)
    return below if choice.ended else replace(choice, below=below)


class CheckpointedChoices:
    """A gradient-checkpointing function under which the recomputation sees the same choices.

    The recomputation runs in the backward pass, after ``forward`` has restored the stack and, on
    an accelerator, on another thread. Without this its gradients are silently those of the dense
    model.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function``, re-entering the choices of now whenever it runs."""
        captured = _snapshot(_LOCAL.top)

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            previous = _LOCAL.top
            _LOCAL.top = captured
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                _LOCAL.top = previous

        return self.checkpoint(run, *args, **kwargs)
