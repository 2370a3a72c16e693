"""A picture of a benchmark: ratios to dense with their ceilings, and where dense's time goes."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hf_sparse_pathways.measure.plots.drawing import (
    COLOURS,
    GREY,
    MARKERS,
    Picture,
    hide_rest,
    short_name,
)
from hf_sparse_pathways.measure.speed.arms import DENSE, Arm
from hf_sparse_pathways.measure.speed.report import BenchmarkReport
from hf_sparse_pathways.measure.speed.results import Spread, Timing

_COLUMNS = 3
_PARTS = ("ffn", "attention", "head", "rest")


def plot_speed(report: BenchmarkReport) -> Figure:
    """Draw every arm's speed over plain dense, a panel per workload, and dense's shares of time."""
    arms = [arm for arm in report.arms if arm.label != DENSE]
    shown = [timing for timing in report.timings if DENSE in timing.shares]
    panels = len(report.timings) + bool(shown)
    columns = min(_COLUMNS, panels)
    lines = -(-panels // columns)
    size = (1.6 + 3.4 * columns, lines * (0.3 * len(arms) + 1.3) + 0.7)
    figure = Picture(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, timing in zip(grid.flat, report.timings, strict=False):
        _draw_timing(axes, timing, arms)
        if axes not in grid[:, 0]:
            axes.tick_params(labelleft=False)
    if shown:
        _draw_shares(grid.flat[len(report.timings)], shown)
    hide_rest(grid, panels)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(unique.values()), list(unique), loc="outside lower center", ncols=3, frameon=False
    )
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    figure.suptitle(
        f"Speed over plain dense, {short_name(report.base)}, {report.dtype}, {threads} "
        "(bars: quartiles)"
    )
    return figure


def _draw_timing(axes: Axes, timing: Timing, arms: list[Arm]) -> None:
    """Draw a row per arm: its ratio with quartiles, and its ceiling in the same terms."""
    for place, arm in enumerate(arms):
        spread = Spread.of(timing.ratios(arm.label))
        kind = 0 if arm.pathway else 1
        axes.errorbar(
            [spread.median],
            [place],
            xerr=[[spread.median - spread.low], [spread.high - spread.median]],
            fmt=MARKERS[kind],
            color=COLOURS[kind],
            capsize=3,
            markersize=5,
            label="pathway" if arm.pathway else "no domain",
        )
        axes.annotate(
            f"{spread.median:.2f}",
            (spread.median, place),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=COLOURS[kind],
        )
        if arm.pathway:
            partner = Spread.of(timing.ratios(arm.partner)).median
            ceiling = partner * timing.ceiling(arm)
            axes.plot([ceiling], [place], "|", color="black", markersize=11, label="ceiling")
    axes.axvline(1.0, color=GREY, linewidth=1.0, linestyle=":")
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=8)
    axes.set_ylim(len(arms) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(timing.workload.label, fontsize=10)


def _draw_shares(axes: Axes, timings: list[Timing]) -> None:
    """Draw where plain dense's time goes, a bar per workload."""
    for place, timing in enumerate(timings):
        shares, left = timing.shares[DENSE], 0.0
        for index, part in enumerate(_PARTS):
            width = max(0.0, getattr(shares, part))
            axes.barh(place, width, left=left, color=COLOURS[index + 2], height=0.7)
            if width > 0.07:
                text = f"{part if part != 'ffn' else 'FFN'}\n{width:.0%}"
                axes.text(left + width / 2, place, text, ha="center", va="center", fontsize=6)
            left += width
    works = [timing.workload for timing in timings]
    labels = [f"batch {w.batch}" if w.kind == "decode" else f"{w.tokens} tokens" for w in works]
    axes.set_yticks(range(len(timings)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("dense: shares of the time (%)", fontsize=10)
