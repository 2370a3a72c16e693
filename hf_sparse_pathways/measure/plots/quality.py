"""Pictures of a quality report: perplexity ratios, the matrix of texts and pathways, cosines."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    MaxNLocator,
)

from hf_sparse_pathways.measure.plots.drawing import (
    COLOURS,
    COLUMNS,
    MARKERS,
    draw_map,
    label_map,
    line_style,
    short_name,
    tick_log,
)
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow


def plot_quality(report: QualityReport) -> dict[str, Figure]:
    """Return all pictures of a quality report, by name."""
    figures = {"ratios": plot_ratios(report), "cosines": plot_cosines(report)}
    if any(row.role == "other" for row in report.rows):
        figures["matrix"] = plot_matrix(report)
    return figures


def plot_ratios(report: QualityReport) -> Figure:
    """Draw every arm's perplexity ratio with its interval, a panel per domain."""
    domains = report.domains
    arms = {domain: [r for r in report.of(domain) if r.role != "dense"] for domain in domains}
    most = max(len(rows) for rows in arms.values())
    columns = min(len(domains), 2)
    lines = -(-len(domains) // columns)
    size = (4.6 * columns + 0.4, lines * (0.34 * most + 1.1) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
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
    for axes in list(grid.flat)[len(domains) :]:
        axes.set_visible(False)
    figure.supxlabel("perplexity / dense (log scale; bars: 95 % over documents)", fontsize=9)
    figure.suptitle(f"Perplexity ratio to dense, {short_name(report.base)}")
    return figure


def plot_matrix(report: QualityReport) -> Figure:
    """Draw perplexity ratios as a map: text (rows) by pathway (columns), log scale."""
    names = list(
        dict.fromkeys(row.pathway or "" for row in report.rows if row.role in ("pathway", "other"))
    )
    if any(row.role == "pooled" for row in report.rows):
        names.append(next(row.pathway or "" for row in report.rows if row.role == "pooled"))
    values = np.full((len(report.domains), len(names)), np.nan)
    for line, domain in enumerate(report.domains):
        for row in report.of(domain):
            if row.pathway in names and row.role != "random":
                values[line, names.index(row.pathway)] = row.ratio
    figure = Figure(figsize=(0.9 * len(names) + 3.0, 0.6 * len(values) + 2.0), layout="constrained")
    axes = figure.subplots()
    high = max(float(np.nanmax(values)), 1.01)
    image = draw_map(axes, values, LogNorm(min(1.0, float(np.nanmin(values))), high), "{:.3g}")
    label_map(axes, report.domains, names)
    axes.set_xlabel("pathway")
    axes.set_ylabel("text")
    bar = figure.colorbar(image, ax=axes, label="perplexity / dense (log)")
    tick_log(bar.ax.yaxis, *bar.ax.get_ylim())
    axes.set_title(f"Text by pathway, {short_name(report.base)}", fontsize=11)
    return figure


def plot_cosines(report: QualityReport) -> Figure:
    """Draw the cosine with dense hidden states behind each layer, a panel per domain."""
    domains = report.domains
    columns = min(len(domains), COLUMNS)
    lines = -(-len(domains) // columns)
    figure = Figure(figsize=(2.6 * columns + 1.4, 2.4 * lines + 1.0), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for place, (axes, domain) in enumerate(zip(grid.flat, domains, strict=False)):
        for row in report.of(domain):
            if row.role == "dense":
                continue
            layers = range(len(row.cosine_per_layer))
            style = line_style(_role_index(row), len(layers))
            first = row.role not in axes.get_legend_handles_labels()[1]
            label = row.role if first else None
            axes.plot(layers, row.cosine_per_layer, **style, label=label)
        axes.set_title(domain, fontsize=10)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if place + columns >= len(domains):
            axes.set_xlabel("layer with an FFN block", fontsize=9)
            axes.tick_params(labelbottom=True)
    for axes in list(grid.flat)[len(domains) :]:
        axes.set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    labels = ["other domains' pathways" if label == "other" else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.supylabel("cosine with the dense hidden state", fontsize=9)
    figure.suptitle(f"How far hidden states drift, {short_name(report.base)}")
    return figure


_ROLES = ("pathway", "pooled", "random", "other", "tuned")


def _role_index(row: QualityRow) -> int:
    """Return the place of an arm's colour and marker."""
    return _ROLES.index(row.role) if row.role in _ROLES else len(_ROLES)


def _draw_ratio(axes: Axes, place: int, row: QualityRow) -> None:
    index = _role_index(row)
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
