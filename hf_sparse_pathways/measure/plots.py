"""Every picture of the project: values of reports in, matplotlib figures out.

A figure is made without pyplot, so nothing global changes and no display is needed. Colours are
those of Okabe and Ito, with markers beside them, and cividis for maps: both are told apart by
colour-blind readers and in grey.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure import paper
from hf_sparse_pathways.measure.analysis import Analysis
from hf_sparse_pathways.measure.experiments import MeasuredRule
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow
from hf_sparse_pathways.measure.scale import ScaleComparison
from hf_sparse_pathways.measure.specialisation import PAPER, Criterion

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"
DPI = 150
COLUMNS = 4
"""Most small multiples in a row."""


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[str]:
    """Write figures as ``NAME.png`` into a folder that exists; return the file names."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI, format="png")
    return [f"{name}.png" for name in figures]


def plot_analysis(analysis: Analysis) -> dict[str, Figure]:
    """Return all pictures of an analysis, by name."""
    figures = {"skippable": plot_skippable(analysis)}
    if analysis.specialisation is not None:
        figures["specialisation"] = plot_specialisation(analysis)
        figures["overlap"] = plot_overlap(analysis)
    if analysis.experiments is not None:
        figures["preservation"] = plot_rules(
            analysis.experiments.preservation,
            title=f"Output preservation on held-out text, {_short(analysis.base)}",
            reference=1.0 - paper.PRESERVED_COSINE,
        )
        if analysis.experiments.selection:
            figures["selection"] = plot_rules(
                analysis.experiments.selection,
                title=f"Negative against positive selection, {_short(analysis.base)}",
                reference=None,
            )
    return figures


def plot_quality(report: QualityReport) -> dict[str, Figure]:
    """Return all pictures of a quality report, by name."""
    figures = {"ratios": plot_ratios(report), "cosines": plot_cosines(report)}
    if any(row.role == "other" for row in report.rows):
        figures["matrix"] = plot_matrix(report)
    return figures


def plot_specialisation(analysis: Analysis) -> Figure:
    """Draw the specialised fraction of every block: by threshold, and by domain."""
    specialisation = analysis.specialisation
    if specialisation is None:
        raise PathwaysError("Specialisation cannot be drawn: the analysis has one domain only.")
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    blocks = range(len(analysis.blocks))
    thresholds = (
        Criterion(kind="ratio", threshold=1.5),
        PAPER,
        Criterion(kind="excess", threshold=0.5),
    )
    for index, criterion in enumerate(thresholds):
        fraction = specialisation.of(criterion)
        label = f"{criterion}: {fraction.overall:.1%} of all"
        left.plot(blocks, fraction.per_block, **_style(index, len(blocks)), label=label)
    if analysis.shuffled is not None:
        chance = analysis.shuffled.of(thresholds[0])
        label = f"{thresholds[0]}, shuffled text: {chance.overall:.1%}"
        left.plot(blocks, chance.per_block, color=GREY, linestyle=":", label=label)
    left.set_title("in any domain, by threshold", fontsize=10)
    for index, (domain, values) in enumerate(specialisation.of(PAPER).per_domain_and_block.items()):
        right.plot(blocks, values, **_style(index, len(blocks)), label=domain)
    right.set_title(f"by domain, {PAPER}", fontsize=10)
    for axes in (left, right):
        _finish_blocks(axes, "specialised neurons (% of the block)")
    figure.suptitle(f"Specialised neurons of {_short(analysis.base)}")
    return figure


def plot_skippable(analysis: Analysis) -> Figure:
    """Draw what every domain skips in every block when the percentile is pooled over the model."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    blocks = range(len(analysis.blocks))
    for index, (domain, values) in enumerate(analysis.skippable_by("model").per_block.items()):
        axes.plot(blocks, values, **_style(index, len(blocks)), label=domain)
    axes.axhline(
        analysis.percentile / 100.0, color=GREY, linestyle=":", label="pool layer, by construction"
    )
    _finish_blocks(axes, "skipped neurons (% of the block)")
    axes.set_title(
        f"Below p{analysis.percentile:g} of the whole model, {_short(analysis.base)}", fontsize=11
    )
    return figure


def plot_overlap(analysis: Analysis) -> Figure:
    """Draw the Jaccard index of every two domains' skipped neurons, a map per sparsity."""
    count = len(analysis.overlaps)
    size = 1.6 + 0.35 * len(analysis.domains)
    figure = Figure(figsize=(max(size * count + 1.2, 6.4), size + 1.2), layout="constrained")
    grid = np.atleast_1d(figure.subplots(1, count, sharey=True))
    for axes, overlap in zip(grid, analysis.overlaps, strict=True):
        values = np.full((len(analysis.domains), len(analysis.domains)), np.nan)
        for pair in overlap.pairs:
            row, column = analysis.domains.index(pair.first), analysis.domains.index(pair.second)
            values[row, column] = values[column, row] = pair.jaccard
        image = _draw_map(axes, values, Normalize(0.0, 1.0), "{:.2f}")
        _label_map(axes, analysis.domains, analysis.domains)
        axes.set_title(
            f"{overlap.sparsity:.0%} skipped\nchance {overlap.pairs[0].chance:.2f}", fontsize=10
        )
    figure.colorbar(image, ax=list(grid), label="Jaccard index", shrink=0.8)
    figure.suptitle(f"Overlap of skipped neurons between domains, {_short(analysis.base)}")
    return figure


_METRICS: tuple[tuple[str, Callable[[MeasuredRule], float]], ...] = (
    ("1 - cosine of\nfinal hidden states", lambda row: 1.0 - row.cosine),
    ("KL from dense\n(nats per token)", lambda row: row.divergence),
    ("top-1 disagreement\n(% of tokens)", lambda row: 1.0 - row.agreement),
)


