"""One HTML page of pathways and what was measured, or of an analysis, that needs nothing beside it.

Tables are the reports' own, pictures are SVG within the page, and there is no script: a policy in
the page lets a browser fetch nothing. Reports are given, never found: one that lies about may be of
pathways that were there before, so those that are given have to fit, too.
"""

import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_sparse_pathways.errors import MismatchError, PathwaysError, option
from hf_sparse_pathways.files import write_atomically
from hf_sparse_pathways.measure import analysis_report
from hf_sparse_pathways.measure.analysis import Analysis
from hf_sparse_pathways.measure.overlap import (
    measure_expert_overlap,
    measure_kept_overlap,
    overlap_section,
)
from hf_sparse_pathways.measure.plotting import load_plots
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.measure.speed import tables
from hf_sparse_pathways.measure.speed.report import BenchmarkReport
from hf_sparse_pathways.pathways.expert_summary import describe_experts
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.pathways.summary import block_table, describe_pathways, text_of
from hf_sparse_pathways.share.card import is_hub_id
from hf_sparse_pathways.tables import as_html
from hf_sparse_pathways.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS = 96
"""Per inch, as CSS counts them."""

_SAME = 5e-4
"""Most that two sparsities of one pathway differ by."""

_ALTS = {
    "sparsity": "Lines over the FFN blocks by depth: the share of neurons that each domain removes",
    "overlap": "Map of every two domains: the Jaccard index of their neurons",
    "ratios": "Perplexity over the dense model's, with 95 % intervals, of every arm on every text",
    "matrix": "Map of perplexity over the dense model's: a row per text, a column per pathway",
    "cosines": "Lines over the layers: cosine of each arm's hidden states with the dense model's",
    "speed": "Speed of every arm over plain dense, with its ceiling, for every workload",
    "specialisation": "Lines over the FFN blocks by depth: the share of specialised neurons",
    "skippable": "Lines over the FFN blocks by depth: the share of neurons that each domain skips",
    "preservation": "Distance from the dense model by the share of neurons removed, per rule",
    "selection": "Distance from the dense model under negative and positive selection",
}
"""What a picture shows, for those who do not see it; the tables beside it have the figures."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of the pathways; what is None is said to be missing, with the way to it.

    Attributes:
        evaluation: By ``evaluate``.
        benchmark: By ``benchmark``.
        analysis: By ``sparse-pathways analyze``.
    """

    evaluation: QualityReport | None = None
    benchmark: BenchmarkReport | None = None
    analysis: Analysis | None = None

    def check_fits(self, pathways: Pathways) -> None:
        """Check that the pathways are those that were measured.

        Raises:
            MismatchError: They are others.
        """
        removed = {name: pathways.sparsity(name) for name in pathways.domains}
        if self.evaluation is not None:
            labels: list[str | None] = [*self.evaluation.sets]
            sets = [self.evaluation.removed(label) for label in labels or [None]]
            _check_removed("evaluation", removed, *sets)
        if self.benchmark is not None:
            arms = self.benchmark.arms
            timed = {str(arm.pathway): arm.sparsity for arm in arms if arm.pathway in removed}
            _check_removed("benchmark", removed, timed)
        blocks = tuple(block.name for block in pathways.base.blocks)
        if self.analysis is not None and self.analysis.blocks != blocks:
            raise MismatchError(
                f"The analysis is of {self.analysis.base!r} with {len(self.analysis.blocks)} FFN "
                f"blocks, and these are pathways of {pathways.base.title} with {len(blocks)}."
            )


def write_html_report(
    source: Pathways | str | PathLike[str] | None,
    path: str | PathLike[str],
    *,
    evaluation: QualityReport | None = None,
    benchmark: BenchmarkReport | None = None,
    analysis: Analysis | None = None,
    plots: bool = True,
) -> None:
    """Write a page on pathways and what was measured of them, whole or not at all.

    Args:
        source: Pathways, or a folder or Hub id with some. None for a page on the analysis of a
            model without pathways.
        path: The HTML file; it is replaced.
        evaluation: What ``sp.evaluate`` returned.
        benchmark: What ``sp.benchmark`` returned.
        analysis: What ``sparse-pathways analyze`` wrote, by ``Analysis.from_dict``.
        plots: Whether there are pictures beside the tables.

    Raises:
        MismatchError: A report is of other pathways.
        PathwaysError: Pictures are wanted, and matplotlib is missing; or there is nothing to show.
    """
    if source is None:
        if analysis is None or evaluation is not None or benchmark is not None:
            raise PathwaysError(
                "Without a folder with pathways a page shows an analysis, and nothing else: give "
                f"the folder, or {option('analysis')} alone."
            )
        text = render_analysis(analysis, plots=plots)
    else:
        pathways = source if isinstance(source, Pathways) else Pathways.from_pretrained(source)
        measured = Measured(evaluation=evaluation, benchmark=benchmark, analysis=analysis)
        text = render_page(pathways, measured, plots=plots)
    write_atomically(Path(path), text.encode())


