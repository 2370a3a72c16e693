"""How far a domain has to be ahead of another, so that a stated share of prompts goes wrong.

Held-out text of a domain is scored by its own weights, which were counted without it, and by those
of each domain that was profiled with it. The margin is the least lead that the other one has to be
asked for, so that no more of the texts are taken to be its; it depends on the number of tokens. It
is never below the usual one, which also holds for domains that were not profiled together: text of
no domain is held back by it, and of that there is none here.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.signatures import (
    count_tokens,
    cut_texts,
    hold_out,
    score_texts,
    weigh_tokens,
)
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.errors import PathwaysError, option
from hf_sparse_pathways.pathways.pairs import share_seen
from hf_sparse_pathways.pathways.signature import LENGTHS, USUAL_MARGIN, Signature

TARGET_ERROR = 0.01
"""Usual share of a domain's prompts that may go to a wrong domain."""


def check_target(target_error: float) -> None:
    """Check a share of prompts.

    Raises:
        PathwaysError: It is not between 0 and 1.
    """
    if not 0.0 < target_error < 1.0:
        raise PathwaysError(
            f"{option('target_error')} has to be between 0 and 1, got {target_error!r}: it is the "
            "share of a domain's prompts that may go to a wrong domain."
        )


def find_margins(
    signatures: Mapping[str, Signature],
    windows: Mapping[str, tuple[tuple[Window, ...], tuple[Window, ...]]],
    background: Background,
    target_error: float,
) -> dict[str, Signature]:
    """Return the signatures with what their domains' held-out texts say of each other. Pure.

    Args:
        signatures: Domain -> signature.
        windows: Domain -> its calibration windows, and those for validation.
        background: What the model writes.
        target_error: Share of each domain's texts that may be taken to be another's.
    """
    found = {}
    for name, signature in signatures.items():
        others = [other for key, other in signatures.items() if key != name]
        leads, trials = _lead(windows[name], background, others)
        margins = [[_least(lead, target_error / len(others)) for lead in row] for row in leads]
        found[name] = replace(
            signature,
            peers=torch.tensor([other.digest for other in others], dtype=torch.int64),
            margins=torch.tensor(margins).reshape(len(others), len(LENGTHS)),
            trials=torch.tensor(trials, dtype=torch.int32),
            target_error=torch.tensor([target_error]),
        )
    return found


def _lead(
    windows: tuple[tuple[Window, ...], tuple[Window, ...]],
    background: Background,
    others: list[Signature],
) -> tuple[list[list[Tensor]], list[int]]:
    """Return how far other domains are ahead on a domain's texts, per number in ``LENGTHS``.

    A text that another domain would not take has a lead of minus infinity. Returned as well is
    how many texts of each length there were.
    """
    parts: list[list[list[Tensor]]] = [[[] for _ in LENGTHS] for _ in others]
    trials = [0] * len(LENGTHS)
    ignored = background.ignored
    for kept, held_out in hold_out(*windows):
        weights = weigh_tokens(kept, background)
        for window in held_out:
            for place, texts in cut_texts(window):
                own = score_texts(texts, weights, ignored)
                trials[place] += len(texts)
                counted = count_tokens(texts, weights, ignored)
                for number, other in enumerate(others):
                    score = score_texts(texts, other.tokens.float(), ignored)
                    taken = score >= other.least_scores[place]
                    taken &= share_seen(other.pairs, texts, counted) >= other.least_seen[place]
                    ahead = (score - own) * LENGTHS[place]
                    parts[number][place].append(ahead.where(taken, -torch.inf))
    return [[torch.cat([*row, torch.empty(0)]) for row in rows] for rows in parts], trials


def _least(leads: Tensor, share: float) -> float:
    """Return the least margin, from the usual one on, that at most a share of the leads reaches.

    Fewer texts than it takes to see such a share show nothing: then it is the usual one.
    """
    allowed = int(share * len(leads))
    if allowed == 0:
        return USUAL_MARGIN
    next_one = leads.sort(descending=True).values[allowed]
    return max(USUAL_MARGIN, float(next_one.nextafter(torch.tensor(torch.inf))))
