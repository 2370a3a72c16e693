"""Maps of where prompts went: text by decision, one map per length of the prompt."""

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hf_sparse_pathways.measure.plots.drawing import LEAST_WIDTH, Picture, draw_map, label_map
from hf_sparse_pathways.measure.routing_report import DENSE, RoutingReport


def plot_confusion(report: RoutingReport) -> Figure:
    """Draw the share of each text's prompts that went to each domain, or to the dense model."""
    columns = [*report.domains, DENSE]
    texts = list(dict.fromkeys(row.text for row in report.rows))
    width, height = 1.2 + 0.6 * len(columns), 1.8 + 0.4 * len(texts)
    size = (max(width * len(report.lengths) + 1.2, LEAST_WIDTH), height)
    figure = Picture(figsize=size, layout="constrained")
    grid = np.atleast_1d(figure.subplots(1, len(report.lengths), sharey=True))
    for axes, length in zip(grid, report.lengths, strict=True):
        values = np.full((len(texts), len(columns)), np.nan)
        for row in report.rows:
            if row.length == length:
                shares = [row.decided.get(column, 0) / row.prompts for column in columns]
                values[texts.index(row.text)] = shares
        image = draw_map(axes, values, Normalize(0.0, 1.0), "{:.2f}")
        label_map(axes, columns, texts)
        axes.set_title(f"{length} tokens", fontsize=10)
    figure.colorbar(image, ax=list(grid), label="share of the text's prompts", shrink=0.8)
    figure.suptitle("Text (rows) by where its prompts went (columns)")
    return figure
