"""What the gates of sgatlin layers stand for, as tables: contexts, neighbours, interventions.

Of a few layers by depth: the experts with the strongest scores and the contexts in which they are
highest; some tokens with those whose gates point the same way; and what the model predicts when a
token gets the gates of another one, the least like it in its text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.passes import evaluation_mode, find_device
from hf_sparse_pathways.measure.figures import Section, format_figure
from hf_sparse_pathways.measure.gating import (
    Context,
    Gates,
    find_sgatlin,
    read_gates,
    swap_effect,
)

if TYPE_CHECKING:
    from hf_sparse_pathways.discovery.text import TextSource

LAYERS, EXPERTS, TOKENS, CONTEXTS = 3, 8, 6, 4
"""How many layers are shown; of each how many experts, tokens, and contexts of these."""

FEWEST, LARGEST = 5, 0.25
"""An expert of fewer tokens is not shown, nor one that a larger share of them gets."""

LONGEST = 64
"""Most tokens of a text in which gates are swapped."""


@dataclass(frozen=True, kw_only=True)
class ExpertContexts:
    """One expert.

    Attributes:
        channel: Its channel.
        expert: Its number there.
        share: Of the tokens, those that get it.
        contexts: Those in which its score is highest.
    """

    channel: int
    expert: int
    share: float
    contexts: tuple[Context, ...]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """One token, and those whose gates are most alike.

    Attributes:
        token: It.
        alike: The others, with the cosine of all scores.
    """

    token: Context
    alike: tuple[Context, ...]


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One token that gets another's gates.

    Attributes:
        token: It.
        partner: The other, with the cosine of all scores.
        before: The likeliest successors of the token, and their probabilities, in words.
        after: The same with the other's gates.
        divergence: KL of the predictions there, nats.
        later: Mean KL of the predictions at the tokens behind it; 0 if there are none.
    """

    token: Context
    partner: Context
    before: str
    after: str
    divergence: float
    later: float


@dataclass(frozen=True, kw_only=True)
class LayerGating:
    """One layer's gates.

    Attributes:
        name: Of the layer.
        tokens: How many were read.
        experts: The strongest.
        neighbours: Of some tokens.
        swaps: Some interventions.
    """

    name: str
    tokens: int
    experts: tuple[ExpertContexts, ...]
    neighbours: tuple[Neighbours, ...]
    swaps: tuple[Swap, ...]


def summarise_gating(
    model: Any, tokenizer: Any, text: "TextSource", *, max_tokens: int = 4096, seed: int = 0
) -> tuple[LayerGating, ...]:
    """Return what the gates of some of a model's sgatlin layers stand for; none if it has none.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: As ``sp.profile`` takes that of a domain.
        max_tokens: Most tokens that are read.
        seed: Decides what is drawn.
    """
    found = find_sgatlin(model)
    places = sorted({0, len(found) // 2, len(found) - 1})[:LAYERS] if found else []
    names = {id(module): name for name, module in model.named_modules()}
    summaries = []
    for place in places:
        gates = read_gates(model, tokenizer, text, place, max_tokens=max_tokens, seed=seed)
        drawn = _draw_tokens(gates, seed)
        summaries.append(
            LayerGating(
                name=names[id(found[place])],
                tokens=len(gates.ids),
                experts=_strongest(gates),
                neighbours=tuple(_find_neighbours(gates, token) for token in drawn),
                swaps=tuple(_swap(model, gates, place, token) for token in drawn),
            )
        )
    return tuple(summaries)


def _draw_tokens(gates: Gates, seed: int) -> list[int]:
    """Return some tokens that have others before them in their text."""
    places = torch.arange(len(gates.ids))
    inside = places[places > gates.starts + 1]
    order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))
    return sorted(inside[order[:TOKENS]].tolist())


