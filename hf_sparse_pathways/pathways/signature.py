"""A domain's signature: what tells its text from other text, and how surely.

A token has a weight: the logarithm of how much more likely it is in the domain than in what the
model itself writes (its *background*). A text's score is the mean over its tokens. Beside it stands
the fraction of its pairs of neighbouring tokens that the domain's text holds. What held-out text of
the domain has of both, and what the background scores, is kept as quantiles by the number of
tokens, so that a threshold means an error rate. All of this depends on no other domain: they come,
go and are renamed, and it stays as it is. Only how far another one has to be ahead was seen on text
of those that were profiled together; they are known by their weights.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from hf_sparse_pathways.errors import ArtefactError, MismatchError
from hf_sparse_pathways.limits import MOST_DOMAINS, MOST_FRAME, MOST_WIDTH
from hf_sparse_pathways.pathways.framing import Framing, Text
from hf_sparse_pathways.pathways.pairs import BYTES, holds

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
"""Numbers of tokens for which quantiles are kept. Of fewer than the first nothing is said."""

LEVELS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Which quantiles are kept."""

MISSED = 0.04
"""Fraction of a domain's own held-out text that each of both may take to be none of it."""

TAKEN = 0.01
"""Fraction of the model's own text that may be taken to be a domain's."""

USUAL_MARGIN = math.log(100.0)
"""Nats that a domain has to be ahead of one that it was never compared with."""

_GRID = (len(LENGTHS), len(LEVELS))

_IDS = ("ignored", "prefix", "suffix")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one text says of a domain.

    Attributes:
        count: How many of its tokens say something.
        nats: The sum of their weights.
        seen: Fraction of their pairs that the domain's text holds, in [0, 1].
    """

    count: int
    nats: float
    seen: float

    @property
    def score(self) -> float:
        """Mean weight of a token, in nats."""
        return self.nats / max(1, self.count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Signature:
    """What text of one domain looks like.

    Attributes:
        tokens: Weights of tokens in nats, float16 ``(vocabulary,)``.
        own: Quantiles of the scores of held-out text of the domain, float32
            ``(len(LENGTHS), len(LEVELS))``.
        background: The same of what the model writes by itself.
        ignored: int32 ids of special tokens, which say nothing.
        prefix: int32 ids with which the chat template begins a prompt; they say nothing either.
        suffix: int32 ids with which it ends one.
        peers: Digests of other domains' weights, int64 ``(peers,)``.
        margins: Nats by which each of those has to be ahead of this domain, float32
            ``(peers, len(LENGTHS))``.
        trials: How many held-out texts of this domain stand behind the margins, int32
            ``(len(LENGTHS),)``.
        target_error: Share of them that may be taken to be another domain's, float32 ``(1,)``.
        pairs: The pairs of tokens of the domain's text, uint8 ``(BYTES,)``; ``(0,)`` if unknown.
        own_pairs: Quantiles of the fraction of its pairs that held-out text of the domain has
            among these, as ``own``.
    """

    tokens: Tensor
    own: Tensor
    background: Tensor
    ignored: Tensor
    prefix: Tensor
    suffix: Tensor
    peers: Tensor
    margins: Tensor
    trials: Tensor
    target_error: Tensor
    pairs: Tensor
    own_pairs: Tensor

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Self:
        """Build from tensors by name; older ones have fewer. ``check`` is to follow."""
        return cls(**{**no_margins(), **no_pairs(), **parts})

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def check(self) -> None:
        """Check dtypes and shapes.

        Raises:
            MismatchError: A tensor's do not fit.
        """
        sizes: dict[str, tuple[torch.dtype, tuple[int, ...] | int]] = {
            "tokens": (torch.float16, MOST_WIDTH),
            "own": (torch.float32, _GRID),
            "background": (torch.float32, _GRID),
            **dict.fromkeys(_IDS, (torch.int32, MOST_FRAME)),
            "peers": (torch.int64, MOST_DOMAINS),
            "margins": (torch.float32, (*self.peers.shape, len(LENGTHS))),
            "trials": (torch.int32, (len(LENGTHS),)),
            "target_error": (torch.float32, (1,)),
            "pairs": (torch.uint8, (BYTES,) if self.knows_pairs else (0,)),
            "own_pairs": (torch.float32, _GRID),
        }
        for name, (dtype, size) in sizes.items():
            found = getattr(self, name)
            if isinstance(size, int):
                fits = found.dim() == 1 and found.numel() <= size
                fits = fits and (found.numel() > 0 or name != "tokens")
            else:
                fits = found.shape == size
            if found.dtype != dtype or not fits:
                wanted = f"at most ({size},)" if isinstance(size, int) else str(size)
                raise MismatchError(
                    f"a signature's {name!r} is {found.dtype} {tuple(found.shape)}; it has to be "
                    f"{dtype} {wanted}."
                )

    def check_values(self) -> None:
        """Check what ids and quantiles say.

        Raises:
            ArtefactError: An id is negative, quantiles do not ascend, or margins are none.
        """
        if any(bool((getattr(self, name) < 0).any()) for name in _IDS):
            raise ArtefactError("a signature names a negative token id.")
        grids = (self.own, self.background, self.own_pairs)
        if any(bool((grid.diff(dim=1) < 0).any()) for grid in grids):
            raise ArtefactError("a signature's quantiles do not ascend.")
        below = bool((self.margins < 0).any() or (self.trials < 0).any())
        if below or not 0.0 < float(self.target_error) < 1.0:
            raise ArtefactError("a signature's margins are none.")

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def knows_pairs(self) -> bool:
        """Whether the pairs of the domain's text are known; earlier versions did not keep them."""
        return self.pairs.numel() > 0

    @cached_property
    def framing(self) -> Framing:
        """What of a text says something; equal for the domains of one tokenizer."""
        special, prefix, suffix = (getattr(self, name).tolist() for name in _IDS)
        return Framing(
            vocabulary=len(self.tokens),
            special=frozenset(special),
            prefix=tuple(prefix),
            suffix=tuple(suffix),
        )

    def read(self, text: Text) -> "Reading":
        """Return what a text says, of which ``framing`` took what says something."""
        held = holds(self.pairs, text.pairs) if self.knows_pairs else None
        return Reading(
            count=len(text.tokens),
            nats=float(self.tokens[text.tokens].float().sum()),
            seen=1.0 if held is None else float(held.sum() / max(1, len(held))),
        )

    @cached_property
    def least_scores(self) -> list[float]:
        """The least score that is taken to be the domain's, per number in ``LENGTHS``."""
        own = _levels(self.own, MISSED)
        background = _levels(self.background, 1.0 - TAKEN)
        return [max(pair) for pair in zip(own, background, strict=True)]

    @cached_property
    def least_seen(self) -> list[float]:
        """The least fraction of pairs that is taken to be the domain's, per number there."""
        return _levels(self.own_pairs, MISSED)

    @cached_property
    def digest(self) -> int:
        """What the weights are known by to the domains that they were compared with."""
        data = self.tokens.contiguous().numpy().tobytes()
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)

    def margin(self, other: Self, count: int) -> float:
        """Return by how many nats another domain has to be ahead of this one to be chosen.

        Args:
            other: Its signature.
            count: Tokens of the text.
        """
        margins = self._margins.get(other.digest)
        return USUAL_MARGIN if margins is None else at_length(margins, count)

    @cached_property
    def _margins(self) -> dict[int, list[float]]:
        """Digest of another domain's weights -> by how many nats it has to be ahead."""
        return dict(zip(self.peers.tolist(), self.margins.tolist(), strict=True))

    def typicality(self, said: Reading) -> float:
        """Return the fraction of the domain's held-out text of a length that scores less.

        Args:
            said: What a text of that length says.
        """
        columns = self.own.T.tolist()
        values = [at_length(column, said.count) for column in columns]
        return interpolate(said.score, values, LEVELS)


