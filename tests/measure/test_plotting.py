"""``sp.plot`` draws what fits an object, and says what does where something does not."""

import builtins
from dataclasses import replace

import numpy
import pytest
import torch
from matplotlib.figure import Figure

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.measure.correlation import correlate
from hf_sparse_pathways.measure.entanglement import Relation, summarise_entanglement
from hf_sparse_pathways.measure.overlap import measure_kept_overlap
from hf_sparse_pathways.measure.plots import KINDS, as_svg, plot_strip
from hf_sparse_pathways.measure.routing_report import RoutedText, RoutingReport
from tests.architectures import build, random_masks
from tests.discovery.profiles import random_profile
from tests.measure.speed.reports import REPORT
from tests.measure.test_plots import _analysis, _lines, _panels, _quality
from tests.test_tables import _scale

MASKED = sp.Pathways.from_masks(
    build("llama"), random_masks(build("llama"), ["code", "law", "math"])
)


def _routing():
    rows = [
        RoutedText(
            text="code",
            known=True,
            length=n,
            prompts=9,
            decided={"code": 8, "dense": 1},
            kinds=("tokens",),
        )
        for n in (8, 64)
    ]
    rows.append(
        RoutedText(
            text="x",
            known=False,
            length=64,
            prompts=5,
            decided={"law": 1, "dense": 4},
            kinds=("tokens",),
        )
    )
    return RoutingReport(domains=("code", "law"), rows=tuple(rows))


def _entangled():
    """A profile that says how entangled its rows are."""
    profile = random_profile(build("llama"), ("code", "law", "math"))
    own = tuple(torch.rand(block.branches, block.d_ff) for block in profile.base.blocks)
    domains = {n: replace(d, entanglement=own) for n, d in profile.by_domain.items()}
    return replace(profile, by_domain=domains)


def _related():
    """An analysis that says how that goes together with errors."""
    pearson, spearman = correlate([1.0, 2.0, 3.0, 5.0], [1.0, 3.0, 2.0, 4.0])
    relation = Relation(
        domain="code",
        method="magnitude",
        sparsity=0.5,
        pearson=pearson,
        spearman=spearman,
        within=0.5,
        points=((0.1, 0.2), (0.3, 0.4)),
    )
    found = summarise_entanglement(_entangled())
    return replace(_analysis(), entanglement=replace(found, relations=(relation,)))


DRAWN = (
    MASKED,
    _entangled(),
    _quality(),
    REPORT,
    _related(),
    _scale(),
    _routing(),
)


@pytest.mark.parametrize("thing", DRAWN, ids=lambda thing: type(thing).__name__)
def test_every_kind_of_every_object_is_drawn(thing):
    kinds = [kind for kind in KINDS[type(thing)] if kind != "experts"]  # see tests/moe
    titles = [_title(sp.plot(thing, kind)) for kind in kinds]
    assert len(set(titles)) == len(kinds)
    assert _title(sp.plot(thing)) == titles[0]


def _title(figure):
    assert isinstance(figure, Figure)
    return figure.get_suptitle() or figure.axes[0].get_title()


def test_objects_are_all_that_can_be_drawn():
    assert {type(thing) for thing in DRAWN} == set(KINDS)


def test_sparsity_is_drawn_block_by_block_beside_the_pooled_control():
    own = MASKED.with_controls({"pooled": MASKED["law"]})
    drawn = _lines(sp.plot(own, "sparsity").axes[0])
    assert set(drawn) == {"code", "law", "math", "pooled (control)"}
    for name in own.domains:
        assert numpy.allclose(drawn[name], own.sparsity(name, per_block=True))


def test_the_overlap_of_kept_neurons_is_their_jaccard_index():
    (axes,) = _panels(sp.plot(MASKED, "overlap"))
    values = numpy.ma.filled(axes.images[0].get_array(), numpy.nan)
    for row, first in enumerate(MASKED.domains):
        for column, second in enumerate(MASKED.domains):
            if row == column:
                assert numpy.isnan(values[row, column])
                continue
            mine, theirs = (
                {(b, int(n)) for b, keep in enumerate(MASKED[d].keep) for n in keep.nonzero()}
                for d in (first, second)
            )
            assert values[row, column] == pytest.approx(len(mine & theirs) / len(mine | theirs))
    chances = [f"{pair.chance:.2f}" for pair in measure_kept_overlap(MASKED)]
    assert min(chances) in axes.get_title()
    assert max(chances) in axes.get_title()


def test_what_compares_domains_takes_two():
    one = MASKED.subset(["law"])
    assert "removed" in _title(sp.plot(one))
    assert "Below" in _title(sp.plot(random_profile(build("llama"), ("code",))))
    assert "ratio" in _title(sp.plot(_quality(("code",))))
    for thing, kind in ((one, "overlap"), (_quality(("code",)), "matrix")):
        with pytest.raises(sp.PathwaysError, match=f"'{kind}' .*two of them"):
            sp.plot(thing, kind)
    with pytest.raises(sp.PathwaysError, match=r"'sparsity' .*has none"):
        sp.plot(MASKED.subset([]))


def test_what_does_not_fit_is_told_what_does():
    with pytest.raises(sp.PathwaysError, match=r"A dict cannot be drawn.*Pathways, Profile"):
        sp.plot({})
    with pytest.raises(UnknownNameError, match="Did you mean 'overlap'"):
        sp.plot(MASKED, "overlop")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    own = builtins.__import__

    def without(name, *arguments, **options):
        if name == "hf_sparse_pathways.measure" and "plots" in (arguments[2] or ()):
            raise ImportError("No module named 'matplotlib'")
        return own(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(sp.PathwaysError, match=r"hf-sparse-pathways\[plots\]"):
        sp.plot(MASKED)


def test_a_notebook_shows_a_figure_without_pyplot():
    assert sp.plot(MASKED)._repr_png_().startswith(b"\x89PNG")


def test_equal_pictures_are_equal_bytes():
    strip = [as_svg(plot_strip([0.1, 0.5, 0.9])) for _ in range(2)]
    assert strip[0] == strip[1]
    assert strip[0] != as_svg(plot_strip([0.1, 0.5, 0.8]))


def test_dollars_in_names_are_no_formulas():
    """Half a formula in a folder's name would be an error when the picture is written."""
    named = replace(MASKED, base=replace(MASKED.base, name=r"my$\frac{model$"))
    figure = sp.plot(named)
    assert r"my$\frac{model$" in _title(figure)
    assert figure._repr_png_()
    assert as_svg(figure)


def test_a_pathway_in_a_strip_goes_from_nothing_to_all():
    (axes,) = plot_strip([0.1, 0.5, 0.9]).axes
    assert [bar.get_height() for bar in axes.patches] == [0.1, 0.5, 0.9]
    assert axes.get_ylim() == (0.0, 1.0)
