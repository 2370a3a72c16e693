"""Routed experts of which one pathway's are held alone.

The packed parameters become smaller, the router stays as it is and is restricted to the kept
experts for good; their numbers are translated on the way from one to the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_sparse_pathways.ffn.attached_experts import AttachedExperts
from hf_sparse_pathways.ffn.attached_linear import AttachedLinear
from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.expert_layouts import Packing, cut_experts, find_parameter
from hf_sparse_pathways.ffn.experts import RoutedExperts
from hf_sparse_pathways.ffn.kept_experts import KeptExperts
from hf_sparse_pathways.ffn.runs import Run, find_runs
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN


class ReducedExperts:
    """One layer's routed experts on their way to those of one pathway.

    Attributes:
        found: Those of the live model.
        kept: What the pathway keeps of them.
    """

    def __init__(self, found: RoutedExperts, kept: KeptExperts) -> None:
        self.found, self.kept = found, kept
        self._reserved: set[str] = set()

    def parameters(self) -> list[tuple[nn.Module, str, Packing, list[Run]]]:
        """Return what is to be cut: module, name in it, how it is packed, and the rows that stay.

        The rows are those of the first dimension that belong to kept experts.
        """
        parts = []
        for packing in self.found.packed.packings:
            path, _, name = packing.name.rpartition(".")
            holder = self.found.module.get_submodule(path)
            rows = len(holder.get_parameter(name)) // packing.experts
            runs = [(start * rows, stop * rows) for start, stop in find_runs(self.kept.keep)]
            parts.append((holder, name, packing, runs))
        return parts

    def reserve(self, holder: nn.Module, name: str, packing: Packing, runs: Sequence[Run]) -> None:
        """Give a parameter that is not loaded yet the shape of the kept experts', in place."""
        old = holder.get_parameter(name)
        shape = [sum(stop - start for start, stop in runs), *old.shape[1:]]
        empty = torch.empty(shape, dtype=old.dtype, device=old.device)
        holder._parameters[name] = nn.Parameter(empty, requires_grad=old.requires_grad)
        self._reserved.add(packing.name)

    @torch.no_grad()
    def finish(self) -> None:
        """Cut what is still whole, in place, and restrict the router."""
        experts, neurons, silent = self.kept.padded_indices()
        here = torch.arange(len(experts))
        width = self.found.packed.d_ff if neurons is None else neurons.shape[1]
        tensors = {}
        for number, packing in enumerate(self.found.packed.packings):
            weight = find_parameter(self.found.module, packing.name)
            whole = packing.name not in self._reserved
            if not whole:
                packing = packing.of(len(experts))
            needed = (experts if whole else here).to(weight.device)
            own = None if neurons is None else neurons.to(weight.device)
            cut = packing.take(weight, needed, own, 0 if number else silent)
            tensors[packing.name] = nn.Parameter(cut, requires_grad=weight.requires_grad)
        made = cut_experts(self.found.module, type(self.found.module), tensors, len(experts), width)
        self.found.module.__dict__.update(made.__dict__)
        AttachedExperts(self.found, ModelKey()).reduce(self.kept)


class ReducedLinear(ReducedExperts):
    """A sgatlin layer on its way to the experts of one pathway.

    Its tables are read whole and cut then: kept experts of one channel lie apart from another's.
    """

    def parameters(self) -> list[tuple[nn.Module, str, Packing, list[Run]]]:
        """Return what is to be cut before it is read: nothing."""
        return []

    @torch.no_grad()
    def finish(self) -> None:
        """Cut the tables, in place, and restrict the router."""
        layer: Any = self.found.module
        for name in ("u", "v"):
            table = getattr(layer, name)
            rows = table.flatten(0, 1)[self.kept.keep.to(table.device)]
            setattr(layer, name, nn.Parameter(rows[None], requires_grad=table.requires_grad))
        AttachedLinear(self.found, ModelKey()).reduce(self.kept)


def reduce_experts(found: RoutedExperts, kept: KeptExperts) -> ReducedExperts:
    """Return a layer's routed experts on their way to those of one pathway."""
    kind = ReducedLinear if isinstance(found.module, SgatlinFFN) else ReducedExperts
    return kind(found, kept)
