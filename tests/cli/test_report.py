"""The page holds everything that it shows, is well-formed, and is of the pathways it says."""

import base64
import json
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import MismatchError
from hf_sparse_pathways.measure import plotting
from hf_sparse_pathways.pathways.pathway import Pathway
from hf_sparse_pathways.share.page import Measured, render_page
from tests.cli.commands import assert_error, content, run, run_well
from tests.hub.cards import pathways
from tests.measure.speed.reports import REPORT
from tests.measure.test_plots import _analysis, _quality, _several
from tests.test_tables import HOSTILE, Page

OWN = pathways(("code", "law", "medicine"))
ANALYSIS = _analysis(architecture="llama")


def _evaluation(own=OWN, report=None):
    report = report or _quality(("code", "law", "medicine"))
    rows = (
        replace(row, sparsity=own.sparsity(row.pathway)) if row.role == "pathway" else row
        for row in report.rows
    )
    return replace(report, rows=tuple(rows))


def _benchmark(own=OWN):
    arms = (
        replace(arm, sparsity=own.sparsity(arm.pathway)) if arm.pathway else arm
        for arm in REPORT.arms
    )
    return replace(REPORT, arms=tuple(arms))


FULL = Measured(evaluation=_evaluation(), benchmark=_benchmark(), analysis=ANALYSIS)


@pytest.fixture(scope="module")
def full():
    return render_page(OWN, FULL)


def _check_self_contained(text):
    """Check that nothing is fetched, and that what is a picture says so in words."""
    page = Page(text.removeprefix("<!doctype html>"))
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "form", "base"}
    for tag, attrs in page.tags:
        held = {name: value for name, value in attrs.items() if "://" in (value or "")}
        assert tag == "a" or not held, (tag, held)
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in text
    assert "@import" not in text
    for picture in page.named("img"):
        assert len(picture["alt"]) > 20
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    return page


