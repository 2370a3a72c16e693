"""What a domain's text does in the routed experts of one layer, as sums over its tokens.

Per expert: how many tokens were routed to it, its weights there, weight times the norm of its
output (the criterion of REAP), and its summed outputs, of which the likeness of experts is told;
per neuron of an expert the absolute activation over these tokens.

Source: Lasby et al. 2025, "REAP the Experts", arXiv:2510.13999, eq. 9: the mean over the tokens
routed to an expert of gate value times output norm.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.ffn.kept_experts import ExpertsShape
from hf_sparse_pathways.tensor_files import without_memory


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertStatistics:
    """Sums over a domain's tokens in one layer, float64.

    Attributes:
        tokens: Number of tokens, padding excluded.
        routed: Tokens that were routed to each expert, ``(experts,)``.
        weight_sum: Their weights there, as the router gives them, ``(experts,)``.
        reap_sum: Weight times norm of the expert's output, ``(experts,)``.
        output_sum: Outputs before the weight, ``(experts, d_out)``; of experts of a single neuron,
            whose outputs all have the direction of its weights, ``(experts, 0)``.
        abs_sum: Absolute activations of each expert's neurons, ``(experts, d_ff)``.
    """

    tokens: int
    routed: Tensor
    weight_sum: Tensor
    reap_sum: Tensor
    output_sum: Tensor
    abs_sum: Tensor

    @classmethod
    def empty(cls, shape: ExpertsShape) -> Self:
        """Return the sums over no tokens."""
        zeros = {
            name: torch.zeros(size, dtype=torch.float64)
            for name, size in statistics_shapes(shape).items()
        }
        return cls(tokens=0, **zeros)

    def merged(self, other: Self) -> Self:
        """Return the sums over both streams of tokens. Pure."""
        added = {name: getattr(self, name) + getattr(other, name) for name in TENSORS}
        return replace(self, tokens=self.tokens + other.tokens, **added)

    @property
    def usage(self) -> Tensor:
        """Fraction of the tokens that are routed to each expert, ``(experts,)``."""
        return self.routed / max(1, self.tokens)

    @property
    def mean_weight(self) -> Tensor:
        """Mean weight over the tokens routed to each expert; 0 where there are none."""
        return self.weight_sum / self.routed.clamp_min(1)

    @property
    def reap(self) -> Tensor:
        """Mean over the tokens routed to each expert of weight times output norm; 0 without any."""
        return self.reap_sum / self.routed.clamp_min(1)

    @property
    def added(self) -> Tensor:
        """Mean over all tokens of the norm of what each expert adds, ``(experts,)``."""
        return self.reap_sum / max(1, self.tokens)

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute activation of each expert's neurons over its tokens, of unseen ones 0."""
        return self.abs_sum / self.routed.clamp_min(1).unsqueeze(1)

    @property
    def likeness(self) -> Tensor:
        """Cosines of the experts' mean outputs, ``(experts, experts)``; 0 with unseen ones."""
        directions = torch.nn.functional.normalize(self.output_sum, dim=1)
        return directions @ directions.T

    def check(self, domain: str, name: str) -> None:
        """Check that the values are sums of what they say.

        Raises:
            ArtefactError: One cannot be.
        """
        most = self.routed.max() if self.routed.numel() else torch.tensor(0.0)
        signs = min(float(part.min()) for part in (self.routed, self.reap_sum, self.abs_sum))
        finite = all(bool(getattr(self, part).isfinite().all()) for part in TENSORS)
        if not finite or signs < 0 or float(most) > self.tokens:
            raise ArtefactError(
                f"Domain {domain!r}: the statistics of the experts {name} are impossible (NaN, "
                "infinite, negative, or more routed tokens than there are). Take the profile again."
            )


TENSORS = tuple(field.name for field in fields(ExpertStatistics))[1:]
"""Names of the sums."""


def statistics_shapes(shape: ExpertsShape) -> dict[str, tuple[int, ...]]:
    """Return what shape each sum of a layer has."""
    experts = (shape.experts,)
    sizes = {name: experts for name in TENSORS}
    return {
        **sizes,
        "output_sum": (shape.experts, 0 if shape.single else shape.d_out),
        "abs_sum": (shape.experts, shape.d_ff),
    }


def statistics_header(shape: ExpertsShape) -> dict[str, Tensor]:
    """Return the sums of a layer without memory, as a file's header has to have them."""
    sizes = statistics_shapes(shape).items()
    return {name: without_memory(torch.float64, *size) for name, size in sizes}
