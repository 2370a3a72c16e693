"""What a pathway keeps of one layer's routed experts: some of them, and some neurons of each.

The router chooses among the kept experts as if the others' logits were minus infinity. All kept
experts have the same number of kept neurons, so that packed weights only get smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_pathways.errors import MismatchError

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.experts import RoutedExperts

_MULTIPLE = 8
"""Grouped products want rows of 16 bytes, which are eight numbers of the smallest dtype."""

EXPERT_PARTS = ("keep", "neurons")
"""Names of the tensors that it may hold; the first one it always has."""


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """Name and numbers of one layer's routed experts.

    Attributes:
        name: Module name inside the decoder.
        experts: How many there are.
        top_k: How many a token has.
        groups: Groups of equal size that the router chooses among first; 1 for none.
        top_groups: How many of these a token has.
        d_in: Width of their input (d_model).
        d_ff: Neurons of each.
        d_out: Width of their output (d_model).
        branches: Rows of the incoming weights per neuron: 2 with a gate, else 1.
        channels: Choices that a token makes, each of ``top_k / channels`` among as many experts of
            its own, which lie one channel behind the other; more than 1 in sgatlin layers alone.
    """

    name: str
    experts: int
    top_k: int
    groups: int
    top_groups: int
    d_in: int
    d_ff: int
    d_out: int
    branches: int
    channels: int = 1

    @classmethod
    def of(cls, found: "RoutedExperts", prefix: str) -> "ExpertsShape":
        """Describe those of a live model; ``prefix`` is cut from the name."""
        packed = found.packed
        return cls(
            name=found.name.removeprefix(prefix),
            experts=packed.experts,
            top_k=found.top_k,
            groups=found.groups,
            top_groups=found.top_groups,
            d_in=packed.d_in,
            d_ff=packed.d_ff,
            d_out=packed.d_out,
            branches=packed.branches,
            channels=found.channels,
        )

    @property
    def weights(self) -> int:
        """Number of weights of all experts, biases apart."""
        return self.experts * self.d_ff * (self.branches * self.d_in + self.d_out)

    @property
    def single(self) -> bool:
        """Whether each is a neuron without gate, as in sgatlin layers: there is nothing in it."""
        return self.d_ff == self.branches == 1

    @property
    def least_per_group(self) -> int:
        """How many experts of each group are enough, whichever groups the router takes.

        A group is judged by its best two experts, where it has two.
        """
        share = -(-self.top_k // self.top_groups)
        most = self.experts // self.groups
        return share if self.groups == 1 else max(share, min(2, most))


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptExperts:
    """What a pathway keeps of one layer's routed experts.

    Attributes:
        keep: The experts that the router may choose, bool ``(experts,)``.
        neurons: Their kept neurons, bool ``(experts, d_ff)``, as many of each kept expert and none
            of the others; None for all.
    """

    keep: Tensor
    neurons: Tensor | None = None

    @property
    def kept(self) -> int:
        """Number of kept experts."""
        return int(self.keep.sum())

    @property
    def width(self) -> int | None:
        """Number of kept neurons of each kept expert; None for all."""
        return None if self.neurons is None else int(self.neurons.sum()) // max(1, self.kept)

    def parts(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        parts = {"keep": self.keep}
        return parts if self.neurons is None else {**parts, "neurons": self.neurons}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> "KeptExperts":
        """Build from what ``parts`` returned."""
        return cls(keep=parts["keep"], neurons=parts.get("neurons"))

    def indices(self) -> tuple[Tensor, Tensor | None]:
        """Return the kept experts, int64 ``(kept,)``, and their neurons, ``(kept, width)``."""
        experts = self.keep.nonzero().flatten()
        if self.neurons is None:
            return experts, None
        return experts, self.neurons[experts].nonzero()[:, 1].view(len(experts), -1)

    def padded_indices(self) -> tuple[Tensor, Tensor | None, int]:
        """Return ``indices`` with a width that is a multiple, and how many neurons that adds.

        The first neurons stand again at the end; their outgoing weights have to be zeros.
        """
        experts, neurons = self.indices()
        if neurons is None:
            return experts, None, 0
        silent = -neurons.shape[1] % _MULTIPLE
        return experts, torch.cat([neurons, neurons[:, :1].expand(-1, silent)], dim=1), silent

    def check(self, shape: ExpertsShape) -> None:
        """Check that it fits a layer's experts; of tensors without memory the shapes alone.

        Raises:
            MismatchError: It does not; the message says what does.
        """
        fitting = {"keep": (shape.experts,), "neurons": (shape.experts, shape.d_ff)}
        for part, tensor in self.parts().items():
            if tensor.dtype != torch.bool or tuple(tensor.shape) != fitting[part]:
                raise MismatchError(
                    f"{part} of the experts {shape.name} is {tensor.dtype} {tuple(tensor.shape)}; "
                    f"it has to be torch.bool {fitting[part]}."
                )
        if self.neurons is not None and shape.single:
            raise MismatchError(
                f"The experts {shape.name} are single neurons: say which experts are kept, and "
                "nothing of neurons."
            )
        if not self.keep.is_meta:
            self._check_enough(shape)
            self._check_widths(shape)

    def _check_enough(self, shape: ExpertsShape) -> None:
        if self.kept < shape.top_k:
            raise MismatchError(
                f"{self.kept} of the {shape.experts} experts {shape.name} are kept, but a token "
                f"has {shape.top_k}. Keep at least as many."
            )
        least = int(self.keep.view(shape.channels, -1).sum(1).min())
        if least < shape.top_k // shape.channels:
            raise MismatchError(
                f"A channel of {shape.name} keeps {least} experts, but a token has "
                f"{shape.top_k // shape.channels} of each channel. Keep at least as many of each."
            )
        if shape.groups == 1:
            return
        counts = self.keep.view(shape.groups, -1).sum(1)
        two = min(2, shape.experts // shape.groups)
        fewest = counts[counts > 0].sort().values[: shape.top_groups]
        if int((counts >= two).sum()) < shape.top_groups or int(fewest.sum()) < shape.top_k:
            raise MismatchError(
                f"The router of {shape.name} takes {shape.top_k} experts of {shape.top_groups} of "
                f"{shape.groups} groups, and of the groups {counts.tolist()} experts are kept, "
                f"which may be too few. Keep at least {shape.least_per_group} of each group."
            )

    def _check_widths(self, shape: ExpertsShape) -> None:
        if self.neurons is None:
            return
        widths = self.neurons.sum(1)
        own = widths[self.keep]
        if int(own.min()) < 1 or int(own.min()) != int(own.max()) or int(widths[~self.keep].sum()):
            raise MismatchError(
                f"Of the experts {shape.name} the kept ones keep {int(own.min())} to "
                f"{int(own.max())} neurons. Keep equally many of each, at least one, and none of "
                "the experts that are removed."
            )
