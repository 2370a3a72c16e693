"""What an FFN layer is made of: one frozen class per kind, saved as JSON in ``config.json``.

Each says by formula what a token costs in it, so that layers of different kinds can be compared at
equal FLOPs. All count the matrix products alone, two operations per multiply-add, as
``torch.utils.flop_counter`` does; activations, norms, softmax and top-k are left out.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from hf_sparse_pathways.errors import ArtefactError, PathwaysError, UnknownNameError

ROUTERS = ("product_dense", "product_key", "dense")
"""How sgatlin scores its experts."""

ACTIVATIONS = ("gelu", "relu", "silu")
"""What an MLP may have between its two matrices."""

IDENTITY = "identity"
"""No activation."""

MOST = 1 << 24
"""Largest number that a field takes: what is read may have been written by anybody."""


@dataclass(frozen=True, kw_only=True)
class FfnConfig(ABC):
    """What every kind of FFN layer has in common."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every count.

        Raises:
            PathwaysError: One is no positive integer, or is too large.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and 1 <= value <= MOST):
                raise PathwaysError(
                    f"{type(self).__name__} takes an integer from 1 to {MOST} as {field.name}, "
                    f"got {value!r:.50}."
                )

    @abstractmethod
    def flops(self, d_model: int) -> int:
        """Return the FLOPs of a token's matrix products."""

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SgatlinConfig(FfnConfig):
    """Sparsely gated single-neuron linear experts.

    Source: Schug 2026, arXiv 2606.07414.

    Attributes:
        n_experts: Of each channel; for the product routers a square.
        n_channels: Each has experts and a choice of its own.
        top_k: Experts that a token gets in each channel.
        d_key: Width of the query that the router scores experts by.
        router: ``"product_dense"`` adds two scores of ``sqrt(n_experts)`` each, made from one query
            that the channels share; ``"product_key"`` compares two queries of each channel with as
            many keys; ``"dense"`` scores each expert by itself, from the shared query.
        activation: Of an expert's score times its product. ``"identity"`` is the layer; others are
            there to see what a nonlinearity changes.
    """

    kind: ClassVar[str] = "sgatlin"

    n_experts: int = 1024
    n_channels: int = 8
    top_k: int = 8
    d_key: int = 128
    router: str = "product_dense"
    activation: str = IDENTITY

    def __post_init__(self) -> None:
        """Check that the router can choose so many of so many.

        Raises:
            PathwaysError: It cannot.
            UnknownNameError: There is no such router, or no such activation.
        """
        super().__post_init__()
        if self.router not in ROUTERS:
            raise UnknownNameError("router", self.router, ROUTERS)
        if self.activation not in (IDENTITY, *ACTIVATIONS):
            raise UnknownNameError("activation", self.activation, (IDENTITY, *ACTIVATIONS))
        if self.router == "dense":
            _check_top_k(self.top_k, self.n_experts)
        else:
            _check_product(self.router, self.n_experts, self.top_k)

    def flops(self, d_model: int) -> int:
        """Return the FLOPs of a token's matrix products: router, and selected experts."""
        if self.router == "product_key":
            router = _product_key_flops(self.n_experts, self.n_channels, self.d_key, d_model)
        else:
            product = self.router == "product_dense"
            scores = 2 * math.isqrt(self.n_experts) if product else self.n_experts
            router = 2 * self.d_key * (d_model + scores * self.n_channels)
        return router + 4 * self.n_channels * self.top_k * d_model


@dataclass(frozen=True, kw_only=True)
class PeerConfig(FfnConfig):
    """Single-neuron experts of one pool, each with a GELU, weighed by a softmax.

    Source: He 2024, arXiv 2407.04153. Keys are each head's own and queries are not normalised, as
    in sgatlin's comparison with it.

    Attributes:
        n_experts: A square.
        n_heads: Each chooses from the same pool.
        top_k: Experts that a token gets from each head.
        d_key: Width of a query.
    """

    kind: ClassVar[str] = "peer"

    n_experts: int = 1024
    n_heads: int = 8
    top_k: int = 8
    d_key: int = 128

    def __post_init__(self) -> None:
        """Check that the router can choose so many of so many.

        Raises:
            PathwaysError: It cannot.
        """
        super().__post_init__()
        _check_product("product_key", self.n_experts, self.top_k)

    def flops(self, d_model: int) -> int:
        """Return the FLOPs of a token's matrix products: router, and selected experts."""
        router = _product_key_flops(self.n_experts, self.n_heads, self.d_key, d_model)
        return router + 4 * self.n_heads * self.top_k * d_model