def _strongest(gates: Gates) -> tuple[ExpertContexts, ...]:
    """Return the experts of the highest mean score over their tokens, if these are some only."""
    channels, count = gates.index.shape[1], gates.n_experts
    flat = (gates.index + torch.arange(channels)[:, None] * count).flatten()
    often = torch.bincount(flat, minlength=channels * count)
    sums = torch.zeros(channels * count).index_add_(0, flat, gates.scores.flatten())
    fits = (often >= FEWEST) & (often <= LARGEST * len(gates.ids))
    means = (sums / often.clamp_min(1)).masked_fill(~fits, -torch.inf)
    shown = means.topk(min(EXPERTS, int(fits.sum()))).indices.tolist()
    return tuple(
        ExpertContexts(
            channel=place // count,
            expert=place % count,
            share=float(often[place]) / len(gates.ids),
            contexts=tuple(gates.contexts(place // count, place % count, CONTEXTS)),
        )
        for place in shown
    )


def _find_neighbours(gates: Gates, place: int) -> Neighbours:
    token = gates.describe(place)
    return Neighbours(token=token, alike=tuple(gates.neighbours(place, CONTEXTS)))


def _swap(model: Any, gates: Gates, layer: int, place: int) -> Swap:
    """Give a token the gates of the least like it among those around it."""
    start = max(int(gates.starts[place]), place - LONGEST // 2)
    stop = start + LONGEST
    stop = start + int((gates.starts[start:stop] == gates.starts[place]).sum())
    cosines = gates.cosines(place)[start:stop]
    partner = start + int(cosines.argmin())
    ids = gates.ids[start:stop][None]
    with torch.no_grad(), evaluation_mode(model):
        before = model(ids.to(find_device(model)), use_cache=False).logits[0]
    after = before + swap_effect(model, ids, layer, place - start, partner - start)
    own, changed = before.float().log_softmax(-1), after.float().log_softmax(-1)
    divergences = (own.exp() * (own - changed)).sum(-1).clamp_min(0)[place - start :].tolist()
    later = divergences[1:]
    return Swap(
        token=gates.describe(place),
        partner=gates.describe(partner, float(cosines.min())),
        before=_say(own[place - start], gates),
        after=_say(changed[place - start], gates),
        divergence=divergences[0],
        later=sum(later) / max(1, len(later)),
    )


def _say(predictions: Tensor, gates: Gates) -> str:
    """Name the likeliest tokens."""
    best = predictions.exp().topk(3)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return ", ".join(f"{gates.tokenizer.decode([i])!r} {share:.0%}" for i, share in pairs)


def gating_sections(layers: Sequence[LayerGating]) -> Iterator[Section]:
    """Yield three tables per layer."""
    for layer in layers:
        yield Section(
            title=f"Experts of {layer.name} and where their scores are highest",
            note=(
                f"The {len(layer.experts)} experts of the highest mean score of those that "
                f"{FEWEST} to {LARGEST * layer.tokens:.0f} of {layer.tokens} tokens get. A context "
                "ends with the token in [ ], behind it the score."
            ),
            header=["channel, expert", "tokens", *("context" for _ in range(CONTEXTS))],
            rows=[
                [
                    f"{one.channel}, {one.expert}",
                    f"{one.share:.1%}",
                    *_fill(one.contexts),
                ]
                for one in layer.experts
            ],
        )
        yield Section(
            title=f"Tokens that {layer.name} gates alike",
            note="Nearest neighbours by the cosine of all scores, which stands behind them.",
            header=["token", *("neighbour" for _ in range(CONTEXTS))],
            rows=[[_show(one.token), *_fill(one.alike)] for one in layer.neighbours],
        )
        yield Section(
            title=f"Gates swapped in {layer.name}",
            note=(
                "A token gets the gates of the token of its text whose gates are least like its "
                "own (cosine behind it); all else stays. KL: of the predictions from those without "
                "the swap, at the token and over the tokens behind it, nats."
            ),
            header=["token", "gets the gates of", "successors before", "after", "KL", "KL behind"],
            rows=[
                [
                    _show(one.token),
                    _show_value(one.partner),
                    one.before,
                    one.after,
                    format_figure(one.divergence),
                    format_figure(one.later),
                ]
                for one in layer.swaps
            ],
        )


def _fill(contexts: Sequence[Context]) -> list[str]:
    """Return as many cells as there are columns."""
    cells = [_show_value(one) for one in contexts]
    return cells + ["-"] * (CONTEXTS - len(cells))


def _show(context: Context) -> str:
    """Return a token behind its text, line ends made visible."""
    return f"{context.before}[{context.token}]".replace("\r", "").replace("\n", "\N{RETURN SYMBOL}")


def _show_value(context: Context) -> str:
    return f"{_show(context)} {context.value:.2f}"
