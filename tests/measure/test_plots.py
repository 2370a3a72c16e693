"""Figures hold what they were given, and files are pictures."""

from dataclasses import replace

import numpy
import pytest
from matplotlib.image import imread

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure import paper, plots
from hf_sparse_pathways.measure.analysis import analyse
from hf_sparse_pathways.measure.experiments import Experiments, MeasuredRule
from hf_sparse_pathways.measure.plots import drawing
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow
from hf_sparse_pathways.measure.scale import ComparedModel, compare_models
from hf_sparse_pathways.measure.specialisation import PAPER, Criterion
from tests.architectures import build
from tests.discovery.profiles import random_profile
from tests.measure.test_analysis import DOMAINS, SIZE

RULES = ("mean_abs", "wanda", "obs")


def _rule(domain, rule, sparsity, place):
    return MeasuredRule(
        domain=domain,
        rule=rule,
        sparsity=sparsity,
        cosine=1.0 - 0.01 * place,
        agreement=1.0 - 0.02 * place,
        divergence=0.03 * place,
        ratio=1.0 + 0.1 * place,
        interval=(1.0, 1.2),
        tokens=100,
        documents=3,
    )


def _analysis(domains=DOMAINS, architecture="deepseek_v3"):
    found = analyse(random_profile(build(architecture), domains), SIZE)
    rows = tuple(
        _rule(domain, rule, sparsity, 1 + place + 3 * index)
        for place, domain in enumerate(domains)
        for index, rule in enumerate(RULES)
        for sparsity in (0.15, 0.05, 0.1)
    )
    experiments = Experiments(dtype="float32", preservation=rows, selection=rows)
    return found.with_measurements(experiments=experiments, shuffled=found.specialisation)


def _quality(domains=DOMAINS):
    rows = []
    for place, domain in enumerate(domains):
        arms = [("dense", None), ("pathway", domain), ("pooled", "pooled"), ("random", "random: x")]
        arms += [("other", other) for other in domains if other != domain]
        for index, (role, name) in enumerate(arms):
            ratio = 1.0 + 0.3 * index + 0.1 * place if index else 1.0
            rows.append(
                QualityRow(
                    domain=domain,
                    role=role,
                    pathway=name,
                    perplexity=10 * ratio,
                    ratio=ratio,
                    interval=(0.9 * ratio, 1.2 * ratio) if index != 2 else None,
                    bits_per_byte=1.0,
                    divergence=0.1,
                    agreement=0.9,
                    cosine=0.9,
                    cosine_per_layer=tuple(1.0 - 0.01 * index * layer for layer in range(4)),
                    flops=0.7,
                    tokens=100,
                    documents=3,
                    excluded=0,
                )
            )
    return QualityReport(base="tiny", rows=tuple(rows))


SETS = {"half": (0.5, 3.0), "less": (0.3, 1.0), "flap": (0.3, 2.0)}


def _several(domains=DOMAINS, sets=SETS):
    """Return a report of several sets: the more a set's factor, the worse it is."""
    one, rows = _quality(domains), []
    for domain in domains:
        rows.append(one.of(domain)[0])
        for label, (sparsity, factor) in sets.items():
            for row in one.of(domain)[1:]:
                ratio = 1.0 + (row.ratio - 1.0) * factor * (1000.0 if row.role == "random" else 1.0)
                changes = {"flops": 1.0 - sparsity, "sparsity": sparsity, "set": label}
                if row.interval is not None:
                    changes["interval"] = (0.9 * ratio, 1.2 * ratio)
                rows.append(replace(row, ratio=ratio, **changes))
    return QualityReport(base="tiny", rows=tuple(rows))


def _lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def _panels(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


@pytest.mark.parametrize("domains", [("code",), ("code", "law")])
def test_every_picture_is_written_as_a_picture(tmp_path, domains, monkeypatch):
    monkeypatch.setattr(drawing, "DPI", 50)
    analysis = _analysis(domains)
    figures = plots.draw_all(analysis) | plots.draw_all(_quality(domains))
    names = {"skippable", "preservation", "selection", "ratios", "cosines"}
    if len(domains) > 1:
        names |= {"specialisation", "overlap", "matrix"}
    assert set(figures) == names
    written = plots.save_figures(figures, tmp_path)
    assert sorted(written) == sorted(path.name for path in tmp_path.iterdir())
    for name in written:
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 90
        assert pixels[..., :3].std() > 0.01, "not one colour"


@pytest.mark.parametrize("domains", [("code",), DOMAINS])
@pytest.mark.parametrize("make", [_quality, _several], ids=["alone", "sets"])
def test_titles_and_legends_lie_within_the_picture(domains, make):
    report = replace(make(domains), base="org/a-model-135m-instruct")
    for name, figure in plots.draw_all(report).items():
        figure.draw_without_rendering()
        box, size = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0, *(size - box.max)) > -0.05, name


def test_what_was_not_measured_is_not_drawn():
    bare = _analysis().with_measurements(experiments=None, shuffled=None)
    assert set(plots.draw_all(bare)) == {"skippable", "specialisation", "overlap"}
    with pytest.raises(PathwaysError, match="two of them"):
        plots.draw(_analysis(("code",)), "specialisation")


