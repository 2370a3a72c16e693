"""Wall clock of every executor beside dense: what ``sparse-pathways benchmark`` measures.

All arms are ready before the first is timed (``arms``), and take turns within every workload
(``timing``). The workloads share a budget of time: those that cannot be made shorter, the prefills,
go first, and what one leaves of its share is the others'. Where the time goes is measured beside
each workload, in passes of its own (``shares``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.measure.speed.arms import Lineup, line_up
from hf_sparse_pathways.measure.speed.random_models import random_pathway
from hf_sparse_pathways.measure.speed.report import BenchmarkReport
from hf_sparse_pathways.measure.speed.results import Timing
from hf_sparse_pathways.measure.speed.runs import make_runs
from hf_sparse_pathways.measure.speed.shares import TimeShares, measure_shares
from hf_sparse_pathways.measure.speed.switching import SwitchCost, fit_pairs, time_switch
from hf_sparse_pathways.measure.speed.timing import LEAST_TOKENS, TimingSettings, alternate
from hf_sparse_pathways.measure.speed.workloads import (
    Workload,
    check_positions,
    most_tokens,
    plan_workloads,
)
from hf_sparse_pathways.modeling.model import SparsePathwaysModel
from hf_sparse_pathways.modeling.structure import copy_structure
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathways

_SWITCHING = 0.1
"""Of the budget."""


def benchmark(
    model: Any,
    domains: Sequence[str] = (),
    *,
    sparsities: Sequence[float] = (),
    executors: Sequence[str] = (),
    workloads: Sequence[Workload] | None = None,
    settings: TimingSettings | None = None,
) -> BenchmarkReport:
    """Time every executor beside dense. The model is left as it was.

    Args:
        model: A causal LM with pathways, or with ``sparsities`` a dense one.
        domains: Whose pathways to time. If empty, the first one's: pathways of equal widths are
            equally fast.
        sparsities: Time random masks of these sparsities, too.
        executors: Names in ``EXECUTORS``, or ``"auto"``; all of them if empty.
        workloads: What to time; by default decoding with batch 1, 4 and 8 and prefilling 128 and
            512 tokens, as far as the model has positions.
        settings: How long to measure.

    Raises:
        UnknownNameError: An unknown domain or executor.
        PathwaysError: A number is out of range, or there is nothing to time.
    """
    started = clock.now()
    settings = settings or TimingSettings()
    dense = _plain(model)
    pathways, timed = _choose(model, domains, sparsities)
    chosen = _fitting(workloads, settings, most_tokens(dense))
    lineup = line_up(dense, pathways, timed, executors)
    if not lineup.models:
        reasons = "; ".join(f"{name}: {why}" for name, why in lineup.unavailable.items())
        raise PathwaysError(f"No executor can be timed. {reasons}.")
    session = _Session(lineup, settings, started)
    timings = session.time_all(chosen)
    switches = session.time_switches(pathways.domains)
    sizes = (p.numel() * p.element_size() for p in dense.parameters())
    return BenchmarkReport(
        base=_name_base(model),
        dtype=str(dense.dtype).removeprefix("torch."),
        device=str(dense.device),
        threads=torch.get_num_threads(),
        weights=sum(sizes),
        auto=lineup.auto,
        arms=tuple(lineup.arms),
        unavailable=lineup.unavailable,
        notes=tuple(session.notes),
        timings=tuple(found for one in chosen if (found := timings[one]) is not None),
        switches=switches,
        copies=tuple(lineup.copies),
        seconds=clock.now() - started,
    )


class _Session:
    """The measurements of one lineup within one budget."""

    def __init__(self, lineup: Lineup, settings: TimingSettings, started: float) -> None:
        self.lineup, self.settings = lineup, settings
        self.ends = started + settings.budget
        self.notes: list[str] = []

    def time_all(self, workloads: Sequence[Workload]) -> dict[Workload, Timing | None]:
        """Time workloads, each with its share of the time that is left, by weight."""
        ordered = _by_length(workloads)
        timings = {}
        for index, workload in enumerate(ordered):
            left = self.ends - clock.now() - _SWITCHING * self.settings.budget
            weights = sum(later.weight for later in ordered[index:])
            timings[workload] = self.time(workload, max(0.0, left) * workload.weight / weights)
        return timings

    def time(self, workload: Workload, share: float) -> Timing | None:
        """Time one workload for a share of time, in seconds; None if the model cannot do it."""
        ends = clock.now() + share
        shares = {}
        if workload.kind != "ffn":
            shares = {
                arm.label: measure_shares(self.lineup, arm, workload)
                for arm in self.lineup.dense_partners
            }
        new_tokens = self._fit_tokens(workload, shares, ends - clock.now())
        runs = make_runs(self.lineup, workload, new_tokens)
        if not runs:
            self.notes.append(
                f"{workload.label}: not timed, since they are no modules of their own here"
            )
            return None
        left = ends - clock.now()
        rates = alternate(runs, lambda s: self.settings.fit_rounds(s, left), workload.label)
        tokens = new_tokens if workload.kind == "decode" else None
        return Timing(workload=workload, new_tokens=tokens, rates=rates, shares=shares)

    def _fit_tokens(
        self, workload: Workload, shares: Mapping[str, TimeShares], share: float
    ) -> int:
        """Return the new tokens per call, as if every arm were as slow as the slowest dense one."""
        if workload.kind != "decode":
            return 0
        step = max(found.seconds for found in shares.values())
        seconds = LEAST_TOKENS * step * len(self.lineup.arms)
        fitting = self.settings.fit_tokens(seconds, share)
        positions = most_tokens(self.lineup.dense)
        return fitting if positions is None else min(fitting, positions - workload.tokens)

    def time_switches(self, names: Sequence[str]) -> tuple[SwitchCost, ...]:
        """Time switching between the first two pathways, by executor that keeps copies."""
        first, second = [*names, None][:2]
        assert first is not None  # there is a pathway: see _choose
        models = {n: m for n, m in self.lineup.models.items() if n != "masked"}
        share = _SWITCHING * self.settings.budget / max(len(models), 1)
        costs = []
        for executor, model in models.items():
            pairs = fit_pairs(model, first, share)
            seconds = time_switch(model, first, second, pairs=pairs)
            costs.append(SwitchCost(executor=executor, first=first, second=second, seconds=seconds))
        return tuple(costs)


def _plain(model: Any) -> Any:
    """Return a plain model in evaluation mode that shares a model's parameters. Pure."""
    sparse = isinstance(model, SparsePathwaysModel)
    return (model.to_dense() if sparse else copy_structure(model, {})).eval()


