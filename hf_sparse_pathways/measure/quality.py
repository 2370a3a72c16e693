"""Quality of a model's pathways on held-out documents, beside honest partners.

Every domain's text is scored with the dense model, the domain's pathway, and as controls the pooled
pathway, a random mask that keeps as many neurons of every block, and the other domains' pathways.
All arms see the same windows, one batch at a time. Documents that the pathways were calibrated on
are left out. Several sets of pathways (other sparsities, other methods) are measured together:
each has these arms, and the dense model runs once for all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.weights import weight_digest
from hf_sparse_pathways.discovery.windows import Batch, resolve_length
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError, named
from hf_sparse_pathways.ffn.clusters import ClusteredBlock
from hf_sparse_pathways.ffn.kept_experts import ExpertsShape, KeptExperts
from hf_sparse_pathways.measure.adapters import active_adapters, without_adapters
from hf_sparse_pathways.measure.arms import DENSE, MeasuredArm, ScoredText, measure_arms
from hf_sparse_pathways.measure.pathway_sets import PathwaySet, gather_sets
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow, QualitySettings
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.base import BlockShape
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.processes import Processes
from hf_sparse_pathways.version import __version__

SEEN = ("exclude", "include", "refuse")


def evaluate(  # noqa: PLR0913
    model: SparsePathwaysForCausalLM,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    also: Mapping[str, Pathways] | None = None,
    label: str = "model",
    controls: bool = True,
    max_tokens: int = 16384,
    max_length: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    seen: str = "exclude",
    accelerator: Any = None,
) -> QualityReport:
    """Measure every arm on each domain's text. The model is left as it was.

    Args:
        model: A model with pathways. If adapters are active in it, all rows but the dense one have
            their effect.
        tokenizer: Its tokenizer.
        texts: Domain name -> text source, held out from calibration.
        also: Label -> other pathways of the same base, of another sparsity or method, that are
            measured beside the model's own on the same windows.
        label: What the model's own pathways are called beside those.
        controls: Whether to measure the pooled, random and other domains' pathways too.
        max_tokens: Most tokens per domain, drawn at random over its documents.
        max_length: Most tokens per window, each scored on its own; by default 512, or the model's
            positions if fewer.
        batch_size: Windows per forward pass.
        seed: Decides the windows, the random masks and the resampling.
        seen: What to do with documents that any of the pathways were calibrated on:
            ``"exclude"`` them (the report says how many there were), ``"include"`` them, or
            ``"refuse"`` to measure.
        accelerator: An ``Accelerator`` or ``PartialState`` whose processes share the batches. Each
            has to call this with the same arguments, and gets the report of one process.

    Raises:
        UnknownNameError: A domain that the model does not have.
        MismatchError: Other pathways were made for another base.
        PathwaysError: Two sets of pathways have one label, or one lacks a domain; or processes
            were given something else each.
        UnsupportedModelError: An adapter is merged, or came with biases, so that the dense model
            is not there any more.
        TextError: A source cannot be read, no document is left that was not calibrated on, or
            there is one and ``seen="refuse"``.
    """
    processes = Processes.of(accelerator)
    _check(model, texts, seen)
    processes.check_whole(model)
    settings = QualitySettings(
        max_tokens=max_tokens,
        max_length=resolve_length(model, max_length),
        batch_size=batch_size,
        seed=seed,
        seen=seen,
        controls=controls,
        dtype=str(model.dtype).removeprefix("torch."),
        adapters=active_adapters(model),
        versions=_versions(),
    )
    pathways = model.pathways
    sets = gather_sets(pathways, label, also or {}, list(texts))
    if controls:
        sets = [
            given.with_partners(
                partial(
                    random_partner,
                    shapes=pathways.base.blocks,
                    seed=seed,
                    experts=given.pathways.base.experts,
                )
            )
            for given in sets
        ]
    drawn = _draw(sets, tokenizer, texts, settings)
    if processes.count > 1:
        what = (weight_digest(model), settings, _what_is_measured(sets, drawn))
        processes.check_same(what, "Model, pathways, texts or settings")
    rows: list[QualityRow] = []
    with _prepared(model, sets):
        for text in drawn:
            arms = [_dense_arm(settings)]
            arms += [arm for given in sets for arm in given.arms(text.domain, controls)]
            rows.extend(
                measure_arms(
                    model, text, arms, batch_size=batch_size, seed=seed, processes=processes
                )
            )
    return QualityReport(base=pathways.base.name, rows=tuple(rows), settings=settings)


def _check(model: Any, texts: Mapping[str, TextSource], seen: str) -> None:
    """Check what can be checked before any text is read."""
    if not isinstance(model, SparsePathwaysForCausalLM):
        raise PathwaysError(
            f"evaluate needs a model with pathways, not {type(model).__name__}. Make one with "
            "SparsePathwaysForCausalLM.from_dense(model, pathways); of an adapter model pass "
            "adapted.get_base_model()."
        )
    if seen not in SEEN:
        raise UnknownNameError("value of seen", seen, SEEN)
    for domain in texts:
        if domain not in model.pathways.domains:
            raise UnknownNameError("domain", domain, model.pathways.domains)


def _what_is_measured(sets: Sequence[PathwaySet], drawn: Sequence[ScoredText]) -> list[Any]:
    """Return what processes that share the batches have to score alike."""
    kept = [
        (given.label, name, [block.kept for block in pathway.blocks])
        for given in sets
        for name, pathway in given.pathways.by_domain.items()
    ]
    return [kept, [(text.domain, [window.ids for window in text.windows]) for text in drawn]]


def _versions() -> dict[str, str]:
    """Return the versions on which figures may depend."""
    return {
        "hf-sparse-pathways": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _draw(
    sets: Sequence[PathwaySet],
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    settings: QualitySettings,
) -> list[ScoredText]:
    """Draw every domain's windows from documents that no set was calibrated on."""
    drawn = []
    for domain, source in texts.items():
        documents = read_documents(source, seed=settings.seed, tokens=settings.max_tokens)
        documents, excluded = _held_out(sets, domain, documents, settings.seen)
        drawn.append(
            ScoredText.draw(
                domain,
                documents,
                tokenizer,
                max_tokens=settings.max_tokens,
                max_length=settings.max_length,
                seed=settings.seed,
                excluded=excluded,
            )
        )
    return drawn


