"""Groups of kept neurons of which each token has some, chosen by a router: dense into experts.

Some of a block's kept neurons are computed for every token. The others form G groups of one size,
and a token has the k groups of largest logit l = R x + r, with x the block's input. With p the
softmax over the logits of these k, the activation of a neuron is multiplied by w_g::

    w_g = k p_g   where g, its group, is among them;   0 where it is not;   1 outside of all groups

so that equal logits give the plain sum of what is computed.

Source: partitions of a dense FFN with a router: Zhang et al. 2022, "MoEfication", arXiv:2110.01786;
experts that every token has: Dai et al. 2024, "DeepSeekMoE", arXiv:2401.06066; one refit of the
outgoing columns to what is routed (``discovery/grouping.py``) is ours.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.errors import MismatchError
from hf_sparse_pathways.limits import MOST_GROUPS

ALWAYS = -1
"""In place of a group's number: neurons that every token has."""

_TENSORS = {
    "group": "group",
    "group_router": "weight",
    "group_bias": "bias",
    "group_share": "share",
}

TOP_K = "top_k"

GROUP_PARTS = (*_TENSORS, TOP_K)
"""Names of the tensors, as they are stored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronGroups:
    """Which of a block's kept neurons each token has.

    Attributes:
        group: The group of each kept neuron, or ``ALWAYS``, int32 ``(kept,)``.
        weight: R, float32 ``(G, d_in)``.
        bias: r, float32 ``(G,)``.
        share: The share of the calibration tokens that have each group, float32 ``(G,)``.
        top_k: k, how many groups a token has.
    """

    group: Tensor
    weight: Tensor
    bias: Tensor
    share: Tensor
    top_k: int

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.bias)

    @property
    def always(self) -> int:
        """Number of neurons that every token has."""
        return int((self.group == ALWAYS).sum())

    @property
    def size(self) -> int:
        """Neurons of each group."""
        return (len(self.group) - self.always) // self.count

    @property
    def active(self) -> int:
        """Number of neurons that a token has."""
        return self.always + self.top_k * self.size

    def places(self) -> tuple[Tensor, Tensor]:
        """Return where the neurons stand among the kept ones, int64.

        Returns:
            Those that every token has, ``(always,)``, and those of each group, ``(G, size)``.
        """
        order = self.group.argsort(stable=True)
        return order[: self.always], order[self.always :].view(self.count, -1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's groups, with a gradient in the router.

        Args:
            x: The block's input ``(..., d_in)``.

        Returns:
            The groups, int64 ``(..., k)``, and their weights, float32 ``(..., k)``.
        """
        return self.choose(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """Return the router's logits, float32 ``(..., G)``, whatever autocast says."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.logits(x)
        return functional.linear(x.float(), self.weight, self.bias)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the groups of some logits, and their weights; see ``__call__``."""
        largest, groups = logits.topk(self.top_k, dim=-1)
        return groups, self.top_k * largest.softmax(-1)

    def factors(self, x: Tensor) -> Tensor:
        """Return what the activation of each kept neuron is multiplied by, float32 ``(..., kept)``.

        Args:
            x: The block's input ``(..., d_in)``.
        """
        groups, weights = self(x)
        table = weights.new_zeros(*weights.shape[:-1], self.count).scatter(-1, groups, weights)
        table = functional.pad(table, (0, 1), value=1.0)  # the last column, which ALWAYS finds
        return table[..., self.group.long()]

    def at(self, columns: Tensor | slice) -> "NeuronGroups":
        """Return the same for some of the kept neurons, or for them in another order. Pure."""
        return replace(self, group=self.group[columns])

    def over(self, keep: Tensor) -> "NeuronGroups":
        """Return the same for all of a block's neurons, those that are not kept in no group. Pure.

        Args:
            keep: Keep mask ``(d_ff,)``.
        """
        group = torch.full(keep.shape, ALWAYS, dtype=self.group.dtype)
        group[keep] = self.group
        return replace(self, group=group)

    def to(self, device: torch.device) -> "NeuronGroups":
        """Return a copy on a device."""
        return replace(
            self, **{field: getattr(self, field).to(device) for field in _TENSORS.values()}
        )

    def parts(self) -> dict[str, Tensor]:
        """Return it as tensors by name, as they are stored; k is an int32 ``(1,)``."""
        named = {name: getattr(self, field) for name, field in _TENSORS.items()}
        return {**named, TOP_K: torch.tensor([self.top_k], dtype=torch.int32)}

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor]) -> "NeuronGroups":
        """Build from what ``parts`` returned; on the device ``meta`` k is not known, and 1.

        Raises:
            MismatchError: k is no number.
        """
        top_k = parts[TOP_K]
        if top_k.dtype != torch.int32 or tuple(top_k.shape) != (1,):
            raise MismatchError(
                f"{TOP_K} is {top_k.dtype} {tuple(top_k.shape)}; it has to be torch.int32 (1,)."
            )
        return cls(
            **{field: parts[name] for name, field in _TENSORS.items()},
            top_k=1 if top_k.is_meta else int(top_k),
        )

    def check(self, name: str, d_in: int, kept: range) -> None:
        """Check that every part fits a block; of those on the device ``meta`` the shapes alone.

        Args:
            name: The block's.
            d_in: Width of its input.
            kept: How many neurons it may keep.

        Raises:
            MismatchError: One does not; the message says which.
        """
        count = len(self.weight) if self.weight.dim() else 0
        if not 0 < count <= MOST_GROUPS:
            raise MismatchError(
                f"{name} has a router of shape {tuple(self.weight.shape)}; it has to have 1 to "
                f"{MOST_GROUPS} rows, one per group of neurons."
            )
        fitting = {
            "weight": ((count, d_in), torch.float32),
            "bias": ((count,), torch.float32),
            "share": ((count,), torch.float32),
            "group": ((len(self.group) if self.group.dim() else 0,), torch.int32),
        }
        for field, (shape, dtype) in fitting.items():
            part: Tensor = getattr(self, field)
            if tuple(part.shape) != shape or part.dtype != dtype:
                raise MismatchError(
                    f"{field} of the groups of {name} is {part.dtype} {tuple(part.shape)}; it has "
                    f"to be {dtype} {shape}."
                )
        if len(self.group) not in kept:
            raise MismatchError(
                f"{len(self.group)} neurons of {name} are told their groups; it keeps "
                f"{kept[0] if len(kept) == 1 else f'1 to {kept[-1]}'}."
            )
        if not self.group.is_meta:
            self._check_values(name)

    def _check_values(self, name: str) -> None:
        if not 0 < self.top_k <= self.count:
            raise MismatchError(
                f"A token has {self.top_k} of the {self.count} groups of {name}; it has to have "
                "at least one, and no more than there are."
            )
        inside = bool((self.group >= ALWAYS).all() and (self.group < self.count).all())
        sizes = (self.group[self.group != ALWAYS] if inside else self.group[:0]).bincount(
            minlength=self.count
        )
        if not (inside and self.always and bool((sizes == sizes[0]).all()) and int(sizes[0])):
            raise MismatchError(
                f"The groups of {name} do not fit: each has to have as many neurons as the others, "
                f"and some neurons have to be in none, which is written {ALWAYS}."
            )
        share = self.share
        within = bool((share >= 0).all() and (share <= 1.0 + 1e-3).all())
        if not within or abs(float(share.sum()) - self.top_k) > 0.01 * self.top_k:
            raise MismatchError(
                f"The shares of tokens that have the groups of {name} do not add up to the "
                f"{self.top_k} that each token has."
            )
