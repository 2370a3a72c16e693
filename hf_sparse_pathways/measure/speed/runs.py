"""One timed call of an arm, in tokens per second.

Decoding is timed within the real ``generate``: a logits processor looks at the clock at every
token, and what lies between the first and the last one counts, so the prompt does not.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.measure.speed.arms import Arm, Lineup
from hf_sparse_pathways.measure.speed.workloads import Workload

Run = Callable[[], float]
Calls = Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]
"""Module name, arguments and keyword arguments."""


def make_runs(lineup: Lineup, workload: Workload, new_tokens: int) -> dict[str, Run]:
    """Return a timed call for every arm.

    Args:
        lineup: The arms.
        workload: What they do.
        new_tokens: Tokens per call of ``generate``.

    Returns:
        Arm's label -> a call that returns tokens per second. Empty if the model's FFN blocks
        cannot be called alone, because they have no module of their own.
    """
    ids = random_ids(lineup.dense, workload)
    if workload.kind == "ffn":
        calls = record_calls(lineup.dense, ids)
        return {arm.label: _ffn_run(lineup, arm, calls, ids) for arm in lineup.arms if calls}
    if workload.kind == "prefill":
        return {arm.label: _prefill_run(lineup, arm, ids) for arm in lineup.arms}
    return {arm.label: _decode_run(lineup, arm, ids, new_tokens) for arm in lineup.arms}


def random_ids(model: Any, workload: Workload) -> Tensor:
    """Return random token ids ``(batch, tokens)``, the same every time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (workload.batch, workload.tokens), generator=generator)
    return ids.to(model.device)


def generate(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> list[float]:
    """Generate greedily and return the time at which each new token's logits were there."""
    ticks = _Ticks(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([ticks]),
        **options,
    )
    return ticks.times


def decode(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> float:
    """Generate greedily and return the tokens per second of all rows, without the prompt's time."""
    times = generate(model, ids, new_tokens, **options)
    return len(ids) * (len(times) - 1) / (times[-1] - times[0])


@torch.no_grad()
def prefill(model: Any, ids: Tensor, **options: Any) -> None:
    """Run one pass over some tokens, without a cache."""
    model(input_ids=ids, use_cache=False, **options)


def prefill_speed(model: Any, ids: Tensor, **options: Any) -> float:
    """Run one pass over some tokens, without a cache, and return the tokens per second."""
    started = clock.now(model.device)
    prefill(model, ids, **options)
    return ids.numel() / (clock.now(model.device) - started)


def pass_options(model: Any, arm: Arm) -> dict[str, Any]:
    """Return what an arm's pass is given: logits of the last position only where that can be."""
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    return {**last, **domain_options(arm)}


def domain_options(arm: Arm) -> dict[str, Any]:
    """Return the arguments by which an arm's pathway is chosen; plain models take none."""
    return {} if arm.executor is None else {"domain": arm.pathway}


@torch.no_grad()
def record_calls(model: Any, ids: Tensor) -> Calls:
    """Return the calls of the FFN blocks in a pass; none if a block is a part of its layer."""
    blocks = find_blocks(model)
    if any(block.parent is block.layer for block in blocks):
        return []
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def keep(name: str) -> Any:
        return lambda _module, args, options: calls.append((name, args, options))

    hooks = [
        block.parent.register_forward_pre_hook(keep(block.name), with_kwargs=True)
        for block in blocks
    ]
    try:
        prefill(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _Ticks(LogitsProcessor):
    """Look at the clock at every token, and leave its logits alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        self.times.append(clock.now(self.device))
        return scores


def _decode_run(lineup: Lineup, arm: Arm, ids: Tensor, new_tokens: int) -> Run:
    options = domain_options(arm)

    return partial(decode, lineup.model(arm), ids, new_tokens, **options)


def _prefill_run(lineup: Lineup, arm: Arm, ids: Tensor) -> Run:
    model = lineup.model(arm)
    options = pass_options(model, arm)

    return partial(prefill_speed, model, ids, **options)


def _ffn_run(lineup: Lineup, arm: Arm, calls: Calls, ids: Tensor) -> Run:
    model: Any = lineup.model(arm)
    modules: list[nn.Module] = [model.get_submodule(name) for name, _, _ in calls]

    @torch.no_grad()
    def run() -> float:
        scope = nullcontext() if arm.executor is None else _Entered(model, arm.pathway, ids)
        with scope:
            started = clock.now(model.device)
            for module, (_, args, options) in zip(modules, calls, strict=True):
                module(*args, **options)
            return ids.numel() / (clock.now(model.device) - started)

    return run


class _Entered:
    """Within the block a pathway is on, as in one forward pass of the model."""

    def __init__(self, model: Any, pathway: str | None, ids: Tensor) -> None:
        self.model, self.pathway, self.ids = model, pathway, ids

    def __enter__(self) -> None:
        self.choice = self.model.enter_forward(self.pathway, (self.ids,), {})

    def __exit__(self, *_: object) -> None:
        self.model.leave_forward(self.choice)
