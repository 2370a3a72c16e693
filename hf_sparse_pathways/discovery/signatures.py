"""From a domain's windows to its signature, without training.

A token's weight is the logarithm of its likelihood in the domain over that in the background. The
domain's likelihood is counted and mixed with the background's, so that a token that was seen once
says little, and one that was not seen says not much either. What held-out text scores, and which
pairs of tokens it shares, is seen on the validation windows, and on the calibration windows by
leaving a fold of the documents out of the counts. All documents of a fold count alike: a few long
ones that are unlike the others (one law in forty languages) would else decide what is usual.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.windows import Window, number_documents
from hf_sparse_pathways.pathways.pairs import collect_pairs, share_seen
from hf_sparse_pathways.pathways.signature import LENGTHS, LEVELS, Signature, no_margins

COUNTED = 1 / 3
"""Part of a domain's likelihoods that is counted; the rest is the background's."""

FOLDS = 5

LEAST_TEXTS = 32
"""Of fewer texts of a length no quantiles are taken: those of the length before stand for them."""

SHORT = 32
"""Short texts begin at every so many tokens of a window; longer ones stand side by side."""

_Readings = dict[int, list[Tensor]]
"""Number of tokens -> of texts, as ``(3, texts)``: score, share of pairs that are known, weight."""


def learn_signature(
    windows: Sequence[Window], validation: Sequence[Window], background: Background
) -> Signature:
    """Learn what tells a domain's text from the background.

    Args:
        windows: The domain's calibration windows.
        validation: Windows of other documents of the domain; there may be none.
        background: What the model writes.
    """
    ignored = background.ignored
    own: _Readings = {length: [] for length in LENGTHS}
    for kept, held_out in hold_out(windows, validation):
        weights, pairs = weigh_tokens(kept, background), collect_known_pairs(kept, background)
        documents = torch.tensor(number_documents(held_out))
        for place, texts, places in cut_texts(held_out):
            scores = score_texts(texts, weights, ignored)
            seen = share_seen(pairs, texts, count_tokens(texts, weights, ignored))
            of = documents[places]
            own[LENGTHS[place]].append(torch.stack((scores, seen, 1.0 / of.bincount()[of])))
    weights = weigh_tokens(windows, background)
    written: _Readings = {length: [] for length in LENGTHS}
    samples = background.samples.long()
    for start in range(len(samples)):
        ids = samples.roll(-start, 0).flatten()
        for length in LENGTHS:
            score = score_texts(ids[None, :length], weights, ignored)
            written[length].append(torch.stack((score, torch.ones(1), torch.ones(1))))
    return Signature(
        tokens=weights.half(),
        own=_quantiles(own, 0),
        background=_quantiles(written, 0),
        ignored=ignored,
        prefix=background.prefix,
        suffix=background.suffix,
        pairs=collect_known_pairs(windows, background),
        own_pairs=_quantiles(own, 1),
        **no_margins(),
    )


def weigh_tokens(windows: Sequence[Window], background: Background) -> Tensor:
    """Return the weights of tokens, float32 ``(vocabulary,)``; special ones have none."""
    usual = background.probabilities.double()
    ids = torch.tensor([token for window in windows for token in window.ids], dtype=torch.int64)
    ids = ids[(ids < len(usual)) & ~torch.isin(ids, background.ignored.long())]
    counts = ids.bincount(minlength=len(usual)).double()
    counted = counts / counts.sum().clamp_min(1.0)
    weights = (1 - COUNTED + COUNTED * counted / usual).log()
    weights[background.ignored[background.ignored < len(usual)].long()] = 0.0
    return weights.float()


def collect_known_pairs(windows: Sequence[Window], background: Background) -> Tensor:
    """Return the pairs of tokens of some windows."""
    ids = [torch.tensor(window.ids) for window in windows]
    usual, ignored = background.probabilities, background.ignored
    return collect_pairs((text, count_tokens(text, usual, ignored)) for text in ids)


def hold_out(
    windows: Sequence[Window], validation: Sequence[Window]
) -> Iterator[tuple[Sequence[Window], Sequence[Window]]]:
    """Yield windows that are counted, and windows of other documents.

    Those are the validation windows, and each fold of the calibrated documents.
    """
    yield windows, validation
    folds = [number % FOLDS for number in number_documents(windows)]
    for number in range(min(FOLDS, max(folds, default=-1) + 1)):
        inside = [fold == number for fold in folds]
        rest = [window for window, held in zip(windows, inside, strict=True) if not held]
        held_out = [window for window, held in zip(windows, inside, strict=True) if held]
        yield rest, held_out


def cut_texts(windows: Sequence[Window]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield places in ``LENGTHS``, the texts of that length, and the places of their windows."""
    ids = [torch.tensor(window.ids) for window in windows]
    for place, length in enumerate(LENGTHS):
        step = max(length, SHORT)
        found = {
            number: own.unfold(0, length, step)
            for number, own in enumerate(ids)
            if len(own) >= length
        }
        if found:
            counts = torch.tensor([len(texts) for texts in found.values()])
            yield (
                place,
                torch.cat([*found.values()]),
                torch.tensor([*found]).repeat_interleave(counts),
            )


def score_texts(ids: Tensor, weights: Tensor, ignored: Tensor) -> Tensor:
    """Return the mean weights of texts, ``(texts,)``."""
    counted = count_tokens(ids, weights, ignored)
    return (weights[ids.where(counted, 0)] * counted).sum(1) / counted.sum(1).clamp_min(1)


def count_tokens(ids: Tensor, vocabulary: Tensor, ignored: Tensor) -> Tensor:
    """Return which tokens say something: none that is special, or not in the vocabulary."""
    return ~torch.isin(ids, ignored.long()) & (ids < len(vocabulary))


def _quantiles(readings: _Readings, row: int) -> Tensor:
    """Return the quantiles of texts' readings, ``(len(LENGTHS), len(LEVELS))``.

    Where there are too few texts of a length, those of the length before; where there are none at
    all, no score is high enough.
    """
    rows = [torch.full((len(LEVELS),), torch.finfo(torch.float32).max)]
    for parts in readings.values():
        found = torch.cat([*parts, torch.empty(3, 0)], dim=1)
        texts = found.shape[1]
        enough = texts >= LEAST_TEXTS or (len(rows) == 1 and texts > 0)
        rows.append(take_quantiles(found[row], found[2], LEVELS) if enough else rows[-1])
    return torch.stack(rows[1:])


def take_quantiles(values: Tensor, weights: Tensor, levels: Sequence[float]) -> Tensor:
    """Return quantiles of weighted values, between those that are nearest; float32.

    With equal weights they are those of ``torch.quantile``.
    """
    order = values.argsort()
    values, weights = values[order].double(), weights[order].double()
    places = weights.cumsum(0) - weights / 2
    places = (places - places[0]) / (places[-1] - places[0]).clamp_min(1e-12)
    return torch.from_numpy(np.interp(levels, places, values)).float()
