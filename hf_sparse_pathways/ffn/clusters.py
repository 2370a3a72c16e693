"""What a pathway keeps of a block whose tokens are clustered: an expert for each cluster.

Tokens that are alike at the block's input need like neurons, fewer than all tokens of a domain
together. A router gives every token to the nearest of C centroids, in the space of the input's
principal components P about the mean m; as a comparison of linear functions of x that is::

    argmin_c |P (x - m) - z_c|^2  =  argmax_c  z_c P x - z_c P m - |z_c|^2 / 2

Each expert is a ``BlockPathway`` of its own, on the block's shared weights. Its refit is its own as
well, or all experts have one in common: ``W + shared``, of which each keeps its columns.

Source: Sawmya et al. 2025, "Sparse Expansion", arXiv:2405.15756, routes so between one-shot pruned
copies of the weights; kept neurons with a repair of their own in the copies' place are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from hf_sparse_pathways.errors import MismatchError
from hf_sparse_pathways.ffn.block_pathway import FLOATING, PARTS, BlockPathway, SharedColumns
from hf_sparse_pathways.limits import MOST_CLUSTERS


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRouter:
    """Gives every token of a block's input to one of C clusters.

    Attributes:
        weight: ``(C, d_in)``, float32.
        bias: ``(C,)``, float32.
        share: The clusters' shares of the calibration tokens, ``(C,)``, float32.
    """

    weight: Tensor
    bias: Tensor
    share: Tensor

    @classmethod
    def nearest(
        cls, centroids: Tensor, components: Tensor, mean: Tensor, share: Tensor
    ) -> "TokenRouter":
        """Route to the nearest centroid.

        Args:
            centroids: ``(C, dimensions)``.
            components: P, orthonormal rows, ``(dimensions, d_in)``.
            mean: m, ``(d_in,)``.
            share: As in the attributes.
        """
        weight = centroids.double() @ components.double()
        bias = -weight @ mean.double() - centroids.double().square().sum(1) / 2
        return cls(weight=weight.float(), bias=bias.float(), share=share.float())

    def __call__(self, x: Tensor) -> Tensor:
        """Return each token's cluster: int64 ``(...)`` of ``(..., d_in)``."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x)
        return functional.linear(x.float(), self.weight, self.bias).argmax(-1)

    def to(self, device: torch.device) -> "TokenRouter":
        """Return a copy on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.parts().items()}
        return TokenRouter(**{_FIELDS[name]: tensor for name, tensor in moved.items()})

    def parts(self) -> dict[str, Tensor]:
        """Return its tensors by name, as they are stored."""
        return {name: getattr(self, field) for name, field in _FIELDS.items()}


_FIELDS = {"router": "weight", "router_bias": "bias", "share": "share"}

ROUTER_PARTS = tuple(_FIELDS)
"""Names of a router's tensors."""

