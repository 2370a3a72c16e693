"""Activation profiles: what each FFN neuron does on a domain's text, alone and with the others.

The decoder runs over random windows of the text. Hooks on every FFN block drop padding and add up,
per neuron, the moments of ``statistics.py``, and per block the Gram matrix of ``grams.py``. Gram
matrices are large, so the blocks are taken in groups that fit into memory, one pass over the text
per group (``collection.py``); a pass ends at its group's last block. Routed experts take one more
pass (``expert_profiling.py``).

Source: A. Young 2026, "Sparse Pathways", profiles E[|a|] per domain; the other statistics serve
other methods (``scores.py``, ``obs.py``).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from hf_sparse_pathways.discovery.background import take_background
from hf_sparse_pathways.discovery.collection import Collection, Sample, cut_groups
from hf_sparse_pathways.discovery.documents import FEW_DOCUMENTS, ROUTER_TOKENS, Documents
from hf_sparse_pathways.discovery.entanglement import measure_entanglement
from hf_sparse_pathways.discovery.expert_profiling import collect_experts
from hf_sparse_pathways.discovery.precision import calibration_precision
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.windows import (
    Window,
    check_seed,
    count_tokens,
    draw_windows,
    list_digests,
    resolve_length,
)
from hf_sparse_pathways.errors import PathwaysError, TextError, named, option
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.memory import MAX_MEMORY, format_memory, parse_memory
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.processes import Processes

MIN_TOKENS = 32
"""Fewer tokens of a domain are refused: their statistics would be noise."""

FEW_TOKENS = 1024
"""Of fewer it is said that they are few."""

logger = logging.getLogger(__name__)


def profile(  # noqa: PLR0913
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    max_tokens: int = 65536,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    grams: bool = True,
    inputs: bool = True,
    entanglement: bool = False,
    validation_tokens: int = 8192,
    validation_share: float = 0.0,
    router_tokens: int = ROUTER_TOKENS,
    precision: str = "model",
    max_memory: int | str = MAX_MEMORY,
    work_folder: "str | os.PathLike[str] | None" = None,
    accelerator: Any = None,
) -> Profile:
    """Take the activation profile of each domain's text. The model is left as it was.

    Args:
        model: A causal LM; one with pathways is profiled densely.
        tokenizer: Its tokenizer.
        texts: Domain name -> text source (see ``read_documents``). All of it is calibration text:
            hold out what you evaluate on.
        max_tokens: Most tokens per domain, drawn at random over all of its documents.
        max_length: Most tokens per window; by default 512, or the model's positions if fewer.
        batch_size: Windows per forward pass.
        seed: Decides which windows are drawn.
        grams: Whether to take Gram matrices, which selection with repair needs.
        inputs: Whether the Gram matrices hold the blocks' inputs too, which one-shot repair with a
            bypass needs.
        entanglement: Whether to measure how far from normal the outputs of every neuron's incoming
            products are, in two more passes over the text.
        validation_tokens: Most tokens per domain that are kept for comparing methods, from
            documents that are not calibrated on.
        validation_share: Fraction of the documents that is set aside for that; if there are fewer
            than five documents, or with 0.0, only documents of which no window was drawn serve.
        router_tokens: Most tokens per domain from which ``domain="auto"`` learns what its text
            looks like; the model does not run over them. No more than ``max_tokens``: it learns
            from the calibration text.
        precision: Of the model's products: ``"model"``, ``"bfloat16"``, or ``"fastest"``, which is
            bfloat16 where the processor is built for it, and goes through float32 where it only
            emulates the model's dtype.
        max_memory: Most bytes (or ``"4GB"``) of Gram matrices in memory at a time. Fewer mean
            more passes over the text.
        work_folder: Where unfinished sums, and the Gram matrices of finished groups, are stored. A
            run that was interrupted goes on from there when it is called again with the same
            settings. Keep the folder while the profile is in use; ``save_pretrained`` copies.
            Several processes need one that all of them see.
        accelerator: An ``Accelerator`` or ``PartialState`` whose processes share the windows. Each
            has to call this with the same arguments, and gets the profile of all windows: that
            of one process, but for the order in which numbers are added.

    Raises:
        UnsupportedModelError: The model has neither FFN blocks nor routed experts that fit.
        TextError: A source cannot be read, or has fewer than ``MIN_TOKENS`` tokens.
        PathwaysError: An activation is NaN or infinite, the memory does not suffice, or processes
            were given something else each.
    """
    processes = Processes.of(accelerator)
    processes.check_whole(model)
    base = BaseModel.of(model)
    if not texts:
        raise TextError("No domains were given. Pass a dictionary {domain: text source}.")
    check_seed(seed)
    max_length = resolve_length(model, max_length)
    samples = {}
    for domain, source in texts.items():
        documents = read_documents(source, seed=seed, tokens=max(max_tokens, router_tokens))
        samples[domain] = _draw(
            domain,
            documents,
            tokenizer,
            max_tokens=max_tokens,
            validation=(validation_share, validation_tokens),
            router_tokens=router_tokens,
            max_length=max_length,
            seed=seed,
        )
    blocks = find_blocks(model)
    groups = [blocks] if blocks else []
    if grams:
        kept = 0 if work_folder is not None else len(samples)
        groups = group_blocks(blocks, parse_memory(max_memory), kept, inputs=inputs)
    run = Collection(model, tuple(groups), batch_size, grams, inputs, precision, processes)
    with calibration_precision(model, precision):
        by_domain = {
            domain: replace(
                run.collect(domain, sample, work_folder),
                experts=collect_experts(run, domain, sample, work_folder),
            )
            for domain, sample in samples.items()
        }
        if entanglement:
            memory = parse_memory(max_memory)
            for domain, sample in samples.items():
                distances = measure_entanglement(run, domain, sample, work_folder, memory)
                by_domain[domain] = replace(by_domain[domain], entanglement=distances)
        background = take_background(
            model, tokenizer, seed=seed, precision=precision, work_folder=work_folder
        )
    return Profile(base=base, by_domain=by_domain, background=background)


def group_blocks(
    blocks: Sequence[FfnBlock], max_memory: int, domains_kept: int, *, inputs: bool = True
) -> list[tuple[FfnBlock, ...]]:
    """Cut blocks into groups whose Gram matrices fit into memory together.

    Args:
        blocks: In layer order.
        max_memory: Bytes.
        domains_kept: How many domains' matrices of all blocks stay in memory besides; 0 if they
            are stored on disk.
        inputs: Whether they hold the blocks' inputs.

    Raises:
        PathwaysError: One block, or what stays, does not fit.
    """
    if not blocks:
        return []
    sizes = [4 * (block.d_ff + (block.d_in if inputs else 0) + 1) ** 2 for block in blocks]
    needed = max(2 * max(sizes), domains_kept * sum(sizes))
    if needed > max_memory:
        way_out = f"raise {option('max_memory')}, or take the profile with {named('grams', False)}"
        if 2 * max(sizes) <= max_memory:
            way_out += ", or pass work_folder= to keep them on disk"
        raise PathwaysError(
            f"Gram matrices of {format_memory(needed)} do not fit into max_memory "
            f"({format_memory(max_memory)}): {way_out}."
        )
    room = max_memory - max(sizes)  # for the copy of one that is being stored
    return cut_groups(blocks, sizes, room)


def _draw(  # noqa: PLR0913
    domain: str,
    documents: Documents,
    tokenizer: Any,
    *,
    max_tokens: int,
    validation: tuple[float, int],
    router_tokens: int,
    max_length: int,
    seed: int,
) -> Sample:
    """Draw calibration windows, validation windows from the documents that are left, and others.

    Those are of the documents that are not validated on, where the calibration windows are not all
    of them anyway.
    """
    share, validation_tokens = validation
    calibration = documents
    if share > 0.0 and len(documents.items) >= FEW_DOCUMENTS:
        calibration, _ = documents.split(share, seed)
    draw = partial(draw_windows, tokenizer=tokenizer, max_length=max_length, seed=seed)
    windows = draw(calibration, max_tokens=max_tokens)
    tokens = count_tokens(windows)
    if tokens < MIN_TOKENS:
        raise TextError(
            f"Domain {domain!r} has {tokens} tokens of text ({documents.source}); at least "
            f"{MIN_TOKENS} are needed, and tens of thousands for a good selection."
        )
    if tokens < FEW_TOKENS:
        logger.warning(
            "Domain %r has only %d tokens of calibration text (%s): which neurons it needs is hard "
            "to tell from so few. Give more text, or raise %s; tens of thousands are usual.",
            domain,
            tokens,
            documents.source,
            option("max_tokens"),
        )
    digests, cut = list_digests(windows)
    kept: list[Window] = []
    if validation_tokens > 0:
        kept = draw(documents.without(digests, cut), max_tokens=validation_tokens)
    kept_digests, kept_cut = list_digests(kept)
    told: list[Window] = []
    if router_tokens > max_tokens <= tokens:
        told = draw(calibration.without(kept_digests, kept_cut), max_tokens=router_tokens)
    told_digests, told_cut = list_digests(told)
    provenance = {
        "source": documents.source,
        "datasets": [dict(dataset) for dataset in documents.datasets],
        "documents": len(digests),
        "tokens": tokens,
        "max_length": max_length,
        "seed": seed,
        "digests": digests,
        "cut_digests": cut,
        "validation_digests": kept_digests,
        "validation_cut_digests": kept_cut,
        "router_digests": told_digests,
        "router_cut_digests": told_cut,
    }
    return Sample(tuple(windows), tuple(kept), tuple(told), provenance)
