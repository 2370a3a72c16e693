"""A sgatlin layer as routed experts of one neuron each, able to keep to those of a pathway.

The layer's own class scores its experts and takes the best of each channel; here it is told which
of them the pathway in use has removed, for all tokens or row by row. The result is that of a router
that gives these minus infinity. Nothing is copied.
"""

from typing import Any

from torch import Tensor

from hf_sparse_pathways.ffn.attached_experts import AttachedExperts, PathwayRouted
from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.experts import RoutedExperts
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN


class PathwayLinear(PathwayRouted):
    """A sgatlin layer whose tokens choose among the kept experts."""

    config: Any

    def removed(self, h: Tensor) -> Tensor | None:
        """Return which experts tokens may not get; see ``SgatlinFFN``."""
        removed = self.find_removed(h)
        if removed is None:
            return None
        return removed.view(*removed.shape[:-1], self.config.n_channels, self.config.n_experts)

    def rows(self, index: Tensor) -> Tensor:
        """Return where experts lie in the tables, of which some may be there alone."""
        own: Any = super()
        rows: Tensor = own.rows(index)
        places = self.expert_state.places
        return rows if places is None else places.to(rows.device)[rows]


class AttachedLinear(AttachedExperts):
    """A sgatlin layer with a swapped class."""

    def _roles(self) -> list[tuple[Any, type[PathwayRouted]]]:
        return [(self.experts, PathwayLinear)]


def attach_experts(found: RoutedExperts, key: ModelKey) -> AttachedExperts:
    """Swap the classes of a layer's router and experts, in place."""
    kind = AttachedLinear if isinstance(found.module, SgatlinFFN) else AttachedExperts
    return kind(found, key)
