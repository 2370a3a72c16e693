"""From a domain's windows to its signature, without training.

A token's weight is the logarithm of its likelihood in the domain over that in the background. The
domain's likelihood is counted, and what was never seen shares as much as there are different tokens
(I. Witten, T. Bell 1991, "The zero-frequency problem", method C), by the background. Pairs are
counted in hashed buckets. What held-out text scores is seen on validation windows, and on the
calibration windows by leaving a fold of the documents out of the counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.pathways.signature import (
    BUCKETS,
    LENGTHS,
    LEVELS,
    Signature,
    hash_pairs,
    score_tokens,
)

FOLDS = 5

LEAST_TEXTS = 32
"""Of fewer texts of a length no quantiles are taken: those of the length before stand for them."""

MORE_OF_EACH = 1.0
"""Added to the count of every bucket of pairs."""

SHORT = 32
"""Short texts begin at every so many tokens of a window; longer ones stand side by side."""


def learn_signature(
    windows: Sequence[Window], validation: Sequence[Window], background: Background
) -> Signature:
    """Learn what tells a domain's text from the background.

    Args:
        windows: The domain's calibration windows.
        validation: Windows of other documents of the domain; there may be none.
        background: What the model writes.
    """
    whole = _Counts.of(windows, background).weigh()
    scores: dict[int, list[Tensor]] = {length: [] for length in LENGTHS}
    for weights, held_out in [(whole, validation), *_folds(windows, background)]:
        for window in held_out:
            _score_window(torch.tensor(window.ids), weights, background, scores)
    written: dict[int, list[Tensor]] = {length: [] for length in LENGTHS}
    for start in range(len(background.samples)):
        joined = background.samples.roll(-start, 0)[: LENGTHS[-1] // background.samples.shape[1]]
        for length in LENGTHS:
            ids = joined.flatten()[:length].long()[None]
            written[length].append(_score(ids, weights=whole, background=background))
    return Signature(
        tokens=whole[0].half(),
        pairs=whole[1].half(),
        own=_quantiles(scores),
        background=_quantiles(written),
        ignored=background.ignored,
        prefix=background.prefix,
        suffix=background.suffix,
    )


class _Counts:
    """How often tokens and buckets of pairs occur.

    Attributes:
        tokens: float64 ``(vocabulary,)``.
        pairs: float64 ``(BUCKETS,)``.
    """

    def __init__(self, tokens: Tensor, pairs: Tensor, background: Background) -> None:
        self.tokens, self.pairs, self._background = tokens, pairs, background

    @classmethod
    def of(cls, windows: Sequence[Window], background: Background) -> "_Counts":
        """Count windows; special tokens do not count."""
        size = len(background.probabilities)
        tokens, pairs = torch.zeros(size).double(), torch.zeros(BUCKETS).double()
        for window in windows:
            ids = torch.tensor(window.ids).clamp_max(size - 1)
            tokens += ids.bincount(minlength=size)
            pairs += hash_pairs(ids).bincount(minlength=BUCKETS)
        tokens[background.ignored.long()] = 0.0
        return cls(tokens, pairs, background)

    def weigh(self) -> tuple[Tensor, Tensor]:
        """Return the weights of tokens and pairs, float32."""
        usual = self._background.probabilities.double()
        unseen, total = (self.tokens > 0).sum(), self.tokens.sum()
        likely = (self.tokens + unseen * usual) / (total + unseen).clamp_min(1.0)
        pairs = hash_pairs(self._background.samples.long()).flatten().bincount(minlength=BUCKETS)
        tokens = (likely / usual).clamp_min(1e-6).log()
        tokens[self._background.ignored.long()] = 0.0
        return tokens.float(), (_shares(self.pairs) / _shares(pairs.double())).log().float()


def _shares(counts: Tensor) -> Tensor:
    return (counts + MORE_OF_EACH) / (counts.sum() + MORE_OF_EACH * BUCKETS)


def _folds(
    windows: Sequence[Window], background: Background
) -> list[tuple[tuple[Tensor, Tensor], list[Window]]]:
    """Return the weights without each fold of the documents, and that fold's windows."""
    keys = [window.document.digest if window.document else str(index) for index, window in enumerate(windows)]
    fold = {key: index % FOLDS for index, key in enumerate(dict.fromkeys(keys))}
    made = []
    for number in range(min(FOLDS, len(fold))):
        held = [window for key, window in zip(keys, windows, strict=True) if fold[key] == number]
        rest = [window for key, window in zip(keys, windows, strict=True) if fold[key] != number]
        made.append((_Counts.of(rest, background).weigh(), held))
    return made


def _score_window(
    ids: Tensor,
    weights: tuple[Tensor, Tensor],
    background: Background,
    scores: dict[int, list[Tensor]],
) -> None:
    """Score the texts of each length within a window."""
    for length in LENGTHS:
        if len(ids) >= length:
            texts = ids.unfold(0, length, max(length, SHORT))
            scores[length].append(_score(texts, weights=weights, background=background))


def _score(ids: Tensor, *, weights: tuple[Tensor, Tensor], background: Background) -> Tensor:
    """Return the mean weights of texts, ``(texts,)``."""
    counted = ~torch.isin(ids, background.ignored.long()) & (ids < len(weights[0]))
    sums = score_tokens(ids, counted, weights[0][None], weights[1][None])[:, 0]
    return sums / counted.sum(1).clamp_min(1)


def _quantiles(scores: dict[int, list[Tensor]]) -> Tensor:
    """Return the quantiles of texts' scores, ``(len(LENGTHS), len(LEVELS))``.

    Where there are too few texts of a length, those of the length before; where there are none of
    any, nothing is usual, and nothing is taken to be the domain's.
    """
    rows = [torch.full((len(LEVELS),), torch.finfo(torch.float32).max)]
    for parts in scores.values():
        found = torch.cat(parts) if parts else torch.empty(0)
        enough = len(found) >= LEAST_TEXTS or (len(rows) == 1 and len(found) > 0)
        levels = torch.tensor(LEVELS)
        rows.append(found.float().quantile(levels) if enough else rows[-1])
    return torch.stack(rows[1:])
