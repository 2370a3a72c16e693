"""Wall clock of ``generate``: dense and sparse alternate in one process, round by round.

Each round times both arms on the same prompt, so that a machine's slow and fast spells fall on
both; the ratio is taken within a round. Both arms produce exactly the same number of tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_sparse_pathways.discovery.goal import check_sparsity
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.speed_report import SpeedReport
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways


def benchmark(
    model: SparsePathwaysForCausalLM,
    domains: Sequence[str] = (),
    *,
    sparsity: float | None = None,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    rounds: int = 7,
) -> tuple[list[SpeedReport], tuple[float, ...]]:
    """Time domains' pathways at batch 1. The model is left as it was.

    Args:
        model: A model with pathways.
        domains: Which to time; all of them if empty.
        sparsity: Time random masks of this sparsity under the domains' names instead.
        prompt_tokens: Length of the prompt, random token ids.
        new_tokens: Tokens that each call generates.
        rounds: Timed rounds per domain.

    Returns:
        One report per domain, and samples of what switching between the first two adds to a step,
        in seconds (none with fewer than two domains).

    Raises:
        UnknownNameError: An unknown domain.
        PathwaysError: A number out of range.
    """
    if prompt_tokens < 1:
        raise PathwaysError(f"prompt_tokens has to be positive, got {prompt_tokens}.")
    pathways = model.pathways
    chosen = pathways.subset(domains or pathways.domains)
    timed = chosen if sparsity is None else _random_pathways(chosen, sparsity)
    timed = pathways.merged(timed)  # the default domain stays one
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    model.set_pathways(timed)
    try:
        reports = [
            compare_generation(model, prompt, name, new_tokens=new_tokens, rounds=rounds)
            for name in chosen.domains
        ]
        first_two = chosen.domains[:2]
        switch = time_switch(model, *first_two) if len(first_two) == 2 else ()
    finally:
        model.set_pathways(pathways)
    return reports, switch


def _random_pathways(pathways: Pathways, sparsity: float) -> Pathways:
    fractions = check_sparsity(sparsity, len(pathways.base.blocks))
    generator = torch.Generator().manual_seed(0)
    by_domain = {}
    for name in pathways.domains:
        keep = [
            torch.randperm(block.d_ff, generator=generator) >= fraction * block.d_ff
            for block, fraction in zip(pathways.base.blocks, fractions, strict=True)
        ]
        by_domain[name] = Pathway.from_keep(keep, {"method": "random"})
    return replace(pathways, by_domain=by_domain)


def compare_generation(
    model: SparsePathwaysForCausalLM,
    input_ids: Tensor,
    domain: str,
    *,
    new_tokens: int = 32,
    rounds: int = 7,
) -> SpeedReport:
    """Time greedy generation with and without a pathway.

    Args:
        model: A model with pathways.
        input_ids: The prompts, int64 ``(batch, tokens)``.
        domain: The pathway to time.
        new_tokens: Tokens that each call generates.
        rounds: Timed rounds, after one round of warming up.

    Raises:
        PathwaysError: A count is not positive.
    """
    if new_tokens < 1 or rounds < 1:
        raise PathwaysError(f"new_tokens and rounds have to be positive: {new_tokens}, {rounds}.")

    def run(chosen: str | None) -> float:
        started = time.perf_counter()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            domain=chosen,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        return new_tokens * len(input_ids) / (time.perf_counter() - started)

    dense, sparse = _alternate(lambda: run(None), lambda: run(domain), rounds, f"time {domain}")
    return SpeedReport(
        domain=domain,
        executor=model.execution.executor,
        sparsity=model.pathways.sparsity(domain),
        dense=tuple(dense),
        sparse=tuple(sparse),
    )


@torch.no_grad()
def time_switch(
    model: SparsePathwaysForCausalLM, first: str, second: str, *, pairs: int = 60
) -> tuple[float, ...]:
    """Return what switching between two resident domains adds to a one-token step, in seconds.

    Every pair is a step in the domain of the step before, then one in the other domain; the
    difference of the two is one sample. Single samples are mostly noise: look at their quartiles.
    """
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)

    def step(domain: str) -> float:
        started = time.perf_counter()
        model(input_ids=token, use_cache=False, domain=domain)
        return time.perf_counter() - started

    for domain in (first, second):
        step(domain)
    differences = []
    for index in range(pairs):
        one, other = (first, second) if index % 2 else (second, first)
        step(one)
        kept = step(one)
        differences.append(step(other) - kept)
    return tuple(differences)


def _alternate(
    dense: Callable[[], float], sparse: Callable[[], float], rounds: int, label: str
) -> tuple[list[float], list[float]]:
    """Call both in turn, changing which comes first; the first round is discarded."""
    results: dict[Any, list[float]] = {dense: [], sparse: []}
    for index in tqdm(range(rounds + 1), desc=label, unit="round", disable=None):
        for arm in (dense, sparse) if index % 2 else (sparse, dense):
            results[arm].append(arm())
    return results[dense][1:], results[sparse][1:]
