"""Sparsities for a budget of quality: how much can go before perplexity rises by more than a limit.

Pathways are made at a guess, their loss is measured on validation text, and the next guess
interpolates between the guesses around the limit, on the scale where the rise in loss is about a
power of the sparsity. Each round makes the pathways of all domains that are not there yet.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.errors import PathwaysError, option
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

FIRST_SPARSITY = 0.3
MOST_SPARSITY = 0.9
USUAL_POWER = 2.0
"""Of the sparsity, in the rise of the loss, until two guesses show it."""

CLOSE = 0.05
"""A search ends when the rise is below the limit by at most this share of it."""


@dataclass
class Search:
    """One domain's guesses.

    Attributes:
        limit: Largest rise of the loss, in nats per token.
        rises: Sparsity -> measured rise.
        pathway: That of the best guess; None if there is none.
        most: Largest sparsity to try.
    """

    limit: float
    rises: dict[float, float] = field(default_factory=dict)
    pathway: Pathway | None = None
    most: float = MOST_SPARSITY

    @property
    def best(self) -> float:
        """The largest sparsity whose rise is within the limit; 0 if none is."""
        return max((s for s, rise in self.rises.items() if rise <= self.limit), default=0.0)

    @property
    def done(self) -> bool:
        """Whether the best guess is close to the limit, or cannot be raised."""
        rise = self.rises.get(self.best, -math.inf)
        return rise >= (1.0 - CLOSE) * self.limit or self.best >= self.most

    def measured(self, sparsity: float, pathway: Pathway, rise: float) -> None:
        """Take down what a guess gave."""
        self.rises[sparsity] = rise
        if sparsity == self.best:
            self.pathway = pathway

    def guess(self) -> float:
        """Return the next sparsity to try."""
        if not self.rises:
            return min(FIRST_SPARSITY, self.most)
        low = self.best
        too_far = min((s for s, rise in self.rises.items() if rise > self.limit), default=None)
        if too_far is None:
            return min(self.most, max(self._scaled(low), low + 0.01))
        if not low:
            return self._scaled(too_far)
        rises = (max(self.rises[low], 1e-6), max(self.rises[too_far], 1e-6))
        share = math.log(self.limit / rises[0]) / max(math.log(rises[1] / rises[0]), 1e-9)
        middle = math.exp(math.log(low) + share * math.log(too_far / low))
        margin = 0.1 * (too_far - low)
        return min(max(middle, low + margin), too_far - margin)

    def _scaled(self, sparsity: float) -> float:
        """Return where the limit would be met if the rise were the usual power of the sparsity."""
        rise = max(self.rises[sparsity], 1e-6)
        scaled = sparsity * (0.97 * self.limit / rise) ** (1.0 / USUAL_POWER)
        return min(max(scaled, 0.25 * sparsity), self.most)


def fit_sparsities(
    model: nn.Module,
    profile: Profile,
    *,
    max_perplexity_increase: float,
    choose: Callable[[Mapping[str, float]], Pathways],
    room: float = 1.0,
    rounds: int = 4,
) -> dict[str, Search]:
    """Find each domain's largest sparsity within a rise of perplexity on validation text.

    Args:
        model: The dense model; it is as it was afterwards.
        profile: Its profile, with validation text.
        max_perplexity_increase: As a fraction: 0.05 is 5 %.
        choose: Makes the pathways of some domains with given sparsities, as ``select`` does.
        room: Largest sparsity that the pathways can have, as ``most_sparsity`` finds it.
        rounds: Most times that pathways are made.

    Returns:
        Per domain its search, with the best guess and its pathway; 0.0 and None if even the
        smallest tried was too much.

    Raises:
        PathwaysError: The limit is not positive, or there is no validation text.
    """
    if not max_perplexity_increase > 0.0:
        raise PathwaysError(
            f"max_perplexity_increase has to be positive, got {max_perplexity_increase!r}."
        )
    without = [name for name in profile.domains if not profile[name].validation]
    if without:
        raise PathwaysError(
            f"There is no validation text of {', '.join(without)}: every document was used for "
            f"calibration. Give more documents, or fewer {option('max_tokens')}."
        )
    blocks = find_blocks(model)
    limit = math.log1p(max_perplexity_increase)
    most = min(MOST_SPARSITY, room)
    searches = {name: Search(limit, most=most) for name in profile.domains}
    dense = {
        name: mean_loss(model, profile[name].validation, None, blocks) for name in profile.domains
    }
    for _ in range(rounds):
        guesses = {name: search.guess() for name, search in searches.items() if not search.done}
        if not guesses:
            break
        pathways = choose(guesses)
        for name, sparsity in guesses.items():
            made, validation = pathways[name], profile[name].validation
            rise = mean_loss(model, validation, made.blocks, blocks) - dense[name]
            searches[name].measured(sparsity, made, rise)
    return searches