def test_axes_are_labelled_with_units():
    figures = plots.draw_all(_analysis())
    for name in ("skippable", "specialisation"):
        for axes in figures[name].axes:
            assert "%" in axes.get_ylabel()
            assert "block" in axes.get_xlabel()
    assert "%" in figures["preservation"].axes[-1].get_xlabel()
    labels = [axes.get_ylabel() for axes in figures["preservation"].axes]
    assert sum("nats" in label for label in labels) == 1


def test_specialisation_is_drawn_as_it_was_found():
    analysis = _analysis()
    left, right = plots.draw_all(analysis)["specialisation"].axes
    drawn = _lines(right)
    expected = analysis.specialisation.of(PAPER).per_domain_and_block
    assert set(drawn) == set(expected)
    for domain, values in expected.items():
        assert numpy.array_equal(drawn[domain], values)
    low = Criterion(kind="ratio", threshold=1.5)
    curves = [list(values) for values in _lines(left).values()]
    assert list(analysis.specialisation.of(low).per_block) in curves
    assert any("shuffled" in label for label in _lines(left))


def test_skippable_neurons_are_drawn_by_block():
    analysis = _analysis()
    drawn = _lines(plots.draw_all(analysis)["skippable"].axes[0])
    for domain, values in analysis.skippable_by("model").per_block.items():
        assert numpy.array_equal(drawn[domain], values)


def test_overlap_is_a_symmetric_map_per_sparsity():
    analysis = _analysis()
    panels = _panels(plots.draw_all(analysis)["overlap"])
    assert len(panels) == len(analysis.overlaps)
    for axes, overlap in zip(panels, analysis.overlaps, strict=True):
        values = numpy.ma.filled(axes.images[0].get_array(), numpy.nan)
        assert numpy.array_equal(values, values.T, equal_nan=True)
        assert numpy.isnan(values.diagonal()).all(), "a domain with itself says nothing"
        assert values[0, 2] == overlap.pairs[1].jaccard
        assert f"{overlap.pairs[0].chance:.2f}" in axes.get_title()
        texts = [text.get_text() for text in axes.texts]
        assert texts == [f"{v:.2f}" for v in values.ravel() if not numpy.isnan(v)]


def test_preservation_has_a_row_per_distance_and_a_column_per_domain():
    analysis = _analysis()
    figure = plots.draw_all(analysis)["preservation"]
    assert len(figure.axes) == 3 * len(DOMAINS)
    for line, name in enumerate(("cosine", "divergence", "agreement")):
        for column, domain in enumerate(DOMAINS):
            drawn = {line.get_label(): line for line in figure.axes[line * 3 + column].get_lines()}
            for rule in RULES:
                own = sorted(
                    (row.sparsity, getattr(row, name))
                    for row in analysis.experiments.preservation
                    if (row.domain, row.rule) == (domain, rule)
                )
                assert list(drawn[rule].get_xdata()) == [0.05, 0.1, 0.15]
                values = [v if name == "divergence" else 1 - v for _, v in own]
                assert list(drawn[rule].get_ydata()) == pytest.approx(values)
            bounds = [label for label in drawn if "paper" in label]
            assert len(bounds) == (line == 0)
            low, high = figure.axes[line * 3 + column].get_ylim()
            for rule in RULES:
                assert all(low <= value <= high for value in drawn[rule].get_ydata())


