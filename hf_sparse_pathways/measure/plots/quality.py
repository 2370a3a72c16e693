"""Pictures of a quality report: ratios, the matrix of texts and pathways, cosines."""

from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_sparse_pathways.measure.plots.drawing import (
    COLUMNS,
    LEAST_WIDTH,
    Picture,
    draw_map,
    hide_rest,
    label_map,
    line_style,
    name_roles,
    role_index,
    short_name,
    tick_log,
)
from hf_sparse_pathways.measure.quality_report import QualityReport


def plot_matrix(report: QualityReport) -> Figure:
    """Draw perplexity ratios as maps: text (rows) by pathway (columns), log scale, one per set."""
    labels: list[str | None] = [*report.sets]
    labels = labels or [None]
    maps = {label: _matrix(report, label) for label in labels}
    widest = max(len(report.columns(label)) for label in labels)
    columns = min(len(labels), max(1, 12 // widest))
    lines = -(-len(labels) // columns)
    titles = 0.0 if report.sets == [] else 0.3
    size = (0.9 * widest * columns + 3.0, (0.6 * len(report.domains) + titles) * lines + 2.0)
    figure = Picture(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    low = min(1.0, *(float(np.nanmin(values)) for values in maps.values()))
    high = max(1.01, *(float(np.nanmax(values)) for values in maps.values()))
    for axes, label in zip(grid.flat, labels, strict=False):
        image = draw_map(axes, maps[label], LogNorm(low, high), "{:.3g}")
        label_map(axes, report.domains, report.columns(label))
        axes.set_title(label or f"Text by pathway, {short_name(report.base)}", fontsize=11)
        axes.set_xlabel("pathway")
        axes.set_ylabel("text")
    hide_rest(grid, len(labels))
    bar = figure.colorbar(image, ax=list(grid.flat), label="perplexity / dense (log)")
    tick_log(bar.ax.yaxis, *bar.ax.get_ylim())
    if report.sets:
        figure.suptitle(f"Text by pathway, {short_name(report.base)}")
    return figure


def _matrix(report: QualityReport, label: str | None) -> Any:
    """Return one set's ratios, ``(texts, pathways)``; NaN where nothing was measured."""
    names = report.columns(label)
    values = np.full((len(report.domains), len(names)), np.nan)
    for line, domain in enumerate(report.domains):
        for row in report.of(domain, label):
            if row.pathway in names and row.role != "random":
                values[line, names.index(row.pathway)] = row.ratio
    return values


def plot_cosines(report: QualityReport) -> Figure:
    """Draw the cosine with dense hidden states behind each layer, a panel per domain and set."""
    sets: list[str | None] = [*report.sets]
    panels = [(label, domain) for label in sets or [None] for domain in report.domains]
    columns = min(len(report.domains), COLUMNS)
    lines = -(-len(panels) // columns)
    size = (max(LEAST_WIDTH, 2.6 * columns + 1.4), 2.4 * lines + 1.0)
    figure = Picture(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for place, (axes, (label, domain)) in enumerate(zip(grid.flat, panels, strict=False)):
        for row in report.of(domain, label):
            if row.role == "dense":
                continue
            layers = range(len(row.cosine_per_layer))
            style = line_style(role_index(row.role), len(layers))
            axes.plot(layers, row.cosine_per_layer, **style, label=row.role)
        axes.set_title(domain if label is None else f"{domain}, {label}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if place + columns >= len(panels):
            axes.set_xlabel("layer with an FFN block", fontsize=9)
            axes.tick_params(labelbottom=True)
    hide_rest(grid, len(panels))
    name_roles(figure, list(grid.flat)[: len(panels)])
    figure.supylabel("cosine with the dense hidden state", fontsize=9)
    figure.suptitle(f"How far hidden states drift, {short_name(report.base)}")
    return figure
