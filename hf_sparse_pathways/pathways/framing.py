"""What of a text says nothing: special tokens, and what a chat template puts around a prompt.

Domains of one tokenizer share it, so that a text is looked at once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_sparse_pathways.pathways.pairs import find_pairs


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """What of a text says something.

    Attributes:
        tokens: Token ids, int64 ``(tokens,)``.
        pairs: The pairs of neighbours among them, by bucket (``pairs.py``), int64 ``(pairs,)``.
    """

    tokens: Tensor
    pairs: Tensor


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Tells what of a text says something.

    Attributes:
        vocabulary: Ids from this one on say nothing.
        special: Nor do these ids.
        prefix: Ids with which the chat template begins a prompt.
        suffix: Ids with which it ends one.
    """

    vocabulary: int
    special: frozenset[int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def take(self, ids: Tensor) -> Text:
        """Return what says something.

        Args:
            ids: int64 ``(tokens,)``; padding with a special token may stand on either side.
        """
        begin, end = self._frames
        inner = self._after(end, self._after(begin, ids.tolist())[::-1])[::-1]
        says = [0 <= token < self.vocabulary and token not in self.special for token in inner]
        inside, counted = torch.tensor(inner, dtype=torch.int64), torch.tensor(says).bool()
        return Text(tokens=inside[counted], pairs=find_pairs(inside, counted))

    @cached_property
    def _frames(self) -> tuple[list[int], list[int]]:
        """The prefix, and the suffix from its end, without what is special before other tokens."""
        return self._begun(self.prefix), self._begun(self.suffix[::-1])

    def _after(self, frame: list[int], ids: list[int]) -> list[int]:
        """Return what follows a frame, if a text begins with it; special tokens do not count."""
        rest = self._begun(ids) if frame else ids
        return rest[len(frame) :] if frame and rest[: len(frame)] == frame else ids

    def _begun(self, ids: Sequence[int]) -> list[int]:
        """Return ids without the special ones that they begin with."""
        told = (place for place, token in enumerate(ids) if token not in self.special)
        return list(ids[next(told, len(ids)) :])
