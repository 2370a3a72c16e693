"""Where prompts of known and unknown text go, what that does to quality, and what deciding costs.

Prompts are the first tokens of windows that are drawn over the documents that nothing was
calibrated or validated on. A text whose name is no domain's is text of no domain: all of it should
go nowhere.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_sparse_pathways.discovery.passes import evaluation_mode, find_device
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.windows import draw_windows
from hf_sparse_pathways.errors import PathwaysError, TextError
from hf_sparse_pathways.measure.guarding import DOCUMENTS, HALF, measure_guard, time_guard
from hf_sparse_pathways.measure.routing_report import (
    DENSE,
    RoutedQuality,
    RoutedText,
    RoutingCost,
    RoutingReport,
)
from hf_sparse_pathways.measure.speed.clock import now
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.modeling.routing import Router
from hf_sparse_pathways.pathways.names import POOLED
from hf_sparse_pathways.pathways.signature import LENGTHS

PROMPTS = (8, 32, 64, 128, 512)
"""Usual lengths of prompts, in tokens."""

SCORED = 64
"""Tokens behind a prompt on which quality is measured."""

QUALITY_LENGTH = 64
"""Length of the prompts before them."""

ROUNDS = 5
"""How often each is timed, in turns."""


def measure_routing(  # noqa: PLR0913
    model: SparsePathwaysForCausalLM,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    lengths: Sequence[int] = PROMPTS,
    max_prompts: int = 200,
    quality_prompts: int = 0,
    guard: bool = False,
    cost: bool = True,
    seed: int = 0,
) -> RoutingReport:
    """Measure what ``domain="auto"`` does. The model is left as it was.

    Args:
        model: A model with pathways.
        tokenizer: Its tokenizer.
        texts: Name -> text source; names that are no domains stand for unknown text.
        lengths: Of prompts, in tokens.
        max_prompts: Most prompts per text and length.
        quality_prompts: Prompts per text behind which perplexity is measured; 0 for none.
        guard: Whether to measure what a guard does where text changes.
        cost: Whether to time deciding beside the prefill.
        seed: Of what is drawn.

    Raises:
        TextError: A text has no document left, or none that is long enough for any prompt.
        PathwaysError: There is no router, or a number is not positive.
    """
    if not lengths or min(lengths) < 1 or max_prompts < 1:
        raise PathwaysError("Prompts need at least one token, and at least one of them.")
    pathways = model.pathways
    seen = [path.provenance.get("text", {}) for path in pathways.by_domain.values()]
    router = model.text_router
    router.check()
    by_kind = [replace(router, kinds=(kind,)) for kind in router.kinds]
    rows: list[RoutedText] = []
    alone: list[RoutedText] = []
    halves: dict[str, Tensor] = {}
    quality: list[RoutedQuality] = []
    excluded = 0
    with torch.no_grad(), evaluation_mode(model):
        for name, source in texts.items():
            documents = read_documents(source, seed=seed, tokens=max_prompts * max(lengths))
            fresh, without = documents.unseen(seen, routed=True)
            excluded += without
            if not fresh.items:
                raise TextError(
                    f"{name!r}: the pathways have seen all {without} documents of "
                    f"{documents.source}. Give others."
                )

            def draw(length: int, most: int, fresh: Any = fresh) -> Tensor:
                return draw_prompts(fresh, tokenizer, length=length, most=most, seed=seed)

            prompts = [draw(length, max_prompts) for length in lengths]
            prompts = [drawn for drawn in prompts if len(drawn)]
            known = name in model.domains
            rows += [_route(router, name, known, drawn) for drawn in prompts]
            alone += [_route(one, name, known, drawn) for one in by_kind for drawn in prompts]
            if not prompts:
                raise TextError(f"{name!r}: no document has {min(lengths)} tokens.")
            if quality_prompts:
                longer = draw(QUALITY_LENGTH + SCORED, quality_prompts)
                quality.append(_measure_quality(model, name, longer))
            if guard:
                halves[name] = draw(HALF, min(DOCUMENTS, max_prompts))
        guarded = measure_guard(model, halves)
        watched = time_guard(model, pathways.routed[0]) if guard and cost else None
        costs = [_time(model, length) for length in lengths] if cost else []
    return RoutingReport(
        domains=tuple(pathways.routed),
        rows=tuple(rows),
        alone=tuple(alone),
        quality=tuple(quality),
        cost=tuple(costs),
        guarded=guarded,
        guard_cost=watched,
        size=sum(signature.size for signature in router.signatures.values()),
        excluded=excluded,
        settings={
            "max_prompts": max_prompts,
            "seed": seed,
            "least_tokens": LENGTHS[0],
            "margins": _describe_margins(router),
        },
    )


def _describe_margins(router: Router) -> dict[str, Any]:
    """Return per domain for which error its margins were found, on how many texts per length."""
    return {
        name: {
            "target_error": float(signature.target_error),
            "texts": dict(zip(map(str, LENGTHS), signature.trials.tolist(), strict=True)),
        }
        for name, signature in router.signatures.items()
    }


def draw_prompts(documents: Any, tokenizer: Any, *, length: int, most: int, seed: int) -> Tensor:
    """Return token ids ``(prompts, length)`` from windows all over the documents."""
    windows = draw_windows(
        documents, tokenizer, max_tokens=4 * length * most, max_length=2 * length, seed=seed
    )
    long = [window.ids[:length] for window in windows if len(window.ids) >= length]
    return torch.tensor(long[:most], dtype=torch.int64).reshape(-1, length)


def _route(router: Router, name: str, known: bool, prompts: Tensor) -> RoutedText:
    """Return where prompts go."""
    decided = Counter(found.domain or DENSE for found in router.decide(prompts))
    return RoutedText(
        text=name,
        known=known,
        length=prompts.shape[1],
        prompts=len(prompts),
        decided=dict(decided),
        kinds=router.kinds,
    )


def _measure_quality(model: Any, name: str, ids: Tensor) -> RoutedQuality:
    """Return the perplexity behind the prompts, however the domain is chosen."""
    if not len(ids):
        raise TextError(
            f"{name!r}: no document has {ids.shape[1]} tokens, {SCORED} of them behind a prompt, "
            "on which quality is measured. Give longer ones, or leave quality out."
        )
    own = name if name in model.domains else None
    ways: dict[str, Any] = {
        DENSE: [None] * len(ids),
        "auto": model.route(ids[:, :QUALITY_LENGTH]),
        "oracle": [own] * len(ids),
    }
    if POOLED in model.pathways.controls:
        ways[POOLED] = [POOLED] * len(ids)
    losses = {way: _loss(model, ids, chosen) for way, chosen in ways.items()}
    dense = losses.pop(DENSE)
    return RoutedQuality(
        text=name,
        length=QUALITY_LENGTH,
        tokens=SCORED * len(ids),
        dense=math.exp(dense),
        ratios={way: math.exp(loss - dense) for way, loss in losses.items()},
    )


def _loss(model: Any, ids: Tensor, chosen: Sequence[str | None]) -> float:
    """Return the mean loss of the tokens behind the prompts, in nats."""
    total, device = 0.0, find_device(model)
    for row, domain in zip(ids, chosen, strict=True):
        logits = model(row[None].to(device), domain=domain).logits[0, QUALITY_LENGTH - 1 : -1]
        target = row[QUALITY_LENGTH:].to(logits.device)
        total += float(cross_entropy(logits.float(), target, reduction="sum"))
    return total / (SCORED * len(ids))


def _time(model: Any, length: int) -> RoutingCost:
    """Time deciding and the dense pass over one prompt, in turns."""
    device = find_device(model)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: model.route(ids),
        lambda: model(ids, domain=None),
    )
    for call in calls:
        call()
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, times in zip(calls, taken, strict=True):
            start = now(device)
            call()
            times.append(now(device) - start)
    return RoutingCost(length=length, seconds=median(taken[0]), prefill=median(taken[1]))
