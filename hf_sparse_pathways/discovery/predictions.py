"""Predictions over a vocabulary, a few tokens at a time.

All of a batch's logits in float32 are fresh memory, of which each operation makes more: that takes
several times as long as the arithmetic. A chunk of them stays in a core's cache.
"""

from collections.abc import Iterator

IGNORED = -100
"""The label of a token that is not scored."""

CHUNK_VALUES = 2**20
"""Logits that are in float32 at a time: 4 MB."""


def chunks(start: int, stop: int, vocabulary: int) -> Iterator[slice]:
    """Yield consecutive slices of tokens, of at least one token each.

    Args:
        start: First token.
        stop: One behind the last.
        vocabulary: Logits per token.
    """
    step = max(1, CHUNK_VALUES // vocabulary)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
