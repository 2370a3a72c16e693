"""Which parts of the model take its time.

Hooks look at the clock around every FFN block's leaves, every layer's attention and the language
model head. That takes time itself, so it is done in passes of its own that are not in the timings.
A part's time is the median over passes (tokens, when decoding); the rest is the whole's median
less the parts' medians: norms, residuals, embedding, sampling, the cache, and Python between them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.measure.figures import quantile
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.measure.speed.arms import Arm, Lineup
from hf_sparse_pathways.measure.speed.runs import (
    domain_options,
    generate,
    pass_options,
    prefill,
    random_ids,
)
from hf_sparse_pathways.measure.speed.workloads import Workload

PARTS = ("ffn", "attention", "head")
STEPS = 12
PASSES = 4


@dataclass(frozen=True, kw_only=True)
class TimeShares:
    """Fractions of a pass's (or a decoded token's) time.

    Attributes:
        ffn: Of the FFN blocks that have pathways.
        attention: Of attention with its projections; 0 where no module is called so.
        head: Of the language model head.
        seconds: Of the whole.
    """

    ffn: float
    attention: float
    head: float
    seconds: float

    @property
    def rest(self) -> float:
        """Of everything else."""
        return 1.0 - self.ffn - self.attention - self.head

    def ceiling(self, removed: float) -> float:
        """Return the speed-up, by Amdahl's law, if a fraction of the FFN cost nothing."""
        return 1.0 / (1.0 - self.ffn * removed)


def measure_shares(lineup: Lineup, arm: Arm, workload: Workload) -> TimeShares:
    """Measure where a dense arm's time goes.

    Args:
        lineup: The arms.
        arm: A dense one.
        workload: A decode or a prefill.
    """
    model = lineup.model(arm)
    ids = random_ids(lineup.dense, workload)
    with _timed_parts(model) as passes:
        if workload.kind == "decode":
            generate(model, ids, STEPS, **domain_options(arm))
        else:
            options = pass_options(model, arm)
            for _ in range(PASSES):
                prefill(model, ids, **options)
    ends = [one.ended for one in passes]
    starts = ends[:-1] if workload.kind == "decode" else [one.started for one in passes[1:]]
    whole = quantile([end - start for start, end in zip(starts, ends[1:], strict=True)], 0.5)
    parts = {
        name: quantile([one.seconds.get(name, 0.0) for one in passes[1:]], 0.5) / whole
        for name in PARTS
    }
    return TimeShares(seconds=whole, **parts)


@dataclass
class _Pass:
    """The times of one forward pass, in seconds."""

    started: float
    ended: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


class _Stopwatch:
    """Hooks that add up how long one part takes; what is called within it counts once."""

    def __init__(self, part: str, passes: list[_Pass], device: torch.device) -> None:
        self.part, self.passes, self.device = part, passes, device
        self.since: float | None = None

    def start(self, *_: Any) -> None:
        if self.since is None:
            self.since = clock.now(self.device)

    def stop(self, *_: Any) -> None:
        if self.since is not None:
            spent = clock.now(self.device) - self.since
            seconds = self.passes[-1].seconds
            seconds[self.part] = seconds.get(self.part, 0.0) + spent
            self.since = None


@contextmanager
def _timed_parts(model: Any) -> Iterator[list[_Pass]]:
    """Yield a list that gets an entry per forward pass."""
    passes: list[_Pass] = []
    device = model.device

    def begin(*_: Any) -> None:
        passes.append(_Pass(clock.now(device)))

    def end(*_: Any) -> None:
        passes[-1].ended = clock.now(device)

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    for part, first, last in _places(model):
        watch = _Stopwatch(part, passes, device)
        hooks += [module.register_forward_pre_hook(watch.start) for module in first]
        hooks.append(last.register_forward_hook(watch.stop))
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _places(model: Any) -> Iterator[tuple[str, tuple[nn.Module, ...], nn.Module]]:
    """Yield each part: its name, the modules any of which begins it, the module that ends it."""
    blocks = find_blocks(model)
    for block in blocks:
        yield "ffn", block.incoming, block.outgoing
    for layer in dict.fromkeys(block.layer for block in blocks):
        for module in _attention(layer):
            yield "attention", (module,), module
    head = model.get_output_embeddings()
    if head is not None:
        yield "head", (head,), head


def _attention(layer: nn.Module) -> list[nn.Module]:
    """Return a layer's outermost modules that are called attention."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        last = name.rsplit(".", 1)[-1]
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if ("attn" in last or "attention" in last) and "norm" not in last and not inside:
            found[name] = module
    return list(found.values())