def no_margins() -> dict[str, Tensor]:
    """Return the parts that say how domains compare, of one that was compared with none."""
    return {
        "peers": torch.empty(0, dtype=torch.int64),
        "margins": torch.empty(0, len(LENGTHS)),
        "trials": torch.zeros(len(LENGTHS), dtype=torch.int32),
        "target_error": torch.tensor([0.01]),
    }


def no_pairs() -> dict[str, Tensor]:
    """Return the parts that say which pairs of tokens a domain's text holds, where none does."""
    return {"pairs": torch.empty(0, dtype=torch.uint8), "own_pairs": torch.zeros(_GRID)}


PARTS = tuple(part.name for part in fields(Signature))


def at_length(values: Sequence[float], count: int) -> float:
    """Return the value for a number of tokens, of values for the numbers in ``LENGTHS``."""
    return interpolate(math.log(max(1, count)), _LOGARITHMS, values)


def interpolate(place: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Return a value between those at ascending places; outside of them, the nearest one's."""
    above = bisect_right(places, place)
    if above == 0 or above == len(places):
        return values[0 if above == 0 else -1]
    low, high = places[above - 1], places[above]
    share = (place - low) / (high - low)
    return values[above - 1] + share * (values[above] - values[above - 1])


_LOGARITHMS = [math.log(length) for length in LENGTHS]


def _levels(grid: Tensor, level: float) -> list[float]:
    return [interpolate(level, LEVELS, row) for row in grid.tolist()]
