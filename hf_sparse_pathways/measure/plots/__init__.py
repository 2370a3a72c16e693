"""Every picture of the project: values of reports in, matplotlib figures out."""

from hf_sparse_pathways.measure.plots.analysis import (
    plot_rules,
    plot_scale,
    plot_skip_overlap,
    plot_skippable,
    plot_specialisation,
)
from hf_sparse_pathways.measure.plots.drawing import as_svg, save_figures
from hf_sparse_pathways.measure.plots.entanglement import plot_entanglement, plot_relation
from hf_sparse_pathways.measure.plots.experts import plot_experts
from hf_sparse_pathways.measure.plots.kinds import KINDS, draw, draw_all
from hf_sparse_pathways.measure.plots.pathways import (
    plot_overlap,
    plot_sparsity,
    plot_strip,
)
from hf_sparse_pathways.measure.plots.quality import (
    plot_cosines,
    plot_matrix,
)
from hf_sparse_pathways.measure.plots.ratios import plot_ratios
from hf_sparse_pathways.measure.plots.speed import plot_speed

__all__ = [
    "KINDS",
    "as_svg",
    "draw",
    "draw_all",
    "plot_cosines",
    "plot_entanglement",
    "plot_experts",
    "plot_matrix",
    "plot_overlap",
    "plot_ratios",
    "plot_relation",
    "plot_rules",
    "plot_scale",
    "plot_skip_overlap",
    "plot_skippable",
    "plot_sparsity",
    "plot_specialisation",
    "plot_speed",
    "plot_strip",
    "save_figures",
]
