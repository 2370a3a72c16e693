"""Picture of routed experts: how much of each domain's text every one of them has."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_sparse_pathways.measure.plots.drawing import COLUMNS, Picture, hide_rest, short_name
from hf_sparse_pathways.measure.routed_experts import RoutedUsage


def plot_experts(layers: Sequence[RoutedUsage], *, base: str) -> Figure:
    """Draw the share of tokens that each expert has, a panel per domain, layers from the top."""
    domains = [*layers[0].usage]
    columns = min(COLUMNS, len(domains))
    lines = -(-len(domains) // columns)
    height = 1.0 + min(4.0, 0.22 * len(layers) + 0.8)
    figure = Picture(figsize=(3.6 * columns + 1.4, height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    wide = max(len(layer.variance) for layer in layers)
    shares = np.full((len(domains), len(layers), wide), np.nan)
    for depth, layer in enumerate(layers):
        for place, domain in enumerate(domains):
            shares[place, depth, : len(layer.variance)] = layer.usage[domain]
    norm = Normalize(0.0, float(np.nanmax(shares)) or 1.0)
    for axes, domain, values in zip(grid.flat, domains, shares, strict=False):
        axes.set_facecolor("#E0E0E0")
        image = axes.imshow(values, cmap="cividis", norm=norm, aspect="auto", interpolation="none")
        axes.set_title(domain, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    hide_rest(grid, len(domains))
    for axes in grid[:, 0]:
        axes.set_ylabel("layer with experts, by depth")
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    bar = figure.colorbar(image, ax=grid, label="tokens (%)")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100.0 * share:g}"))
    figure.suptitle(f"Tokens of each routed expert, {short_name(base)}", fontsize=11)
    return figure
