"""Pictures of entanglement: beside the error of sparsified rows, and by depth."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hf_sparse_pathways.measure.entanglement import Relation, Spread
from hf_sparse_pathways.measure.plots.drawing import (
    COLOURS,
    Picture,
    label_blocks,
    line_style,
    short_name,
)
from hf_sparse_pathways.shares import format_share


def plot_relation(relations: Sequence[Relation], *, base: str) -> Figure:
    """Draw the error of sparsified rows over their entanglement, a panel per way to prune."""
    domains = list(dict.fromkeys(row.domain for row in relations))
    ways = list(dict.fromkeys((row.method, row.sparsity) for row in relations))
    figure = Picture(
        figsize=(2.6 * len(ways) + 1.0, 2.5 * len(domains) + 0.9), layout="constrained"
    )
    grid = figure.subplots(len(domains), len(ways), sharex=True, squeeze=False)
    for row in relations:
        line, column = domains.index(row.domain), ways.index((row.method, row.sparsity))
        axes = grid[line, column]
        x, y = np.array(row.points).reshape(-1, 2).T
        seen = y > 0
        axes.scatter(x[seen], y[seen], s=4, alpha=0.35, color=COLOURS[0], linewidths=0)
        if bool(seen.any()):
            axes.set_yscale("log")
        title = f"{row.method}, {format_share(row.sparsity)}"
        if row.spearman.value is not None:
            title += f"\nSpearman {row.spearman.value:.2f}, n = {row.spearman.n}"
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        if column == 0:
            axes.set_ylabel(f"{row.domain}\nerror / variance", fontsize=9)
        if line == len(domains) - 1:
            axes.set_xlabel("entanglement (W1)", fontsize=9)
    figure.suptitle(f"Entanglement and sparsification of rows, {short_name(base)}", fontsize=11)
    return figure


def plot_entanglement(spreads: Sequence[Spread], *, base: str) -> Figure:
    """Draw the median entanglement of every block's rows, and below what nine in ten are."""
    branches = list(dict.fromkeys(row.branch for row in spreads))
    figure = Picture(figsize=(4.6 * len(branches) + 1.0, 3.9), layout="constrained")
    panels = figure.subplots(1, len(branches), sharey=True, squeeze=False)[0]
    for axes, branch in zip(panels, branches, strict=True):
        for index, domain in enumerate(dict.fromkeys(row.domain for row in spreads)):
            own = [row for row in spreads if (row.domain, row.branch) == (domain, branch)]
            blocks, style = [row.block for row in own], line_style(index, len(own))
            axes.plot(blocks, [row.median for row in own], **style, label=f"{domain}: median")
            high = {**style, "linestyle": ":"}
            axes.plot(blocks, [row.high for row in own], **high, label=f"{domain}: 90 % below")
        label_blocks(axes, "entanglement (W1)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(branch, fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Entanglement of incoming rows, {short_name(base)}", fontsize=11)
    return figure
