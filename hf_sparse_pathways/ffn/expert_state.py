"""What the router and the experts of one layer share: what each pathway keeps, on each device.

Where a pathway keeps some neurons only, the experts are computed by their own class's forward on
smaller weights: copied once per pathway and remade when the weights have changed, or, where
gradients flow or there is no room, taken anew from the experts that a call needs.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.expert_layouts import cut_experts, find_parameter
from hf_sparse_pathways.ffn.experts import RoutedExperts
from hf_sparse_pathways.ffn.kept_experts import KeptExperts

_MAKING = threading.Lock()


@dataclass(frozen=True)
class CutExperts:
    """Some experts with some of their neurons.

    Attributes:
        module: Computes them.
        places: Each expert's number in it, int64 ``(experts,)``.
        stamp: Identifies the weights that it was made of.
    """

    module: nn.Module
    places: Tensor
    stamp: tuple[object, ...]


class ExpertState:
    """What the router and the experts of one layer share.

    Attributes:
        key: The model that they belong to.
        name: Of the module that holds the experts.
        packed: How they are packed.
        own: That module's own class.
        pathways: What each pathway keeps; None where it keeps everything.
        alone: What is kept where one domain's experts were loaded alone.
        places: Each expert's number among these, int64 ``(experts,)``; None where all are there.
    """

    def __init__(self, key: ModelKey, found: RoutedExperts) -> None:
        self.key = key
        self.name = found.name
        self.packed = found.packed
        self.own = type(found.module)
        self.pathways: tuple[KeptExperts | None, ...] = ()
        self._restricts = False
        self.alone: KeptExperts | None = None
        self.places: Tensor | None = None
        self._removed: dict[torch.device, Tensor] = {}
        self._neurons: dict[tuple[int, torch.device], tuple[Tensor, int]] = {}
        self._copies: dict[int, CutExperts] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave copies and tables behind."""
        return {**self.__dict__, "_removed": {}, "_neurons": {}, "_copies": {}}

    def set_pathways(self, pathways: Sequence[KeptExperts | None]) -> None:
        """Replace what the pathways keep, in place."""
        self.pathways = tuple(pathways)
        self._restricts = any(
            part is not None and part.kept < len(part.keep) for part in self.pathways
        )
        self._removed, self._neurons = {}, {}
        self.drop()

    def narrows(self, pathway: int) -> bool:
        """Whether a pathway keeps some of the neurons only."""
        part = self.pathways[pathway] if 0 <= pathway < len(self.pathways) else None
        return part is not None and part.neurons is not None

    def removed(self, pathway: int | Tensor, tokens: int, device: torch.device) -> Tensor | None:
        """Return which experts are removed; None if none is.

        Args:
            pathway: One for all rows, or one per row as int64 ``(batch,)``, -1 for dense.
            tokens: How many tokens there are, those of a row together.
            device: Where.

        Returns:
            bool ``(experts,)``, or ``(tokens, experts)`` if rows differ.
        """
        if not self._restricts:
            return None
        table = self._removed.get(device)
        if table is None:
            whole = torch.ones(self.packed.experts, dtype=torch.bool)
            kept = [whole if part is None else part.keep for part in (*self.pathways, None)]
            with torch.inference_mode(False):
                table = ~torch.stack(kept).to(device)
            if not torch.compiler.is_compiling():
                self._removed[device] = table
        if isinstance(pathway, int):
            return table[pathway]
        rows = table[pathway.to(device)]
        return rows.repeat_interleave(tokens // len(rows), dim=0)

    def copy_bytes(self, experts: nn.Module, pathway: int) -> int:
        """Return how many bytes a pathway's copy of some experts takes."""
        part = self.pathways[pathway] if pathway < len(self.pathways) else None
        if part is None or part.width is None:
            return 0
        _, neurons, _ = part.padded_indices()
        wide = 0 if neurons is None else neurons.shape[1]
        share = part.kept * wide / (self.packed.experts * self.packed.d_ff)
        tensors = self._tensors(experts).values()
        return int(share * sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    def copy(self, experts: nn.Module, pathway: int) -> CutExperts:
        """Return a pathway's copy of its experts' neurons, made again if the weights changed."""
        found = self._copies.get(pathway)
        if torch.compiler.is_compiling() and found is not None:
            return found
        stamp = self._stamp(experts)
        if found is None or found.stamp != stamp:
            with _MAKING, torch.inference_mode(False), torch.no_grad():
                found = self._copies.get(pathway)
                if found is None or found.stamp != stamp:
                    part = self.pathways[pathway]
                    assert part is not None  # or it narrows nothing
                    kept = part.keep.nonzero().flatten().to(_device(experts))
                    found = self._copies[pathway] = self._cut(experts, pathway, kept, stamp)
        return found

    def cut_for(self, experts: nn.Module, pathway: int, index: Tensor) -> CutExperts:
        """Return the neurons of those experts that a call needs. Differentiable.

        Args:
            experts: The module that holds all.
            pathway: One that keeps some of the neurons only.
            index: The experts of each token.
        """
        if torch.compiler.is_compiling():  # which ones these are is not known while tracing
            needed = torch.arange(self.packed.experts, device=index.device)
        else:
            needed = torch.unique(index)
        return self._cut(experts, pathway, needed, ())

    def has_copy(self, pathway: int) -> bool:
        """Whether a pathway's copy is there, if it needs one."""
        return not self.narrows(pathway) or pathway in self._copies

    def drop(self, pathway: int | None = None) -> None:
        """Forget a pathway's copy, or all."""
        if pathway is None:
            self._copies.clear()
        else:
            self._copies.pop(pathway, None)

    def _cut(
        self, experts: nn.Module, pathway: int, needed: Tensor, stamp: tuple[object, ...]
    ) -> CutExperts:
        """Take some experts' kept neurons."""
        all_neurons, silent = self._neurons_of(pathway, needed.device)
        neurons = all_neurons[needed]
        tensors = {
            packing.name: packing.take(
                find_parameter(experts, packing.name), needed, neurons, 0 if number else silent
            )
            for number, packing in enumerate(self.packed.packings)
        }
        module = cut_experts(experts, self.own, tensors, len(needed), neurons.shape[1])
        places = torch.zeros(self.packed.experts, dtype=torch.int64, device=needed.device)
        places = places.index_copy(0, needed, torch.arange(len(needed), device=needed.device))
        return CutExperts(module, places, stamp)

    def _neurons_of(self, pathway: int, device: torch.device) -> tuple[Tensor, int]:
        """Return each expert's kept neurons, int64 ``(experts, width)``; of removed ones any.

        How many of the last ones are to be silent stands beside them.
        """
        found = self._neurons.get((pathway, device))
        if found is None:
            part = self.pathways[pathway]
            assert part is not None  # or it narrows nothing
            with torch.inference_mode(False):
                kept, neurons, silent = part.padded_indices()
                assert neurons is not None  # likewise
                places = torch.zeros(len(part.keep), neurons.shape[1], dtype=torch.int64)
                found = places.index_copy(0, kept, neurons).to(device), silent
            if not torch.compiler.is_compiling():
                self._neurons[pathway, device] = found
        return found

    def _tensors(self, experts: nn.Module) -> dict[str, Tensor]:
        return {one.name: find_parameter(experts, one.name) for one in self.packed.packings}

    def _stamp(self, experts: nn.Module) -> tuple[object, ...]:
        """Return what changes with the weights."""
        stamp: list[object] = []
        for tensor in self._tensors(experts).values():
            version = 0 if tensor.is_inference() else tensor._version
            stamp += [tensor.data_ptr(), version, tensor.dtype, tensor.device]
        return tuple(stamp)


def _device(experts: nn.Module) -> torch.device:
    return next(experts.parameters()).device
