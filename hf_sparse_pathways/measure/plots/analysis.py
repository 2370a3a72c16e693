"""Pictures of a profile or an analysis, and of several models' analyses side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    PercentFormatter,
)

from hf_sparse_pathways.measure import paper
from hf_sparse_pathways.measure.experiments import MeasuredRule
from hf_sparse_pathways.measure.plots.drawing import (
    COLOURS,
    GREY,
    MARKERS,
    Picture,
    finish_blocks,
    line_style,
    short_name,
    tick_log,
)
from hf_sparse_pathways.measure.plots.overlaps import draw_overlaps
from hf_sparse_pathways.measure.scale import ScaleComparison
from hf_sparse_pathways.measure.skipping import (
    SkipOverlap,
    SkippableFraction,
)
from hf_sparse_pathways.measure.specialisation import (
    PAPER,
    Criterion,
    Specialisation,
)
from hf_sparse_pathways.shares import format_share


def plot_specialisation(
    specialisation: Specialisation, shuffled: Specialisation | None = None, *, base: str
) -> Figure:
    """Draw the specialised fraction of every block: by threshold, and by domain.

    Args:
        specialisation: It.
        shuffled: That of shuffled text, which is chance; None if it was not taken.
        base: The model's name.
    """
    figure = Picture(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    blocks = range(len(specialisation.of(PAPER).per_block))
    thresholds = (
        Criterion(kind="ratio", threshold=1.5),
        PAPER,
        Criterion(kind="excess", threshold=0.5),
    )
    for index, criterion in enumerate(thresholds):
        fraction = specialisation.of(criterion)
        label = f"{criterion}: {fraction.overall:.1%} of all"
        left.plot(blocks, fraction.per_block, **line_style(index, len(blocks)), label=label)
    if shuffled is not None:
        chance = shuffled.of(thresholds[0])
        label = f"{thresholds[0]}, shuffled text: {chance.overall:.1%}"
        left.plot(blocks, chance.per_block, color=GREY, linestyle=":", label=label)
    left.set_title("in any domain, by threshold", fontsize=10)
    for index, (domain, values) in enumerate(specialisation.of(PAPER).per_domain_and_block.items()):
        right.plot(blocks, values, **line_style(index, len(blocks)), label=domain)
    right.set_title(f"by domain, {PAPER}", fontsize=10)
    for axes in (left, right):
        finish_blocks(axes, "specialised neurons (% of the block)")
    figure.suptitle(f"Specialised neurons of {short_name(base)}")
    return figure


def plot_skippable(fractions: SkippableFraction, percentile: float, *, base: str) -> Figure:
    """Draw what every domain skips in every block, with the percentile pooled over the model.

    Args:
        fractions: Under the pool ``model``.
        percentile: Below which a neuron is skipped.
        base: The model's name.
    """
    figure = Picture(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    for index, (domain, values) in enumerate(fractions.per_block.items()):
        blocks = range(len(values))
        axes.plot(blocks, values, **line_style(index, len(blocks)), label=domain)
    axes.axhline(percentile / 100.0, color=GREY, linestyle=":", label="pool layer, by construction")
    finish_blocks(axes, "skipped neurons (% of the block)")
    axes.set_title(f"Below p{percentile:g} of the whole model, {short_name(base)}", fontsize=11)
    return figure


def plot_skip_overlap(overlaps: Sequence[SkipOverlap], *, base: str) -> Figure:
    """Draw the Jaccard index of every two domains' skipped neurons, a map per sparsity."""
    panels = {f"{format_share(overlap.sparsity)} skipped": overlap.pairs for overlap in overlaps}
    return draw_overlaps(
        panels, title=f"Overlap of skipped neurons between domains, {short_name(base)}"
    )


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
    figure = Picture(figsize=size, layout="constrained")
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
                axes.plot(x, y, **line_style(index, len(own)), label=rule)
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
    figure = Picture(figsize=(7.2, 4.4), layout="constrained")
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


def _finish_distances(grid: Any, sparsities: Sequence[float]) -> None:
    """Set scales when all is drawn, since panels share them; a log axis leaves zeros out."""
    for (line, column), axes in np.ndenumerate(grid):
        axes.grid(alpha=0.25)
        axes.set_xticks(sparsities)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes.tick_params(labelleft=column == 0, labelsize=8)
        if line < len(grid) - 1:
            axes.set_yscale("log")
            tick_log(axes.yaxis, *axes.get_ylim())
        else:
            axes.set_ylim(bottom=0.0)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