@dataclass(frozen=True, kw_only=True)
class SwigluConfig(FfnConfig):
    """A gated dense FFN: ``down(silu(gate(x)) * up(x))``.

    Attributes:
        d_ff: Number of neurons.
    """

    kind: ClassVar[str] = "swiglu"

    d_ff: int

    def flops(self, d_model: int) -> int:
        """Return the FLOPs of a token's matrix products."""
        return 6 * self.d_ff * d_model


@dataclass(frozen=True, kw_only=True)
class MlpConfig(FfnConfig):
    """A dense FFN without gate: ``down(activation(up(x)))``.

    Attributes:
        d_ff: Number of neurons.
        activation: ``"gelu"``, ``"relu"`` or ``"silu"``.
    """

    kind: ClassVar[str] = "mlp"

    d_ff: int
    activation: str = "gelu"

    def __post_init__(self) -> None:
        """Check the activation.

        Raises:
            UnknownNameError: There is no such activation.
        """
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise UnknownNameError("activation", self.activation, ACTIVATIONS)

    def flops(self, d_model: int) -> int:
        """Return the FLOPs of a token's matrix products."""
        return 4 * self.d_ff * d_model


@dataclass(frozen=True, kw_only=True)
class MoeConfig(FfnConfig):
    """A mixture of SwiGLU experts, of which a token gets a few, weighed by a softmax over those.

    Attributes:
        n_experts: All of them.
        top_k: Experts that a token gets.
        d_ff: Neurons of each.
        load_balancing: Weight of ``n_experts * sum(f_i * p_i)`` in the loss, for the share ``f_i``
            of choices that fall on an expert and its mean probability ``p_i``. Source: Fedus et
            al. 2021, arXiv 2101.03961, eq. 4.
        z_loss: Weight of the mean squared log-sum-exp of the router's logits. Source: Zoph et al.
            2022, arXiv 2202.08906, eq. 5.
    """

    kind: ClassVar[str] = "moe"

    n_experts: int = 8
    top_k: int = 2
    d_ff: int
    load_balancing: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self) -> None:
        """Check the choice and the weights of the losses.

        Raises:
            PathwaysError: They do not fit.
        """
        super().__post_init__()
        _check_top_k(self.top_k, self.n_experts)
        for name in ("load_balancing", "z_loss"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise PathwaysError(
                    f"MoeConfig takes a number from 0 as {name}, got {value!r:.50}."
                )

    def flops(self, d_model: int) -> int:
        """Return the FLOPs of a token's matrix products: router, and selected experts."""
        return 2 * d_model * self.n_experts + 6 * self.top_k * self.d_ff * d_model


_KINDS: Mapping[str, type[FfnConfig]] = {
    made.kind: made for made in (SgatlinConfig, PeerConfig, SwigluConfig, MlpConfig, MoeConfig)
}


def read_ffn(saved: Any) -> FfnConfig:
    """Return what was saved with ``to_dict``.

    Raises:
        ArtefactError: It is not that, or of a newer version.
    """
    try:
        made = _KINDS[saved["kind"]]
        return made(**{name: value for name, value in saved.items() if name != "kind"})
    except (TypeError, KeyError, PathwaysError) as error:
        raise ArtefactError(
            f"config.json has ffn {saved!r:.200}, which is no FFN layer that this version of "
            f"hf-sparse-pathways knows ({error}). Known: {', '.join(_KINDS)}."
        ) from error


def _check_top_k(top_k: int, n_experts: int) -> None:
    if top_k > n_experts:
        raise PathwaysError(
            f"top_k={top_k} is more than the {n_experts} experts that there are. Lower top_k, or "
            "raise n_experts."
        )


def _check_product(router: str, n_experts: int, top_k: int) -> None:
    side = math.isqrt(n_experts)
    if side**2 != n_experts:
        raise PathwaysError(
            f"The router {router!r} adds two scores of sqrt(n_experts) each, so n_experts has to "
            f"be a square, and {n_experts} is none. Take {side**2} or {(side + 1) ** 2}."
        )
    if top_k > side:
        raise PathwaysError(
            f"top_k={top_k} is too large: the router {router!r} takes the best of "
            f"sqrt(n_experts) = {side} scores, twice. Lower top_k to {side} or less, or raise "
            f"n_experts to {top_k**2} or more."
        )


def _product_key_flops(n_experts: int, n_channels: int, d_key: int, d_model: int) -> int:
    return 4 * n_channels * d_key * (d_model + math.isqrt(n_experts))
