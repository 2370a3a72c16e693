"""Perplexity ratios of a quality report: a panel per domain, and over the sets of pathways."""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_sparse_pathways.measure.plots.drawing import (
    COLOURS,
    LEAST_WIDTH,
    MARKERS,
    Picture,
    hide_rest,
    name_roles,
    role_index,
    short_name,
    tick_log,
)
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow


def plot_ratios(report: QualityReport) -> Figure:
    """Draw every arm's perplexity ratio with its interval, a panel per domain."""
    if report.sets:
        return _plot_ratios_of_sets(report)
    domains = report.domains
    arms = {domain: [r for r in report.of(domain) if r.role != "dense"] for domain in domains}
    most = max(len(rows) for rows in arms.values())
    columns = min(len(domains), 2)
    lines = -(-len(domains) // columns)
    size = (4.6 * columns + 0.4, lines * (0.34 * most + 1.1) + 0.5)
    figure = Picture(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axes, domain in zip(grid.flat, domains, strict=False):
        for place, row in enumerate(arms[domain]):
            _draw_ratio(axes, place, row)
        axes.set_yticks(range(len(arms[domain])), [row.label for row in arms[domain]], fontsize=8)
        axes.set_ylim(most - 0.4, -0.6)
        axes.axvline(1.0, color="black", linewidth=1.0)
        axes.set_xscale("log")
        axes.set_title(f"{domain} text, dense {report.of(domain)[0].perplexity:.3g}", fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(labelbottom=True)
    tick_log(grid[0, 0].xaxis, *grid[0, 0].get_xlim())
    hide_rest(grid, len(domains))
    figure.supxlabel("perplexity / dense (log scale; bars: 95 % over documents)", fontsize=9)
    figure.suptitle(f"Perplexity ratio to dense, {short_name(report.base)}")
    return figure


def _plot_ratios_of_sets(report: QualityReport) -> Figure:
    """Draw ratios over the sets of pathways, by their FFN FLOPs, a panel per domain.

    Random masks are so much worse that the others would not be told apart on their axis: where
    they are beyond it, they stand at its upper end with their value.
    """
    domains = report.domains
    width = max(3.2, 0.8 + sum(max(0.9, 0.09 * len(label)) for label in report.sets))
    columns = min(len(domains), max(1, int(14 / width)))
    lines = -(-len(domains) // columns)
    size = (max(LEAST_WIDTH, columns * width + 0.6), 3.2 * lines + 0.8)
    figure = Picture(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    shown = [row for row in report.rows if row.role != "random"]
    highest = max(row.interval[1] if row.interval else row.ratio for row in shown)
    ceiling = min(1.3 * highest, 1e9)
    for place, (axes, domain) in enumerate(zip(grid.flat, domains, strict=False)):
        _draw_sets(axes, report, domain, ceiling)
        if place + columns >= len(domains):
            axes.set_xlabel("set of pathways, and its FFN FLOPs", fontsize=9)
        axes.set_title(f"{domain} text, dense {report.of(domain)[0].perplexity:.3g}", fontsize=10)
    low = min(row.interval[0] if row.interval else row.ratio for row in report.rows)
    grid[0, 0].set_ylim(min(0.9, 0.95 * low) / ceiling**0.08, ceiling**1.08)
    tick_log(grid[0, 0].yaxis, *grid[0, 0].get_ylim())
    hide_rest(grid, len(domains))
    name_roles(figure, list(grid.flat)[: len(domains)])
    figure.supylabel("perplexity / dense (log; bars: 95 %)", fontsize=9)
    figure.suptitle(f"Perplexity ratio to dense, {short_name(report.base)}")
    return figure


def _draw_sets(axes: Axes, report: QualityReport, domain: str, ceiling: float) -> None:
    """Draw one domain's arms: a place per set, the most FLOPs first, a line per arm.

    Sets of equal FLOPs are other methods and no steps of one: their points are not joined.
    """
    own = {row.set: row for row in report.of(domain) if row.role == "pathway"}
    labels = sorted(report.sets, key=lambda label: -own[label].flops)
    flops = [own[label].flops for label in labels]
    joined = all(a - b > 0.01 for a, b in pairwise(flops))
    rows = [row for row in report.of(domain) if row.role != "dense"]
    rows.sort(key=lambda row: labels.index(row.set or ""))
    arms = list(dict.fromkeys((row.role, row.pathway) for row in rows))
    for index, arm in enumerate(arms):
        drawn = [row for row in rows if (row.role, row.pathway) == arm]
        shift = (0.2 if joined else 0.5) * (index / max(len(arms) - 1, 1) - 0.5)
        places = [labels.index(row.set or "") + shift for row in drawn]
        _draw_arm(axes, drawn, places, ceiling=ceiling, joined=joined)
    ticks = [f"{label}\n{share:.1%}" for label, share in zip(labels, flops, strict=True)]
    axes.set_xticks(range(len(labels)), ticks, fontsize=8)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.axhline(1.0, color="black", linewidth=1.0)
    axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(labelleft=True)


def _draw_arm(
    axes: Axes, rows: list[QualityRow], places: list[float], *, ceiling: float, joined: bool
) -> None:
    """Draw one arm of every set that has it; what is beyond the axis stands at its end."""
    index = role_index(rows[0].role)
    ends = [row.interval or (row.ratio, row.ratio) for row in rows]
    beyond = [row.ratio > ceiling for row in rows]
    ratios = np.array([row.ratio for row in rows])
    bars = np.abs(np.array(ends).T - ratios) * ~np.array(beyond)
    axes.errorbar(
        places,
        np.minimum(ratios, ceiling),
        yerr=bars,
        fmt=MARKERS[index],
        linestyle="-" if joined and not any(beyond) else "none",
        linewidth=1.0,
        elinewidth=1.0,
        color=COLOURS[index],
        capsize=2,
        markersize=4,
        label=rows[0].role,
    )
    for row, place, out in zip(rows, places, beyond, strict=True):
        if out or row.role == "pathway":
            axes.annotate(
                f"{'↑ ' if out else ''}{row.ratio:.3g}",
                (place, min(row.ratio, ceiling)),
                xytext=(0, -5) if out else (-4, -3),
                textcoords="offset points",
                ha="center" if out else "right",
                va="top",
                fontsize=7,
                color=COLOURS[index],
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4},
            )


def _draw_ratio(axes: Axes, place: int, row: QualityRow) -> None:
    index = role_index(row.role)
    colour = COLOURS[index]
    low, high = row.interval or (row.ratio, row.ratio)
    bars = [[max(row.ratio - low, 0.0)], [max(high - row.ratio, 0.0)]]
    axes.errorbar(
        [row.ratio], [place], xerr=bars, fmt=MARKERS[index], color=colour, capsize=3, markersize=5
    )
    axes.annotate(
        f"{row.ratio:.3g}",
        (row.ratio, place),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        color=colour,
    )
