"""What a notebook shows of pathways, profiles and reports: well-formed tables, text as text."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.healing.report import HealingReport
from hf_sparse_pathways.measure.comparison_report import ComparisonReport, ComparisonRow
from hf_sparse_pathways.measure.scale import ComparedModel, compare_models
from hf_sparse_pathways.pathways.pathway import Pathway
from hf_sparse_pathways.tables import Table, as_html
from tests.architectures import build, compensate, random_masks
from tests.discovery.profiles import random_profile
from tests.hub.cards import evaluation, pathways
from tests.measure.speed.reports import REPORT
from tests.measure.test_plots import _analysis

HOSTILE = "<script>alert('x')</script>|`&amp;"
VOID = {"br", "meta", "img"}


class Page(HTMLParser):
    """Reads HTML, and checks that whatever is opened is closed in turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def _comparison(base=""):
    rows = [
        ComparisonRow(method=method, sparsity=0.3, quality=replace(row, ratio=ratio))
        for row in evaluation().rows[:1]
        for method, ratio in (("dense", 1.0), ("pathway", 1.2), ("wanda", 1.4))
    ]
    return ComparisonReport(base=base, rows=tuple(rows))


def _healing(**changes):
    values = {
        "domain": "code",
        "settings": sp.HealingSettings(),
        "source": "text",
        "tokens": 4096,
        "passes": 1,
        "seconds": 3.0,
        "validation_tokens": 512,
        "dense": 1.0,
        "before": 2.0,
        "healed": 1.5,
        "tuned": 0.5,
        "curve": (),
        "dense_curve": (),
    }
    return HealingReport(**{**values, **changes})


def _scale():
    model = ComparedModel.from_dict(_analysis().to_dict())
    return compare_models([model, replace(model, name="m", parameters=10**9)])


def _healed():
    reports = {"code": _healing(), "law": _healing(domain="law")}
    return sp.Healed(pathways=pathways(), adapters={}, reports=reports)


SHOWN = {
    "pathways": pathways,
    "profile": lambda: random_profile(build("llama")),
    "quality": evaluation,
    "comparison": _comparison,
    "benchmark": lambda: REPORT,
    "analysis": _analysis,
    "scale": _scale,
    "healing": _healing,
    "healed": _healed,
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_tables(name):
    thing = SHOWN[name]()
    page = Page(thing._repr_html_())
    sections = list(thing.sections())
    assert len(page.tables) == len(sections) > 0
    for table, section in zip(page.tables, sections, strict=True):
        assert table == [list(section.header), *map(list, section.rows)]
        assert len({len(row) for row in table}) == 1
    assert {attrs["scope"] for attrs in page.named("th")} == {"col", "row"}


def test_hostile_names_stay_text():
    own = replace(pathways(), base=replace(pathways().base, name=HOSTILE))
    made = {"method": HOSTILE, "text": {"source": HOSTILE, "tokens": HOSTILE}}
    by_domain = {"law": Pathway(blocks=own["law"].blocks, provenance=made)}
    profile = random_profile(build("llama"))
    profile = replace(profile, base=own.base, by_domain={HOSTILE: profile["code"]})
    rows = tuple(replace(row, domain=HOSTILE, pathway=HOSTILE) for row in evaluation().rows)
    hostile = (
        replace(own, by_domain=by_domain),
        profile,
        replace(evaluation(), rows=rows),
        _healing(domain=HOSTILE),
        replace(REPORT, copies=(replace(REPORT.copies[0], pathway=HOSTILE),)),
    )
    for thing in hostile:
        page = Page(thing._repr_html_())
        assert page.named("script") == []
        assert HOSTILE in "".join(page.text)


def test_figures_stand_on_the_right_and_text_on_the_left():
    rows = [["a", "9.17e+03 (6.44e+03-1.63e+04)", "a context that is longer than figures"]]
    html = Table(title="t", note="", header=["x", "y", "z"], rows=rows).to_html()
    page = Page(html)
    sides = [attrs["style"].split(";")[0] for attrs in (*page.named("th"), *page.named("td"))]
    left, right = "text-align:left", "text-align:right"
    assert sides == [left, right, left, left, right, left]


def test_a_note_has_code_and_is_text_otherwise():
    html = Table(title=HOSTILE, note="see `a<b` and <b>", header=["x"], rows=[["1"]]).to_html()
    page = Page(html)
    assert len(page.named("code")) == 1
    assert page.named("b") == page.named("script") == []
    assert as_html("see `a<b`.") == "see <code>a&lt;b</code>."
    assert page.named("div")[0]["aria-label"] == HOSTILE


def test_compensation_is_told_by_what_there_is():
    dense = build("llama")
    masks = random_masks(dense)
    row = sp.Pathways.from_masks(dense, masks).sections()[0].rows[0]
    assert row[4:6] == ["none", "given masks"]
    assert "refit" in compensate(dense, masks).sections()[0].rows[0][4]


def test_controls_are_told_from_domains():
    own = pathways()
    own = own.with_controls({"pooled": own["law"]})
    names = [row[0] for row in own.sections()[0].rows]
    assert names == ["code", "law", "pooled (control)"]
    odd = replace(own, by_domain={"law": Pathway(blocks=own["law"].blocks, provenance={"text": 5})})
    assert odd.sections()[0].rows[0][-1] == "-"
