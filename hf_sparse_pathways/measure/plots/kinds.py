"""Which pictures there are of which object: the first that it has is what ``sp.plot`` draws."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.measure.analysis import Analysis
from hf_sparse_pathways.measure.entanglement import Entanglement, summarise_entanglement
from hf_sparse_pathways.measure.paper import PERCENTILE, PRESERVED_COSINE
from hf_sparse_pathways.measure.plots.analysis import (
    plot_rules,
    plot_scale,
    plot_skip_overlap,
    plot_skippable,
    plot_specialisation,
)
from hf_sparse_pathways.measure.plots.drawing import literal_names, short_name
from hf_sparse_pathways.measure.plots.entanglement import plot_entanglement, plot_relation
from hf_sparse_pathways.measure.plots.experts import plot_experts
from hf_sparse_pathways.measure.plots.pathways import plot_overlap, plot_sparsity
from hf_sparse_pathways.measure.plots.quality import plot_cosines, plot_matrix
from hf_sparse_pathways.measure.plots.ratios import plot_ratios
from hf_sparse_pathways.measure.plots.routing import plot_confusion
from hf_sparse_pathways.measure.plots.speed import plot_speed
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.measure.routed_experts import RoutedUsage, summarise_experts
from hf_sparse_pathways.measure.routing_report import RoutingReport
from hf_sparse_pathways.measure.scale import ScaleComparison
from hf_sparse_pathways.measure.skipping import measure_overlap, measure_skippable
from hf_sparse_pathways.measure.specialisation import measure_specialisation
from hf_sparse_pathways.measure.speed.report import BenchmarkReport
from hf_sparse_pathways.pathways.pathway import Pathways

Ready = dict[str, Callable[[], Figure]]
"""Name of a picture -> what draws it."""


def draw(thing: Any, kind: str | None = None) -> Figure:
    """Draw one picture of an object; see ``hf_sparse_pathways.plot``."""
    known = _type_of(thing)
    if kind is not None and kind not in KINDS[known]:
        raise UnknownNameError(f"picture of {known.__name__}", kind, KINDS[known])
    ready = _READY[known](thing)
    wanted = kind or next((name for name in KINDS[known] if name in ready), KINDS[known][0])
    if wanted not in ready:
        raise PathwaysError(
            f"There is nothing for the picture {wanted!r} in this {known.__name__}, which has "
            f"{', '.join(ready) or 'none'}: comparing domains takes two of them, and what an "
            "experiment shows takes one."
        )
    with literal_names():
        return ready[wanted]()


def draw_all(thing: Any) -> dict[str, Figure]:
    """Draw every picture that there is of an object, by name, the usual one first."""
    known = _type_of(thing)
    ready = _READY[known](thing)
    with literal_names():
        return {name: ready[name]() for name in KINDS[known] if name in ready}


def _type_of(thing: Any) -> type:
    known = next((own for own in KINDS if isinstance(thing, own)), None)
    if known is None:
        fits = ", ".join(own.__name__ for own in KINDS)
        raise PathwaysError(f"A {type(thing).__name__} cannot be drawn. What can: {fits}.")
    return known


def _of_pathways(pathways: Pathways) -> Ready:
    ready: Ready = {"sparsity": partial(plot_sparsity, pathways)} if pathways.domains else {}
    if len(pathways.domains) > 1:
        ready["overlap"] = partial(plot_overlap, pathways)
    return ready


def _of_profile(profile: Profile) -> Ready:
    base = profile.base.name
    experts = _of_experts(summarise_experts(profile), base)
    if not profile.base.blocks:
        return experts
    pool = next(own for own in measure_skippable(profile, PERCENTILE) if own.pool == "model")
    ready: Ready = {"skippable": partial(plot_skippable, pool, PERCENTILE, base=base)}
    if len(profile.domains) > 1:
        found, overlaps = measure_specialisation(profile), measure_overlap(profile)
        ready["specialisation"] = partial(plot_specialisation, found, base=base)
        ready["overlap"] = partial(plot_skip_overlap, overlaps, base=base)
    return ready | _of_entanglement(summarise_entanglement(profile), base) | experts


def _of_quality(report: QualityReport) -> Ready:
    ready: Ready = {
        "ratios": partial(plot_ratios, report),
        "cosines": partial(plot_cosines, report),
    }
    if any(row.role == "other" for row in report.rows):
        ready["matrix"] = partial(plot_matrix, report)
    return ready


def _of_analysis(analysis: Analysis) -> Ready:
    base, experts = analysis.base, _of_experts(analysis.experts, analysis.base)
    if not analysis.skippable:
        return experts
    pool = analysis.skippable_by("model")
    ready: Ready = {"skippable": partial(plot_skippable, pool, analysis.percentile, base=base)}
    if analysis.specialisation is not None:
        found = (analysis.specialisation, analysis.shuffled)
        ready["specialisation"] = partial(plot_specialisation, *found, base=base)
        ready["overlap"] = partial(plot_skip_overlap, analysis.overlaps, base=base)
    if analysis.experiments is not None:
        ready["preservation"] = partial(
            plot_rules,
            analysis.experiments.preservation,
            title=f"Output preservation on held-out text, {short_name(base)}",
            reference=1.0 - PRESERVED_COSINE,
        )
    if analysis.experiments is not None and analysis.experiments.selection:
        ready["selection"] = partial(
            plot_rules,
            analysis.experiments.selection,
            title=f"Negative against positive selection, {short_name(base)}",
            reference=None,
        )
    return ready | _of_entanglement(analysis.entanglement, base) | experts


def _of_experts(layers: Sequence[RoutedUsage], base: str) -> Ready:
    return {"experts": partial(plot_experts, layers, base=base)} if layers else {}


def _of_entanglement(found: Entanglement | None, base: str) -> Ready:
    if found is None:
        return {}
    ready: Ready = {"entanglement": partial(plot_entanglement, found.spreads, base=base)}
    if found.relations:
        ready["relation"] = partial(plot_relation, found.relations, base=base)
    return ready


_PROFILE = ("specialisation", "skippable", "overlap")

KINDS: Mapping[type, tuple[str, ...]] = MappingProxyType(
    {
        Pathways: ("sparsity", "overlap"),
        Profile: (*_PROFILE, "entanglement", "experts"),
        QualityReport: ("matrix", "ratios", "cosines"),
        BenchmarkReport: ("speed",),
        RoutingReport: ("confusion",),
        Analysis: (*_PROFILE, "preservation", "selection", "entanglement", "relation", "experts"),
        ScaleComparison: ("scale",),
    }
)
"""Type -> names of its pictures, the usual one first."""

_READY: Mapping[type, Callable[[Any], Ready]] = MappingProxyType(
    {
        Pathways: _of_pathways,
        Profile: _of_profile,
        QualityReport: _of_quality,
        RoutingReport: lambda report: {"confusion": partial(plot_confusion, report)},
        BenchmarkReport: lambda report: {"speed": partial(plot_speed, report)},
        Analysis: _of_analysis,
        ScaleComparison: lambda compared: {"scale": partial(plot_scale, compared)},
    }
)
