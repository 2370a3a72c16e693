"""Quality of a model's pathways on held-out documents, beside honest partners.

Every domain's text is scored with the dense model, the domain's pathway, and as controls the pooled
pathway, a random mask that keeps as many neurons of every block, and the other domains' pathways.
All arms see the same windows, one batch at a time. Documents that the pathways were calibrated on
are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.windows import resolve_length
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.measure.arms import (
    DENSE,
    MeasuredArm,
    ScoredText,
    measure_arms,
    pathway_arm,
)
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.base import BlockShape
from hf_sparse_pathways.pathways.pathway import POOLED, TUNED, Pathway, Pathways

RANDOM = "random:"  # no domain's name holds a colon
SEEN = ("exclude", "include", "refuse")


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
    """Measure every arm on each domain's text. The model is left as it was.

    Args:
        model: A model with pathways.
        tokenizer: Its tokenizer.
        texts: Domain name -> text source, held out from calibration.
        controls: Whether to measure the pooled, random and other domains' pathways too.
        max_tokens: Most tokens per domain, drawn at random over its documents.
        max_length: Most tokens per window, each scored on its own; by default 512, or the model's
            positions if fewer.
        batch_size: Windows per forward pass.
        seed: Decides the windows, the random masks and the resampling.
        seen: What to do with documents that the pathways were calibrated on: ``"exclude"`` them
            (the report says how many there were), ``"include"`` them, or ``"refuse"`` to measure.

    Raises:
        UnknownNameError: A domain that the model does not have.
        TextError: A source cannot be read, no document is left that was not calibrated on, or
            there is one and ``seen="refuse"``.
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
        drawn[domain] = ScoredText.draw(
            domain,
            documents,
            tokenizer,
            max_tokens=max_tokens,
            max_length=max_length,
            seed=seed,
            excluded=excluded,
        )
    rows: list[QualityRow] = []
    with _prepared(model, pathways, seed if controls else None):
        for domain, text in drawn.items():
            arms = _arms(model, domain, controls)
            rows.extend(measure_arms(model, text, arms, batch_size=batch_size, seed=seed))
    return QualityReport(base=pathways.base.name, rows=tuple(rows))


def _held_out(
    pathways: Pathways, domain: str, documents: Documents, seen: str
) -> tuple[Documents, int]:
    """Leave out documents that any pathway was calibrated on; return how many those were."""
    known = (pathway.provenance.get("text", {}) for pathway in pathways.by_domain.values())
    fresh, excluded = documents.unseen(known)
    if seen == "include":
        return documents, 0
    if seen == "refuse" and excluded:
        raise TextError(
            f"Domain {domain!r}: the pathways were calibrated on {excluded} of the "
            f"{len(documents.items)} documents of {documents.source}. Give held-out documents, or "
            "seen='exclude' to leave those out."
        )
    if not fresh.items:
        raise TextError(
            f"Domain {domain!r}: the pathways were calibrated on all {excluded} documents of "
            f"{documents.source}. Give held-out documents, or seen='include' to measure on "
            "calibration text."
        )
    return fresh, excluded


@contextmanager
def _prepared(
    model: SparsePathwaysForCausalLM, pathways: Pathways, seed: int | None
) -> Iterator[None]:
    """Give the model random partners of its pathways, and evaluation mode, for a while."""
    if seed is not None:
        partners = {
            f"{RANDOM} {name}": random_partner(pathway, pathways.base.blocks, seed)
            for name, pathway in pathways.by_domain.items()
        }
        model.set_pathways(pathways.with_controls(partners))
    try:
        with evaluation_mode(model):
            yield
    finally:
        model.set_pathways(pathways)


def random_partner(pathway: Pathway, shapes: Sequence[BlockShape], seed: int) -> Pathway:
    """Return a pathway of the same FLOPs whose neurons are chosen at random. Pure.

    Of each block it keeps as many neurons, and as many more as a bypass costs.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = []
    for block, shape in zip(pathway.blocks, shapes, strict=True):
        order = torch.randperm(shape.d_ff, generator=generator)
        mask = block.keep[order]
        bypass = shape.flops(block) // shape.flops_per_neuron - block.kept
        mask[(~mask).nonzero().flatten()[:bypass]] = True
        keep.append(mask)
    return Pathway.from_keep(keep, {"method": "random", "seed": seed})


def _arms(model: SparsePathwaysForCausalLM, domain: str, controls: bool) -> list[MeasuredArm]:
    """Return every arm for one domain's text."""
    pathways = model.pathways
    arms = [DENSE, pathway_arm("pathway", domain, pathways)]
    if f"{TUNED}{domain}" in pathways.controls:
        arms.append(pathway_arm("tuned", f"{TUNED}{domain}", pathways))
    if controls:
        if POOLED in pathways.controls:
            arms.append(pathway_arm("pooled", POOLED, pathways))
        arms.append(pathway_arm("random", f"{RANDOM} {domain}", pathways))
        others = (name for name in pathways.domains if name != domain)
        arms.extend(pathway_arm("other", name, pathways) for name in others)
    return arms
