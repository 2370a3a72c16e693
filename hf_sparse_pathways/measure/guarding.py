"""What a guard does to text that changes its domain halfway, and what watching costs.

A document is the beginning of one domain's and then of another text's; its tokens are given, not
generated. What a guard would compute before each of them follows from them alone, so that tokens
that are computed alike are passed together, over the cache of those before.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from hf_sparse_pathways.discovery.passes import find_device
from hf_sparse_pathways.measure.routing_report import DENSE, GuardCost, GuardedText
from hf_sparse_pathways.measure.speed.clock import now
from hf_sparse_pathways.modeling.guard import Guard, Watched

HALF = 256
"""Tokens of each half of a document."""

PROMPT = 32
"""Tokens at the beginning that are a prompt, and not watched."""

DOCUMENTS = 8
"""Documents for each pair of texts."""

ROUNDS, STEPS = 5, 16
"""How often a generation of so many tokens is timed, in turns with watching them."""

Domains = list[str | None]


def measure_guard(model: Any, halves: Mapping[str, Tensor]) -> tuple[GuardedText, ...]:
    """Measure perplexity where each domain's text goes on, and where each other text follows it.

    Args:
        model: A model with pathways, in evaluation mode.
        halves: Text -> token ids ``(documents, HALF)``; a domain is followed by other documents
            of its own, too.
    """
    known = [name for name in halves if name in model.pathways.routed]
    found = []
    for before in known:
        for after, texts in halves.items():
            second = texts.roll(1, 0) if after == before else texts
            count = min(len(halves[before]), len(second))
            ids = torch.cat([halves[before][:count], second[:count]], dim=1)
            if count:
                found.append(_measure(model, before, after, ids))
    return tuple(found)


def _measure(model: Any, before: str, after: str, ids: Tensor) -> GuardedText:
    """Return what a guard does to documents ``(documents, 2 * HALF)``."""
    router = model.text_router
    home = Watched(domain=before, choices=frozenset({before}))
    free = Watched(domain=before, choices=frozenset(router.signatures))
    steps = 2 * HALF - PROMPT
    losses: dict[str, list[float]] = {}
    delays, dense = [], []
    for row in ids:
        guarded, roaming = (_computed(Guard(router, [one], PROMPT), row) for one in (home, free))
        turn = HALF - PROMPT
        oracle = [before] * turn + [after if after in model.domains else None] * HALF
        ways: dict[str, Domains] = {
            DENSE: [None] * steps,
            "unguarded": [before] * steps,
            "guard": guarded,
            "guard of auto": roaming,
            "oracle": oracle,
        }
        known = {domains: _loss(model, row, domains) for domains in {*map(tuple, ways.values())}}
        for way, domains in ways.items():
            losses.setdefault(way, []).append(known[tuple(domains)])
        left = [domain is None for domain in guarded[turn:]]
        dense.append(sum(left))
        delays.append(left.index(True) if any(left) else HALF)
    base = mean(losses.pop(DENSE))
    return GuardedText(
        before=before,
        after=after,
        documents=len(ids),
        tokens=HALF * len(ids),
        dense=math.exp(base),
        ratios={way: math.exp(mean(nats) - base) for way, nats in losses.items()},
        densely=sum(dense) / (HALF * len(ids)),
        delay=median(delays),
    )


def _computed(guard: Guard, row: Tensor) -> Domains:
    """Return what is computed before each token behind the prompt of a document."""
    switches = {one.token: one.domain for one in guard.history(row[None])[0]}
    domain = guard.rows[0].domain
    found: Domains = []
    for token in range(len(row) - PROMPT):
        domain = switches.get(token, domain)
        found.append(domain)
    return found


def _loss(model: Any, row: Tensor, domains: Sequence[str | None]) -> float:
    """Return the mean loss of the second half's tokens, in nats."""
    device, cache, start = find_device(model), DynamicCache(), 0
    losses = []
    for domain, stop in _parts(domains):
        ids = row[None, start:stop].to(device)
        with model.pathway(domain):
            logits = model(ids, use_cache=True, **{_cache_name(model): cache}).logits[0]
        target = row[start + 1 : stop + 1].to(logits.device)
        losses.append(cross_entropy(logits.float(), target, reduction="none").cpu())
        start = stop
    return float(torch.cat(losses)[HALF - 1 :].mean())


def _parts(domains: Sequence[str | None]) -> Iterator[tuple[str | None, int]]:
    """Yield the domain of neighbouring passes, and the token that the last of them predicts."""
    stop = PROMPT - 1
    for domain, alike in groupby(domains):
        stop += sum(1 for _ in alike)
        yield domain, stop


def _cache_name(model: Any) -> str:
    """Return what ``forward`` calls a cache, which depends on the version of Transformers."""
    named = model.forward.__signature__.parameters
    return "cache" if "cache" in named else "past_key_values"


def time_guard(model: Any, domain: str) -> GuardCost:
    """Time what a guard does for one token, and its decoding, in turns; of one row."""
    device = find_device(model)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, HALF), generator=torch.Generator().manual_seed(0)).to(device)
    row = Watched(domain=domain, choices=frozenset(model.text_router.signatures))
    watching, decoding = [], []
    for _ in range(ROUNDS + 1):
        guard = Guard(model.text_router, [row], PROMPT)
        guard.follow(ids[:, :-STEPS])
        start = now(device)
        for left in range(STEPS - 1, -1, -1):
            guard.follow(ids[:, : HALF - left])
        watching.append((now(device) - start) / STEPS)
        taken = []
        for count in (1, 1 + STEPS):
            start = now(device)
            settings = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
            model.generate(ids, domain=domain, pad_token_id=0, **settings)
            taken.append(now(device) - start)
        decoding.append((taken[1] - taken[0]) / STEPS)
    return GuardCost(watching=median(watching[1:]), decoding=median(decoding[1:]))
