"""Pictures of pathways: what is removed of every FFN block, and what domains have in common."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hf_sparse_pathways.measure.overlap import measure_kept_overlap
from hf_sparse_pathways.measure.plots.drawing import (
    COLOURS,
    GREY,
    Picture,
    label_blocks,
    line_style,
    short_name,
)
from hf_sparse_pathways.measure.plots.overlaps import draw_overlaps
from hf_sparse_pathways.pathways.names import POOLED
from hf_sparse_pathways.pathways.pathway import Pathways


def plot_sparsity(pathways: Pathways) -> Figure:
    """Draw the fraction of neurons removed in every FFN block, a line per domain.

    The pooled control, if there is one, stands beside them.
    """
    figure = Picture(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    blocks = range(len(pathways.base.blocks))
    for index, name in enumerate(pathways.domains):
        shares = pathways.sparsity(name, per_block=True)
        axes.plot(blocks, shares, **line_style(index, len(blocks)), label=name)
    if POOLED in pathways.controls:
        shares = pathways.sparsity(POOLED, per_block=True)
        axes.plot(blocks, shares, color=GREY, linestyle=":", label=f"{POOLED} (control)")
    label_blocks(axes, "neurons removed (% of the block)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"Neurons removed in every FFN block, {short_name(pathways.base.name)}")
    return figure


def plot_overlap(pathways: Pathways) -> Figure:
    """Draw the Jaccard index of every two of several domains' kept neurons, beside chance."""
    title = f"Overlap of kept neurons between domains, {short_name(pathways.base.name)}"
    return draw_overlaps({"kept neurons": measure_kept_overlap(pathways)}, title=title)


def plot_strip(shares: Sequence[float]) -> Figure:
    """Draw one domain's fraction of neurons removed in every block, small enough for a table.

    It does not name the domain, so that it stays true when that is renamed.
    """
    figure = Picture(figsize=(2.0, 0.75), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(shares)), shares, color=COLOURS[0], width=0.8)
    axes.set_ylim(0.0, 1.0)
    axes.set_yticks([0.0, 0.5, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(labelsize=6, length=2)
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("FFN block", fontsize=6)
    return figure