def test_ratios_stand_with_their_intervals_beside_their_partners():
    report = _quality()
    panels = _panels(plots.plot_ratios(report))
    for axes, domain in zip(panels, report.domains, strict=True):
        rows = [row for row in report.of(domain) if row.role != "dense"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [r.label for r in rows]
        for container, row in zip(axes.containers, rows, strict=True):
            assert container.lines[0].get_xdata()[0] == row.ratio
            (segment,) = container.lines[2][0].get_segments()
            low, high = row.interval or (row.ratio, row.ratio)
            assert segment[:, 0] == pytest.approx([low, high])
        assert axes.get_xscale() == "log"


def test_the_matrix_has_a_row_per_text_and_a_column_per_pathway():
    report = _quality()
    (axes,) = _panels(plots.plot_matrix(report))
    values = numpy.asarray(axes.images[0].get_array())
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert sorted(names[:-1]) == sorted(DOMAINS)
    assert names[-1] == "pooled"
    for line, domain in enumerate(DOMAINS):
        for column, name in enumerate(names):
            (row,) = [r for r in report.of(domain) if r.pathway == name]
            assert values[line, column] == row.ratio
    assert axes.images[0].norm.__class__.__name__ == "LogNorm"


def test_cosines_are_drawn_per_layer():
    report = _quality()
    panels = _panels(plots.plot_cosines(report))
    for axes, domain in zip(panels, report.domains, strict=True):
        drawn = [tuple(line.get_ydata()) for line in axes.get_lines()]
        expected = [r.cosine_per_layer for r in report.of(domain) if r.role != "dense"]
        assert drawn == expected


@pytest.mark.parametrize("domains", [("code",), DOMAINS])
def test_pictures_of_several_sets_are_written(tmp_path, domains, monkeypatch):
    monkeypatch.setattr(drawing, "DPI", 50)
    figures = plots.draw_all(_several(domains))
    assert set(figures) == {"ratios", "cosines"} | ({"matrix"} if len(domains) > 1 else set())
    for name in plots.save_figures(figures, tmp_path):
        assert imread(tmp_path / name)[..., :3].std() > 0.01, "not one colour"


@pytest.mark.parametrize("sets", [SETS, {name: SETS[name] for name in ("half", "less")}])
def test_ratios_of_several_sets_stand_over_their_flops(sets):
    report = _several(sets=sets)
    order = [name for name in ("less", "flap", "half") if name in sets]
    panels = _panels(plots.plot_ratios(report))
    for axes, domain in zip(panels, report.domains, strict=True):
        ticks = [tick.get_text() for tick in axes.get_xticklabels()]
        assert ticks == [f"{name}\n{1 - sets[name][0]:.1%}" for name in order]
        rows = [row for row in report.of(domain) if row.role != "dense"]
        arms = list(dict.fromkeys((row.role, row.pathway) for row in rows))
        low, high = axes.get_ylim()
        assert low < 1.0
        assert axes.get_yscale() == "log"
        for container, arm in zip(axes.containers, arms, strict=True):
            own = {row.set: row for row in rows if (row.role, row.pathway) == arm}
            line, _, (bars,) = container.lines
            assert [round(place) for place in line.get_xdata()] == list(range(len(order)))
            if arm[0] == "random":
                assert max(line.get_ydata()) < high < min(row.ratio for row in own.values())
                assert line.get_linestyle() == "None"
                continue
            assert list(line.get_ydata()) == [own[name].ratio for name in order]
            assert line.get_linestyle() == ("None" if "flap" in sets else "-"), "equal FLOPs"
            for name, segment in zip(order, bars.get_segments(), strict=True):
                wanted = own[name].interval or (own[name].ratio,) * 2
                assert segment[:, 1] == pytest.approx(wanted)
                assert low < wanted[0] <= wanted[1] < high
        values = [row for row in rows if row.role in ("pathway", "random")]
        values.sort(key=lambda row: (row.role, order.index(row.set)))
        shown = [f"{'↑ ' if row.role == 'random' else ''}{row.ratio:.3g}" for row in values]
        assert [text.get_text() for text in axes.texts] == shown


def test_every_set_has_its_matrix_in_the_same_colours():
    report = _several()
    panels = _panels(plots.plot_matrix(report))
    assert [axes.get_title() for axes in panels] == list(SETS)
    norms = {(axes.images[0].norm.vmin, axes.images[0].norm.vmax) for axes in panels}
    assert len(norms) == 1
    for axes, label in zip(panels, SETS, strict=True):
        names = [tick.get_text() for tick in axes.get_xticklabels()]
        assert names == report.columns(label)
        values = numpy.asarray(axes.images[0].get_array())
        for line, domain in enumerate(DOMAINS):
            for column, name in enumerate(names):
                (row,) = [r for r in report.of(domain, label) if r.pathway == name]
                assert values[line, column] == row.ratio


def test_every_set_has_its_cosines():
    report = _several()
    panels = _panels(plots.plot_cosines(report))
    places = [(label, domain) for label in SETS for domain in DOMAINS]
    for axes, (label, domain) in zip(panels, places, strict=True):
        assert axes.get_title() == f"{domain}, {label}"
        drawn = [tuple(line.get_ydata()) for line in axes.get_lines()]
        assert drawn == [row.cosine_per_layer for row in report.of(domain, label)]


@pytest.mark.parametrize("count", [2, 5])
def test_scale_is_drawn_beside_the_papers(tmp_path, count):
    values = _analysis().to_dict()
    model = ComparedModel.from_dict(values)
    models = [
        replace(model, name=f"m{i}", parameters=10 ** (6 + i), specialised=0.1 + 0.02 * (i % 3))
        for i in range(count)
    ]
    figure = plots.plot_scale(compare_models(models))
    mine, theirs = figure.axes[0].collections
    assert mine.get_offsets().tolist() == [[m.parameters, m.specialised] for m in models]
    assert len(theirs.get_offsets()) == len(paper.MODELS)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert f"n = {count}" in legend[0]
    assert "n = 6" in legend[1]
    plots.save_figures({"scale": figure}, tmp_path)


def test_many_domains_still_have_their_own_lines():
    domains = tuple(f"domain{index}" for index in range(11))
    found = analyse(random_profile(build("llama"), domains), SIZE)
    lines = plots.draw_all(found)["skippable"].axes[0].get_lines()[:11]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 11


@pytest.mark.parametrize(
    ("low", "high"), [(0.95, 1.3), (0.9, 4.0), (1.0, 80.0), (0.8, 2.6e4), (1.0, 1.01e9)]
)
def test_log_axes_have_a_few_round_ticks(low, high):
    ticks = drawing.log_ticks(low, high)
    assert 2 <= len(ticks) <= 15
    assert ticks == sorted(ticks)
    assert 1.0 in ticks
