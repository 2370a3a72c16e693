"""Which pathway is on: a per-thread stack of choices, one model's apart from another's.

Decoder layers call their FFN without keyword arguments, so the choice travels as state. The stack
is a linked list of immutable entries in one ``threading.local``: threads do not see each other,
a reader takes one attribute, and restoring the previous head undoes any nesting, also after an
error. (A ContextVar would break Dynamo; attributes of the modules would break threads.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class ModelKey:
    """Identity of one model. A deep copy or unpickled model has another, so it chooses alone."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What one model computes, until the choice below it is restored.

    Attributes:
        key: The model it holds for; None means every model.
        pathway: The index of one pathway for all rows; an int64 tensor ``(batch,)`` with one index
            per row, -1 for dense rows; or None for dense.
        executor: Name of the executor; blocks that cannot use it, and per-row choices, are masked.
        expand: Whether per-row indices may be repeated to fit a larger batch (beams).
        below: The choice made before.
    """

    key: ModelKey | None
    pathway: int | Tensor | None
    executor: str = "masked"
    expand: bool = False
    below: "Choice | None" = None


class _Local(threading.local):
    top: Choice | None = None


_LOCAL = _Local()


def find_choice(key: ModelKey) -> Choice | None:
    """Return the newest choice that holds for a model, or None if there is none."""
    choice = _LOCAL.top
    while choice is not None and choice.key is not key and choice.key is not None:
        choice = choice.below
    return choice


def push_choice(
    key: ModelKey | None,
    pathway: int | Tensor | None,
    *,
    executor: str = "masked",
    expand: bool = False,
) -> Choice | None:
    """Make a choice on this thread; return the previous head for ``restore_choices``."""
    previous = _LOCAL.top
    _LOCAL.top = Choice(key, pathway, executor, expand, previous)
    return previous


def restore_choices(previous: Choice | None) -> None:
    """Put back the head that ``push_choice`` returned."""
    _LOCAL.top = previous


@contextmanager
def all_dense() -> Iterator[None]:
    """Within the block, every model on this thread computes densely."""
    previous = push_choice(None, None)
    try:
        yield
    finally:
        restore_choices(previous)


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
        captured = _LOCAL.top

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            previous = _LOCAL.top
            _LOCAL.top = captured
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                _LOCAL.top = previous

        return self.checkpoint(run, *args, **kwargs)