def plot_rules(rows: Sequence[MeasuredRule], *, title: str, reference: float | None) -> Figure:
    """Draw three distances from the dense model (rows) on each domain's text (columns).

    Args:
        rows: What was measured.
        title: Of the figure.
        reference: A distance 1 - cosine to draw as the paper's; None for none.
    """
    domains = list(dict.fromkeys(row.domain for row in rows))
    rules = list(dict.fromkeys(row.rule for row in rows))
    size = (2.4 * len(domains) + 1.6, 2.0 * len(_METRICS) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(_METRICS), len(domains), sharex=True, sharey="row", squeeze=False)
    for line, (label, distance) in enumerate(_METRICS):
        for column, domain in enumerate(domains):
            axes: Axes = grid[line, column]
            for index, rule in enumerate(rules):
                own = sorted(
                    (row.sparsity, distance(row))
                    for row in rows
                    if (row.domain, row.rule) == (domain, rule)
                )
                x, y = [point[0] for point in own], [point[1] for point in own]
                axes.plot(x, y, **_style(index, len(own)), label=rule)
            if line == 0 and reference is not None:
                axes.axhline(reference, color=GREY, linestyle=":", label="the paper's bound")
            if line == 0:
                axes.set_title(domain, fontsize=10)
            if line == len(_METRICS) - 1:
                axes.set_xlabel("neurons removed (%)")
        grid[line, 0].set_ylabel(label, fontsize=9)
    _finish_distances(grid, sorted({row.sparsity for row in rows}))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    return figure


def plot_scale(comparison: ScaleComparison) -> Figure:
    """Draw the specialised fraction against the number of parameters, the paper's beside it."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    here = [(float(m.parameters), m.specialised, m.label) for m in comparison.models]
    stated = [(m.parameters, m.specialised, m.name) for m in paper.MODELS]
    groups = ((here, f"here: {comparison.seen[0]}"), (stated, f"paper: {comparison.published[0]}"))
    for index, (points, label) in enumerate(groups):
        axes.scatter(
            [point[0] for point in points],
            [point[1] for point in points],
            marker=MARKERS[index],
            facecolors="none" if index else COLOURS[index],
            edgecolors=COLOURS[index],
            label=label,
            s=45,
        )
        for place, (x, y, name) in enumerate(points):
            right = (index + place) % 2 == 1  # by turns, since neighbours in size lie close
            axes.annotate(
                name,
                (x, y),
                xytext=(7 if right else -7, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize=8,
                color=COLOURS[index],
            )
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.margins(x=0.35, y=0.12)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_ylabel(f"specialised neurons, {PAPER} (%)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.set_title("Scale against specialisation", fontsize=11)
    return figure


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
    _tick_log(grid[0, 0].xaxis, *grid[0, 0].get_xlim())
    for axes in list(grid.flat)[len(domains) :]:
        axes.set_visible(False)
    figure.supxlabel("perplexity / dense (log scale; bars: 95 % over documents)", fontsize=9)
    figure.suptitle(f"Perplexity ratio to dense, {_short(report.base)}")
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
    image = _draw_map(axes, values, LogNorm(min(1.0, float(np.nanmin(values))), high), "{:.3g}")
    _label_map(axes, report.domains, names)
    axes.set_xlabel("pathway")
    axes.set_ylabel("text")
    bar = figure.colorbar(image, ax=axes, label="perplexity / dense (log)")
    _tick_log(bar.ax.yaxis, *bar.ax.get_ylim())
    axes.set_title(f"Text by pathway, {_short(report.base)}", fontsize=11)
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
            style = _style(_role_index(row), len(layers))
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
    figure.suptitle(f"How far hidden states drift, {_short(report.base)}")
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


def _style(index: int, points: int) -> dict[str, Any]:
    """Return a line's colour and marker; every so often a marker where there are many points."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if index < len(COLOURS) else "--",
        "markersize": 4,
        "markevery": max(1, points // 12),
        "linewidth": 1.4,
    }


def _finish_blocks(axes: Axes, label: str) -> None:
    axes.set_xlabel("FFN block, by depth")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)


def _finish_distances(grid: Any, sparsities: Sequence[float]) -> None:
    """Set scales when all is drawn, since panels share them; a log axis leaves zeros out."""
    for (line, column), axes in np.ndenumerate(grid):
        axes.grid(alpha=0.25)
        axes.set_xticks(sparsities)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes.tick_params(labelleft=column == 0, labelsize=8)
        if line < len(grid) - 1:
            axes.set_yscale("log")
            _tick_log(axes.yaxis, *axes.get_ylim())
        else:
            axes.set_ylim(bottom=0.0)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers between two that spread evenly on a log axis."""
    steps: tuple[float, ...] = (1.0,)
    if high / low < 5.0:
        steps = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
    elif high / low < 1e4:
        steps = (1.0, 2.0, 5.0) if high / low < 200.0 else (1.0, 3.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def _draw_map(axes: Axes, values: Any, norm: Normalize, form: str) -> Any:
    """Draw a map with its values in the cells, light on dark and dark on light; NaN is left out."""
    axes.set_facecolor("#E0E0E0")
    image = axes.imshow(values, cmap="cividis", norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if float(norm(value)) < 0.55 else "black"
            text = form.format(value)
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return image


def _label_map(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)


def _tick_log(axis: Axis, low: float, high: float) -> None:
    axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _short(name: str) -> str:
    return Path(name).name or "a model without a name"