SHARED = "shared"
"""Name of the refit that all experts have in common."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusteredBlock:
    """What a pathway keeps of one FFN block, token by token.

    Attributes:
        router: Gives every token to an expert.
        experts: What is kept for it, one per cluster; without what they share.
        shared: Added to the outgoing leaf's weight, ``(d_out, d_ff)``, whichever of its columns an
            expert keeps; None if each has a refit of its own, or none.
    """

    router: TokenRouter
    experts: tuple[BlockPathway, ...]
    shared: Tensor | None = None

    @property
    def keep(self) -> Tensor:
        """The neurons that any expert keeps, bool ``(d_ff,)``."""
        return torch.stack([expert.keep for expert in self.experts]).any(0)

    @property
    def kept(self) -> int:
        """Number of neurons that a token of the calibration text has on average, rounded."""
        return round(self.mean([expert.kept for expert in self.experts]))

    def mean(self, values: "list[int] | list[float]") -> float:
        """Return the mean over tokens of what each expert has a value of."""
        share = self.router.share.double()
        return float(share @ torch.tensor(values, dtype=torch.float64) / share.sum())

    def parts(self) -> dict[str, Tensor]:
        """Return all tensors by name, those of experts as ``<number>.<part>``."""
        parts = self.router.parts()
        if self.shared is not None:
            parts[SHARED] = self.shared
        for number, expert in enumerate(self.experts):
            parts |= {f"{number}.{name}": tensor for name, tensor in expert.parts().items()}
        return parts

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> "ClusteredBlock":
        """Build from what ``parts`` returned.

        Raises:
            MismatchError: A part is missing or unknown, or there are too many clusters.
        """
        count = count_clusters(parts["router"])
        if not set(ROUTER_PARTS) <= parts.keys():
            raise MismatchError(f"A router cannot hold exactly {sorted(parts)}.")
        own: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for name, tensor in parts.items():
            number, _, part = name.partition(".")
            if name in (*ROUTER_PARTS, SHARED):
                continue
            if not number.isdecimal() or int(number) >= count or part not in PARTS:
                raise MismatchError(f"A block of {count} clusters cannot hold {name!r}.")
            own[int(number)][part] = tensor
        router = TokenRouter(**{field: parts[name] for name, field in _FIELDS.items()})
        experts = tuple(map(BlockPathway.from_parts, own))
        return cls(router=router, experts=experts, shared=parts.get(SHARED))

    def check(self, name: str, d_in: int, d_ff: int, d_out: int, branches: int) -> None:
        """Check that every part fits a block; see ``BlockPathway.check``.

        Raises:
            MismatchError: One does not; the message says which.
        """
        count = len(self.experts)
        fitting = {"router": (count, d_in), "router_bias": (count,), "share": (count,)}
        for part, tensor in self.router.parts().items():
            if tuple(tensor.shape) != fitting[part] or tensor.dtype != torch.float32:
                raise MismatchError(
                    f"{part} of {name} is {tensor.dtype} {tuple(tensor.shape)}; it has to be "
                    f"torch.float32 {fitting[part]}."
                )
        share = self.router.share
        if not share.is_meta and not (
            bool((share >= 0).all()) and abs(float(share.sum()) - 1) < 0.01
        ):
            raise MismatchError(f"the clusters' shares of {name} do not add up to 1.")
        if self.shared is not None:
            self._check_shared(name, self.shared, (d_out, d_ff))
        for number, expert in enumerate(self.experts):
            if expert.groups is not None:
                raise MismatchError(f"{name} has clusters of tokens, and groups of neurons in one.")
            expert.check(f"{name}, cluster {number}", d_in, d_ff, d_out, branches)

    def _check_shared(self, name: str, shared: Tensor, fitting: tuple[int, int]) -> None:
        if tuple(shared.shape) != fitting or shared.dtype not in FLOATING:
            raise MismatchError(
                f"the shared refit of {name} is {shared.dtype} {tuple(shared.shape)}; it has to be "
                f"floating-point {fitting}."
            )
        if any(expert.delta is not None for expert in self.experts):
            raise MismatchError(f"{name} has a shared refit, and experts with one of their own.")

    def check_leaves(self, name: str, leaves: int, *, fused: bool) -> None:
        """Check the changed rows of every expert; see ``BlockPathway.check_leaves``."""
        for expert in self.experts:
            expert.check_leaves(name, leaves, fused=fused)


def count_clusters(router: Tensor) -> int:
    """Return how many clusters a router's weight has rows for.

    Raises:
        MismatchError: There are none, or more than are read.
    """
    count = len(router) if router.dim() else 0
    if not 0 < count <= MOST_CLUSTERS:
        raise MismatchError(
            f"A router is {tuple(router.shape)}; it has to have 1 to {MOST_CLUSTERS} rows."
        )
    return count


Kept = BlockPathway | ClusteredBlock
"""What a pathway keeps of a block: the same for all tokens, or by cluster."""


def experts_of(block: Kept) -> tuple[BlockPathway, ...]:
    """Return the experts of a block, with what they share; one without clusters is its own."""
    if not isinstance(block, ClusteredBlock):
        return (block,)
    if block.shared is None:
        return block.experts
    return tuple(
        replace(expert, delta=SharedColumns(block.shared, expert.keep)) for expert in block.experts
    )
