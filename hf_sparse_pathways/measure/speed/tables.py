"""A benchmark's report as lines, tables and Markdown."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_sparse_pathways.measure.figures import Section, format_figure
from hf_sparse_pathways.measure.speed.arms import DENSE, Arm
from hf_sparse_pathways.measure.speed.results import Spread, Timing
from hf_sparse_pathways.memory import format_memory
from hf_sparse_pathways.shares import format_share

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.speed.report import BenchmarkReport

HEADER = ("arm", "tokens/s", "/ dense", "/ same-kernel dense", "ceiling", "of it reached")

READING = (
    "Medians over rounds, with quartiles in brackets; ratios are taken within a round. `dense` is "
    "plain Transformers; the same-kernel dense of an executor that repacks weights is its own "
    "dense pass, and of the others `dense`. Behind a pathway's name stands the share of the "
    "neurons that it removes. The ceiling is 1 / (1 - s*p) over the same-kernel dense, with s the "
    "FFN's measured share of its time and p the fraction of the FFN's FLOPs removed; the last "
    "column is the ratio as a fraction of it, so that no gain at all is 1 / ceiling. Shares are "
    "taken with hooks in passes of their own, medians over passes or tokens; rest is the whole "
    "less the named parts."
)


def headline(report: "BenchmarkReport") -> list[str]:
    """Return what a reader has to know before the tables."""
    name = Path(report.base).name or "a model without a name"
    held = sum(copy.bytes for copy in report.copies)
    lines = [
        f"{name}, {report.dtype}, {report.device}, {_threads(report.threads)}, "
        f"{format_memory(report.weights)} of weights; measured in {report.seconds:.0f} s",
        f'executor="auto" is {report.auto.executor}: {report.auto.reason.rstrip(".")}',
        *(f"not timed: {name}: {why.rstrip('.')}" for name, why in report.unavailable.items()),
        *report.notes,
        f"copies of kept weights, of all executors at once: {format_memory(held)}",
    ]
    overhead = _overhead(report)
    return [*lines, overhead] if overhead else lines


def sections(report: "BenchmarkReport") -> list[Section]:
    """Return a table per workload, and one each of switching and of resident bytes."""
    tables = [_timing_section(report, timing) for timing in report.timings]
    if report.switches:
        tables.append(_switch_section(report))
    if report.copies:
        tables.append(_copies_section(report))
    return tables


def to_markdown(report: "BenchmarkReport", pictures: Sequence[str] = ()) -> str:
    """Render everything.

    Args:
        report: It.
        pictures: File names.
    """
    parts = [f"# Speed of {Path(report.base).name or 'a model without a name'}"]
    parts.append("\n".join(f"- {line}" for line in headline(report)))
    parts.append(READING)
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    parts += [section.to_markdown() for section in sections(report)]
    return "\n\n".join(parts) + "\n"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _overhead(report: "BenchmarkReport") -> str:
    """Say what the plug-in costs while no domain is on."""
    arm = next((a for a in report.arms if a.label.startswith("plug-in")), None)
    decodes = [timing for timing in report.timings if timing.workload.kind == "decode"]
    if arm is None or not decodes:
        return ""
    said = []
    for timing in decodes:
        spread = Spread.of([1.0 / ratio - 1.0 for ratio in timing.ratios(arm.label)])
        said.append(
            f"{spread.median:+.1%} ({spread.low:+.1%} to {spread.high:+.1%}) at batch "
            f"{timing.workload.batch}"
        )
    return f"time per token added by the plug-in with no domain on: {', '.join(said)}"


def _timing_section(report: "BenchmarkReport", timing: Timing) -> Section:
    rounds = len(next(iter(timing.rates.values())))
    how = "1 round" if rounds == 1 else f"{rounds} rounds"
    if timing.new_tokens is not None:
        how += f", {timing.new_tokens} new tokens after a prompt of {timing.workload.tokens}"
    return Section(
        title=f"{timing.workload.label[0].upper()}{timing.workload.label[1:]}",
        note=". ".join([how, *_shares(timing)]),
        header=HEADER,
        rows=[_cells(timing, arm) for arm in report.arms],
    )


def _shares(timing: Timing) -> list[str]:
    """Say where the time of each dense arm goes."""
    return [
        f"Time of {arm}: {format_share(share.ffn)} FFN, {format_share(share.attention)} "
        f"attention, {format_share(share.head)} head, {format_share(share.rest)} rest"
        for arm, share in timing.shares.items()
    ]


def _cells(timing: Timing, arm: Arm) -> list[str]:
    reached = timing.reached(arm)
    own = arm.partner == arm.label
    return [
        f"{arm.label} (-{format_share(arm.sparsity)})" if arm.pathway else arm.label,
        _spread(timing.rates[arm.label], format_figure),
        "" if arm.label == DENSE else _spread(timing.ratios(arm.label), "{:.2f}".format),
        "" if own else _spread(timing.ratios(arm.label, arm.partner), "{:.2f}".format),
        "" if reached is None else f"{timing.ceiling(arm):.2f}",
        "" if reached is None else f"{reached:.0%}",
    ]


def _spread(values: Sequence[float], render: Callable[[float], str]) -> str:
    spread = Spread.of(values)
    low, median, high = map(render, (spread.low, spread.median, spread.high))
    dash = " to " if spread.low < 0 else "-"
    return f"{median} ({low}{dash}{high})"


def _switch_section(report: "BenchmarkReport") -> Section:
    rows = []
    for cost in report.switches:
        spread = _spread([1000.0 * seconds for seconds in cost.seconds], "{:.2f}".format)
        pair = f"{cost.first}, {cost.second or 'dense'}"
        rows.append([cost.executor, pair, spread, str(len(cost.seconds))])
    return Section(
        title="Switching between two resident pathways",
        note="What it adds to a step of one token",
        header=["executor", "between", "ms", "samples"],
        rows=rows,
    )


def _copies_section(report: "BenchmarkReport") -> Section:
    rows = [
        [
            copy.executor,
            copy.pathway,
            format_memory(copy.bytes),
            f"{copy.bytes / report.weights:.0%}",
            f"{1000.0 * copy.seconds:.0f}",
        ]
        for copy in report.copies
    ]
    return Section(
        title="Resident bytes per domain",
        note="Beside the weights, with the time to make them once",
        header=["executor", "pathway", "bytes", "of the weights", "made in ms"],
        rows=rows,
    )
