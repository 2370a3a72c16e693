"""The identity of a base model: its name, revision, type, and the shapes of its FFN blocks.

The shapes are the fingerprint that decides whether pathways, masks or a profile fit a model.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from hf_sparse_pathways.errors import MismatchError
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks, survey_model
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, Kept
from hf_sparse_pathways.ffn.kept_experts import ExpertsShape
from hf_sparse_pathways.pathways.revision import find_revision

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Name and widths of one FFN block.

    Attributes:
        name: Module name inside the decoder, the same with and without a language model head.
        d_in: Width of its input (d_model).
        d_ff: Number of neurons.
        d_out: Width of its output (d_model).
        branches: Rows of the incoming leaves per neuron: 2 with a gate, else 1.
    """

    name: str
    d_in: int
    d_ff: int
    d_out: int
    branches: int

    @classmethod
    def of(cls, block: FfnBlock, prefix: str) -> Self:
        """Describe a live block; ``prefix`` is cut from its name."""
        return cls(
            name=block.name.removeprefix(prefix),
            d_in=block.d_in,
            d_ff=block.d_ff,
            d_out=block.d_out,
            branches=block.branches,
        )

    @property
    def flops_per_neuron(self) -> int:
        """Multiply-adds per token and neuron."""
        return self.branches * self.d_in + self.d_out

    @property
    def dense_flops(self) -> int:
        """Multiply-adds per token of the dense block."""
        return self.d_ff * self.flops_per_neuron

    def bypass_width(self, rank: int) -> float:
        """Return what a bypass of some rank computes, in neurons."""
        return rank * (self.d_in + self.d_out) / self.flops_per_neuron

    def flops(self, pathway: Kept) -> float:
        """Return a pathway's multiply-adds per token, those of bypass and router included.

        A refit changes weights and a bias starts the sum: neither adds a multiplication. Of
        clusters it is the mean over the tokens that it was calibrated on; of groups of neurons
        every token has as many.
        """
        if isinstance(pathway, ClusteredBlock):
            own = pathway.mean([self.flops(expert) for expert in pathway.experts])
            return own + pathway.router.weight.numel()
        rank = 0 if pathway.bypass is None else pathway.bypass.rank
        active = 1.0 if pathway.skipping is None else float(pathway.skipping.active)
        kept, router = pathway.kept, 0
        if pathway.groups is not None:
            kept, router = pathway.groups.active, pathway.groups.weight.numel()
        own = kept * self.flops_per_neuron * self.share(active) + router
        return own + rank * (self.d_in + self.d_out)

    def share(self, active: float) -> float:
        """Return a neuron's mean cost where it is computed after its gate for some tokens only.

        Args:
            active: The share of tokens for which it is. For the others it costs its gate alone.

        Returns:
            Of what it costs where it is never skipped.
        """
        return (self.d_in + active * (self.flops_per_neuron - self.d_in)) / self.flops_per_neuron

    def router_width(self, clusters: int) -> float:
        """Return what routing between clusters computes, in neurons."""
        return clusters * self.d_in / self.flops_per_neuron if clusters > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Which model something was made for.

    Attributes:
        name: Hub id or folder it was loaded from; empty if it was built from a config.
        revision: Commit of the Hub repository, if known.
        model_type: The architecture, as in its config.
        blocks: Its FFN blocks, in layer order.
        routed: Modules with routed experts.
        neuron_order: Digest of the order of its neurons where ``permute`` has changed it; None for
            the original order.
        experts: Those of the routed experts that a pathway may keep in part; none in what was
            stored without a word of them.
    """

    name: str
    revision: str | None
    model_type: str
    blocks: tuple[BlockShape, ...]
    routed: tuple[str, ...] = ()
    neuron_order: str | None = None
    experts: tuple[ExpertsShape, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Describe a live model, dense or with pathways.

        Raises:
            UnsupportedModelError: It has neither FFN blocks nor routed experts that fit.
        """
        survey = survey_model(model)
        config: Any = getattr(model, "config", None)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        return cls(
            name=str(getattr(config, "_name_or_path", "") or ""),
            revision=find_revision(config),
            model_type=str(getattr(type(config), "model_type", "")),
            blocks=tuple(BlockShape.of(block, prefix) for block in find_blocks(model)),
            routed=tuple(name.removeprefix(prefix) for name in survey.routed),
            neuron_order=getattr(config, "neuron_order", None),
            experts=tuple(ExpertsShape.of(found, prefix) for found in survey.experts),
        )

    @property
    def title(self) -> str:
        """Its name, and its revision if that is known."""
        name = repr(self.name) if self.name else "a model without a name"
        return f"{name} at revision {self.revision}" if self.revision else name

    @property
    def summary(self) -> str:
        """The shape in a few words."""
        widths = sorted({block.d_ff for block in self.blocks})
        models = sorted({block.d_in for block in self.blocks})
        told = f", {len(self.experts)} layers with routed experts" if self.experts else ""
        if not self.blocks:
            return f"{self.model_type} without FFN blocks{told}"
        return (
            f"{self.model_type} with {len(self.blocks)} FFN blocks, "
            f"d_model {_span(models)}, d_ff {_span(widths)}{told}"
        )

    @property
    def _parts(self) -> tuple[BlockShape | ExpertsShape, ...]:
        return (*self.blocks, *self.experts)

    def with_experts_of(self, other: Self) -> Self:
        """Return it with another description's experts, if it does not speak of any. Pure."""
        return self if self.experts else replace(self, experts=other.experts)

    @property
    def _order(self) -> str:
        if self.neuron_order is None:
            return "their original order"
        return f"the permuted order {str(self.neuron_order)[:8]}"

    def check_same(self, other: Self) -> None:
        """Check that another model has the same FFN blocks; names of the models may differ.

        Raises:
            MismatchError: It has others, or their neurons stand in another order.
        """
        told = bool(self.experts and other.experts)
        same = self.blocks == other.blocks and (self.experts == other.experts or not told)
        if self.model_type == other.model_type and same:
            if self.neuron_order != other.neuron_order:
                raise MismatchError(
                    f"Made for {self.name or 'a model without a name'!r} with its neurons in "
                    f"{self._order}, but this model has them in {other._order}: the masks would "
                    "name other neurons. Use the weights and the pathways of one checkpoint; "
                    "sp.permute(model) brings both into a new order."
                )
            return
        detail = next(
            (
                f" First difference: {mine.name} ({mine.d_in} -> {mine.d_ff}) against "
                f"{theirs.name} ({theirs.d_in} -> {theirs.d_ff})."
                for mine, theirs in zip(self._parts, other._parts, strict=False)
                if mine != theirs
            ),
            "",
        )
        raise MismatchError(
            f"Made for {self.name or 'a model without a name'!r} ({self.summary}), but this is "
            f"{other.name or 'a model without a name'!r} ({other.summary}).{detail} "
            "Load the base that they were made for, or build pathways for this one."
        )

    def check_origin(self, other: Self, *, allow_transfer: bool = False) -> None:
        """Check that another model is this one, by its FFN blocks, its name and its revision.

        What did not come from the Hub has no revision; then the blocks decide, with a warning if
        the names differ. What was built in memory has no name either.

        Args:
            other: The model that something made for this one is to be used with.
            allow_transfer: Take another model whose blocks are the same, such as a fine-tune of
                this one, with a warning.

        Raises:
            MismatchError: It is another model, or another revision of this one.
        """
        self.check_same(other)
        known = self.revision is not None and other.revision is not None
        same = self.name == other.name and (not known or self.revision == other.revision)
        if same or not (self.name and other.name):
            return
        told = f"Made for {self.title}, but this is {other.title}"
        if known and not allow_transfer:
            raise MismatchError(
                f"{told}. Load the model and the revision that they were made for; if this one is "
                "a fine-tune of it, or its weights are the same, pass allow_transfer=True."
            )
        logger.warning("%s. Their FFN blocks have the same names and widths.", told)


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}..{values[-1]}"
