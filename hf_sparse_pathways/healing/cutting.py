"""From the tuned dense model to a pathway's student: what was learnt of the kept neurons.

A student is trained as its pathway is: a change of a leaf of the dense model is a change of the
same rank and kind of the student's leaf, without the rows or columns of removed neurons.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_sparse_pathways.healing.adapters import FACTORS
from hf_sparse_pathways.healing.students import Student, StudentLeaf, base_weight


@torch.no_grad()
def cut(student: Student, dense: Student, state: Mapping[str, Tensor], frozen: nn.Module) -> None:
    """Give a student what the dense model had learnt, in place.

    Args:
        student: Untrained, ready to be trained.
        dense: The dense partner's student, trained in the same way.
        state: Its trained parameters by name, at the moment of the cut.
        frozen: The dense model that both were made from.
    """
    parameters = dict(student.model.named_parameters())
    for name in state.keys() - _names(dense):  # of the attention, which is nobody's to cut
        parameters[name].copy_(state[name])
    for leaf, whole in zip(student.trained_leaves(), dense.trained_leaves(), strict=True):
        outer, inner = (f"{leaf.place}.{factor}" for factor in FACTORS)
        if outer in state:
            parameters[outer].copy_(_kept(state[outer], leaf, 0) if leaf.incoming else state[outer])
            parameters[inner].copy_(state[inner] if leaf.incoming else _kept(state[inner], leaf, 1))
        else:
            name = f"{leaf.place}.weight"
            change = state[name] - base_weight(frozen, whole)
            parameters[name].add_(_kept(change, leaf, 0 if leaf.incoming else 1))


def _names(dense: Student) -> set[str]:
    """Return the names of all parameters that are trained in the FFN's leaves."""
    parts = ("weight", *FACTORS)
    return {f"{leaf.place}.{part}" for leaf in dense.trained_leaves() for part in parts}


def _kept(tensor: Tensor, leaf: StudentLeaf, dim: int) -> Tensor:
    return tensor.index_select(dim, leaf.index.to(tensor.device))
