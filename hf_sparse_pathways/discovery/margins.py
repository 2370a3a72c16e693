"""How far a domain has to be ahead of another, so that a stated share of prompts goes wrong.

Held-out text of a domain is scored by its own weights, which were counted without it, and by those
of each domain that was profiled with it. The margins are the leads that the others have to be asked
for, so that no more of the texts than stated are taken to be one's of them; they depend on the
number of tokens. Which of the others may take how many is chosen so that the margins hold back the
least of their own held-out text: a few licences in a corpus of code would else keep the domain of
law from half of its text. A margin is never below the usual one, which also holds for domains that
were not profiled together: text of no domain is held back by it, and of that there is none here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse_pathways.discovery.background import Background
from hf_sparse_pathways.discovery.signatures import (
    collect_known_pairs,
    count_tokens,
    cut_texts,
    hold_out,
    score_texts,
    weigh_tokens,
)
from hf_sparse_pathways.discovery.windows import Window
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.pathways.pairs import share_seen
from hf_sparse_pathways.pathways.signature import LENGTHS, USUAL_MARGIN, Signature
from hf_sparse_pathways.shares import is_number

TARGET_ERROR = 0.01
"""Usual share of a domain's prompts that may go to a wrong domain."""


def check_target(target_error: float) -> None:
    """Check a share of prompts.

    Raises:
        PathwaysError: It is not between 0 and 1.
    """
    if not is_number(target_error) or not 0.0 < target_error < 1.0:
        raise PathwaysError(
            f"target_error has to be between 0 and 1, got {target_error!r}: it is the "
            "share of a domain's prompts that may go to a wrong domain."
        )


@dataclass(frozen=True)
class _Leads:
    """By how many nats domains lead on a domain's held-out texts, per number in ``LENGTHS``.

    Attributes:
        of_others: Other domain -> its leads on those texts that it would take; descending.
        over_others: Other domain -> the domain's own leads over it on the texts that it takes.
        trials: How many texts there were.
    """

    of_others: Mapping[str, list[Tensor]]
    over_others: Mapping[str, list[Tensor]]
    trials: list[int]


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
    leads = {name: _find_leads(name, signatures, windows[name], background) for name in signatures}
    found = {}
    for name, signature in signatures.items():
        own = leads[name]
        margins = []
        for place, trials in enumerate(own.trials):
            pairs = [
                (rival[place], leads[other].over_others[name][place])
                for other, rival in own.of_others.items()
            ]
            margins.append(share_out(pairs, int(target_error * trials)))
        others = [signatures[other].digest for other in own.of_others]
        found[name] = replace(
            signature,
            peers=torch.tensor(others, dtype=torch.int64),
            margins=torch.tensor(margins).T.reshape(len(others), len(LENGTHS)).contiguous(),
            trials=torch.tensor(own.trials, dtype=torch.int32),
            target_error=torch.tensor([target_error]),
        )
    return found


def _find_leads(
    name: str,
    signatures: Mapping[str, Signature],
    windows: tuple[tuple[Window, ...], tuple[Window, ...]],
    background: Background,
) -> _Leads:
    """Return who leads on a domain's held-out texts."""
    others = {other: each for other, each in signatures.items() if other != name}
    of_others: dict[str, list[list[Tensor]]] = {other: [[] for _ in LENGTHS] for other in others}
    over_others: dict[str, list[list[Tensor]]] = {other: [[] for _ in LENGTHS] for other in others}
    trials = [0] * len(LENGTHS)
    for kept, held_out in hold_out(*windows):
        own = replace(
            signatures[name],
            tokens=weigh_tokens(kept, background),
            pairs=collect_known_pairs(kept, background),
        )
        for place, texts, _ in cut_texts(held_out):
            trials[place] += len(texts)
            score, takes = _read(own, texts, place, background)
            for other, rival in others.items():
                its_score, it_takes = _read(rival, texts, place, background)
                ahead = (its_score - score) * LENGTHS[place]
                of_others[other][place].append(ahead[it_takes])
                over_others[other][place].append(-ahead[takes])
    return _Leads(_join(of_others), _join(over_others), trials)


def _read(
    signature: Signature, texts: Tensor, place: int, background: Background
) -> tuple[Tensor, Tensor]:
    """Return the scores of texts of a length, and which of them are taken to be the domain's."""
    weights, ignored = signature.tokens.float(), background.ignored
    scores = score_texts(texts, weights, ignored)
    seen = share_seen(signature.pairs, texts, count_tokens(texts, weights, ignored))
    usual = scores >= signature.least_scores[place]
    return scores, usual & (seen >= signature.least_seen[place])


def _join(parts: Mapping[str, list[list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Return the leads of each domain and length, descending."""
    return {
        name: [torch.cat([*row, torch.empty(0)]).sort(descending=True).values for row in rows]
        for name, rows in parts.items()
    }


def share_out(pairs: Sequence[tuple[Tensor, Tensor]], allowed: int) -> tuple[float, ...]:
    """Return a margin for each other domain, that hold back the least of their own text.

    Args:
        pairs: Per other domain: its leads on the domain's texts, and on its own over the domain.
        allowed: How many of the domain's texts may be taken altogether. If there are too few to
            see such a share, they show nothing: then the usual margins are returned.
    """
    if not allowed:
        return (USUAL_MARGIN,) * len(pairs)
    best: dict[int, tuple[float, tuple[float, ...]]] = {0: (0.0, ())}
    for leads, own in pairs:
        needed = int((leads >= USUAL_MARGIN).sum())
        options = [_ask(leads, own, taken) for taken in range(min(allowed, needed) + 1)]
        found: dict[int, tuple[float, tuple[float, ...]]] = {}
        for spent, (lost, margins) in best.items():
            for taken, (more, margin) in enumerate(options[: allowed - spent + 1]):
                way = (lost + more, (*margins, margin))
                found[spent + taken] = min(found.get(spent + taken, way), way)
        best = found
    return min(best.values())[1]


def _ask(leads: Tensor, own: Tensor, taken: int) -> tuple[float, float]:
    """Return the share of its own text that another domain loses, and its margin.

    Args:
        leads: Its leads on the domain's texts, descending.
        own: Its leads over the domain on its own texts.
        taken: How many of the former may reach the margin.
    """
    reach = torch.tensor(torch.inf)
    margin = float(leads[taken].nextafter(reach)) if taken < len(leads) else USUAL_MARGIN
    margin = max(USUAL_MARGIN, margin)
    return float((own < margin).float().mean()) if len(own) else 0.0, margin
