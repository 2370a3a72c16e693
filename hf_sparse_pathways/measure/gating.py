"""What a sgatlin layer's gates stand for: contexts of experts, tokens gated alike, swapped gates.

The layer is linear but for its gates, so a token's gates (which experts it gets, with which scores)
say all of what it does there. ``read_gates`` keeps them for some text: for an expert the contexts
in which its score is highest, for a token those whose gates point the same way. ``swap_gates``
gives a token other gates, and ``swap_effect`` says what that does to the model's predictions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.passes import evaluation_mode, find_device, run_decoder
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.windows import draw_windows, make_batches, resolve_length
from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.text import TextSource

CONTEXT = 8
"""Tokens before the one that is shown."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """A token in its text.

    Attributes:
        place: Its number among the tokens that were read.
        before: The text before it, a few tokens.
        token: The token.
        value: The expert's score, or how alike the gates are (cosine).
    """

    place: int
    before: str
    token: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The gates of some text's tokens in one layer.

    Attributes:
        scores: ``(tokens, n_channels, top_k)``.
        index: int64 of the same shape, within the channels.
        n_experts: Of each channel.
        ids: int64 ``(tokens,)``.
        starts: int64 ``(tokens,)``: where each token's window starts among the tokens.
        tokenizer: What made the ids.
    """

    scores: Tensor
    index: Tensor
    n_experts: int
    ids: Tensor
    starts: Tensor
    tokenizer: Any

    def contexts(self, channel: int, expert: int, count: int = 5) -> list[Context]:
        """Return the tokens for which an expert's score is highest; fewer if fewer choose it.

        Raises:
            PathwaysError: There is no such channel or expert, or the count is below 0.
        """
        _check_place("channel", channel, self.index.shape[1])
        _check_place("expert", expert, self.n_experts)
        _check_count(count)
        chosen = self.index[:, channel] == expert
        values = self.scores[:, channel].masked_fill(~chosen, -torch.inf).amax(1)
        best = values.topk(min(count, int(chosen.any(1).sum())))
        return self._describe(best.indices, best.values)

    def neighbours(self, place: int, count: int = 5) -> list[Context]:
        """Return the tokens whose gates are most alike one token's, by the cosine of all scores.

        Raises:
            PathwaysError: There is no such token, or the count is below 0.
        """
        _check_count(count)
        values = self.cosines(place)
        values[place] = -torch.inf
        best = values.topk(min(count, len(values) - 1))
        return self._describe(best.indices, best.values)

    def cosines(self, place: int) -> Tensor:
        """Return how alike all tokens' gates are to one token's, ``(tokens,)``.

        Raises:
            PathwaysError: There is no such token.
        """
        _check_place("token", place, len(self.index))
        channels = torch.arange(self.index.shape[1])[:, None]
        own = torch.zeros(self.index.shape[1], self.n_experts)
        own[channels, self.index[place]] = self.scores[place]
        products = (self.scores * own[channels, self.index]).flatten(1).sum(1)
        norms = self.scores.flatten(1).norm(dim=1)
        return products / (norms * norms[place]).clamp_min(1e-30)

    def describe(self, place: int, value: float = 0.0) -> Context:
        """Return a token in its text."""
        first = max(int(self.starts[place]), place - CONTEXT)
        before = self.tokenizer.decode(self.ids[first:place])
        token = self.tokenizer.decode(self.ids[place : place + 1])
        return Context(place=place, before=before, token=token, value=value)

    def _describe(self, places: Tensor, values: Tensor) -> list[Context]:
        pairs = zip(places.tolist(), values.tolist(), strict=True)
        return [self.describe(place, value) for place, value in pairs]


@torch.no_grad()
def read_gates(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    text: "TextSource",
    layer: int,
    *,
    max_tokens: int = 16_384,
    batch_size: int = 8,
    seed: int = 0,
) -> Gates:
    """Read what a text's tokens choose in one layer.

    Args:
        model: A model with sgatlin layers.
        tokenizer: Its tokenizer.
        text: The text, as ``sp.profile`` takes that of a domain.
        layer: Which of the model's sgatlin layers, from 0.
        max_tokens: Most tokens.
        batch_size: Windows of a pass.
        seed: Decides what is drawn.

    Raises:
        UnsupportedModelError: The model has no such layers.
        PathwaysError: There is no such layer.
    """
    own = find_layer(model, layer)
    windows = draw_windows(
        read_documents(text, seed=seed, tokens=max_tokens),
        tokenizer,
        max_tokens=max_tokens,
        max_length=resolve_length(model, None),
        seed=seed,
    )
    scores, index, ids = [], [], []
    lengths: list[int] = []
    with evaluation_mode(model):
        for batch in make_batches(windows, batch_size):
            seen: list[Tensor] = []
            hook = own.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[0]))
            try:
                run_decoder(model, batch)
            finally:
                hook.remove()
            mask = batch.mask.flatten()
            routed = own.route(seen[0].reshape(-1, own.d_model)[mask.to(seen[0].device)])
            scores.append(routed[0].float().cpu())
            index.append(routed[1].cpu())
            ids.append(batch.ids.flatten()[mask])
            lengths.extend(len(window.ids) for window in batch.windows)
    sizes = torch.tensor(lengths)
    return Gates(
        scores=torch.cat(scores),
        index=torch.cat(index),
        n_experts=own.config.n_experts,
        ids=torch.cat(ids),
        starts=(sizes.cumsum(0) - sizes).repeat_interleave(sizes),
        tokenizer=tokenizer,
    )


