"""The linear leaves that every pass computes whole, for executors of every leaf.

They are those outside the FFN blocks (attention, head), and in a model that was loaded with one
domain's neurons the FFN's, too.
"""

import threading
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.leaves import (
    PathwayLeaf,
    RestLeaf,
    computes_linear,
    restore_leaf,
    swap_leaf,
)
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.state import BlockState
from hf_sparse_pathways.ffn.stored import lies_in_memory

REST = -2
"""Key of the copies of all of them, among the residents."""

_SWAPPING = threading.Lock()

_LINEAR = (nn.Linear, Conv1D)


class RestLeaves:
    """A model's linear leaves that are computed whole; their classes are swapped while in use.

    They are looked for when the model is made, and looked at when they are used: a model that is
    being loaded has no weights yet. Leaves of FFN blocks are left out for as long as they have
    pathways.

    Attributes:
        leaves: Those that are swapped now.
        reduced: The leaves of each FFN block that holds one pathway's neurons alone.
    """

    def __init__(
        self,
        model: nn.Module,
        key: ModelKey,
        residents: Residents,
        apart: Sequence[nn.Module] = (),
    ) -> None:
        """Find the leaves; none inside of modules that are to be left ``apart``."""
        left = {id(inner) for module in apart for inner in module.modules()}
        self.leaves: tuple[PathwayLeaf, ...] = ()
        self.reduced: tuple[tuple[nn.Module, ...], ...] = ()
        self._state = BlockState(key, 0, residents)
        self._found = [
            module
            for module in model.modules()
            if isinstance(module, _LINEAR) and id(module) not in left
        ]

    @property
    def candidates(self) -> Sequence[Any]:
        """The leaves that are swapped, or would be."""
        return self.leaves or [module for module in self._found if _is_plain(module)]

    def use(self, wanted: bool) -> bool:
        """Swap the leaves' classes, or restore them, in place; return whether that was to do."""
        if wanted == bool(self.leaves):
            return False
        with _SWAPPING:
            if wanted and not self.leaves:
                leaves = self.candidates
                for leaf in leaves:
                    swap_leaf(leaf, RestLeaf, self._state)
                self.leaves = tuple(leaves)
            elif not wanted and self.leaves:
                leaves, self.leaves = self.leaves, ()
                for leaf in leaves:
                    leaf.drop_copies()
                    restore_leaf(leaf)
        return True


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes ``linear`` with weights that lie in memory as they are."""
    weight: Any = module._parameters.get("weight")  # another's, if it is parametrised
    if weight is None or isinstance(module, PathwayLeaf) or hasattr(module, "_hf_hook"):
        return False
    return lies_in_memory(weight) and not weight.is_meta and computes_linear(module, type(module))
