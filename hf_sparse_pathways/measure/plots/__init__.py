"""Every picture of the project: values of reports in, matplotlib figures out."""

from hf_sparse_pathways.measure.plots.analysis import (
    plot_analysis,
    plot_overlap,
    plot_rules,
    plot_scale,
    plot_skippable,
    plot_specialisation,
)
from hf_sparse_pathways.measure.plots.drawing import save_figures
from hf_sparse_pathways.measure.plots.quality import (
    plot_cosines,
    plot_matrix,
    plot_quality,
)
from hf_sparse_pathways.measure.plots.ratios import plot_ratios
from hf_sparse_pathways.measure.plots.speed import plot_speed

__all__ = [
    "plot_analysis",
    "plot_cosines",
    "plot_matrix",
    "plot_overlap",
    "plot_quality",
    "plot_ratios",
    "plot_rules",
    "plot_scale",
    "plot_skippable",
    "plot_specialisation",
    "plot_speed",
    "save_figures",
]