def render_page(pathways: Pathways, measured: Measured, *, plots: bool = True) -> str:
    """Return the page; see ``write_html_report``."""
    measured.check_fits(pathways)
    base = pathways.base
    pairs = measure_kept_overlap(pathways) if base.blocks else ()
    experts, expert_pairs = describe_experts(pathways), measure_expert_overlap(pathways)
    if expert_pairs:
        experts.append(overlap_section(expert_pairs, "experts"))
    return _render(
        "page.html.jinja",
        base=base,
        short=_short(base.name),
        base_id=base.name if is_hub_id(base.name) else None,
        kept="Neurons" if base.blocks else "Experts",
        neurons=sum(block.d_ff for block in base.blocks),
        domains=pathways.domains,
        summary=replace(
            describe_pathways(pathways),
            title="What each domain keeps",
            note="FFN FLOPs: of the dense FFN's, whatever compensation costs included.",
        ),
        blocks=block_table(pathways),
        experts=experts,
        overlap=overlap_section(pairs) if pairs else None,
        origins={name: _describe_origin(pathways[name]) for name in pathways.domains},
        evaluation=measured.evaluation,
        benchmark=measured.benchmark,
        headline=tables.headline(measured.benchmark) if measured.benchmark else [],
        reading=as_html(tables.READING),
        analysis=measured.analysis,
        analysed=analysis_report.describe(measured.analysis) if measured.analysis else "",
        pictures=_draw(pathways, measured) if plots else {},
        drawn=plots,
    )


def render_analysis(analysis: Analysis, *, plots: bool = True) -> str:
    """Return the page of an analysis alone; see ``write_html_report``."""
    return _render(
        "analysis_page.html.jinja",
        short=_short(analysis.base),
        analysis=analysis,
        analysed=analysis_report.describe(analysis),
        pictures=_embed_all(_pictures_of(analysis)) if plots else [],
        drawn=plots,
    )


def _render(template: str, **values: Any) -> str:
    """Return a page with values put in; what they hold stays text."""
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=__version__, **values)


def _short(name: str) -> str:
    return Path(name).name or "a model without a name"


def _draw(pathways: Pathways, measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """Return the pictures of each part of the page."""
    plots = load_plots()
    parts: dict[str, Mapping[str, Figure]] = {}
    if pathways.base.blocks:
        parts["pathways"] = plots.draw_all(pathways)
    if measured.evaluation is not None:
        parts["evaluation"] = plots.draw_all(measured.evaluation)
    if measured.benchmark is not None:
        parts["benchmark"] = plots.draw_all(measured.benchmark)
    if measured.analysis is not None:
        parts["analysis"] = _pictures_of(measured.analysis)
    return {part: _embed_all(figures) for part, figures in parts.items()}


def _pictures_of(analysis: Analysis) -> "Mapping[str, Figure]":
    """Return an analysis's pictures, which are of FFN blocks."""
    return load_plots().draw_all(analysis) if analysis.blocks else {}


def _embed_all(figures: "Mapping[str, Figure]") -> list[dict[str, Any]]:
    """Return pictures as the template takes them; widths are in pixels."""
    return [
        {
            "name": name,
            "alt": _ALTS[name],
            "data": f"data:image/svg+xml;base64,{b64encode(load_plots().as_svg(figure)).decode()}",
            "width": round(figure.get_figwidth() * _PIXELS),
        }
        for name, figure in figures.items()
    ]


def _describe_origin(pathway: Pathway) -> dict[str, str]:
    """Return what a pathway says of how it was made, without the digests of documents."""
    made = {name: value for name, value in pathway.provenance.items() if name != "text"}
    text = {f"text, {name}": value for name, value in text_of(pathway).items()}
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in {**made, **text}.items()
        if "digests" not in name
    }


def _check_removed(what: str, removed: Mapping[str, float], *measured: Mapping[str, float]) -> None:
    """Check that one set of measured pathways is among those that there are, by what they remove.

    Raises:
        MismatchError: None is.
    """
    for found in measured:
        near = (abs(share - removed.get(name, 2.0)) < _SAME for name, share in found.items())
        if found and all(near):
            return
    shown = [
        ", ".join(f"{name} {share:.1%}" for name, share in found.items()) or "none of these domains"
        for found in (*measured, removed)
    ]
    raise MismatchError(
        f"The {what} is of other pathways: they remove {'; or '.join(shown[:-1])}, and these "
        f"{shown[-1]}. Measure these, or take the folder that was measured."
    )