def _held_out(
    sets: Sequence[PathwaySet], domain: str, documents: Documents, seen: str
) -> tuple[Documents, int]:
    """Leave out documents that any pathway was calibrated on; return how many those were."""
    pathways = [pathway for given in sets for pathway in given.pathways.by_domain.values()]
    fresh, excluded = documents.unseen(p.provenance.get("text", {}) for p in pathways)
    if seen == "include":
        return documents, 0
    if seen == "refuse" and excluded:
        raise TextError(
            f"Domain {domain!r}: the pathways were calibrated on {excluded} of the "
            f"{len(documents.items)} documents of {documents.source}. Give held-out documents, or "
            f"{named('seen', 'exclude')} to leave those out."
        )
    if not fresh.items:
        raise TextError(
            f"Domain {domain!r}: the pathways were calibrated on all {excluded} documents of "
            f"{documents.source}. Give held-out documents, or {named('seen', 'include')} to "
            "measure on calibration text."
        )
    return fresh, excluded


@contextmanager
def _prepared(model: SparsePathwaysForCausalLM, sets: Sequence[PathwaySet]) -> Iterator[None]:
    """Give the model all that is measured, and evaluation mode, for a while."""
    pathways = model.pathways
    guests = {name: pathway for given in sets for name, pathway in given.guests.items()}
    try:
        model.set_pathways(pathways.with_controls(guests))
        with evaluation_mode(model):
            yield
    finally:
        model.set_pathways(pathways)


def random_partner(
    pathway: Pathway,
    shapes: Sequence[BlockShape],
    seed: int,
    experts: Sequence[ExpertsShape] = (),
) -> Pathway:
    """Return a pathway of the same FLOPs whose neurons are chosen at random. Pure.

    Of each block it keeps as many neurons, and as many more as bypass and router cost; of routed
    experts as many of each group, with as many neurons.

    Args:
        pathway: The other one.
        shapes: The FFN blocks'.
        seed: Of what is drawn.
        experts: Of the layers with routed experts, if the pathway keeps some of them.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = []
    for block, shape in zip(pathway.blocks, shapes, strict=True):
        order = torch.randperm(shape.d_ff, generator=generator)
        groups = None if isinstance(block, ClusteredBlock) else block.groups
        kept = block.kept if groups is None else groups.active
        alike = kept == int(block.keep.sum())
        mask = (block.keep if alike else torch.arange(shape.d_ff) < kept)[order]
        more = int(shape.flops(block) // shape.flops_per_neuron) - kept
        mask[(~mask).nonzero().flatten()[:more]] = True
        keep.append(mask)
    drawn = tuple(
        _random_experts(kept, shape, generator)
        for kept, shape in zip(pathway.experts, experts, strict=False)
    )
    random = Pathway.from_keep(keep, {"method": "random", "seed": seed})
    return replace(random, experts=drawn)


def _random_experts(
    kept: KeptExperts, shape: ExpertsShape, generator: torch.Generator
) -> KeptExperts:
    """Return as many experts of each group or channel, and neurons of each, at random."""
    groups = kept.keep.view(shape.groups * shape.channels, -1)
    keep = torch.stack(
        [own[torch.randperm(len(own), generator=generator)] for own in groups]
    ).flatten()
    if kept.width is None:
        return KeptExperts(keep=keep)
    order = torch.rand(shape.experts, shape.d_ff, generator=generator).argsort(1)
    return KeptExperts(keep=keep, neurons=(order < kept.width) & keep.unsqueeze(1))


def _dense_arm(settings: QualitySettings) -> MeasuredArm:
    """Return the arm of the base alone: without pathways, and without adapters if there are any."""
    return replace(DENSE, forward=_run_bare) if settings.adapters else DENSE


def _run_bare(model: Any, batch: Batch) -> Tensor:
    with without_adapters(model):
        return DENSE.forward(model, batch)
