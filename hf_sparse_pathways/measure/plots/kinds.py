"""Which pictures there are of which object: the first of a list is what ``sp.plot`` draws."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.measure.analysis import Analysis
from hf_sparse_pathways.measure.plots.analysis import plot_analysis, plot_profile, plot_scale
from hf_sparse_pathways.measure.plots.pathways import plot_pathways
from hf_sparse_pathways.measure.plots.quality import plot_quality
from hf_sparse_pathways.measure.plots.speed import plot_speed
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.measure.scale import ScaleComparison
from hf_sparse_pathways.measure.speed.report import BenchmarkReport
from hf_sparse_pathways.pathways.pathway import Pathways

_PROFILE = ("specialisation", "skippable", "overlap")

KINDS: Mapping[type, tuple[str, ...]] = MappingProxyType(
    {
        Pathways: ("sparsity", "overlap"),
        Profile: _PROFILE,
        QualityReport: ("matrix", "ratios", "cosines"),
        BenchmarkReport: ("speed",),
        Analysis: (*_PROFILE, "preservation", "selection"),
        ScaleComparison: ("scale",),
    }
)
"""Type -> names of its pictures, the usual one first."""

_DRAWN: Mapping[type, Callable[[Any], Mapping[str, Figure]]] = MappingProxyType(
    {
        Pathways: plot_pathways,
        Profile: plot_profile,
        QualityReport: plot_quality,
        BenchmarkReport: lambda report: {"speed": plot_speed(report)},
        Analysis: plot_analysis,
        ScaleComparison: lambda compared: {"scale": plot_scale(compared)},
    }
)


def draw(thing: Any, kind: str | None = None) -> Figure:
    """Draw one picture of an object; see ``hf_sparse_pathways.plot``."""
    known = next((own for own in KINDS if isinstance(thing, own)), None)
    if known is None:
        fits = ", ".join(own.__name__ for own in KINDS)
        raise PathwaysError(f"A {type(thing).__name__} cannot be drawn. What can: {fits}.")
    if kind is not None and kind not in KINDS[known]:
        raise UnknownNameError(f"picture of {known.__name__}", kind, KINDS[known])
    drawn = _DRAWN[known](thing)
    wanted = kind or next(name for name in KINDS[known] if name in drawn)
    if wanted not in drawn:
        raise PathwaysError(
            f"There is nothing for the picture {wanted!r} in this {known.__name__}, which has "
            f"{', '.join(drawn)}: comparing domains takes two of them, and what an experiment "
            "shows takes one."
        )
    return drawn[wanted]
