"""What a report wrote as JSON is that report again, and nothing else is."""

import json

import pytest

from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.measure.analysis import Analysis
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.measure.speed.report import BenchmarkReport
from tests.hub.cards import evaluation
from tests.measure.speed.reports import REPORT
from tests.measure.test_plots import _analysis

REPORTS = [evaluation(), REPORT, _analysis()]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_report_is_read_back(report):
    values = json.loads(json.dumps(report.to_dict()))
    again = type(report).from_dict(values)
    assert again == report
    assert json.dumps(again.to_dict()) == json.dumps(report.to_dict())
    assert [table.rows for table in again.sections()] == [table.rows for table in report.sections()]


def _changed(report, **changes):
    return {**json.loads(json.dumps(report.to_dict())), **changes}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (QualityReport, {}),
        (QualityReport, _changed(REPORTS[0], rows=[{}])),
        (QualityReport, _changed(REPORTS[0], base=None)),
        (BenchmarkReport, _changed(REPORTS[0])),
        (BenchmarkReport, _changed(REPORT, threads="one")),
        (BenchmarkReport, _changed(REPORT, weights=True)),
        (BenchmarkReport, _changed(REPORT, copies="none")),
        (BenchmarkReport, _changed(REPORT, unavailable={"sliced": 5})),
        (Analysis, _changed(REPORTS[2], blocks=[1])),
        (Analysis, _changed(REPORTS[2], format=99)),
    ],
)
def test_what_is_no_such_report_is_refused(kind, values):
    with pytest.raises(ArtefactError, match=r"no report of an?|format 99"):
        kind.from_dict(values)