def _check_count(count: int) -> None:
    if type(count) is not int or count < 0:
        raise PathwaysError(f"count is how many tokens are wanted, got {count!r}.")


def _check_place(what: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise PathwaysError(f"There is no {what} {number}: there are {count}, from 0.")


@contextmanager
def swap_gates(model: Any, layer: int, gates: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Any]:
    """Within the block, give tokens of every pass other gates in one layer, on all threads.

    Args:
        model: A model with sgatlin layers.
        layer: Which of them, from 0.
        gates: Place of a token in the pass (rows one behind the other) -> its scores and indices,
            each ``(n_channels, top_k)``, such as another token's of ``route``.

    Raises:
        UnsupportedModelError: The model has no such layers.
        PathwaysError: There is no such layer or expert, or gates are of another shape.
    """
    found = find_layer(model, layer)
    shape = (found.config.n_channels, found.config.top_k)
    for place, own in gates.items():
        told = [tuple(part.shape) for part in own]
        if told != [shape, shape]:
            raise PathwaysError(
                f"Gates of token {place} are scores and indices of shapes {told}; both have to be "
                f"{shape}, (n_channels, top_k)."
            )
        for number in (int(own[1].min()), int(own[1].max())):
            _check_place("expert", number, found.config.n_experts)

    def swap(_: Any, __: Any, routed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores, index = routed[0].clone(), routed[1].clone()
        for place, (own_scores, own_index) in gates.items():
            if place < len(scores):
                scores[place], index[place] = own_scores.to(scores), own_index.to(index)
        return scores, index

    hook = found.router.register_forward_hook(swap)
    try:
        yield model
    finally:
        hook.remove()


@torch.no_grad()
def swap_effect(model: Any, ids: Tensor, layer: int, place: int, partner: int) -> Tensor:
    """Return what giving one token another's gates in a layer does to the predictions.

    Args:
        model: A model with sgatlin layers.
        ids: int64 ``(1, tokens)``.
        layer: Which of the model's sgatlin layers, from 0.
        place: The token whose gates are swapped.
        partner: The token of the same text whose gates it gets.

    Returns:
        ``(tokens, vocabulary)``: logits with the swap minus those without; zeros before ``place``.

    Raises:
        UnsupportedModelError: The model has no such layers.
        PathwaysError: There is no such layer or token.
    """
    if ids.dim() != 2 or len(ids) != 1 or not {place, partner} <= {*range(ids.shape[1])}:
        raise PathwaysError(
            f"swap_effect takes ids of shape (1, tokens) and two places among them, got "
            f"{tuple(ids.shape)}, {place} and {partner}."
        )
    seen: list[tuple[Tensor, Tensor]] = []
    ids = ids.to(find_device(model))
    with evaluation_mode(model):
        hook = find_layer(model, layer).router.register_forward_hook(
            lambda _, __, routed: seen.append(routed)
        )
        try:
            before = model(ids, use_cache=False).logits[0]
        finally:
            hook.remove()
        own = (seen[0][0][partner], seen[0][1][partner])
        with swap_gates(model, layer, {place: own}):
            return model(ids, use_cache=False).logits[0] - before


def find_layer(model: Any, layer: int) -> SgatlinFFN:
    """Return one of a model's sgatlin layers.

    Raises:
        UnsupportedModelError: It has none.
        PathwaysError: There is none of that number.
    """
    layers = find_sgatlin(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no sgatlin layers. Build it with SparsePathwaysConfig."
            "from_base(config, ffn=sp.SgatlinConfig(...))."
        )
    if not 0 <= layer < len(layers):
        raise PathwaysError(f"There is no layer {layer}: the model has {len(layers)}, from 0.")
    return layers[layer]


def find_sgatlin(model: Any) -> list[SgatlinFFN]:
    """Return a model's sgatlin layers, in its order."""
    return [module for module in model.modules() if isinstance(module, SgatlinFFN)]