def test_the_page_needs_nothing_beside_it(full):
    page = _check_self_contained(full)
    assert page.named("html") == [{"lang": "en"}]
    assert "default-src 'none'" in page.named("meta")[1]["content"]
    assert len(page.named("title")) == len(page.named("h1")) == len(page.named("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = {attrs["href"] for attrs in page.named("a") if attrs["href"].startswith("#")}
    assert {link[1:] for link in links} <= targets
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.named("th"))


def test_the_page_shows_what_was_measured_beside_its_partners(full):
    page = _check_self_contained(full)
    shown = [tuple(map(tuple, table)) for table in page.tables]
    for report in (FULL.evaluation, FULL.benchmark, FULL.analysis):
        for section in report.sections():
            assert (tuple(section.header), *map(tuple, section.rows)) in shown
    pictures = 2 + 3 + 1 + 5
    assert len(page.named("img")) == pictures
    assert "Not measured here" not in full
    domains = {row[0]: row for row in page.tables[0]}
    assert domains["law"][1] == f"{OWN.sparsity('law'):.1%}"


def test_a_page_without_measurements_says_how_they_are_made():
    text = render_page(OWN.subset(["law"]), Measured())
    page = _check_self_contained(text)
    assert text.count("Not measured here") == 2
    for command in ('evaluate FOLDER --domain "law=TEXT"', "benchmark FOLDER", "analyze"):
        assert f"sparse-pathways {command}" in "".join(page.text)
    assert len(page.named("img")) == 1
    assert "overlap takes two domains" in text
    assert _check_self_contained(render_page(OWN.subset([]), Measured())).named("img") == []


def test_an_analysis_has_a_page_of_its_own(tmp_path):
    """As of a model of sgatlin layers without domains."""
    values = ANALYSIS.to_dict() | {"base": HOSTILE}
    (tmp_path / "analysis.json").write_text(json.dumps(values))
    out = tmp_path / "page.html"
    run_well("report", "--html", out, "--analysis", tmp_path / "analysis.json")
    text = out.read_text(encoding="utf-8")
    page = _check_self_contained(text)
    shown = [tuple(map(tuple, table)) for table in page.tables]
    for section in ANALYSIS.sections():
        assert (tuple(section.header), *map(tuple, section.rows)) in shown
    assert len(page.named("img")) == 5
    assert HOSTILE.rpartition("/")[2] in "".join(page.text)
    assert "Not measured here" not in text


def test_a_page_of_nothing_is_refused(tmp_path):
    out = tmp_path / "page.html"
    assert_error(run("report", "--html", out), "--analysis")
    with pytest.raises(sp.PathwaysError, match=r"analysis \(--analysis\)"):
        sp.write_html_report(None, out, analysis=ANALYSIS, benchmark=REPORT)
    assert not out.exists()


def test_whatever_an_artefact_says_stays_text():
    made = {"method": HOSTILE, HOSTILE: HOSTILE, "text": {"source": HOSTILE, "digests": ["abc"]}}
    by_domain = {"law": Pathway(blocks=OWN["law"].blocks, provenance=made)}
    own = replace(OWN, by_domain=by_domain, base=replace(OWN.base, name=HOSTILE, revision=HOSTILE))
    report = _evaluation(own, _quality(("law",)))
    rows = tuple(replace(row, domain=HOSTILE) for row in report.rows)
    measured = Measured(evaluation=replace(report, rows=rows, base=HOSTILE))
    page = _check_self_contained(render_page(own, measured))
    assert "".join(page.text).count(HOSTILE) > 5
    assert "abc" not in "".join(page.text)


def test_reports_of_other_pathways_are_refused():
    fewer = tuple(
        replace(row, sparsity=0.9) if row.pathway == "law" else row for row in _evaluation().rows
    )
    others = (
        Measured(evaluation=replace(_evaluation(), rows=fewer)),
        Measured(evaluation=_evaluation(pathways(("code", "math")), _quality(("code", "math")))),
        Measured(benchmark=REPORT),
        Measured(benchmark=replace(REPORT, arms=REPORT.arms[:3])),
        Measured(analysis=replace(ANALYSIS, blocks=("other",))),
    )
    for measured in others:
        with pytest.raises(MismatchError, match="is of"):
            render_page(OWN, measured, plots=False)
    several = _several(sets={"before": (0.5, 3.0), "now": (0.3, 1.0)})
    rows = (
        replace(row, sparsity=OWN.sparsity(row.pathway))
        if (row.role, row.set) == ("pathway", "now")
        else row
        for row in several.rows
    )
    assert render_page(OWN, Measured(evaluation=replace(several, rows=tuple(rows))), plots=False)


def _write_reports(places, folder):
    (folder / "evaluation.json").write_text(
        json.dumps(json.loads(run_well("evaluate", places.built, *places.texts, "--json")))
    )
    return ("--evaluation", folder / "evaluation.json")


def test_the_command_writes_a_page_and_leaves_an_earlier_one(places, tmp_path):
    reports, page = _write_reports(places, tmp_path), tmp_path / "deep" / "page.html"
    run_well("report", places.built, "--html", page, *reports)
    _check_self_contained(page.read_text(encoding="utf-8"))
    before = content(tmp_path)
    assert_error(run("report", places.built, "--html", page), "--overwrite")
    assert content(tmp_path) == before
    run_well("report", places.built, "--html", page, "--overwrite", "--no-plots")
    again = page.read_text(encoding="utf-8")
    assert "Without pictures" in again
    assert "<img" not in again
    assert list(page.parent.iterdir()) == [page]


def test_without_matplotlib_the_page_has_tables_alone(places, tmp_path, monkeypatch):
    def missing():
        raise sp.PathwaysError("Plots need matplotlib.")

    monkeypatch.setattr(plotting, "load_plots", missing)
    ran = run("report", places.built, "--html", tmp_path / "page.html")
    assert ran.status == 0
    assert "Written without pictures" in ran.err
    assert "<table" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_said(places, tmp_path):
    (tmp_path / "file").write_text("mine")
    ran = run("report", places.built, "--no-plots", "--html", tmp_path / "file" / "page.html")
    assert_error(ran, "page.html cannot be written", "--html")


def test_a_file_that_is_no_report_writes_nothing(places, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    for option in ("--evaluation", "--benchmark", "--analysis"):
        ran = run(
            "report", places.built, "--html", tmp_path / "x.html", option, tmp_path / "other.json"
        )
        assert ran.status == 1
        assert_error(ran, "no report of" if option != "--analysis" else "format None")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
