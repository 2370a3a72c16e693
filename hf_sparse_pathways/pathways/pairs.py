"""Which pairs of neighbouring tokens a domain's text holds, as a set of bits.

A pair has a bucket, and a bucket a bit. Pairs that share a bucket are taken for each other: of a
quarter of a million, the text that a domain is calibrated on fills a fraction.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

BUCKETS = 1 << 18
BYTES = BUCKETS // 8

_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B
"""Odd multipliers of the two tokens; products of ids stay below 2**63."""

_SHIFT = 12


def collect_pairs(texts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the set of the texts' pairs, uint8 ``(BYTES,)``.

    Args:
        texts: Token ids, int64 ``(tokens,)``, and which of them count, as bool of that shape.
    """
    seen = torch.zeros(BUCKETS, dtype=torch.bool)
    for ids, counted in texts:
        seen[find_pairs(ids, counted)] = True
    powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (seen.view(BYTES, 8) * powers).sum(1, dtype=torch.uint8)


def share_seen(pairs: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Return which fraction of texts' pairs a set holds, ``(...)``; 0 of texts without any.

    Args:
        pairs: The set.
        ids: int64 ``(..., tokens)``.
        counted: Which of them count, of that shape.
    """
    both = _both(counted)
    return (holds(pairs, _buckets(ids)) * both).sum(-1) / both.sum(-1).clamp_min(1)


def find_pairs(ids: Tensor, counted: Tensor) -> Tensor:
    """Return the buckets of a text's pairs, int64 ``(pairs,)``.

    Args:
        ids: int64 ``(tokens,)``.
        counted: Which of them count, bool of that shape.
    """
    return _buckets(ids)[_both(counted)]


def holds(pairs: Tensor, buckets: Tensor) -> Tensor:
    """Return which buckets a set holds, 0 or 1 in uint8, of the buckets' shape."""
    return (pairs[buckets >> 3] >> (buckets & 7).to(torch.uint8)) & 1


def _buckets(ids: Tensor) -> Tensor:
    mixed = (ids[..., :-1] * _FIRST) ^ (ids[..., 1:] * _SECOND)
    return (mixed >> _SHIFT) & (BUCKETS - 1)


def _both(counted: Tensor) -> Tensor:
    return counted[..., :-1] & counted[..., 1:]
