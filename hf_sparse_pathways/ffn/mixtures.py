"""Batches whose rows have different pathways: which neurons any of them needs, and whose rows.

A block computes the union of the kept neurons once for all rows; the rows' own masks are applied to
the activation. Where pathways have repaired columns of their own, each is applied to its own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NEARLY_EVERYTHING = 0.95
"""From this share of the neurons on, the union is computed by the leaf itself, without copies."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """The pathways of a batch's rows.

    Attributes:
        pathways: One index per row, int64 ``(batch,)``, -1 for dense.
        key: The pathways that occur, ascending; -1 first if a row has none.
        slots: For each row its place in ``key``, int64 ``(batch,)``.
        rows: For each entry of ``key`` its rows, int64.
        removed: For each block, by its union, which of the neurons a row does not keep, bool
            ``(batch, width)``; filled as blocks ask.
        elsewhere: The same for blocks on other devices.
    """

    pathways: Tensor
    key: tuple[int, ...]
    slots: Tensor
    rows: tuple[Tensor, ...]
    removed: "dict[Union, Tensor]" = field(default_factory=dict)
    elsewhere: "dict[torch.device, Mixture]" = field(default_factory=dict)

    @classmethod
    def of(cls, pathways: Tensor) -> "Mixture":
        """Sort the rows of a batch."""
        found, slots = torch.unique(pathways, return_inverse=True)
        rows = tuple((slots == slot).nonzero().flatten() for slot in range(len(found)))
        return cls(pathways, tuple(found.tolist()), slots, rows)

    def on(self, device: torch.device) -> "Mixture":
        """Return the same for a block on some device."""
        if device == self.pathways.device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = Mixture.of(self.pathways.to(device))
        return self.elsewhere[device]

    def removed_from(self, union: "Union") -> Tensor:
        """Return which of a block's neurons each row does not keep, bool ``(batch, width)``."""
        found = self.removed.get(union)
        if found is None:
            found = self.removed[union] = union.removed[self.slots]
        return found

    def rows_of(self, length: int) -> Sequence[Tensor]:
        """Return the rows of each entry, in a tensor of this length.

        Blocks that flatten their input have ``batch * tokens`` rows.
        """
        tokens = length // len(self.slots)
        if tokens == 1:
            return self.rows
        steps = torch.arange(tokens, device=self.slots.device)
        return [(rows[:, None] * tokens + steps).flatten() for rows in self.rows]


@dataclass(frozen=True, eq=False)
class Union:
    """The neurons of one block that some pathways keep, together.

    Attributes:
        index: These neurons, int64, ascending; None if all are computed.
        width: How many they are.
        places: For each pathway, where its kept neurons are among them, int64 ascending; None for
            a dense row.
        removed: For each pathway, which of them it does not keep, bool ``(pathways, width)``.
    """

    index: Tensor | None
    width: int
    places: tuple[Tensor | None, ...]
    removed: Tensor

    @classmethod
    def of(cls, masks: Sequence[Tensor | None], d_ff: int, device: torch.device) -> "Union":
        """Unite keep masks ``(d_ff,)``; None stands for a dense row."""
        everything = torch.ones(d_ff, dtype=torch.bool)
        keeps = torch.stack([everything if mask is None else mask.cpu() for mask in masks])
        union = keeps.any(0)
        whole = int(union.sum()) >= _NEARLY_EVERYTHING * d_ff
        index = None if whole else union.nonzero().flatten().to(device)
        within = (keeps if whole else keeps[:, union]).to(device)
        places = tuple(
            None if mask is None else own.nonzero().flatten()
            for mask, own in zip(masks, within, strict=True)
        )
        return cls(index, within.shape[1], places, ~within)
