"""Perplexity of a model's pathways on held-out documents, beside honest partners.

Every domain's text is scored with the dense model, the domain's pathway, and as controls the pooled
pathway, a random mask that keeps as many neurons of every block, and the other domains' pathways.
Documents that the pathways were calibrated on are left out.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.text import Documents, TextSource, read_documents
from hf_sparse_pathways.discovery.trials import batch_loss, run_model
from hf_sparse_pathways.discovery.windows import (
    Window,
    count_tokens,
    draw_windows,
    make_batches,
    resolve_length,
)
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.measure.report import QualityReport, QualityRow
from hf_sparse_pathways.modeling.model import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.pathway import POOLED, Pathway, Pathways

RANDOM = "random:"  # no domain's name holds a colon
SEEN = ("exclude", "include")
SPLITS = ("", "validation_")  # prefixes of the digests in a pathway's provenance


def evaluate(  # noqa: PLR0913
    model: SparsePathwaysForCausalLM,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    controls: bool = True,
    max_tokens: int = 16384,
    max_length: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    seen: str = "exclude",
) -> QualityReport:
    """Measure perplexity on each domain's text. The model is left as it was.

    Args:
        model: A model with pathways.
        tokenizer: Its tokenizer.
        texts: Domain name -> text source, held out from calibration.
        controls: Whether to measure the pooled, random and other domains' pathways too.
        max_tokens: Most tokens per domain, drawn at random over its documents.
        max_length: Most tokens per window, each scored on its own; by default 512, or the model's
            positions if fewer.
        batch_size: Windows per forward pass.
        seed: Decides the windows and the random masks.
        seen: What to do with documents that the pathways were calibrated on: ``"exclude"`` them
            (the report says how many there were), or ``"include"`` them.

    Raises:
        UnknownNameError: A domain that the model does not have.
        TextError: A source cannot be read, or no document is left that was not calibrated on.
    """
    if not isinstance(model, SparsePathwaysForCausalLM):
        raise PathwaysError(
            f"evaluate needs a model with pathways, not {type(model).__name__}. Make one with "
            "SparsePathwaysForCausalLM.from_dense(model, pathways); of an adapter model pass "
            "adapted.get_base_model()."
        )
    if seen not in SEEN:
        raise UnknownNameError("value of seen", seen, SEEN)
    pathways = model.pathways
    max_length = resolve_length(model, max_length)
    drawn = {}
    for domain, source in texts.items():
        if domain not in model.domains:
            raise UnknownNameError("domain", domain, model.domains)
        documents, excluded = _held_out(pathways, domain, read_documents(source, seed=seed), seen)
        windows = draw_windows(
            documents, tokenizer, max_tokens=max_tokens, max_length=max_length, seed=seed
        )
        _check_scorable(domain, windows)
        drawn[domain] = (windows, excluded)
    rows: list[QualityRow] = []
    with _prepared(model, pathways, seed if controls else None):
        for domain, (windows, excluded) in drawn.items():
            arms = _arms(model.pathways, domain, controls)
            rows.extend(_measure(model, domain, arms, windows, excluded, batch_size))
    return QualityReport(base=pathways.base.name, rows=tuple(rows))


def _held_out(
    pathways: Pathways, domain: str, documents: Documents, seen: str
) -> tuple[Documents, int]:
    """Leave out documents that any pathway was calibrated on; return how many those were."""
    texts = [pathway.provenance.get("text", {}) for pathway in pathways.by_domain.values()]
    digests, cut = (
        [digest for text in texts for split in SPLITS for digest in text.get(f"{split}{name}", ())]
        for name in ("digests", "cut_digests")
    )
    fresh = documents.without(digests, cut)
    excluded = len(documents.items) - len(fresh.items)
    if seen == "include":
        return documents, 0
    if not fresh.items:
        raise TextError(
            f"Domain {domain!r}: the pathways were calibrated on all {excluded} documents of "
            f"{documents.source}. Give held-out documents, or seen='include' to measure on "
            "calibration text."
        )
    return fresh, excluded


def _check_scorable(domain: str, windows: list[Window]) -> None:
    if not any(len(window.ids) > 1 for window in windows):
        raise TextError(f"Domain {domain!r} has no held-out text of two tokens or more.")


@contextmanager
def _prepared(
    model: SparsePathwaysForCausalLM, pathways: Pathways, seed: int | None
) -> Iterator[None]:
    """Give the model random partners of its pathways, and evaluation mode, for a while."""
    if seed is not None:
        partners = {
            f"{RANDOM} {name}": random_partner(pathway, seed)
            for name, pathway in pathways.by_domain.items()
        }
        model.set_pathways(pathways.with_controls(partners))
    try:
        with evaluation_mode(model):
            yield
    finally:
        model.set_pathways(pathways)


def random_partner(pathway: Pathway, seed: int) -> Pathway:
    """Return a pathway that keeps as many neurons of each block, chosen at random. Pure."""
    generator = torch.Generator().manual_seed(seed)
    keep = [mask[torch.randperm(len(mask), generator=generator)] for mask in pathway.keep]
    return Pathway.from_keep(keep, {"method": "random", "seed": seed})


def _arms(pathways: Pathways, domain: str, controls: bool) -> list[tuple[str, str | None]]:
    """Return ``(role, name of the pathway)`` of every arm for one domain's text."""
    arms: list[tuple[str, str | None]] = [("dense", None), ("pathway", domain)]
    if controls:
        if POOLED in pathways.controls:
            arms.append(("pooled", POOLED))
        arms.append(("random", f"{RANDOM} {domain}"))
        arms.extend(("other", name) for name in pathways.domains if name != domain)
    return arms


def _measure(
    model: SparsePathwaysForCausalLM,
    domain: str,
    arms: list[tuple[str, str | None]],
    windows: list[Window],
    excluded: int,
    batch_size: int,
) -> Iterator[QualityRow]:
    pathways = model.pathways
    bar = tqdm(
        total=count_tokens(windows) * len(arms),
        desc=f"evaluate {domain}",
        unit="tok",
        disable=None,
    )
    dense = math.nan
    with bar:
        for role, name in arms:
            loss, tokens = negative_log_likelihood(model, windows, name, batch_size, bar)
            if math.isnan(loss):
                raise PathwaysError(
                    f"The loss of {name or 'the dense model'!r} on {domain!r} text is NaN. Check "
                    "the weights, or load them in float32."
                )
            perplexity = math.exp(min(loss / tokens, 700.0))
            dense = perplexity if name is None else dense
            yield QualityRow(
                domain=domain,
                role=role,
                pathway=name,
                perplexity=perplexity,
                ratio=perplexity / dense,
                flops=1.0 if name is None else pathways.flops(name),
                tokens=tokens,
                documents=len({window.document for window in windows}),
                excluded=excluded,
            )


@torch.no_grad()
def negative_log_likelihood(
    model: Any,
    windows: list[Window],
    domain: str | None,
    batch_size: int,
    bar: Any = None,
) -> tuple[float, int]:
    """Return the summed loss in nats and the number of scored tokens.

    A window's first token is context only.
    """
    total, tokens = 0.0, 0
    for batch in make_batches(windows, batch_size):
        loss, count = batch_loss(run_model(model, batch, domain=domain), batch)
        total, tokens = total + loss, tokens + count
        if bar is not None:
            bar.update(int(batch.mask.sum()))
    return total, tokens
