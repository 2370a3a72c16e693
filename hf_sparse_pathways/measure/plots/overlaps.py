"""Maps of the overlap between domains: of skipped neurons by sparsity, or of kept neurons."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hf_sparse_pathways.measure.overlap import PairOverlap
from hf_sparse_pathways.measure.plots.drawing import Picture, draw_map, label_map


def draw_overlaps(panels: Mapping[str, Sequence[PairOverlap]], *, title: str) -> Figure:
    """Draw the Jaccard index of every two domains' neurons, a map per panel, beside chance.

    Args:
        panels: Title of a panel -> every pair of the same two or more domains.
        title: Of the figure.
    """
    first = next(iter(panels.values()))
    domains = list(dict.fromkeys(name for pair in first for name in (pair.first, pair.second)))
    size = 1.6 + 0.35 * len(domains)
    figure = Picture(figsize=(max(size * len(panels) + 1.2, 6.4), size + 1.2), layout="constrained")
    grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (name, pairs) in zip(grid, panels.items(), strict=True):
        values = np.full((len(domains), len(domains)), np.nan)
        for pair in pairs:
            row, column = domains.index(pair.first), domains.index(pair.second)
            values[row, column] = values[column, row] = pair.jaccard
        image = draw_map(axes, values, Normalize(0.0, 1.0), "{:.2f}")
        label_map(axes, domains, domains)
        axes.set_title(f"{name}\nchance {_range([pair.chance for pair in pairs])}", fontsize=10)
    figure.colorbar(image, ax=list(grid), label="Jaccard index", shrink=0.8)
    figure.suptitle(title)
    return figure


def _range(values: Sequence[float]) -> str:
    """Render the least and the greatest, or one figure where they are the same."""
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))
