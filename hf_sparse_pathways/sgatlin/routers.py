"""How tokens get their experts: scores of all, and the best of each channel without them.

A product router adds two scores: expert ``(i, j)`` of a channel has ``a_i + b_j``, from two tables
of ``sqrt(N)`` each. An expert among the best k has its ``a_i`` among the best k of its table, and
its ``b_j`` as well (if k other rows were better, so would be k other experts of its column), so the
best k of the ``k * k`` sums are the best k of all N. Where some experts are removed that does not
hold: the scores of those that are kept are computed, or of all where each token keeps others, the
channels keep different numbers, or tokens are few; of some tokens at a time.

Queries of less than float32 are multiplied with their keys in float32: sums of rounded scores would
often be equal, and of equal ones it is not said which are the best.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse_pathways.sgatlin.initialisation import fill, scale_variance
from hf_sparse_pathways.sgatlin.settings import PeerConfig, SgatlinConfig

Routed = tuple[Tensor, Tensor]
"""Scores and indices, each ``(tokens, channels, top_k)``, the best first."""

_MOST_SCORES = 1 << 24
"""Scores that are held at a time where some experts are removed."""

_MANY = 16
"""Tokens from which on it is worth finding out which experts are kept."""


class Router(nn.Module, ABC):
    """Scores a number of channels' experts for every token.

    Attributes:
        top_k: How many a token gets in each channel.
    """

    top_k: int

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights, in place."""

    @abstractmethod
    def all_scores(self, x: Tensor) -> Tensor:
        """Return the score of every expert, ``(tokens, channels, experts)``.

        Args:
            x: ``(tokens, d_model)``.
        """

    def forward(self, x: Tensor, removed: Tensor | None = None) -> Routed:
        """Return the best experts of each channel.

        Args:
            x: ``(tokens, d_model)``.
            removed: Experts that are not chosen from, bool ``(channels, experts)`` or one such per
                token in front; each channel has to have ``top_k`` others.
        """
        if removed is None:
            return self.choose(x)
        kept = _kept(removed, self.top_k) if len(x) >= _MANY else None
        scored = removed.shape[-2:] if kept is None else kept.shape
        tokens = max(1, _MOST_SCORES // scored.numel())
        parts = torch.split(x, tokens)
        if kept is not None:
            scores, place = self._best(self.scores_of(part, kept) for part in parts)
            return scores, kept.expand(len(x), *kept.shape).gather(-1, place)
        apart = torch.split(removed, tokens) if removed.dim() > 2 else [removed] * len(parts)
        return self._best(
            self.all_scores(part).masked_fill(without, -math.inf)
            for part, without in zip(parts, apart, strict=True)
        )

    def _best(self, parts: Iterable[Tensor]) -> Routed:
        """Return the best of each channel's scores, of some tokens after others."""
        scores, places = zip(*(part.topk(self.top_k) for part in parts), strict=True)
        return torch.cat(scores), torch.cat(places)

    @abstractmethod
    def scores_of(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the scores of some experts, ``(tokens, channels, some)``.

        Args:
            x: ``(tokens, d_model)``.
            experts: Which of each channel's, int64 ``(channels, some)``.
        """

    def choose(self, x: Tensor) -> Routed:
        """Return the best of all experts of each channel; see ``all_scores``."""
        scores, index = self.all_scores(x).topk(self.top_k)
        return scores, index


class DenseRouter(Router):
    """Every expert's score is a linear map of one query that the channels share."""

    def __init__(self, config: SgatlinConfig, d_model: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.query = nn.Linear(d_model, config.d_key, bias=False)
        self.keys = nn.Parameter(torch.empty(config.n_channels, config.n_experts, config.d_key))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place."""
        scale_variance(self.query.weight, self.query.in_features)
        scale_variance(self.keys, self.query.out_features)

    def all_scores(self, x: Tensor) -> Tensor:
        """Return the score of every expert; see the base."""
        return _score(self.query(x), self.keys)

    def scores_of(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the scores of some experts; see the base."""
        channel = torch.arange(len(experts), device=experts.device)[:, None]
        return _score(self.query(x), self.keys[channel, experts])


class ProductRouter(Router):
    """A router whose scores are sums, float32 or float64; see the module."""

    @abstractmethod
    def tables(self, x: Tensor) -> Tensor:
        """Return the scores that are added, ``(tokens, 2, channels, sqrt(experts))``."""

    def all_scores(self, x: Tensor) -> Tensor:
        """Return the score of every expert; see the base."""
        first, second = self.tables(x).unbind(1)
        return (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)

    def scores_of(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the scores of some experts; see the base."""
        tables = self.tables(x)
        side = tables.shape[-1]
        channel = side * torch.arange(len(experts), device=experts.device)[:, None]
        places = experts // side + channel, experts % side + channel
        first, second = (
            table.flatten(1).index_select(1, place.flatten())
            for table, place in zip(tables.unbind(1), places, strict=True)
        )
        return (first + second).view(len(x), *experts.shape)

    def choose(self, x: Tensor) -> Routed:
        """Return the best experts of each channel, of the sums of the best of each table."""
        tables = self.tables(x)
        best, place = tables.topk(self.top_k)
        sums = (best[:, 0].unsqueeze(-1) + best[:, 1].unsqueeze(-2)).flatten(-2)
        index = place[:, 0].unsqueeze(-1) * tables.shape[-1] + place[:, 1].unsqueeze(-2)
        scores, chosen = sums.topk(self.top_k)
        return scores, index.flatten(-2).gather(-1, chosen)


class ProductDenseRouter(ProductRouter):
    """Both tables of all channels are linear maps of one query."""

    def __init__(self, config: SgatlinConfig, d_model: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.query = nn.Linear(d_model, config.d_key, bias=False)
        side = math.isqrt(config.n_experts)
        self.keys = nn.Parameter(torch.empty(2, config.n_channels, side, config.d_key))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place."""
        scale_variance(self.query.weight, self.query.in_features)
        scale_variance(self.keys, self.query.out_features)

    def tables(self, x: Tensor) -> Tensor:
        """Return the scores that are added; see the base."""
        query, keys = _in_full(self.query(x), self.keys)
        with _without_autocast(x):
            return _score(query, keys)


class ProductKeyRouter(ProductRouter):
    """Each table is a channel's keys against a query of its own."""

    def __init__(self, config: SgatlinConfig | PeerConfig, d_model: int, n_channels: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        side = math.isqrt(config.n_experts)
        self.query = nn.Linear(d_model, 2 * n_channels * config.d_key, bias=False)
        self.keys = nn.Parameter(torch.empty(2, n_channels, side, config.d_key))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, in place."""
        scale_variance(self.query.weight, self.query.in_features)
        fill(self.keys, 1.0)

    def tables(self, x: Tensor) -> Tensor:
        """Return the scores that are added, of unit variance together; see the base."""
        halves, channels, _, d_key = self.keys.shape
        query, keys = _in_full(self.query(x), self.keys)
        queries = query.view(len(x), halves * channels, d_key).transpose(0, 1)
        with _without_autocast(x):
            scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2))
        scores = scores / math.sqrt(halves * d_key)
        return scores.transpose(0, 1).reshape(len(x), *self.keys.shape[:-1])


def make_router(config: SgatlinConfig, d_model: int) -> Router:
    """Return the router that a configuration names, with new weights."""
    if config.router == "product_key":
        return ProductKeyRouter(config, d_model, config.n_channels)
    made: Any = {"product_dense": ProductDenseRouter, "dense": DenseRouter}[config.router]
    return made(config, d_model)


def _kept(removed: Tensor, least: int) -> Tensor | None:
    """Return which experts of each channel all tokens keep, int64 ``(channels, kept)``.

    None where that is not the same for all, or less than ``least``; or in a graph, whose shapes
    must not depend on it.
    """
    if removed.dim() > 2 or torch.compiler.is_compiling():
        return None
    numbers = (~removed).sum(1)
    if bool((numbers != numbers[0]).any()) or numbers[0] < least:
        return None
    return (~removed).nonzero()[:, 1].view(len(removed), -1)


def _in_full(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider of their dtypes, at least float32."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    return query.to(dtype), keys.to(dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within the block, products are of their operands' dtype."""
    known = torch.amp.is_autocast_available(x.device.type)  # not on "meta"
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def _score(query: Tensor, keys: Tensor) -> Tensor:
    """Multiply queries ``(tokens, d_key)`` with keys ``(..., d_key)``, whatever their shape."""
    scores = functional.linear(query, keys.flatten(0, -2))
    return scores.view(len(query), *keys.shape[:-1])
