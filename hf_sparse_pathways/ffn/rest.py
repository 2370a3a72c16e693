"""The linear leaves outside the FFN blocks (attention, head), for executors of every leaf."""

import threading
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.leaves import PathwayLeaf, RestLeaf, restore_leaf, swap_leaf
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.state import BlockState
from hf_sparse_pathways.ffn.stored import lies_in_memory

REST = -2
"""Key of the copies of all of them, among the residents."""

_SWAPPING = threading.Lock()

_LINEAR = (nn.Linear, Conv1D)


class RestLeaves:
    """A model's linear leaves outside the FFN blocks; their classes are swapped while in use.

    They are looked for when the model is made, and looked at when they are used: a model that is
    being loaded has no weights yet.

    Attributes:
        leaves: Those that are swapped now.
    """

    def __init__(self, model: nn.Module, key: ModelKey, residents: Residents) -> None:
        self.leaves: tuple[PathwayLeaf, ...] = ()
        self._state = BlockState(key, 0, residents)
        self._found = [module for module in model.modules() if type(module) in _LINEAR]

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
    if type(module) not in _LINEAR or hasattr(module, "_hf_hook"):
        return False
    weight: Any = module.weight
    return lies_in_memory(weight) and not weight.is_meta