def _name_base(model: Any) -> str:
    """Return the name of the dense model, which may not be where it was loaded from."""
    sparse = isinstance(model, SparsePathwaysModel)
    return (model.pathways.base if sparse else BaseModel.of(model)).name


def _choose(
    model: Any, domains: Sequence[str], sparsities: Sequence[float]
) -> tuple[Pathways, list[str]]:
    """Return the pathways to make ready, and the names of those to time.

    Beside a single one a second is made ready if there is one, to switch to.
    """
    saved = Pathways(base=BaseModel.of(model), by_domain={})
    if isinstance(model, SparsePathwaysModel):  # its own fit it, whatever it was loaded from
        saved = replace(saved, by_domain=model.pathways.by_domain)
    timed = saved.subset(domains or saved.domains[:1])
    drawn = {f"random {value:g}": random_pathway(saved.base, value) for value in sparsities}
    names = [*timed.domains, *drawn]
    if not names:
        raise PathwaysError(
            "This model has no pathways to time. Name one that has, or give sparsities "
            "(--sparsity 0.5) to time random masks."
        )
    others = [name for name in saved.domains if name not in names][: max(0, 2 - len(names))]
    ready = {**timed.by_domain, **drawn, **saved.subset(others).by_domain}
    return replace(saved, by_domain=ready), names


def _fitting(
    workloads: Sequence[Workload] | None, settings: TimingSettings, positions: int | None
) -> list[Workload]:
    """Return the workloads in the order of the tables; given ones have to fit the positions.

    Raises:
        PathwaysError: One does not, or there is none.
    """
    new_tokens = settings.new_tokens or LEAST_TOKENS
    chosen = []
    for workload in plan_workloads() if workloads is None else dict.fromkeys(workloads):
        try:
            check_positions(workload, new_tokens, positions)
        except PathwaysError:
            if workloads is not None:
                raise
            continue
        chosen.append(workload)
    if not chosen:
        raise PathwaysError(f"No workload was given, or none fits {positions} positions.")
    return chosen


def _by_length(workloads: Sequence[Workload]) -> list[Workload]:
    """Return the longest passes first, and ``generate`` last, with its smallest batch."""
    return sorted(workloads, key=lambda w: (w.kind == "decode", -w.batch * w.tokens))
